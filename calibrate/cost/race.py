"""Settings side by side: each writes the same prompts by the real engine, in turns, and the times decide.

They run as ``auto`` would run them, with widths that follow each draft, so what is compared is what users get.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

from quantspec.calibrate.cost.watch import watch
from quantspec.calibrate.cost.workbench import Workbench
from quantspec.calibrate.stats import Ratio, ratio
from quantspec.engine.costs import Profile, Setting
from quantspec.engine.engine import Engine
from quantspec.engine.records import Record
from quantspec.errors import QuantSpecError

_AFTER = 2  # steps in which target and drafter read the prompt: they are paid once, not by the token
_ROUNDS = 4
_HORIZON = 512
"""New tokens of a text that the race's short ones stand for: in one of these few, reading the prompt may not pay."""
_HOPELESS, _UNPLANNED = 0.6, 0.8
"""What gave so little of the fastest one's speed on the first prompts, and was planned to give so little of the best
plan's, does not run on the others. One of the two alone may be a disturbance, or a mistake."""
_JUDGED = 3


@dataclass(frozen=True)
class Run(Record):
    """One text: the tokens that its steps gave and their seconds, those that read the prompt left out."""

    setting: int
    prompt: int
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]


class Race:
    """``known`` is what their drafters are known to cost and give, ``planned`` the settings' speeds, as far as one can
    tell; ``runs`` what was run before. ``failures`` tell why a setting, by number, does not take part."""

    def __init__(
        self, bench: Workbench, known: Profile, settings: Sequence[Setting], planned: Sequence[float],
        runs: Sequence[Run] = (),
    ) -> None:  # fmt: skip
        self._bench, self._known, self._settings, self._planned = bench, known, settings, planned
        self.runs = list(runs)
        self.failures: dict[int, str] = {}
        self._engines: dict[int, Engine] = {}
        for number, setting in enumerate(settings):
            self._load(number, setting)

    def run(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, seconds: float, keep: Callable[[Run], None], seed: int
    ) -> None:
        """Rounds over all prompts, settings in a new order each time, until ``seconds`` are over; not before every
        setting has written ``_JUDGED`` prompts, or all of them. ``keep`` hears of each text."""
        shuffle, began = random.Random(seed).shuffle, perf_counter()
        taking_part = list(self._engines)
        for number in range(_ROUNDS):
            for at, prompt in enumerate(prompts):
                if perf_counter() - began > seconds and (number or at >= _JUDGED):
                    return
                shuffle(taking_part)
                for one in taking_part:
                    if one in self._engines and self._count(one, at) <= number:
                        self._one(one, at, prompt, new_tokens, keep)
                if at + 1 == _JUDGED:
                    taking_part = self._hopeful(taking_part)

    def speed(self, number: int) -> Ratio:
        """Tokens per second of a setting, with a 95% bootstrap interval over prompts. Of a step that several rounds
        have timed, the least time counts: what else the machine did only ever adds to it. Rounds whose steps differ,
        since widths follow the times too, are averaged."""
        return ratio(
            [
                (float(sum(sum(same[0].tokens) for same in rounds)), sum(map(_least, rounds)))
                for prompt in sorted({run.prompt for run in self.runs if run.setting == number})
                for rounds in [self._rounds(number, prompt)]
            ]
        )

    def noise(self) -> float:
        """How far times repeat: the median over all settings and prompts of the difference between a text's earlier and
        later rounds, as a share of the smaller; 0 where there was one round."""
        apart = [0.0]
        for number, prompt in {(run.setting, run.prompt) for run in self.runs}:
            for same in self._rounds(number, prompt):
                if len(same) > 1:
                    half = len(same) // 2
                    first, second = _least(same[:half]), _least(same[half:])
                    apart.append(abs(first - second) / max(min(first, second), 1e-9))
        return median(apart[1:] or apart)

    def _rounds(self, number: int, prompt: int) -> list[list[Run]]:
        """The rounds of one text, those with the same steps together."""
        alike: dict[tuple[int, ...], list[Run]] = {}
        for run in self.runs:
            if (run.setting, run.prompt) == (number, prompt):
                alike.setdefault(run.tokens, []).append(run)
        return list(alike.values())

    def _load(self, number: int, setting: Setting) -> None:
        try:
            engine = self._bench.engine(setting, self._known)
            failure = self._bench.failure(engine, setting)
        except QuantSpecError as error:
            failure = str(error)
        if failure:
            self.failures[number] = failure
        else:
            self._engines[number] = engine

    def _one(self, number: int, at: int, prompt: Sequence[int], new_tokens: int, keep: Callable[[Run], None]) -> None:
        self._bench.notices.clear()
        engine, setting = self._engines[number], self._settings[number]
        steps = watch(engine, prompt, new_tokens, horizon=_HORIZON)[_AFTER:]
        failure = self._bench.failure(engine, setting)
        if failure:
            self.failures[number] = failure
            del self._engines[number]
            return
        run = Run(number, at, tuple(step.tokens for step in steps), tuple(step.seconds for step in steps))
        self.runs.append(run)
        keep(run)

    def _count(self, number: int, prompt: int) -> int:
        return sum((run.setting, run.prompt) == (number, prompt) for run in self.runs)

    def _hopeful(self, numbers: Sequence[int]) -> list[int]:
        speeds = {number: self.speed(number).value for number in numbers if number in self._engines}
        fastest, best = max(speeds.values(), default=0.0), max(self._planned)
        plain = [number for number in speeds if self._settings[number].method == "none"]
        return [
            number
            for number, speed in speeds.items()
            if speed >= _HOPELESS * fastest or self._planned[number] >= _UNPLANNED * best or number in plain
        ]


def _least(runs: Sequence[Run]) -> float:
    """Seconds of a text of which every step took its least time."""
    return sum(map(min, zip(*(run.seconds for run in runs), strict=True)))
