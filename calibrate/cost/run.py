"""``quantspec tune``: measure a model and its drafters on this machine, and write the profile that the planner reads.

Forwards first, then every drafter at its widest; the planner ranks what follows from these; each drafter then runs
against plain decoding, as ``auto`` would run it, and the fastest is chosen. Every finished part is kept at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

from quantspec.calibrate.cost.config import TuneConfig
from quantspec.calibrate.cost.curve import INNER_WIDTHS, WIDTHS, Forwards, noise
from quantspec.calibrate.cost.drafts import Plain, failed, measure_drafter, measure_plain, widest, widest_nodes
from quantspec.calibrate.cost.found import Found, find
from quantspec.calibrate.cost.prompts import read_prompts
from quantspec.calibrate.cost.race import Race, Run
from quantspec.calibrate.cost.work import Work
from quantspec.calibrate.cost.workbench import Workbench
from quantspec.core.verify import Verifier
from quantspec.engine import here
from quantspec.engine.build import DEFAULT_TARGET, build
from quantspec.engine.costs import (
    FORMAT_VERSION,
    PLAIN,
    Candidate,
    CostCurve,
    Measured,
    Profile,
    Setting,
    file_name,
)
from quantspec.engine.planner import Plan, rank
from quantspec.errors import ModelError, QuantSpecError, ResourceError
from quantspec.models.fingerprint import fingerprint
from quantspec.models.resolve import resolve

Note = Callable[[str], None]

_SHARES = {"forwards": 0.15, "drafters": 0.45, "race": 0.4}
"""Of the time to measure."""
_RETRIES = 2
"""How often forwards are timed again where their times do not repeat."""
_PLAIN_PROMPTS = 3
_LIMITS = ("seconds", "max_noise", "prompts")
"""What may change when an interrupted tune goes on; of the prompts their tokens count."""


@dataclass(frozen=True)
class Tuned:
    """A profile, where it lies, how long it took to measure, and how noisy the machine was (0: times repeat)."""

    profile: Profile
    path: Path
    seconds: float
    noise: float


def tune(config: TuneConfig, out: Path | None, folder: Path, note: Note, again: bool = True) -> Tuned:
    """Measure what ``config`` names and write the profile to ``out`` (None: under its own name in ``folder``). Not
    ``again``: one that is there, holds here and knows these drafters is taken as it is.

    ``note`` hears what is being done. Raises ``UsageError`` or ``ModelError`` for models and prompts that cannot be
    had, ``ResourceError`` for a machine that is too noisy, whose old profile stays as it is.
    """
    began = perf_counter()
    if config.draft_model is not None:
        resolve(config.draft_model)  # a name that leads nowhere is said at once
    engine = build(config.engine(), note)
    target = resolve(DEFAULT_TARGET if config.model == "default" else config.model)
    machine, model = here.machine(engine.config), fingerprint(target)
    path = out or folder / file_name(model, machine)
    assert engine.tokenizer is not None, "build loads one"
    prompts = read_prompts(config.prompts, engine.tokenizer, engine.max_context, config.max_new_tokens, note)
    found = find(config.model, config.draft_model, config.head, note)[1:]
    kernels = here.kernels_of(engine.model, engine.config)
    if not again and (profile := _there(path, note)):
        refusal = profile.refusal(machine, model, kernels) or _other_drafters(profile, found)
        if refusal is None:
            return Tuned(profile, path, 0.0, 0.0)
        note(f"the profile {path} is measured anew: {refusal}")
    identity: dict[str, Any] = {"machine": machine, "model": model, "kernels": kernels, "prompts": prompts}
    identity |= {name: value for name, value in asdict(config).items() if name not in _LIMITS}
    identity["drafters"] = [[one.name, *_stamps(one)] for one in found]
    with Work(path, identity) as work:
        if work.resumed:
            note("going on with what an interrupted tune has measured")
        tuning = _Tuning(config, Workbench(engine), prompts, work, path, note)
        profile = tuning.profile(machine, model, kernels, found)
        profile.save(path)
        work.finish()
    return Tuned(profile, path, perf_counter() - began, tuning.noise)


def _there(path: Path, note: Note) -> Profile | None:
    """A profile that was measured before."""
    if not path.exists():
        return None
    try:
        return Profile.load(path)
    except ModelError as error:
        note(f"{error}: it is measured anew")
        return None


def _other_drafters(profile: Profile, found: Sequence[Found]) -> str | None:
    """Why a profile does not know all of these drafters, and these alone."""
    known = {(each.method, *sorted(each.parts.items())): each.weights for each in profile.candidates}
    wanted = {_key(one): _weights(one) for one in found}
    return None if known == wanted else "it was measured with other drafters"


def _key(one: Found) -> tuple[Any, ...]:
    return one.options.get("method", one.name), *sorted(_parts(one).items())


def _stamps(one: Found) -> list[Any]:
    """What a resumed run must find again of a drafter: its parts, and their files."""
    stamps: list[Any] = sorted(one.options.items())
    for name in sorted(set(one.options) - {"method"}):
        files = sorted(resolve(one.options[name]).glob("*.safetensors"))
        stamps += [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return stamps


class _Tuning:
    """The parts of one tune, in order; those that ``work`` has are not measured again."""

    def __init__(
        self,
        config: TuneConfig,
        bench: Workbench,
        prompts: Sequence[Sequence[int]],
        work: Work,
        path: Path,
        note: Note,
    ) -> None:
        self.config, self.bench, self.prompts, self.work, self.note = config, bench, prompts, work, note
        self.path, self.noise = path, 0.0
        self._seconds = {part: share * config.seconds for part, share in _SHARES.items()}

    def profile(self, machine: Mapping[str, str | int], model: str, kernels: str, found: Sequence[Found]) -> Profile:
        """Measure everything."""
        plain = self._plain()
        candidates = tuple(self._candidate(one, plain, len(found)) for one in found)

        created = datetime.now(UTC).isoformat(timespec="seconds")
        known = Profile(
            FORMAT_VERSION, machine, model, kernels, created, plain.target, plain.overhead, candidates, (), PLAIN
        )
        measured, failures = self._race(known, rank(known))
        for setting, failure in failures:
            late = known.candidate(setting)
            candidates = tuple(replace(each, failure=failure) if each is late else each for each in candidates)
        best = max(measured, key=lambda each: each.tokens_per_second).setting
        return replace(known, candidates=candidates, measured=tuple(measured), chosen=best)

    def _plain(self) -> Plain:
        done = self.work.get("target")
        if done is None:
            engine = self.bench.plain
            self.note(f"timing forwards of {engine.config.model} on {engine.model.backend}")
            share = self._seconds["forwards"] / 2
            curve = self._curve(engine.verifier, WIDTHS, share)
            some = self.prompts[:_PLAIN_PROMPTS]
            done = {"curve": curve.as_dict(), "noise": self.noise}
            done["overhead"] = measure_plain(self.bench, some, self.config.max_new_tokens)
            self.work.put("target", done)
        self.noise = done["noise"]
        return Plain(CostCurve.from_dict(done["curve"]), done["overhead"])

    def _curve(self, verifier: Verifier, widths: Sequence[int], seconds: float) -> CostCurve:
        """Times that repeat. Raises ``ResourceError`` where none do."""
        threads = self.bench.plain.torch_threads
        forwards = Forwards(verifier, self.config.contexts, widths, threads, self.config.seed)
        for attempt in range(1 + _RETRIES):
            forwards.run(seconds)
            self.noise = noise(forwards.times)
            if self.noise <= self.config.max_noise:
                return forwards.curve()
            if attempt < _RETRIES:
                self.note(f"times of the same forward differ by {self.noise:.0%}: timing more of them")
        raise self._too_noisy("forward")

    def _too_noisy(self, what: str) -> ResourceError:
        kept = f"; the profile {self.path} stays as it is" if self.path.is_file() else ""
        return ResourceError(
            f"this machine is too noisy to measure: times of the same {what} differ by {self.noise:.0%}, more than "
            f"{self.config.max_noise:.0%}{kept}",
            hint="end what else runs here and try again, or raise --max-noise",
        )

    def _candidate(self, one: Found, plain: Plain, count: int) -> Candidate:
        part = f"drafter {one.name}"
        done = self.work.get(part)
        if done is None:
            found = self._measure(one, plain, self._seconds["drafters"] / count)
            done = found.as_dict()
            self.work.put(part, done)
        candidate = replace(Candidate.from_dict(done), weights=_weights(one))
        if candidate.failure:
            self.note(f"{one.name} fails: {candidate.failure}")
        return candidate

    def _measure(self, one: Found, plain: Plain, seconds: float) -> Candidate:
        if one.error:
            return failed(Setting(one.name), one.error)
        self.note(f"measuring {one.name}")
        method, top_k = one.options["method"], self.bench.plain.config.tree_top_k
        options = widest(method, widest_nodes(plain.target), top_k, self.config.max_new_tokens)
        setting = Setting(method, _parts(one), options)
        curve = None
        if method == "cascade":
            try:
                self.bench.draft_model(setting)
            except QuantSpecError as error:
                return failed(setting, str(error))
            curve = self._intermediate(setting)
        new_tokens = self.config.max_new_tokens
        return measure_drafter(self.bench, setting, self.prompts, new_tokens, plain, curve, seconds)

    def _intermediate(self, setting: Setting) -> CostCurve:
        part = f"forwards {setting.parts['draft_model']}"
        done = self.work.get(part)
        if done is None:
            verifier = Verifier(self.bench.draft_model(setting), stage="intermediate")
            done = self._curve(verifier, INNER_WIDTHS, self._seconds["forwards"] / 4).as_dict()
            self.work.put(part, done)
        return CostCurve.from_dict(done)

    def _race(self, known: Profile, plans: Sequence[Plan]) -> tuple[list[Measured], list[tuple[Setting, str]]]:
        """Each drafter and plain decoding, measured, in the planner's order; and those that failed, with the reason."""
        settings = [plan.setting for plan in plans]
        listed = [setting.as_dict() for setting in settings]
        done = self.work.get("race")
        if done is None or done["settings"] != listed:
            done = {"settings": listed, "runs": []}
        self.note(f"running {len(settings)} settings against each other")
        planned = [plan.rate for plan in plans]
        race = Race(self.bench, known, settings, planned, [Run.from_dict(run) for run in done["runs"]])

        def keep(run: Run) -> None:
            done["runs"].append(run.as_dict())
            self.work.put("race", done)

        race.run(self.prompts, self.config.max_new_tokens, self._seconds["race"], keep, self.config.seed)
        self.noise = max(self.noise, race.noise())
        if self.noise > self.config.max_noise:
            self.work.put("race", None)  # the next tune runs them again
            raise self._too_noisy("text")
        measured = list[Measured]()
        for number, plan in enumerate(plans):
            if number in race.failures:
                self.note(f"{plan.setting.method} fails: {race.failures[number]}")
            else:
                speed = race.speed(number)
                measured.append(Measured(plan.setting, plan.rate, speed.value, speed.low, speed.high))
        return measured, [(settings[number], why) for number, why in race.failures.items()]


def _weights(one: Found) -> dict[str, str]:
    """The fingerprints of a drafter's parts; none of one that has no weights, whose row says why."""
    try:
        return {part: fingerprint(resolve(name)) for part, name in _parts(one).items()}
    except ModelError:
        return {}


def _parts(one: Found) -> dict[str, str]:
    return {name: _lasting(value) for name, value in one.options.items() if name != "method"}


def _lasting(name: str) -> str:
    """A part's name that means the same in every folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
