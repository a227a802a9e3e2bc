"""Options of every training recipe: plain dataclasses, no torch at import."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Precision = Literal["auto", "bf16", "fp32"]
LossName = Literal["ce", "kl", "reverse-kl", "tv", "lk"]
"""See `losses`."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama decoder. All widths are multiples of 128, so that W4 groups of 128 fit."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    head_dim: int = 64
    max_positions: int = 4096
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5


@dataclass(frozen=True)
class FamilyShape:
    """A target and the intermediate that verifies its drafts first, about an eighth of its size."""

    target: Shape
    intermediate: Shape


PRESETS: dict[str, FamilyShape] = {
    # 6.6M + 0.85M parameters at 4096 tokens of vocabulary: two hours on two CPU cores.
    "cpu": FamilyShape(Shape(256, 7, 4, 2, 768), Shape(128, 2, 2, 2, 256)),
    # 14.7M + 1.9M: minutes on one GPU.
    "gpu": FamilyShape(Shape(512, 4, 8, 4, 1536), Shape(128, 4, 2, 2, 512)),
}


@dataclass(frozen=True)
class Source:
    """One body of text: `path` is a .jsonl or text file or a folder of .py files; `weight` its share of the rows."""

    path: str
    weight: float
    held_out: int = 0
    """Documents at the end of the file that no stage trains on; 0 means 5% of them."""


@dataclass(frozen=True)
class Optim:
    """Schedule and optimizer: Muon for hidden matrices, AdamW for embeddings, norms and biases."""

    steps: int = 0
    """Steps to run; 0 means: as many as `minutes` allow."""
    minutes: float = 0.0
    """Wall-clock budget of the recipe, over all its resumed runs; the learning rate reaches zero at its end."""
    lr: float = 3e-3
    muon_lr: float = 0.02
    warmup: float = 0.03
    weight_decay: float = 0.01
    clip: float = 1.0
    batch: int = 8
    accumulate: int = 1
    """Batches whose gradients are added up for a step."""
    seq_len: int = 512
    seed: int = 0


@dataclass(frozen=True)
class RunOptions:
    """What every recipe has in common."""

    device: str = "cpu"
    threads: int = 2
    processes: int = 1
    """CPU processes of one thread each that share every batch; better than threads on a busy machine."""
    precision: Precision = "auto"
    """Of matrix products in training: bf16 by autocast, or fp32. auto: bf16 on a GPU."""
    shard: bool = False
    """Spread the frozen base over the processes (FSDP) where it does not fit one device; see torchrun."""
    compile: bool = False
    log_every: int = 20
    eval_every: int = 200
    save_every: int = 100


@dataclass(frozen=True)
class CorpusConfig:
    """Train the tokenizer and turn the sources into token ids."""

    sources: tuple[Source, ...]
    out: Path
    vocab_size: int = 4096


@dataclass(frozen=True)
class LMConfig:
    """Pretrain a decoder from scratch on a built corpus."""

    corpus: Path
    out: Path
    shape: Shape
    optim: Optim = field(default_factory=lambda: Optim(minutes=50.0))
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class RolloutConfig:
    """Let a (quantized) model write text from training prompts."""

    model: Path
    corpus: Path | None
    out: Path
    """Folder to write."""
    prompts: Path | None = None
    """Prompts rather than a corpus: conversations, questions, instructions or texts, in JSONL, JSON, text or on the
    hub."""
    prompt_column: str | None = None
    """What to read of each row of the prompts. None: the usual names."""
    tokens: int = 1_500_000
    texts: int = 0
    """Take this many prompts and finish them all; 0: go on until `tokens` or `minutes` are reached, or all prompts of a
    file were answered once at each temperature."""
    minutes: float = 0.0
    """Stop after this time even if `tokens` are not reached; 0: no limit."""
    slots: int = 96
    max_len: int = 256
    temperatures: tuple[float, ...] = (0.0, 0.8, 1.0)
    weights: tuple[float, ...] = ()
    """Share of prompts per source of the corpus; empty: the corpus weights."""
    held_out: bool = False
    """Prompts from held-out documents (of --prompts, every twentieth), for measuring."""
    seed: int = 0
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class DistillConfig:
    """Teach an intermediate to say what the quantized target says."""

    student: Path
    teacher: Path
    rollouts: Path
    out: Path
    held_out: Path | None = None
    """Rollouts of held-out prompts, to measure agreement on."""
    prompt_weight: float = 0.25
    """Weight of rows inside the prompt beside rows of generated text."""
    ce_weight: float = 0.1
    bits: int = 4
    """Width that the student will be rounded to; its rounding is part of the last half of the training. 0: never."""
    group_size: int = 128
    quantize_from: float = 0.5
    """Progress from which the rounded weights are trained (straight-through)."""
    optim: Optim = field(default_factory=lambda: Optim(minutes=20.0, batch=16, muon_lr=0.01))
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class DrafterConfig:
    """What the training of every drafter asks: a (quantized) model `base`, text that it wrote, and where to write."""

    base: Path
    rollouts: Path
    out: Path
    held_out: Path | None = None
    """Rollouts of held-out prompts, to fit tau on and to measure acceptance."""
    features: Path | None = None
    """Folder to keep the base's streams in, computed once; without it they are computed batch by batch."""
    fp8: bool = False
    """Keep them in 8 bits a value rather than 16."""
    loss: LossName = "ce"
    """Between the base's distributions and the drafter's: cross-entropy, KL divergence, its reverse, total variation,
    or LK, which goes from KL to total variation as they come closer."""
    mlp: int = 0
    """Width of the drafter's MLP; 0: that of the base's layers."""
    heads: int = 0
    """Attention heads of the drafter, with key-value heads in the base's proportion; 0: as many as the base's."""
    unroll: int = 3
    """Draft steps that training simulates: step j reads what step j - 1 put out."""
    unroll_from: float = 0.4
    """Progress from which more than one step is trained."""
    step_decay: float = 0.8
    """Weight of each further draft step in the loss."""
    bits: int = 0
    """Width that `quantspec quantize --method rtn` will round all its linear layers to; their rounding is part of the
    last part of the training. 0: never."""
    group_size: int = 128
    """Inputs of a linear layer that will share a scale."""
    quantize_from: float = 0.75
    """Progress from which the rounded weights are trained (straight-through)."""
    optim: Optim = field(default_factory=lambda: Optim(minutes=15.0, batch=12))
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class EagleConfig(DrafterConfig):
    """Train an EAGLE-1/2 head; more than one step is HASS's alignment."""

    ce_weight: float = 1.0
    """Weight of the loss on distributions."""
    feature_weight: float = 1.0
    """Weight of the distance to the base's features."""
    noise: float = 0.1
    """Half-width of the uniform noise on input features, in units of their root mean square."""
    start: Path | None = None
    """An EAGLE-1/2 head of the same shape to start from."""


