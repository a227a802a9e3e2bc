"""All methods, other engines and plain decoding on the same prompts, alternated: tokens/s side by side.

    quantspec bench generate --prompts spec_bench.jsonl --out results

Every contender is a process of its own, loaded once; one works at a time. A turn is one prompt in one round: plain
decoding is timed on a fixed text first (which tells how steady the machine is), then all generate it greedily in a new
order. Each finished turn is a line of a log in the output folder, and the same command goes on where it ends.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import quantspec
from quantspec.benchmarks import generate_contenders
from quantspec.benchmarks.equality import read_log
from quantspec.benchmarks.generate_config import GenerateBench
from quantspec.benchmarks.generate_contenders import target_folder
from quantspec.benchmarks.generate_figures import CURVE, Turn, report_of
from quantspec.benchmarks.generate_prompts import Prompt, read_prompts
from quantspec.benchmarks.generate_rows import PLAIN, Report
from quantspec.benchmarks.kernels import check_device
from quantspec.benchmarks.peers.process import Contender, PeerError, PeerProcess
from quantspec.benchmarks.peers.protocol import Answer, Ask
from quantspec.calibrate.stats import distinct_ngrams
from quantspec.errors import ModelError
from quantspec.kernels.machine import cores
from quantspec.models import atomic
from quantspec.models.config import read_config
from quantspec.models.resolve import resolve
from quantspec.models.tokenizer import Tokenizer

LOG = "log.jsonl"
LOAD_SECONDS = 3600.0
"""What a process may take to load: a large model is packed then."""
CALIBRATION_TOKENS, CALIBRATION_SECONDS, MOST_CALIBRATIONS = 32, 0.3, 5
"""Plain decoding of so many tokens is timed before each turn, again until so many seconds are spent."""
Note = Callable[[str], None]


def run(
    config: GenerateBench,
    note: Note,
    stop: Callable[[], bool] = lambda: False,
    arrange: Callable[[list[Contender]], list[Contender]] = list,
) -> Report:
    """The report. ``stop`` is asked between texts; what is finished by then is reported, and ``complete`` is false.
    ``arrange`` may put our own methods into other processes.

    Raises ``UsageError`` or ``ModelError`` for options, a device, prompts or a target that cannot be used or plain
    decoding that fails, ``ResourceError`` for an output folder that cannot be written. Any other contender that fails
    has rows that say so.
    """
    check_device(config.device)
    target, threads = target_folder(config), config.threads or cores()
    tokenizer, positions = Tokenizer(target), read_config(target).get("max_position_embeddings")
    prompts, left_out = read_prompts(config, tokenizer, positions)
    for line in left_out:
        note(f"left out {line}")
    longest = max(len(prompt.tokens) for prompt in prompts) + config.max_new_tokens
    with ExitStack() as stack:
        if config.out is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantspec-bench-")))
        else:
            atomic.make_folder(config.out)
            work = config.out
        contenders = arrange(generate_contenders.methods(config, threads, note))
        settings = _settings(config, threads, prompts, contenders)
        log = Log(None if config.out is None else config.out / LOG, settings)
        setting = generate_contenders.setting_of(config, work, threads, longest, note)
        contenders += generate_contenders.peers(config, setting)
        bench = Bench(config, contenders, prompts, threads, tokenizer.eos_ids, note)
        stack.callback(bench.close)
        complete = _turns(config, bench, log, note, stop)
        return report_of(settings, contenders, prompts, log.turns, log.infos, left_out, complete)


def _turns(config: GenerateBench, bench: Bench, log: Log, note: Note, stop: Callable[[], bool]) -> bool:
    """All turns that are not in the log yet; false where ``stop`` cut them short."""
    keys = [(round_number, prompt.number) for round_number in range(config.rounds) for prompt in bench.prompts]
    left = [key for key in keys if key not in log.turns]
    if 0 < len(left) < len(keys) or not left:
        note(f"going on after {len(keys) - len(left)} of {len(keys)} turns")
    if left:
        bench.start(log, stop)
    for round_number, number in left:
        turn = bench.turn(round_number, bench.prompts[number], stop)
        if turn is None:
            return False
        log.add_turn((round_number, number), turn)
    return True


def _settings(
    config: GenerateBench, threads: int, prompts: Sequence[Prompt], ours: Sequence[Contender]
) -> dict[str, Any]:
    """What a log must have in common with the run that goes on with it, the models' files among it."""
    keys = ("model", "max_new_tokens", "rounds", "peer_limit", "device", "seed")
    chosen = {key: getattr(config, key) for key in keys}
    names = [*(one.name for one in ours), *config.peer_names]
    parts = {str(one.options[key]) for one in ours for key in ("draft_model", "head") if one.options.get(key)}
    profiles = {Path(str(one.options["profile"])) for one in ours if one.options.get("profile")}
    files = [_stamp(path) for path in (target_folder(config), *map(resolve, sorted(parts)), *sorted(profiles))]
    digests = {
        "prompts": _digest([prompt.tokens for prompt in prompts]),
        "models": _digest([files, [one.process_key for one in ours]]),
    }
    return {"version": quantspec.__version__, **chosen, "threads": threads, "contenders": names, **digests}


