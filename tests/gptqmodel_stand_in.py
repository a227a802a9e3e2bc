"""A gptqmodel package with the interface of version 7 and a product that reads AutoGPTQ's format, on any device.

Loaded by ``tests/conftest.py``; a test says ``from gptqmodel_stand_in import ...``.
"""

import sys
from itertools import pairwise
from types import ModuleType

import torch


class StandIn(torch.nn.Module):
    """The parameters and calls of gptqmodel 7's ``MarlinLinear``; its product is that of AutoGPTQ's format."""

    def __init__(self, bits, group_size, desc_act, sym, in_features, out_features, bias=False,
                 pack_dtype=torch.int32, register_buffers=False, adapter=None, **kwargs):  # fmt: skip
        super().__init__()
        assert (desc_act, sym) == (False, True)
        self.bits, self.ready, self.dtype = bits, False, kwargs["dtype"]
        groups = 1 if group_size == -1 else in_features // group_size

        def empty(*shape, dtype):
            return torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)

        self.qweight = empty(in_features * bits // 32, out_features, dtype=torch.int32)
        self.scales = empty(groups, out_features, dtype=self.dtype)
        self.qzeros = empty(groups, out_features * bits // 32, dtype=torch.int32)
        self.g_idx = empty(in_features, dtype=torch.int32)
        self.bias = None
        if bias:
            del self.bias
            self.register_buffer("bias", torch.zeros(out_features, dtype=self.dtype))

    def post_init(self):
        self.ready = True

    def forward(self, x):
        assert self.ready
        assert x.dtype == self.dtype
        assert (x.stride(1), x.stride(0) % 8, x.data_ptr() % 16) == (1, 0, 0)
        words = self.qweight.long() & 0xFFFFFFFF
        codes = torch.stack([words >> shift & (1 << self.bits) - 1 for shift in range(0, 32, self.bits)], 1)
        codes = codes.reshape(-1, words.shape[1]).double() - (1 << self.bits - 1)
        weight = codes * self.scales.double().repeat_interleave(len(codes) // len(self.scales), 0)
        y = x.double() @ weight
        return (y if self.bias is None else y + self.bias.double()).to(x.dtype)


def install(monkeypatch):
    """Put it in the package's place; returns the module that holds the stand-in."""
    names = ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear", "gptqmodel.nn_modules.qlinear.marlin")
    modules = [ModuleType(name) for name in names]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for parent, module in pairwise(modules):
        setattr(parent, module.__name__.rpartition(".")[2], module)
    modules[-1].MarlinLinear = StandIn
    return modules[-1]
