"""Tasks of EleutherAI's lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness) on our kernels.

``HarnessModel`` answers the three questions of the harness's ``LM`` interface in plain Python; ``as_lm`` wraps it in
the harness's own class, since that package is an extra.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantspec.calibrate.evaluate.config import EvalConfig
from quantspec.calibrate.evaluate.scoring import CHUNK
from quantspec.engine.config import did_you_mean
from quantspec.engine.engine import Engine
from quantspec.engine.llm import LLM
from quantspec.errors import ModelError, Unavailable, UsageError
from quantspec.kernels.packages import lacking
from quantspec.models.base import Cache
from quantspec.types import Batch, SamplingParams

_MAX_GENERATED = 256  # tokens, where a task names no limit: the harness's own default
_MEANINGLESS = {"num_beams": 1, "use_cache": True}  # what tasks carry over from transformers
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def require_harness() -> None:
    """Raises ``Unavailable`` where lm-evaluation-harness is missing or too old."""
    if missing := lacking("lm_eval", (0, 4, 13)):
        raise Unavailable(f"--tasks: {missing}", hint="pip install 'quantspec[lm-eval]'")


def run_tasks(config: EvalConfig, engine: Engine) -> dict[str, dict[str, Any]]:
    """The harness's ``results``: metrics by task. Raises ``UsageError`` for a task that it does not know,
    ``ModelError`` for one whose data it cannot load."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if config.include_path is None else str(config.include_path))
    names = [name for one in config.tasks for name in one.split(",") if name]
    for name in names:
        if not manager.match_tasks([name]) and not Path(name).is_file():
            raise UsageError(
                f"lm-evaluation-harness has no task {name!r}",
                hint=did_you_mean(name, manager.all_tasks) or "`lm-eval ls tasks` lists them",
            )
    try:
        manager.load(names)  # its data sets, which may be downloads; they are kept for what follows
    except Exception as error:  # of whatever loads them
        said = str(error).strip().partition("\n")[0]
        hint = "check the network, and --include-path for tasks of your own"
        raise ModelError(f"cannot load tasks {', '.join(names)}: {type(error).__name__}: {said}", hint=hint) from error
    with redirect_stdout(sys.stderr):  # where the harness prints its progress would stand our JSON
        found = simple_evaluate(
            as_lm(HarnessModel(engine)),
            tasks=names,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            task_manager=manager,
            log_samples=False,
        )
    return {task: {key: _plain(value) for key, value in row.items()} for task, row in found["results"].items()}


def _plain(value: Any) -> Any:
    """A metric as JSON has it: the harness gives numpy's numbers too."""
    return value if isinstance(value, str | int | float | None) else getattr(value, "item", lambda: str(value))()


