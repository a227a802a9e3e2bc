"""Every drafter there is, on the same prompts in turns: tokens per target forward, the time of a draft, tokens/s, and
whether the text is that of plain decoding.

    quantspec bench drafters --out results

Each prompt is generated greedily with every drafter, in a new order each round, and once at temperature 0.8 with top-p
0.95. Texts that loop (under 60% distinct 4-grams) are counted and left out of the figures, and compared all the same.
Intervals are 95% bootstraps over prompts. With an output folder each finished prompt is a line of a log there, and the
same command goes on where it ends.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import quantspec
from quantspec.benchmarks.acceptance import DISTINCT, SETTINGS
from quantspec.benchmarks.config import DraftersBench
from quantspec.benchmarks.drafters_found import find
from quantspec.benchmarks.equality import read_log
from quantspec.calibrate.cost.found import PLAIN, Found
from quantspec.calibrate.stats import Ratio, distinct_ngrams, quotient, ratio
from quantspec.engine.build import equip, load_draft_model, with_parts
from quantspec.engine.llm import LLM
from quantspec.engine.request import Completion
from quantspec.errors import ModelError, QuantSpecError, UsageError
from quantspec.models import atomic
from quantspec.models.base import CausalModel
from quantspec.models.resolve import resolve
from quantspec.types import SamplingParams

HELD_OUT = Path(__file__).parent / "held_out.jsonl"
LOG = "log.jsonl"
Note = Callable[[str], None]
Prompt = dict[str, dict[str, Any]]
"""What one prompt gave: by drafter the figures of its text by setting, or an ``error``."""


def run(config: DraftersBench, note: Note, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """The report. ``stop`` is asked between texts; what is finished by then is reported, and ``complete`` is false.

    Raises ``UsageError`` or ``ModelError`` for prompts or a target that cannot be read, ``ResourceError`` for an output
    folder that cannot be written. A drafter that fails has a row that says so.
    """
    prompts, found = questions(config.prompts or HELD_OUT, config.limit), find(config, note)
    log = None if config.out is None else config.out / LOG
    settings = _settings(config, prompts, found)
    done: dict[int, Prompt] = {}
    if log is not None:
        atomic.make_folder(log.parent)
        with atomic.writing(log):
            done = {int(number): each for number, each in read_log(log, settings, "--out").items()}
        done = {number: each for number, each in done.items() if number < len(prompts)}
        if done:
            note(f"going on after {len(done)} of {len(prompts)} prompts")
    bench = _Bench(config, found, note)
    for number, prompt in enumerate(prompts):
        if number in done:
            continue
        found_now = bench.prompt(number, prompt, stop)
        if found_now is None:
            break
        done[number] = found_now
        if log is not None:
            with atomic.writing(log), open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps({"id": number, "found": found_now}) + "\n")
    return {
        "version": quantspec.__version__,
        "model": config.model,
        "device": config.device,
        "max_new_tokens": config.max_new_tokens,
        "rounds": config.rounds,
        "prompts": len(done),
        "complete": len(done) == len(prompts),
        "degenerate_prompts": {setting: sorted(_loops(done, setting)) for setting in SETTINGS},
        "rows": [_row(one, bench, done) for one in found],
    }


def questions(path: Path, limit: int) -> list[str]:
    """The first ``limit`` questions of GSM8K-form JSON lines, as prompts. Raises ``UsageError`` or ``ModelError``."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
        prompts = [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint="give JSON lines with a question") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not JSON lines with a question each") from error
    if not prompts:
        raise ModelError(f"{path} has no questions")
    return prompts


def _settings(config: DraftersBench, prompts: Sequence[str], found: Sequence[Found]) -> dict[str, Any]:
    """What a log must have in common with the run that goes on with it, the drafters' files among it."""
    keys = ("model", "max_new_tokens", "rounds", "device", "threads", "seed")
    text = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    drafters = [[one.name, *[_stamp(value) for key, value in one.options.items() if key != "method"]] for one in found]
    return {key: getattr(config, key) for key in keys} | {"prompts": text, "drafters": drafters}


