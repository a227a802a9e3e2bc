"""Who is told of a drafter that is hardly ever right, and with what causes: the target's drafter by each request, the
drafter inside a cascade by the cascade's own rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quantspec.core.session import Session
from quantspec.engine.alarm import Alarm
from quantspec.engine.causes import Subject, causes
from quantspec.types import Verdict


def useless(alarm: Alarm, subject: Subject, tokens: Sequence[int], prompt: Sequence[int], where: str = "") -> str:
    """The line for a drafter whose alarm was raised on the text ``tokens``."""
    try:
        why = causes(subject, tokens, prompt)
    except Exception as error:  # of a drafter that is wrong anyway; no text depends on it
        why = [f"not found out ({type(error).__name__}: {error})"]
    return (
        f"drafter {subject.drafter.name}{where} is hardly ever right: {alarm.hits} of its first {alarm.drafts} drafts "
        f"began with a right token, and the text's commonest tokens would have {alarm.chance} times; likely causes: "
        f"{'; '.join(why)}"
    )


class InnerWatch:
    """Sees the rounds inside a cascade, where a useless drafter shows nowhere else: the intermediate stands in."""

    def __init__(self, subject: Subject, tell: Callable[[str], None]) -> None:
        self.alarm, self._subject, self._tell = Alarm(), subject, tell

    def __call__(self, session: Session, before: int, verdict: Verdict) -> None:
        """``verdict`` was made of a draft for the first ``before`` tokens of ``session``."""
        tokens = session.tokens
        if self.alarm.count(tokens[:before], verdict):
            prompt = tokens[: session.prompt_length]
            self._tell(useless(self.alarm, self._subject, tokens, prompt, " inside the cascade"))
