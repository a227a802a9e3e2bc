"""What the controller costs a step: CPU time of ``budget`` and ``take``, least of several rounds, by draft width.

`python -m quantspec.benchmarks.controller_step`
"""

from __future__ import annotations

from time import process_time

from quantspec.engine.controller import Controller, Lessons
from quantspec.engine.costs import CostCurve, DraftCost
from quantspec.engine.planner import Outlook, Speed
from quantspec.types import Draft, Verdict

WIDTHS = (4, 8, 16, 32, 63)
_STEPS, _ROUNDS = 500, 7
_CURVE = CostCurve((0, 1024, 4096), (1, 2, 4, 8, 16, 64), ((0.025, 0.025, 0.025, 0.026, 0.027, 0.05),) * 3)


def microseconds(nodes: int) -> float:
    """Of one step whose drafts have that many nodes, tables of costs looked up anew every 64 tokens included."""
    outlook = Outlook(_CURVE, 1e-3, DraftCost(per_level=1e-3), Speed(3.0, 0.05), (0.8,) * 8, 1.0, nodes, 8)
    draft = Draft.chain([1] * nodes, [0.97**i for i in range(nodes)], ["eagle"] * nodes)
    verdict = Verdict((0, 1), (1, 1), 0, (0,) * (nodes + 1), ("eagle", "eagle", "target"), draft)
    rounds = []
    for _ in range(_ROUNDS):
        controller = Controller(outlook, Lessons(), 100, 4096)
        began = process_time()
        for step in range(_STEPS):
            controller.budget(100 + 3 * step)
            controller.take(verdict, 8e-3, 0.026)
        rounds.append((process_time() - began) / _STEPS)
    return 1e6 * min(rounds)


def main() -> None:
    """Print a line per width."""
    for nodes in WIDTHS:
        print(f"{nodes:3d} nodes: {microseconds(nodes):5.1f} us a step")


if __name__ == "__main__":
    main()
