"""The parts of a foreign decoder, found by shape and then checked: layers to tap, embedding, final norm and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantspec.errors import ModelError
from quantspec.types import Tap


class Parts:
    """Where the parts of ``module`` are. ``norm`` and ``head`` are None where they could not be found or did not
    reproduce the model's own numbers (see ``check``)."""

    def __init__(self, module: Any, config: Any) -> None:
        self.name = type(module).__name__
        outer = module.get_decoder() if hasattr(module, "get_decoder") else module
        self.embedding: Any = module.get_input_embeddings()
        self.decoder, self.layers = _find_layers(outer, config.num_hidden_layers, self.name)
        self.norm: nn.Module | None = None
        self.head: nn.Module | None = module.get_output_embeddings()
        self.dtype: torch.dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._width: int = config.hidden_size
        self._scale = 1.0  # Cohere, Granite and others multiply the logits

    def logits(self, x: Tensor) -> Tensor:
        """fp32 logits of the stream after the final norm."""
        assert self.head is not None
        logits = self.head(x).float() * self._scale
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    @torch.no_grad()
    def check(self, taps: Mapping[Tap, Sequence[Tensor]], logits: Tensor) -> None:
        """Compare norm and head with one plain forward: ``taps`` of its last layer and "norm", and its ``logits``."""
        after_norm, before_norm = taps["norm"][0], taps[len(self.layers) - 1][0]
        for norm in self._norms():
            if _close(norm(before_norm), after_norm):
                self.norm = norm
        if self.head is not None and self._cap is None:
            raw = self.head(after_norm).float()
            scale = float((raw * logits).sum() / raw.square().sum().clamp_min(1e-30))
            self._scale = scale if abs(scale - 1) > 1e-2 else 1.0
        if self.head is not None and not _close(self.logits(after_norm), logits):
            self.head = None

    @contextmanager
    def recording(self, taps: Sequence[Tap]) -> Iterator[dict[Tap, list[Tensor]]]:
        """Collects the rows ``[n, H]`` of each tap, one tensor per forward. Hooks, and not ``output_hidden_states``:
        its last entry is after the final norm, and some families leave out the first."""
        recorded: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
        with ExitStack() as stack:
            for tap in recorded:
                stack.callback(self._hook(tap, recorded[tap].append).remove)
            yield recorded

    def rows(self, recorded: Mapping[Tap, Sequence[Tensor]], tap: Tap) -> Tensor:
        """All rows ``[n, H]`` of a recorded tap."""
        rows = torch.cat(list(recorded[tap]))
        if rows.dim() != 2:
            raise ModelError(f"the layers of {self.name} do not hand on one stream, so a drafter cannot tap it")
        return rows

    def _norms(self) -> Iterator[nn.Module]:
        """Norms of the residual stream beside the layers."""
        for child in self.decoder.children():
            weight = getattr(child, "weight", None)
            if "norm" in type(child).__name__.lower() and weight is not None and weight.shape[-1:] == (self._width,):
                yield child

    def _hook(self, tap: Tap, keep: Callable[[Tensor], None]) -> Any:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            keep((output if isinstance(output, Tensor) else output[0])[0])

        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            keep((inputs[0] if inputs else named["hidden_states"])[0])

        if tap == "embed":
            return self.layers[0].register_forward_pre_hook(before, with_kwargs=True)
        if tap == "norm":
            return self.decoder.register_forward_hook(after)
        assert isinstance(tap, int), f"no tap {tap!r}"
        assert 0 <= tap < len(self.layers), f"no layer {tap}"
        return self.layers[tap].register_forward_hook(after)


def _find_layers(decoder: nn.Module, count: int, name: str) -> tuple[nn.Module, nn.ModuleList]:
    """The outermost list of ``count`` modules, and the module that holds it."""
    for owner in decoder.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return owner, child
    raise ModelError(f"cannot find the layers of {name}")


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    # A part that was found wrongly is off by about 1; half precision alone by about 0.01.
    difference = (ours.float() - theirs.float()).square().mean().sqrt()
    return bool(difference <= 0.03 * theirs.float().square().mean().sqrt() + 1e-6)