class HarnessModel:
    """What the harness asks of a model, answered on the engine's own kernels and with its cache.

    The keys and values of one sequence are kept: the choices of a question share their prompt, which is then fed once.
    """

    def __init__(self, engine: Engine) -> None:
        assert engine.tokenizer is not None, "build loads one"
        self.engine, self.tokenizer, self.model = engine, engine.tokenizer, engine.model
        self.max_length = engine.max_context
        self._cache: Cache | None = None
        self._fed: list[int] = []
        first = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else next(iter(self.tokenizer.eos_ids), None)
        if first is None:
            raise ModelError(f"{engine.config.model} names neither a BOS nor an EOS token, and tasks need one")
        self.prefix_token = first
        """Stands before a text that nothing comes before."""

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """log p(continuation | context) in nats, and whether greedy decoding would say it.

        Blanks at the end of the context count to the continuation, for tokens begin with blanks. Of a pair longer than
        the model's context the end is scored.
        """
        blanks = len(context) - len(context.rstrip())
        if context and blanks < len(context):
            stem = context[: len(context) - blanks]
            before = self.tokenizer.encode(stem)
            after = self.tokenizer.encode(context + continuation)[len(before) :]
        else:
            before, after = [self.prefix_token], self.tokenizer.encode(context + continuation, add_special=False)
        return self.score(before, after)

    def loglikelihood_rolling(self, text: str) -> float:
        """log p(text) in nats, in windows of the model's context: each token is predicted once, the first from the
        BOS, and the last window looks back as far as it can."""
        tokens, size = self.tokenizer.encode(text, add_special=False), self.max_length
        total = 0.0
        for start in range(0, len(tokens), size):
            after = tokens[start : start + size]
            # One token less than fits stands before: the last is predicted and not fed.
            back = max(1, size + 1 - len(after))
            before = tokens[max(0, start - back) : start] or [self.prefix_token]
            total += self.score(before, after)[0]
        return total

    def score(self, before: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
        """Of the tokens ``after`` that follow ``before`` (at least one): the sum of their log-probabilities in nats,
        and whether each is the most likely one."""
        if not after:
            return 0.0, True
        tokens = [*before, *after][-self.max_length - 1 :]
        count = min(len(after), len(tokens) - 1)
        logs = torch.cat(list(self._log_probs(tokens[:-1], count)))
        targets = torch.tensor(tokens[-count:], device=logs.device)
        picked = logs.gather(1, targets[:, None])
        return float(picked.double().sum()), bool((logs.argmax(-1) == targets).all())

    @torch.no_grad()
    def _log_probs(self, inputs: list[int], count: int) -> Iterator[Tensor]:
        """Log-probabilities ``[.., V]`` that the last ``count`` of ``inputs`` give, chunk by chunk."""
        cache, start = self._shared(inputs, len(inputs) - count)
        self._fed = inputs
        while start < len(inputs):
            part = inputs[start : start + CHUNK]
            scored = min(len(part), max(0, start + len(part) - (len(inputs) - count)))
            logits = self.model.forward(Batch.chain(part, start, scored), [cache]).logits
            cache.commit(range(len(part)))
            start += len(part)
            if scored:
                yield logits.float().log_softmax(-1)

    def _shared(self, inputs: list[int], most: int) -> tuple[Cache, int]:
        """A cache that holds the returned number of ``inputs`` already, at most ``most``."""
        if self._cache is None or self._cache.chains_only:  # such a cache may not be cut
            self._cache, self._fed = self.model.new_cache(self.max_length, CHUNK), []
        shared = 0
        while shared < min(most, len(self._fed)) and self._fed[shared] == inputs[shared]:
            shared += 1
        self._cache.truncate(shared)
        return self._cache, shared

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Continue each context by its task's settings. Raises ``UsageError`` for a setting that we do not have."""
        settings = [(context, self.sampling(options)) for context, options in requests]
        llm, texts = LLM(self.engine), []
        for params, group in groupby(settings, key=lambda one: one[1]):
            room = self.max_length - params.max_new_tokens
            prompts = [(self.tokenizer.encode(context) or [self.prefix_token])[-room:] for context, _ in group]
            completions = llm.generate(prompts, params)
            texts += [one.text for one in (completions if isinstance(completions, list) else [completions])]
        return texts

    def sampling(self, options: Mapping[str, Any]) -> SamplingParams:
        """A task's ``generation_kwargs`` in our words."""
        given = {key: value for key, value in options.items() if (key, value) not in _MEANINGLESS.items()}
        until = given.pop("until", None) or ()
        named = [length for key in _LENGTHS if (length := given.pop(key, None)) is not None]
        length = int(named[0]) if named else _MAX_GENERATED
        sampled = given.pop("do_sample", float(given.get("temperature") or 0) > 0)
        unknown = given.keys() - set(_SAMPLING)
        if unknown:
            raise UsageError(f"a task asks for {min(unknown)}, which generation here does not have")
        if length >= self.max_length:
            raise UsageError(
                f"a task asks for {length} tokens, and the model's context ends at {self.max_length}",
                hint="leave the task out",
            )
        own = {key: value for key, value in given.items() if value is not None}
        own["temperature"] = float(own.get("temperature", 1.0)) if sampled else 0.0
        stop = tuple(one for one in ((until,) if isinstance(until, str) else until) if one)
        return SamplingParams(max_new_tokens=length, stop=stop, **{"seed": 0, **own})


def as_lm(model: HarnessModel) -> Any:
    """``model`` as an instance of the harness's ``LM``."""
    from lm_eval.api.model import LM

    class QuantSpecLM(LM):
        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return [model.loglikelihood(*one.args) for one in requests]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [model.loglikelihood_rolling(*one.args) for one in requests]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            return model.generate_until([one.args for one in requests])

    return QuantSpecLM()
