"""Why a drafter may never be right: what its files and its target's say, most certain first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from quantspec.errors import QuantSpecError
from quantspec.models.config import ModelConfig, Rope
from quantspec.models.fingerprint import fingerprint
from quantspec.models.tensors import checkpoint_files
from quantspec.types import Tap

if TYPE_CHECKING:
    from quantspec.core.drafter import Drafter
    from quantspec.models.base import CausalModel
    from quantspec.models.tokenizer import Tokenizer

_MOST_BYTES = 4 << 30  # of weights that are summed up to know them again
_PROBED = 192  # tokens of the text on which other layers are tried
_CLEAR = 0.1  # how much more often right other layers must be


@dataclass(frozen=True, slots=True)
class Subject:
    """A drafter, and the model below which it drafts, with that model's tokenizer: the target's, or inside a cascade
    its intermediate's."""

    drafter: Drafter
    model: CausalModel
    tokenizer: Tokenizer | None


@runtime_checkable
class TappedDrafter(Protocol):
    """A drafter that reads chosen layers of its target, and can be tried on others."""

    @property
    def taps(self) -> tuple[Tap, ...]: ...

    def neighbours(self) -> list[tuple[Tap, ...]]:
        """The layers that other ways of counting would name."""
        ...

    def rate(self, tokens: Sequence[int], taps: tuple[Tap, ...]) -> float:
        """The share of ``tokens`` that its best token foretells where it reads ``taps``."""
        ...


def causes(subject: Subject, tokens: Sequence[int], prompt: Sequence[int]) -> list[str]:
    """What is found, then what cannot be ruled out, for the drafter on the text ``tokens``."""
    drafter, model = subject.drafter, subject.model
    config, base = getattr(drafter, "config", None), getattr(model, "config", None)
    found, possible = list[str](), list[str]()
    if isinstance(drafter, TappedDrafter):
        found += _layers(drafter, tokens)
    shape = getattr(config, "model", None)
    if isinstance(shape, ModelConfig) and isinstance(base, ModelConfig) and shape.rope != base.rope:
        found.append(f"its rope parameters ({_rope(shape.rope)}) differ from the target's ({_rope(base.rope)})")
    trained_on, own = getattr(config, "base", None), _own(subject)
    known = trained_on is not None and trained_on == own
    if trained_on is not None and own is not None and not known:
        found.append("it was trained on other weights than this target's: another model, or another quantization of it")
    if _untemplated(subject, prompt):
        found.append("the prompt is not in the target's chat template")
    quantized = isinstance(base, ModelConfig) and base.quantization is not None
    if not known and getattr(model, "rotation", None) is not None:
        possible.append("the target is rotated, and it was trained on the rotated weights without saying so")
    if not known and not found and quantized:
        possible.append("it was trained on another quantization of the target, or before it was quantized")
    if isinstance(drafter, TappedDrafter) and not known and not found:
        possible.append(f"the layers it reads the target after, {_list(drafter.taps)} from 0, are not those it learned")
    if not found:
        possible.append("the text is unlike what it learned from, or written in another chat template")
    return found + possible


def _rope(rope: Rope) -> str:
    more = "" if rope.kind == "default" else f", {rope.kind} {rope.params}"
    return f"theta {rope.theta:g}{more}"


def _list(taps: Sequence[Any]) -> str:
    return ", ".join(str(tap) for tap in taps)


def _layers(drafter: TappedDrafter, tokens: Sequence[int]) -> list[str]:
    """Whether it would be right more often on the layers next to its own, as if its ids were counted otherwise."""
    text = list(tokens)[-_PROBED:]
    own = drafter.taps
    if len(text) < 8:
        return []
    rates = {taps: drafter.rate(text, taps) for taps in dict.fromkeys((own, *drafter.neighbours()))}
    best = max(rates, key=rates.__getitem__)
    if rates[best] < rates[own] + _CLEAR:
        return []
    return [
        f"it reads the target after layers {_list(own)} (from 0): after {_list(best)} it is right on "
        f"{rates[best]:.0%} of this text's tokens, not {rates[own]:.0%}"
    ]


def _own(subject: Subject) -> str | None:
    """The model's fingerprint, if it is quick to know."""
    try:
        folder = None if subject.tokenizer is None else subject.tokenizer.folder
        if folder is None or sum(path.stat().st_size for path in checkpoint_files(folder)) > _MOST_BYTES:
            return None
        return fingerprint(folder)
    except (QuantSpecError, OSError):
        return None


def _untemplated(subject: Subject, prompt: Sequence[int]) -> bool:
    """Whether the model has a chat template that leaves a mark on every prompt, and this prompt has none."""
    tokenizer = subject.tokenizer
    try:
        if tokenizer is None or tokenizer.chat_template is None:
            return False
        plain = set(tokenizer.encode("x"))
        asked = tokenizer.chat([{"role": "user", "content": "x"}])
        marks = set(tokenizer.encode(asked, add_special=False)) - plain
    except QuantSpecError:
        return False
    return bool(marks) and len(marks & set(prompt)) < len(marks) / 2