@dataclass(frozen=True)
class Eagle3Config(DrafterConfig):
    """Train an EAGLE-3 head by training-time test."""

    unroll: int = 5
    """Draft steps of the training-time test."""
    unroll_from: float = 0.2
    """Progress from which more than one step is trained."""
    layers: int = 1
    """Decoder layers of the head; published ones have one."""
    draft_vocab_size: int = 0
    """Tokens that the head can draft: the commonest of the rollouts' answers; 0: all."""
    keep_lm_head: bool = False
    """The LM head stays the base's own rows, as an EAGLE-2 head's does: what is trained lies elsewhere."""
    feature_weight: float = 0.0
    """Weight of SmoothL1 between the head's outputs and the base's own features, as an EAGLE-2 head learns: short
    trainings learn more from it."""
    feature_until: float = 1.0
    """Progress from which that weight is 0, and tokens alone are learned."""
    layer_ids: tuple[int, ...] = ()
    """Layers after which the base is tapped, from 0; empty: 1, half, and three before the last."""
    fc_norm: bool = False
    """A norm on each tapped stream before they are fused (EAGLE-3.1)."""
    norm_output: bool = False
    """Each draft step hands on its output after the final norm rather than before (EAGLE-3.1)."""
    norm_before_fc: bool = False
    """One norm on all tapped streams together."""
    norm_before_residual: bool = False
    """The residual stream starts from the normed input."""
    start: Path | None = None
    """A head on the same layers and draft vocabulary to start from: EAGLE-3, or for P-EAGLE either."""


@dataclass(frozen=True)
class PEagleConfig(Eagle3Config):
    """Train a P-EAGLE head, whose tokens of a draft all come from one forward."""

    layers: int = 4
    """Decoder layers of the head."""
    depths: int = 8
    """Tokens of a draft that are learned; one that drafts fewer gains from having learned more."""
    keep: float = 0.8
    """Share of the slots of each depth that the next one keeps."""
    keep_least: float = 0.2
    """Share of all slots that every depth keeps at least."""
    path_rank: int = 0
    """Rank of what corrects a slot's logits by the token drafted before it, once all slots are there; 0: nothing does,
    as in the paper."""
    partitions: int = 1
    """Parts that texts are learned in, one after the other: more take less memory, and the gradient is the same."""


@dataclass(frozen=True)
class MedusaConfig(DrafterConfig):
    """Train Medusa heads, which guess side by side from one feature of the base."""

    medusa_num_heads: int = 4
    """Tokens of a draft, a head for each."""
    medusa_num_layers: int = 1
    """Residual layers of a head."""
    draft_vocab_size: int = 0
    """Tokens that the heads can draft: the commonest of the rollouts' answers; 0: all."""


@dataclass(frozen=True)
class ScaleConfig(Eagle3Config):
    """Train a grid of EAGLE-3 heads, fit how their acceptance grows, and say which one to train."""

    grid_tokens: tuple[int, ...] = (50_000, 100_000, 200_000, 400_000)
    """Amounts of training data of the grid, in tokens (repeat it)."""
    grid_layers: tuple[int, ...] = (1, 2, 4)
    """Depths of the grid, in decoder layers (repeat it)."""
    budget_tokens: int = 0
    """Training data that there is for the drafter to be chosen; 0: the most that was measured."""
    budget_parameters: int = 0
    """Parameters that it may have; 0: the most that were measured."""
    budget_draft_ms: float = 0.0
    """Milliseconds that a draft may take; 0: no bound."""


@dataclass(frozen=True)
class FamilyConfig:
    """Make a whole family: tokenizer, target, intermediate, their W4 copies and an EAGLE head on each W4 copy."""

    sources: tuple[Source, ...]
    work: Path
    """Folder for states, logs and rollouts; a second call skips what is finished there."""
    out: Path
    """Folder for the finished family."""
    preset: str = "cpu"
    vocab_size: int = 4096
    target_minutes: float = 60.0
    intermediate_minutes: float = 10.0
    rollout_tokens: int = 1_500_000
    rollout_minutes: float = 15.0
    rollout_weights: tuple[float, ...] = ()
    """Share of the prompts per source; empty: as in the corpus."""
    distill_minutes: float = 20.0
    eagle_minutes: float = 15.0
    """For the head on the target; the head on the intermediate gets half of it."""
    seed: int = 0
    run: RunOptions = field(default_factory=lambda: RunOptions(processes=2))
