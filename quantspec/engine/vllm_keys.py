"""Keys of vLLM's ``speculative_config`` that speak of vLLM's own machinery: taken where they change nothing here, and
said; refused, with what to do instead, where leaving them out would change what was asked for. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quantspec.errors import UsageError

_ONE_DEVICE = "a drafter runs where its target does, on one device"
_KERNELS = "kernels are chosen by quantspec itself (quantspec doctor)"
_LATER = "how drafts are batched is quantspec's own affair"
_FILES = "what a drafter is stored in is read from its files"

_WITHOUT_EFFECT: dict[str, str] = {
    "draft_tensor_parallel_size": _ONE_DEVICE,
    "tensor_parallel_size": _ONE_DEVICE,
    "enforce_eager": _KERNELS,
    "attention_backend": _KERNELS,
    "moe_backend": _KERNELS,
    "use_local_argmax_reduction": _KERNELS,
    "draft_sample_method": "drafters draw with the target's own noise",
    "draft_load_config": _FILES,
    "disable_padded_drafter_batch": _LATER,
    "disable_mqa_scorer": _LATER,
    "disable_by_batch_size": "no batch is too large for drafts here: --method none turns them off",
    "disable_logprobs": "log-probabilities are the target's, and only asked for with --logprobs",
    "max_model_len": "a drafter reads what its target reads (--max-context bounds both)",
}
"""Key to the reason, for the user."""

_STORED = ("gptq", "gptq_marlin", "awq", "awq_marlin", "compressed-tensors", "gguf", "bitsandbytes")
"""Values of ``quantization`` that name what is in the drafter's files."""

_STANDARD = {
    "rejection_sample_method": ("standard", "strict"),
    "acceptance_method": ("rejection_sampler",),
}
"""Keys that choose how drafts are accepted, and the values by which the text stays the target's, as it does here."""

_REFUSED: dict[str, str] = {
    "revision": "download that revision, and name its folder as the model",
    "code_revision": "no code of a model's own is run: leave it out",
    "speculative_token_tree": "trees grow by themselves: tree_depth, tree_top_k and num_speculative_tokens bound them",
    "num_speculative_tokens_per_batch_size": "give one num_speculative_tokens, or tune the model: quantspec tune",
    "use_heterogeneous_vocab": "a draft model must share its target's tokenizer here",
    "draft_lm_head_quantization": "quantize the head's folder: quantspec quantize",
    "kv_cache_dtype": "a drafter's keys and values stay as they are; --kv-cache-dtype is the target's",
    "posterior_threshold": "typical acceptance changes the text: leave it out",
    "posterior_alpha": "typical acceptance changes the text: leave it out",
    "synthetic_acceptance_rates": "made-up acceptance gives made-up text: leave it out",
    "synthetic_acceptance_length": "made-up acceptance gives made-up text: leave it out",
}
"""Key to the hint."""


def without_engine_keys(speculative: Mapping[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """The keys that are left. ``tell`` gets one line for each that has no effect; vLLM's null stands for a key that is
    not there. Raises ``UsageError`` for one that would have had another."""
    left: dict[str, Any] = {}
    for key, value in speculative.items():
        known = key in _WITHOUT_EFFECT or key in _STANDARD or key in _REFUSED or key == "quantization"
        if not known:
            left[key] = value
        elif value is not None:
            tell(f"speculative_config key {key} has no effect: {_reason(key, value)}")
    return left


def _reason(key: str, value: Any) -> str:
    """Why a key has no effect. Raises ``UsageError``: it should have one."""
    if key in _WITHOUT_EFFECT:
        return _WITHOUT_EFFECT[key]
    hint = _REFUSED.get(key)
    if key == "quantization":
        if value in _STORED:
            return _FILES
        hint = "leave it out: a drafter's files say what it is, and quantspec quantize makes 4-bit ones"
    elif key in _STANDARD:
        if value in _STANDARD[key]:
            return "drafts are accepted where they are the target's own tokens"
        hint = "leave it out: drafts are accepted so that the text is the target's (rule: exact or ratio)"
    raise UsageError(f"speculative_config key {key} ({value!r}) is not supported", hint=hint)
