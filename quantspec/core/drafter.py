"""The drafter protocol: everything that proposes tokens, a cascade included, and the immutable view it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain, WarpState
from quantspec.types import EMPTY_DRAFT, Budget, Draft, Needs, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from quantspec.models.base import CausalModel
    from quantspec.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TargetParts:
    """What a drafter may use of its target, read-only: the model (embedding, final norm and head are its attributes)
    and the tokenizer (None in tests)."""

    model: CausalModel
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True, slots=True)
class View:
    """One session as a drafter sees it at one step.

    ``remaining`` is how many more tokens the user may get. ``stream`` is None under the ratio rule: drafters then see no
    noise. ``state`` is the warp state after ``tokens``.
    """

    tokens: tuple[int, ...]
    prompt_length: int
    chain: WarpChain
    state: WarpState
    stream: Stream | None
    stop_ids: frozenset[int]
    remaining: int

    def scores(
        self, logits: Tensor, paths: Sequence[Sequence[int]], ids: Tensor | None = None, tau: float = 1.0
    ) -> Tensor:
        """Log of the estimated probability that each token is the target's draw: warp, then keyed noise.

        ``logits [m, W]`` are the drafter's rows, ``paths[i]`` the draft tokens that lead from the last committed token to
        row i, ``ids [W]`` maps a trimmed draft vocabulary to target ids (None: the same). Returns log scores ``[m, W]``:
        ``log_softmax((log q - log E) / tau)`` at temperature > 0 with a stream, ``log_softmax`` of the warped row else.
        """
        raise AssertionError("written by the core")


class Drafter(Protocol):
    """Proposes drafts. All state of one sequence lives in the object that ``open`` returns."""

    needs: Needs
    name: str

    def prepare(self, parts: TargetParts) -> None:
        """Once, before any ``open``: take what is needed of the target; refuse a mismatch with a ``ModelError``."""

    def open(self, view: View) -> Any:
        """State for a new sequence."""

    def propose(self, states: Sequence[Any], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        """One draft per sequence, within its budget. May be empty: that is plain decoding."""

    def observe(self, state: Any, verdict: Verdict) -> None:
        """After every commit, an empty draft's included. ``verdict.taps`` holds what ``needs`` asked for."""

    def truncate(self, state: Any, length: int) -> None:
        """An outer level took back all tokens from ``length`` on."""

    def finalize(self, state: Any, length: int) -> None:
        """Tokens before ``length`` are confirmed by the outermost target and will never be taken back."""

    def close(self, state: Any) -> None:
        """The sequence is over."""

    def describe(self) -> str:
        """One line for people."""


class NoDrafter:
    """Plain decoding: every draft is empty."""

    needs = Needs()
    name = "none"

    def prepare(self, parts: TargetParts) -> None:
        pass

    def open(self, view: View) -> None:
        return None

    def propose(self, states: Sequence[None], views: Sequence[View], budgets: Sequence[Budget]) -> list[Draft]:
        return [EMPTY_DRAFT] * len(states)

    def observe(self, state: None, verdict: Verdict) -> None:
        pass

    def truncate(self, state: None, length: int) -> None:
        pass

    def finalize(self, state: None, length: int) -> None:
        pass

    def close(self, state: None) -> None:
        pass

    def describe(self) -> str:
        return "none (plain decoding)"
