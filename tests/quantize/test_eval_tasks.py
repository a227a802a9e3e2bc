"""The answers that lm-evaluation-harness gets: log-likelihoods against plain forwards, texts against generation."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quantspec.calibrate.evaluate import tasks
from quantspec.calibrate.evaluate.config import EvalConfig
from quantspec.calibrate.evaluate.run import evaluate
from quantspec.calibrate.evaluate.tasks import HarnessModel, as_lm
from quantspec.engine.build import build
from quantspec.engine.llm import LLM
from quantspec.errors import ModelError, Unavailable, UsageError
from quantspec.models.load import load_model
from quantspec.types import Batch, SamplingParams


@pytest.fixture
def harness(model: Path) -> HarnessModel:
    return HarnessModel(build(EvalConfig(model=str(model)).engine(), print))


def plain(folder: Path, before: list[int], after: list[int]) -> tuple[float, bool]:
    """By one forward without any cache that was used before."""
    model, tokens = load_model(folder), [*before, *after]
    logs = model.forward(Batch.chain(tokens[:-1]), [model.new_cache(len(tokens), 1)]).logits.log_softmax(-1)
    rows, targets = logs[len(before) - 1 :], torch.tensor(after)
    return float(rows.gather(1, targets[:, None]).double().sum()), bool((rows.argmax(-1) == targets).all())


def test_loglikelihood_is_the_sum_over_the_continuation(harness: HarnessModel, model: Path) -> None:
    encode = harness.tokenizer.encode
    assert harness.loglikelihood("w5 w9 w11", " w7 w8") == plain(model, encode("w5 w9 w11"), encode("w7 w8"))
    assert harness.loglikelihood("", "w7 w8") == plain(model, [0], encode("w7 w8"))  # after the BOS
    assert harness.loglikelihood("w5", "") == (0.0, True)


def test_choices_share_their_prompt_and_keep_its_bits(
    harness: HarnessModel, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    forward = harness.model.forward

    def counted(batch: Batch, *rest: Any) -> Any:
        fed.append(len(batch.tokens))
        return forward(batch, *rest)

    monkeypatch.setattr(harness.model, "forward", counted)
    monkeypatch.setattr(tasks, "CHUNK", 4)
    prompt = list(range(3, 13))
    choices = [[20, 21], [20, 22, 23], [30], [20, 21]]
    found = [harness.score(prompt, choice) for choice in choices]
    # The prompt's last token is fed again: its row predicts the first token of the choice.
    assert fed == [4, 4, 3, 3, 1, 2]
    assert found == [plain(model, prompt, choice) for choice in choices]
    assert found[0] == found[3]


def test_greedy_continuations_are_told(harness: HarnessModel) -> None:
    said = LLM(harness.engine).generate("w5 w9 w11", SamplingParams(max_new_tokens=3, ignore_eos=True))
    before = harness.tokenizer.encode("w5 w9 w11")
    assert harness.score(before, list(said.token_ids))[1]  # type: ignore[union-attr]
    assert not harness.score(before, [*said.token_ids[:-1], 3 + said.token_ids[-1] % 60])[1]  # type: ignore[union-attr]


def test_rolling_predicts_each_token_once(harness: HarnessModel, model: Path) -> None:
    words = [3 + i * 7 % 60 for i in range(21)]
    text = " ".join(f"w{word}" for word in words)
    harness.max_length = 8
    # Windows of 8, 8 and 5 tokens; the last has 4 more before it, for 8 are fed.
    windows = [([0], words[:8]), ([words[7]], words[8:16]), (words[12:16], words[16:])]
    assert harness.loglikelihood_rolling(text) == sum(plain(model, *window)[0] for window in windows)
    harness.max_length = 64
    harness._cache = None
    assert harness.loglikelihood_rolling(text) == plain(model, [0], words)[0]
    assert harness.loglikelihood_rolling("") == 0.0


def test_of_a_pair_that_is_too_long_the_end_is_scored(harness: HarnessModel, model: Path) -> None:
    harness.max_length = 8
    prompt, choice = list(range(3, 30)), [40, 41]
    assert harness.score(prompt, choice) == plain(model, prompt[-7:], choice)


def test_generation(harness: HarnessModel) -> None:
    prompts, llm = ["w5 w9 w11", "w20"], LLM(harness.engine)
    plainly = [llm.generate(prompt, SamplingParams(max_new_tokens=9)).text for prompt in prompts]  # type: ignore[union-attr]
    options = {"until": [], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0, "num_beams": 1}
    assert harness.generate_until([(prompt, options) for prompt in prompts]) == plainly
    stop = plainly[0].split()[3]
    cut = harness.generate_until([(prompts[0], options | {"until": stop}), (prompts[1], options)])
    assert cut == [plainly[0].partition(stop)[0], plainly[1]]
    sampled = {"until": ["\n"], "max_gen_toks": 9, "do_sample": True, "temperature": 5.0}
    assert harness.generate_until([(prompts[0], sampled)]) == harness.generate_until([(prompts[0], sampled)])
    assert harness.sampling(sampled) == SamplingParams(max_new_tokens=9, temperature=5.0, stop=("\n",), seed=0)
    harness.max_length = 1000
    assert harness.sampling({"until": None}) == SamplingParams(max_new_tokens=256, seed=0)


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"max_gen_toks": 256}, {"typical_p": 0.5}])
def test_settings_that_cannot_be_met(harness: HarnessModel, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        harness.generate_until([("w5", options)])


@dataclass
class Instance:
    args: tuple[Any, ...]


def test_the_harness_class_asks_this_model(harness: HarnessModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in of its documented interface; the package itself comes below."""
    api = types.ModuleType("lm_eval.api.model")
    api.LM = type("LM", (), {"rank": 0})  # type: ignore[attr-defined]
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", api)
    lm = as_lm(harness)
    pairs = [("w5", " w6"), ("w5", " w7")]
    assert lm.loglikelihood([Instance(pair) for pair in pairs]) == [harness.loglikelihood(*pair) for pair in pairs]
    assert lm.loglikelihood_rolling([Instance(("w5 w6",))]) == [harness.loglikelihood_rolling("w5 w6")]
    texts = lm.generate_until([Instance(("w5", {"max_gen_toks": 3}))])
    assert texts == harness.generate_until([("w5", {"max_gen_toks": 3})])