def _stamp(name: str) -> list[Any]:
    files = sorted(resolve(name).glob("*.safetensors"))
    return [name, *[[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


class _Bench:
    """All drafters, loaded, with what they had to say."""

    def __init__(self, config: DraftersBench, found: Sequence[Found], note: Note) -> None:
        self.config, self.llms = config, dict[str, LLM]()
        self._draft_models: dict[str, CausalModel] = {}
        self.errors = {one.name: one.error for one in found if one.error}
        self.notes: dict[str, list[str]] = {one.name: [] for one in found}
        self._note, self._random = note, random.Random(config.seed)
        for one in found:
            if not one.error:
                self._load(one)
        for name, error in self.errors.items():
            note(f"{name} fails: {error}")

    def _load(self, one: Found) -> None:
        options, notice = {"method": PLAIN, **one.options}, self.notes[one.name].append
        try:
            llm = self._llm(options, notice)
            if llm.config.method != options["method"]:
                raise ModelError(self.notes[one.name][-1])  # such as that it did not fit into memory
            # A first run pays for caches, thread pools and what is compiled.
            llm.generate("Question:", SamplingParams(max_new_tokens=8, seed=0))
            self.llms[one.name] = llm
        except Exception as error:
            if one.name == PLAIN:
                raise
            self.errors[one.name] = _line(error)

    def _llm(self, options: Mapping[str, Any], notice: Note) -> LLM:
        """The target, loaded once, with the drafter of these options; a draft model is loaded once too."""
        config = self.config
        if PLAIN not in self.llms:
            return quantspec.load(config.model, notice=notice, device=config.device, threads=config.threads, **options)
        plain = self.llms[PLAIN]._engine
        asked = with_parts(replace(plain.config, **options), notice)
        assert plain.tokenizer is not None, "build loads one"
        name = asked.draft_model
        if name is not None and name not in self._draft_models:
            self._draft_models[name] = load_draft_model(asked, notice)
        draft = None if name is None else self._draft_models[name]
        return LLM(equip(asked, plain.model, plain.tokenizer, notice, draft))

    def prompt(self, number: int, prompt: str, stop: Callable[[], bool]) -> Prompt | None:
        """All drafters on one prompt, or None where ``stop`` cut it short."""
        plain: dict[str, Completion] = {}
        runs: dict[str, dict[str, list[Completion]]] = {}
        for round_number in range(self.config.rounds):
            order = [name for name in self.llms if name != PLAIN]
            self._random.shuffle(order)
            for name in (PLAIN, *order):
                for setting in SETTINGS if round_number == 0 else ("greedy",):
                    if stop():
                        return None
                    completion = self._generate(name, prompt, number, setting)
                    if completion is None:
                        break
                    runs.setdefault(name, {}).setdefault(setting, []).append(completion)
                    if name == PLAIN:
                        plain.setdefault(setting, completion)
        found: Prompt = {
            name: {setting: _sample(each, plain[setting]) for setting, each in by_setting.items()}
            for name, by_setting in runs.items()
            if name in self.llms
        }
        return found | {name: {"error": error} for name, error in self.errors.items()}

    def _generate(self, name: str, prompt: str, number: int, setting: str) -> Completion | None:
        sampling: dict[str, Any] = SETTINGS[setting]
        params = SamplingParams(max_new_tokens=self.config.max_new_tokens, seed=self.config.seed + number, **sampling)
        try:
            completion = self.llms[name].generate(prompt, params)
        except Exception as error:
            if name == PLAIN:
                raise
            self.errors[name] = _line(error)
            self._note(f"{name} fails: {self.errors[name]}")
            del self.llms[name]
            return None
        assert isinstance(completion, Completion)
        return completion


def _line(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, QuantSpecError) else f"{type(error).__name__}: {text}"


def _sample(runs: Sequence[Completion], plain: Completion) -> dict[str, Any]:
    """Figures of one text: the least times of its runs; ``after_first`` leaves out the drafter's reading of the
    prompt."""
    stats = [each.stats for each in runs]
    return {
        "equal": all(each.token_ids == plain.token_ids for each in runs),
        "distinct": round(distinct_ngrams(plain.token_ids), 4),
        "new_tokens": stats[0].new_tokens,
        "target_forwards": stats[0].target_forwards,
        "seconds": min(each.seconds for each in stats),
        "draft_seconds_after_first": min(each.draft_seconds - each.draft_prefill_seconds for each in stats),
    }


def _loops(done: dict[int, Prompt], setting: str) -> set[int]:
    return {number for number, found in done.items() if found[PLAIN][setting]["distinct"] < DISTINCT}


def _row(one: Found, bench: _Bench, done: dict[int, Prompt]) -> dict[str, Any]:
    """A drafter's row. Figures are of greedy texts, those of sampled ones under ``sampled``."""
    failed = [found[one.name]["error"] for found in done.values() if "error" in found.get(one.name, {})]
    error = bench.errors.get(one.name) or next(iter(failed), "")
    empty = dict.fromkeys(
        ("acceptance_length", "draft_ms", "tokens_per_second", "speedup", "exactness", "equal_to_plain")
    )
    row: dict[str, Any] = {"drafter": one.name, "method": one.options.get("method"), **empty}
    if error or not done:
        return row | {"error": error or "no prompt was finished"}
    greedy, sampled = [_of(done, one.name, setting) for setting in SETTINGS]
    lengths, draft, speed, plain = _lengths(greedy), _draft(greedy), _speed(greedy), _speed(_of(done, PLAIN, "greedy"))
    figures = {
        "acceptance_length": ratio(lengths),
        "draft_ms": ratio(draft),
        "tokens_per_second": ratio(speed),
        "speedup": quotient(speed, plain),
    }
    different = {
        setting: [number for number, found in done.items() if not found[one.name][setting]["equal"]]
        for setting in SETTINGS
    }
    llm = bench.llms[one.name]
    return {
        **row,
        **{name: round(value.value, 4) for name, value in figures.items()},
        "exactness": llm.exactness,
        "equal_to_plain": not any(different.values()),
        "num_speculative_tokens": llm.config.max_nodes,
        "intervals": {name: _interval(value) for name, value in figures.items()},
        "sampled": {
            "acceptance_length": round(ratio(_lengths(sampled)).value, 4),
            "interval": _interval(ratio(_lengths(sampled))),
            "prompts": len(sampled),
        },
        "prompts": len(greedy),
        "different": different,
        "notes": bench.notes[one.name],
    }


def _of(done: dict[int, Prompt], name: str, setting: str) -> list[dict[str, Any]]:
    """What a drafter gave on the prompts whose text does not loop."""
    loops = _loops(done, setting)
    return [found[name][setting] for number, found in sorted(done.items()) if number not in loops]


def _lengths(samples: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Tokens and target forwards; the prompt's own forward and token are left out."""
    return [(each["new_tokens"] - 1, each["target_forwards"]) for each in samples]


def _draft(samples: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Milliseconds of drafting and drafts, but the first, in which a drafter reads the prompt."""
    return [(1000 * each["draft_seconds_after_first"], max(each["target_forwards"] - 1, 0)) for each in samples]


def _speed(samples: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Tokens and seconds, all prefills included."""
    return [(each["new_tokens"], each["seconds"]) for each in samples]


def _interval(value: Ratio) -> list[float]:
    return [round(value.low, 4), round(value.high, 4)]
