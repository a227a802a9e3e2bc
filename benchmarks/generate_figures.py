"""From the turns of ``bench generate`` to its rows: figures per task and method, and whether the machine was steady."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantspec.benchmarks.acceptance import DISTINCT
from quantspec.benchmarks.generate_prompts import Prompt
from quantspec.benchmarks.generate_rows import ALL, LOOPS, PARTS, PLAIN, UNFINISHED, Interval, Noise, Report, Row
from quantspec.benchmarks.peers.process import Contender
from quantspec.calibrate.stats import ratio

Turn = Mapping[str, Any]
"""One prompt in one round: seconds of the ``calibration``, the plain text's share of ``distinct`` 4-grams, and by
contender the figures of its ``answers``, or an ``error``."""
Turns = Mapping[tuple[int, int], Turn]
"""By round and the prompt's number."""
CURVE = "curve"
"""What the process that times the target's forwards is called among those that say something of themselves."""
NOISE_LIMIT = 0.15
"""What the spread of equal work may be, as ``Noise`` counts it, for a speedup to mean something."""
FEWEST_TURNS = 3
"""Whose spread says anything."""
_RESAMPLES = 2000


def report_of(
    settings: Mapping[str, Any],
    contenders: Sequence[Contender],
    prompts: Sequence[Prompt],
    turns: Turns,
    infos: Mapping[str, Mapping[str, Any]],
    left_out: Sequence[str],
    complete: bool,
) -> Report:
    """What all turns together show."""
    noise = noise_of([turn["calibration"] for _, turn in sorted(turns.items())])
    loops = {number for (_, number), turn in turns.items() if turn["distinct"] < DISTINCT}
    tasks = {prompt.task: [each.number for each in prompts if each.task == prompt.task] for prompt in prompts}
    groups = {ALL: [prompt.number for prompt in prompts], **(tasks if len(tasks) > 1 else {})}
    found = [_Found(one, infos.get(one.name, {}), turns, loops) for one in contenders]
    steady = noise is not None and noise.refusal is None
    curve = infos.get(CURVE, {}).get("curve")
    return Report(
        settings=settings,
        contenders={name: info for name, info in infos.items() if name != CURVE},
        rows=tuple(each.row(task, set(numbers), steady) for task, numbers in groups.items() for each in found),
        noise=noise,
        curve=None if curve is None else {int(width): seconds for width, seconds in curve.items()},
        degenerate_prompts=tuple(sorted(loops)),
        left_out=tuple(left_out),
        prompts=len({number for _, number in turns}),
        complete=complete,
    )


def noise_of(seconds: Sequence[float]) -> Noise | None:
    """How far the times of the same work lie apart; None where nothing was timed."""
    if not seconds:
        return None
    low, middle, high = (float(value) for value in np.quantile(np.array(seconds), (0.1, 0.5, 0.9)))
    spread, refusal = (high - low) / middle, None
    if len(seconds) < FEWEST_TURNS:
        refusal = f"no speedups: of fewer than {FEWEST_TURNS} turns nobody can tell how steady this machine was"
    elif spread > NOISE_LIMIT:
        refusal = (
            f"no speedups: this machine was too noisy; the same plain text took {1e3 * low:.1f} to {1e3 * high:.1f} ms "
            f"in 8 of 10 cases, a spread of {spread:.0%} where {NOISE_LIMIT:.0%} are allowed"
        )
    return Noise(seconds=tuple(seconds), spread=spread, limit=NOISE_LIMIT, refusal=refusal)


@dataclass(frozen=True)
class _Found:
    """All that one contender gave."""

    contender: Contender
    info: Mapping[str, Any]
    turns: Turns
    loops: set[int]

    def row(self, task: str, numbers: set[int], steady: bool) -> Row:
        """Its row over these prompts. One that failed in its last turn has no figures."""
        name, kind = self.contender.name, self.contender.kind
        answers = {
            key: turn["answers"][name]
            for key, turn in sorted(self.turns.items())
            if key[1] in numbers and name in turn["answers"]
        }
        last = next(reversed(answers.values()), {"error": UNFINISHED})
        error = self.contender.error or self.info.get("error") or last.get("error")
        answers = {key: answer for key, answer in answers.items() if "error" not in answer}
        figured = {key: answer for key, answer in answers.items() if key[1] not in self.loops}
        if error:
            return Row(task=task, method=name, kind=kind, error=error)
        compared = {
            "equal_to_plain": all(answer["equal"] for answer in answers.values()),
            "equal_share": round(sum(answer["equal"] for answer in answers.values()) / len(answers), 4),
            "exactness": self.info.get("exactness"),
        }
        if not figured:
            return Row(task=task, method=name, kind=kind, error=LOOPS, **compared)
        plain = [self.turns[key]["answers"][PLAIN] for key in figured]
        once = list({key[1]: answer for key, answer in figured.items()}.values())
        figures, intervals = _figures(figured, plain, once, steady)
        return Row(
            task=task,
            method=name,
            kind=kind,
            time_to_first_token=_median(answer["first_token_seconds"] for answer in figured.values()),
            target_forwards=sum(answer["target_forwards"] or 0 for answer in once) or None,
            step_ms=_step_ms(list(figured.values())),
            acceptance_by_position=_by_position(once),
            peak_memory_bytes=max(answer["peak_memory_bytes"] or 0 for answer in answers.values()) or None,
            prompts=len(once),
            texts=len(figured),
            new_tokens=sum(answer["tokens"] for answer in once),
            intervals=intervals,
            **compared,
            **figures,
        )