def test_without_the_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "lacking", lambda *package: "the package lm_eval is not installed")
    with pytest.raises(Unavailable, match="not installed") as caught:
        evaluate(EvalConfig(model=str(model), tasks=("hellaswag",)), print)
    assert caught.value.hint == "pip install 'quantspec[lm-eval]'"


class TestWithTheHarness:
    @pytest.fixture(autouse=True)
    def package(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        pytest.importorskip("lm_eval")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def task(self, folder: Path) -> None:
        """Which of three words comes next, as JSON and YAML (of which JSON is a part)."""
        rows = [{"before": "w5 w9", "choices": ["w7", "w8", "w9"], "gold": i} for i in range(3)]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings = {
            "task": "next_word", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "doc_to_text": "{{before}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        (folder / "next_word.yaml").write_text(json.dumps(settings))

    def test_a_task_of_ones_own(self, model: Path, tmp_path: Path) -> None:
        self.task(tmp_path)
        report = evaluate(EvalConfig(model=str(model), tasks=("next_word",), include_path=tmp_path), print)
        assert report.perplexity is None
        # The same question with each answer called right once.
        assert report.tasks["next_word"]["acc,none"] == pytest.approx(1 / 3)

    def test_unknown_tasks_and_missing_data(self, model: Path, tmp_path: Path) -> None:
        self.task(tmp_path)
        with pytest.raises(UsageError, match="no task 'next_wort'") as caught:
            evaluate(EvalConfig(model=str(model), tasks=("next_wort",), include_path=tmp_path), print)
        assert caught.value.hint == "did you mean 'next_word'?"
        (tmp_path / "rows.jsonl").unlink()
        with pytest.raises(ModelError, match="cannot load tasks next_word"):
            evaluate(EvalConfig(model=str(model), tasks=("next_word",), include_path=tmp_path), print)