def _stamp(path: Path) -> list[Any]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return [str(path), *[[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Log:
    """Finished turns by round and prompt, and what contenders said of themselves; on disk if ``path`` is given."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        self.turns: dict[tuple[int, int], Turn] = {}
        self.infos: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        with atomic.writing(path):
            found = read_log(path, dict(settings), "--out")
        for key, value in found.items():
            kind, _, rest = key.partition(":")
            if kind == "turn":
                round_number, _, number = rest.partition(":")
                self.turns[int(round_number), int(number)] = value
            else:
                self.infos[rest] = value

    def add_turn(self, key: tuple[int, int], turn: Turn) -> None:
        self.turns[key] = turn
        self._append(f"turn:{key[0]}:{key[1]}", turn)

    def add_info(self, name: str, info: dict[str, Any]) -> None:
        self.infos[name] = info
        self._append(f"contender:{name}", info)

    def _append(self, key: str, value: object) -> None:
        if self._path is not None:
            with atomic.writing(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"id": key, "found": value}) + "\n")


class Bench:
    """The contenders' processes. Those that share module and options share a process."""

    def __init__(
        self,
        config: GenerateBench,
        contenders: Sequence[Contender],
        prompts: Sequence[Prompt],
        threads: int,
        eos_ids: Sequence[int],
        note: Note,
    ) -> None:
        self.config, self.prompts = config, prompts
        self.errors = {one.name: one.error for one in contenders if one.error}
        self._contenders = {one.name: one for one in contenders}
        self._threads, self._eos, self._note = threads, frozenset(eos_ids), note
        self._processes: dict[str, PeerProcess] = {}
        self._infos: dict[str, dict[str, Any]] = {}

    def start(self, log: Log, stop: Callable[[], bool]) -> None:
        """Load everything, and have the target's forwards timed. Raises ``ModelError`` where plain decoding fails."""
        if CURVE not in log.infos:
            self._time_forwards(log)
        for name, contender in self._contenders.items():
            if stop():
                return
            if contender.error:
                self._note(f"{name} takes no part: {contender.error}")
                log.add_info(name, {"error": contender.error})
                continue
            self._note(f"loading {name}")
            try:
                self._process(contender)
            except PeerError as error:
                self._fails(name, error)
                log.add_info(name, {"error": str(error)})
                continue
            info = self._infos[contender.process_key]
            for line in info.get("notes", ()):
                self._note(f"{name}: {line}")
            log.add_info(name, info)

    def _time_forwards(self, log: Log) -> None:
        contender = generate_contenders.curve_of(self._contenders[PLAIN])
        self._note("timing the target's forwards")
        process = PeerProcess(contender, self._threads)
        try:
            log.add_info(CURVE, process.load(LOAD_SECONDS))
        except PeerError as error:
            self._note(f"the target's forwards could not be timed: {error}")
        finally:
            process.close()

    def turn(self, round_number: int, prompt: Prompt, stop: Callable[[], bool]) -> Turn | None:
        """One prompt, by all that still stand; None where ``stop`` cut it short."""
        chosen = [name for name in self._contenders if self._takes_part(name, prompt)]
        random.Random(f"{self.config.seed}:{round_number}:{prompt.number}").shuffle(chosen)
        if stop():
            return None
        calibration, answers = self._calibrate(), dict[str, Answer]()
        for name in chosen:
            if stop():
                return None
            try:
                answers[name] = self._ask(name, prompt, self.config.max_new_tokens)
            except PeerError as error:
                self._fails(name, error)
        plain = self._body(answers[PLAIN])
        found = {name: _figures(answer) | {"equal": self._body(answer) == plain} for name, answer in answers.items()}
        failed = {name: {"error": error} for name, error in self.errors.items()}
        return {"calibration": calibration, "distinct": distinct_ngrams(plain), "answers": {**found, **failed}}

    def close(self) -> None:
        """End all processes."""
        while self._processes:
            self._processes.popitem()[1].close()

    def _takes_part(self, name: str, prompt: Prompt) -> bool:
        limit = self.config.peer_limit
        late = limit is not None and self._contenders[name].kind == "peer" and prompt.rank >= limit
        return name not in self.errors and not late

    def _calibrate(self) -> float:
        """Seconds of the same plain text as always: the first prompt's beginning."""
        times: list[float] = []
        tokens = min(CALIBRATION_TOKENS, self.config.max_new_tokens)
        while len(times) < MOST_CALIBRATIONS and sum(times) < CALIBRATION_SECONDS:
            try:
                times.append(self._ask(PLAIN, self.prompts[0], tokens).seconds)
            except PeerError as error:
                self._fails(PLAIN, error)
        return median(times)

    def _ask(self, name: str, prompt: Prompt, max_new_tokens: int) -> Answer:
        contender = self._contenders[name]
        process = self._process(contender)
        ask = Ask(tokens=prompt.tokens, text=prompt.text, max_new_tokens=max_new_tokens, extra=contender.ask)
        try:
            return process.ask(ask, self.config.time_limit)
        except PeerError as error:
            if error.fatal:
                del self._processes[contender.process_key]
            raise

    def _process(self, contender: Contender) -> PeerProcess:
        """Its process, started anew where it has ended: another that shares it may have brought it down."""
        key = contender.process_key
        if key not in self._processes:
            process = PeerProcess(contender, self._threads)
            try:
                self._infos[key] = process.load(LOAD_SECONDS)
            except BaseException:
                process.close()
                raise
            self._processes[key] = process
        return self._processes[key]

    def _fails(self, name: str, error: PeerError) -> None:
        if name == PLAIN:
            raise ModelError(f"plain decoding fails: {error}") from error
        self.errors[name] = str(error)
        self._note(f"{name} fails: {error}")

    def _body(self, answer: Answer) -> tuple[int, ...]:
        """Its tokens without an end token, which not every engine gives."""
        ended = answer.tokens and answer.tokens[-1] in self._eos
        return answer.tokens[:-1] if ended else answer.tokens


def _figures(answer: Answer) -> dict[str, Any]:
    """What a log keeps of an answer: how many tokens, not which."""
    return {**answer.as_dict(), "tokens": len(answer.tokens)}
