"""What ``quantspec bench scale`` takes, and what models and heads of a shape cost. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantspec.benchmarks.shapes import SHAPES, ModelShape, parse_shape
from quantspec.errors import UsageError

INTERMEDIATES = {
    "1b": ModelShape(512, 2048, 12, 8, 8, 64, 128256),
    "8b": ModelShape(2048, 8192, 7, 32, 8, 64, 128256),
    "70b": SHAPES["8b"],
}
"""Of about an eighth of the bytes that a step of the target reads, as Llama 3.1 8B beside the 70B."""
MODELS = ("target", "intermediate")
HEADS = {
    "eagle-target": "target",
    "eagle-intermediate": "intermediate",
    "eagle3-target": "target",
    "peagle-target": "target",
    "medusa-target": "target",
}
"""Of the family, and the model that each drafts for."""
MEMBERS = (*MODELS, *HEADS)
SHARE = 8.5
"""A head reads about so many times fewer bytes than its target."""
GROUP = 128


def folder_name(member: str, bits: int) -> str:
    """Of a member whose weights have so many bits."""
    return member if bits == 16 else f"{member}-w{bits}"


@dataclass(frozen=True)
class ScaleBench:
    """What ``quantspec bench scale`` writes."""

    out: Path
    """New folder for the family's models and heads."""
    shape: str = "1b"
    """Of the target: 1b, 8b, 70b, and KEY=NUMBER, as in 1b,layers=4."""
    intermediate_shape: str | None = None
    """Of the intermediate, in the same words. Default: an eighth of the target's bytes."""
    bits: int = 4
    """4: the packed target and intermediate; 8: rounded to 8 bits; 16: bfloat16, for transformers."""
    dequantized: bool = False
    """With --bits 16: models with the values of the 4-bit ones, not of those that these were made from."""
    source: Path | None = None
    """A family of small models, as `quantspec train family` writes it. Default: the one that ships."""
    only: tuple[str, ...] = ()
    """Members of the family to write. Default: all that there are for these bits."""
    seed: int = 0
    """Of the random content."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16):
            raise UsageError(f"--bits must be 4, 8 or 16, not {self.bits}")
        if self.dequantized and self.bits != 16:
            raise UsageError("--dequantized goes with --bits 16", hint="leave it out")
        unknown = [name for name in self.only if name not in MEMBERS]
        if unknown:
            raise UsageError(f"the family has no {unknown[0]!r}", hint=f"it has {', '.join(MEMBERS)}")
        self.shapes()

    def shapes(self) -> tuple[ModelShape, ModelShape]:
        """Of the target and of the intermediate. Raises ``UsageError``."""
        target, name = parse_shape(self.shape), self.shape.split(",")[0].strip().lower()
        if self.intermediate_shape is not None:
            small = parse_shape(self.intermediate_shape)
        elif self.shape.strip().lower() in INTERMEDIATES:
            small = INTERMEDIATES[name]
        else:
            hint = "add --intermediate-shape, such as 1b,hidden=512,inner=2048,layers=12,heads=8"
            raise UsageError(f"there is no intermediate for the shape {self.shape!r}", hint=hint)
        if small.vocab != target.vocab:
            raise UsageError(f"target and intermediate have {target.vocab} and {small.vocab} tokens", hint="as many")
        return target, small


def linear_bytes(rows: int, cols: int, bits: int) -> float:
    """Of a weight in groups of ``GROUP`` with scales of 2 bytes, or in 16 bits."""
    return rows * cols * (2.0 if bits == 16 else bits / 8 + 2 / GROUP)


def model_bytes(shape: ModelShape, bits: int) -> float:
    """That a decode step reads: layers of so many bits, and an LM head of 8 (of 16 where the layers have 16)."""
    layers = linear_bytes(shape.layers * shape.layer_weights, 1, bits)
    return layers + linear_bytes(shape.vocab, shape.hidden, max(bits, 8))


def eagle_bytes(shape: ModelShape, bits: int, layers: int = 1, streams: int = 0) -> float:
    """Of a head's layers without its LM head: EAGLE-1/2, or EAGLE-3 and P-EAGLE on so many ``streams``."""
    attention = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    fused = shape.hidden * (streams or 2) * shape.hidden
    wider = shape.hidden * attention if streams else 0
    return linear_bytes(layers * shape.layer_weights + fused + wider, 1, bits)


def lm_rows(shape: ModelShape, budget: float, heads: int, bits: int, used: int, vocab: int) -> int:
    """Rows of ``heads`` LM heads in ``budget`` bytes: a multiple of ``GROUP``, and more than the ``used`` ones of the
    small head, whose model has ``vocab`` tokens; at most those and all that the large model has besides."""
    rows = int(budget / heads / linear_bytes(1, shape.hidden, bits)) // GROUP * GROUP
    return min(shape.vocab - vocab + used, max(rows, -(-used // GROUP) * GROUP + GROUP))
