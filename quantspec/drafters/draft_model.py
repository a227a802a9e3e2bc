"""An independent draft model: a cascade with nothing below it, whose rounds are plain steps of the small model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quantspec.core.drafter import NoDrafter
from quantspec.core.verify import Verifier
from quantspec.drafters.cascade import Cascade
from quantspec.drafters.config import CascadeOptions

if TYPE_CHECKING:
    from quantspec.models.base import CausalModel
    from quantspec.models.tokenizer import Tokenizer


def draft_model(
    model: CausalModel,
    tokenizer: Tokenizer | None = None,
    num_speculative_tokens: int = 5,
    taus: Mapping[float, float] | None = None,
) -> Cascade:
    """A drafter that proposes ``num_speculative_tokens`` tokens of ``model`` at a time; ``taus`` see ``Cascade``."""
    options = CascadeOptions(min_draft=num_speculative_tokens)
    drafter = Cascade(NoDrafter(), Verifier(model, stage="draft"), options, tokenizer=tokenizer, taus=taus)
    drafter.name = "draft"
    return drafter