def _figures(
    answers: Mapping[tuple[int, int], Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]],
    once: Sequence[Mapping[str, Any]],
    steady: bool,
) -> tuple[dict[str, Any], dict[str, Interval]]:
    """The figures that have intervals, and these; ``plain`` are plain decoding's answers in the same turns, ``once``
    one of each prompt."""
    pairs = [(number, (mine, other)) for (_, number), mine, other in zip(answers, answers.values(), plain, strict=True)]
    found = _speeds(pairs, lambda answer: answer["seconds"], lambda answer: answer["tokens"])
    told = [pair for pair in pairs if all(_after_first(answer) for answer in pair[1])]
    if told:
        decoding = _speeds(told, _after_first, lambda answer: answer["tokens"] - 1)
        found["decode_speedup"] = decoding["speedup"]
    if not steady:
        found = {name: value for name, value in found.items() if not name.endswith("speedup")}
    lengths = [_emitted(answer["accepted"]) for answer in once]
    if any(forwards for _, forwards in lengths):
        length = ratio(lengths)
        found["acceptance_length"] = (length.value, (length.low, length.high))
    figures = {name: round(value, 4) for name, (value, _) in found.items()}
    return figures, {name: (round(low, 4), round(high, 4)) for name, (_, (low, high)) in found.items()}


def _speeds(
    pairs: Sequence[tuple[int, tuple[Turn, Turn]]], seconds: Callable[[Turn], float], tokens: Callable[[Turn], int]
) -> dict[str, tuple[float, Interval]]:
    """``speeds`` of answers (method, plain) by the prompts' numbers, by what counts as time and tokens of an answer."""
    times, counts = defaultdict[int, list[tuple[float, float]]](list), dict[int, tuple[int, int]]()
    for number, (mine, other) in pairs:
        times[number].append((seconds(mine), seconds(other)))
        counts[number] = (tokens(mine), tokens(other))
    return speeds(list(times.values()), list(counts.values()))


def _after_first(answer: Mapping[str, Any]) -> float:
    """Seconds from the first token to the last; 0 where an engine does not tell, or there is no second token."""
    first = answer["first_token_seconds"]
    return 0.0 if first is None or answer["tokens"] < 2 else max(answer["seconds"] - first, 0.0)


def speeds(
    seconds: Sequence[Sequence[tuple[float, float]]], tokens: Sequence[tuple[int, int]]
) -> dict[str, tuple[float, Interval]]:
    """Tokens/s of a method, and its quotient with plain decoding's, each with a 95% bootstrap.

    For every prompt ``seconds`` are pairs (method, plain), one per round, and ``tokens`` how many both gave. A prompt's
    time is the median of its rounds. Prompts are resampled, and within each its rounds, both methods together.
    """
    random, prompts = np.random.default_rng(0), len(seconds)
    times = np.empty((_RESAMPLES + 1, prompts, 2))
    for number, rounds in enumerate(seconds):
        data = np.array(rounds, dtype=np.float64)
        times[0, number] = np.median(data, axis=0)
        picks = random.integers(0, len(data), (_RESAMPLES, len(data)))
        times[1:, number] = np.median(data[picks], axis=1)
    chosen = np.vstack([np.arange(prompts), random.integers(0, prompts, (_RESAMPLES, prompts))])
    spent = np.take_along_axis(times, chosen[:, :, None], axis=1).sum(axis=1)
    rates = np.array(tokens, dtype=np.float64)[chosen].sum(axis=1) / spent
    return {"tokens_per_second": _middle(rates[:, 0]), "speedup": _middle(rates[:, 0] / rates[:, 1])}


def _middle(values: NDArray[np.float64]) -> tuple[float, Interval]:
    """The first value, and the 95% interval of the others, its resamples."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return float(values[0]), (float(low), float(high))


def _emitted(accepted: Sequence[int]) -> tuple[int, int]:
    """Tokens and target forwards of a text, its prompt's left out, by how many drafted tokens were accepted."""
    return sum((count + 1) * forwards for count, forwards in enumerate(accepted)), sum(accepted)


def _by_position(answers: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """Of all target forwards, the share that accepted more than k drafted tokens, for k from 0."""
    accepted = [sum(column) for column in zip_longest(*(answer["accepted"] for answer in answers), fillvalue=0)]
    forwards = sum(accepted)
    return tuple(round(sum(accepted[k + 1 :]) / forwards, 4) for k in range(len(accepted) - 1))


def _step_ms(answers: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Milliseconds of a target forward's step by part; None where an engine does not tell."""
    told = [answer for answer in answers if answer["part_seconds"] and answer["target_forwards"]]
    if not told:
        return None
    steps = sum(answer["target_forwards"] for answer in told)
    return {part: round(1e3 * sum(answer["part_seconds"][part] for answer in told) / steps, 4) for part in PARTS}


def _median(values: Any) -> float | None:
    told = [value for value in values if value is not None]
    return round(median(told), 6) if told else None
