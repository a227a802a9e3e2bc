"""Options of ``quantspec bench paper``. No torch here: the command line reads them for its help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantspec.benchmarks.generate_config import NO_PEERS, GenerateBench
from quantspec.benchmarks.generate_rows import PLAIN
from quantspec.benchmarks.scaled.config import ScaleBench
from quantspec.drafters.config import EagleOptions
from quantspec.errors import UsageError

BITS = {"bf16": 16, "w8": 8, "w4": 4}
"""Of the target's weights, by the names of ``PaperBench.precisions``."""
CPU_TREES, CUDA_TREES = ("2x2", "4x3", "6x4", "8x4", "15x6"), ("12x4", "16x5", "24x6", "32x6", "60x6")
CPU_CASCADES, CUDA_CASCADES = ("3/4x3", "4/4x3", "4/8x4", "6/4x3"), ("6/16x3", "6/30x3", "8/16x4", "12/16x4")
EAGLE2_TOP_K = 10
"""Nodes of a level that are expanded, and children of each, on a GPU. A CPU's trees are small, and take our default."""


@dataclass(frozen=True)
class PaperBench:
    """What ``quantspec bench paper`` measures."""

    out: Path
    """Folder for the report, the logs by which a run that was stopped goes on, and the models, if none are named."""
    shape: str = "1b"
    """Of the target: 1b, 8b, 70b, and KEY=NUMBER, as in 1b,layers=4."""
    intermediate_shape: str | None = None
    """Of the intermediate, in the same words. Default: an eighth of the target's bytes."""
    models: Path | None = None
    """Folder of `quantspec bench scale`; what it lacks is written into it. Default: OUT/models."""
    precisions: tuple[str, ...] = tuple(BITS)
    """Of the target's weights."""
    trees: tuple[str, ...] = ()
    """EAGLE trees to choose the best from, as nodes x levels. Default: some that suit the device."""
    cascades: tuple[str, ...] = ()
    """Likewise cascades: the tokens at which they ask the target, over the tree that they grow on the intermediate."""
    prompts: Path | None = None
    """As in bench generate. Default: questions of GSM8K that no training of the default family has seen."""
    limit: int = 10
    """Prompts of each task, from the first on."""
    max_new_tokens: int = 96
    """Tokens to generate for each."""
    rounds: int = 3
    """How often every text is generated."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """CPU threads. Default: all cores."""
    seed: int = 0
    """Of the models' random content, and of the order within a round."""

    def __post_init__(self) -> None:
        for name in self.precisions:
            if name not in BITS:
                raise UsageError(f"there is no precision {name!r}", hint=f"of {', '.join(BITS)}")
        if not self.precisions:
            raise UsageError("no precision was named", hint=f"of {', '.join(BITS)}")
        if len(set(self.precisions)) < len(self.precisions):
            raise UsageError("a precision is named twice", hint="name each row once")
        ScaleBench(self.out, self.shape, self.intermediate_shape)
        self.bench()  # says now, not after gigabytes are written, what is wrong with a value

    def bench(self) -> GenerateBench:
        """What is the same for every precision. Raises ``UsageError``."""
        return GenerateBench(
            methods=(*self.tree_methods(), *self.cascade_methods()),
            peers=NO_PEERS,
            prompts=self.prompts,
            limit=self.limit,
            max_new_tokens=self.max_new_tokens,
            rounds=self.rounds,
            device=self.device,
            threads=self.threads,
            seed=self.seed,
        )

    def tree_methods(self) -> tuple[str, ...]:
        """The trees as ``bench generate`` names methods. Raises ``UsageError``."""
        trees = self.trees or (CPU_TREES if self.device == "cpu" else CUDA_TREES)
        return tuple(f"eagle:num_speculative_tokens={nodes}:{shape}" for nodes, shape in map(self._tree, trees))

    def cascade_methods(self) -> tuple[str, ...]:
        """Likewise the cascades. Their last inner round may bring more than was asked: two tokens of it are verified
        too."""
        found = []
        for cascade in self.cascades or (CPU_CASCADES if self.device == "cpu" else CUDA_CASCADES):
            tokens, _, tree = cascade.partition("/")
            if not tokens.isdecimal() or not int(tokens):
                raise UsageError(f"{cascade!r} is no cascade", hint="tokens / inner tree, like 6/30x3")
            nodes, shape = self._tree(tree)
            found.append(
                f"cascade:min_draft={tokens}:num_speculative_tokens={int(tokens) + 2}:tree_nodes={nodes}:{shape}"
            )
        return tuple(found)

    def _tree(self, text: str) -> tuple[int, str]:
        """A tree's nodes, and its shape as settings of a method."""
        nodes, _, depth = text.partition("x")
        if not nodes.isdecimal() or not depth.isdecimal() or not 1 <= int(depth) <= int(nodes):
            raise UsageError(f"{text!r} is no tree", hint="nodes x levels, like 16x5")
        top_k = min(int(nodes), EAGLE2_TOP_K if self.device != "cpu" else EagleOptions().top_k)
        return int(nodes), f"tree_depth={depth}:tree_top_k={top_k}"


def in_words(method: str) -> str:
    """A tree or cascade by the words of the options, such as ``tree 8x4`` and ``cascade 6/8x4``; other engines as they
    are called."""
    name, *settings = method.split(":")
    values = dict(setting.split("=") for setting in settings)
    if name == "cascade":
        return f"cascade {values['min_draft']}/{values['tree_nodes']}x{values['tree_depth']}"
    if name == "eagle":
        return f"tree {values['num_speculative_tokens']}x{values['tree_depth']}"
    return "plain" if name == PLAIN else name
