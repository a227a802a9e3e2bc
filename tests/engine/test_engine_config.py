"""Options: unknown ones come with the nearest known one, wrong values with the rule; vLLM's keys are understood."""

from __future__ import annotations

from typing import Any

import pytest

from quantspec.engine.config import METHODS, EngineConfig
from quantspec.errors import UsageError


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        ({"modell": "x"}, "unknown option 'modell'", "'model'"),
        ({"zzz": 1}, "unknown option 'zzz'", "known: model"),
        ({"method": "eagel"}, "unknown method 'eagel'", "'eagle'"),
        ({"method": "hydra"}, "unknown method 'hydra'", "draft"),
        ({"mode": "exakt"}, "unknown mode 'exakt'", "'exact'"),
        ({"backend": "cpu-fp16"}, "unknown backend 'cpu-fp16'", "'cpu-fp32'"),
        ({"backend": "tpu"}, "unknown backend 'tpu'", "cpu-int8, cpu-fp32"),
        ({"dtype": "bfloat"}, "unknown dtype 'bfloat'", "did you mean 'bfloat16'"),
        ({"dtype": None}, "unknown dtype None", "one of auto, bfloat16"),
        ({"head_bits": 5}, "unknown head_bits 5", "one of 4, 8, 16"),
        ({"activations": "bf16"}, "unknown activations 'bf16'", None),
        ({"rule": "typical"}, "unknown rule 'typical'", "ratio"),
        ({"head": ["a", "b"]}, "head must be a folder or a name, not .'a', 'b'.", None),
        ({"speculative_config": {"method": "eagle", "model": 5}}, "head must be a folder or a name, not 5", None),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens must be a whole number of at least 0, not -1", None),
        ({"min_draft": 0}, "min_draft", None),
        ({"max_batch": True}, "max_batch must be a whole number", None),
        ({"max_context": "10"}, "max_context must be a whole number", None),
        ({"threads": 100_000}, "threads must be at most 1024, not 100000", "as many as cores"),
        (
            {"prompt_lookup_min": 5, "prompt_lookup_max": 3},
            "prompt_lookup_max must be a whole number of at least 5",
            None,
        ),
        ({"rule": "ratio", "method": "eagle"}, "the ratio rule verifies chains", "default rule"),
        ({"speculative_config": {"num_spec": 3}}, "unknown speculative_config key 'num_spec'", "num_speculative"),
        ({"speculative_config": {"method": "eagle4"}}, "method 'eagle4' is not supported", "ngram"),
        ({"speculative_config": {"num_speculative_tokens": 3}}, "needs a method or a model", None),
        ({"speculative_config": "ngram"}, "must be a mapping", None),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        EngineConfig.from_mapping(options)
    assert "\n" not in str(caught.value)
    assert hint is None or hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("speculative", "expected"),
    [
        (
            {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
            {"method": "lookup", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
        ),
        ({"model": "ngram"}, {"method": "lookup", "draft_model": None}),
        ({"method": "eagle", "model": "org/head"}, {"method": "eagle", "head": "org/head", "draft_model": None}),
        ({"method": "eagle3", "model": "org/head"}, {"method": "eagle3", "head": "org/head", "draft_model": None}),
        ({"method": "draft_model", "model": "org/small"}, {"method": "draft", "draft_model": "org/small"}),
        ({"model": "org/small", "num_speculative_tokens": 7}, {"method": "draft", "draft_model": "org/small"}),
        ({"method": "cascade", "model": "a", "head": "b"}, {"method": "cascade", "draft_model": "a", "head": "b"}),
    ],
)
def test_vllm_keys_are_understood(speculative: dict[str, Any], expected: dict[str, Any]) -> None:
    config = EngineConfig.from_mapping({"model": "target", "speculative_config": speculative})
    assert config.model == "target"
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize("method", [method for method in METHODS if method != "auto"])
def test_draft_width(method: str) -> None:
    assert EngineConfig(method=method, num_speculative_tokens=3).max_nodes == (0 if method == "none" else 3)
    assert (EngineConfig(method=method).max_nodes > 0) == (method != "none")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("draft_tensor_parallel_size", 2, "on one device"),
        ("max_model_len", 4096, "--max-context"),
        ("disable_by_batch_size", 8, "--method none"),
        ("enforce_eager", True, "quantspec doctor"),
        ("quantization", "gptq", "read from its files"),
        ("rejection_sample_method", "standard", "the target's own tokens"),
    ],
)
def test_vllm_keys_without_effect_are_taken_and_told(key: str, value: Any, reason: str) -> None:
    told: list[str] = []
    config = EngineConfig().with_speculative({"method": "ngram", key: value}, told.append)
    assert config == EngineConfig(method="lookup")
    assert len(told) == 1
    assert f"key {key} has no effect" in told[0]
    assert reason in told[0]


@pytest.mark.parametrize(
    ("key", "value", "hint"),
    [
        ("revision", "main", "name its folder"),
        ("quantization", "fp8", "quantspec quantize"),
        ("speculative_token_tree", "[(0,), (0, 0)]", "tree_depth"),
        ("rejection_sample_method", "synthetic", "the text is the target's"),
        ("posterior_threshold", 0.1, "typical acceptance"),
        ("num_speculative_tokens_per_batch_size", {"1": 5}, "quantspec tune"),
    ],
)
def test_vllm_keys_that_would_change_what_is_asked_for_are_refused(key: str, value: Any, hint: str) -> None:
    with pytest.raises(UsageError, match=f"key {key} .* is not supported") as caught:
        EngineConfig().with_speculative({"method": "ngram", key: value})
    assert hint in str(caught.value.hint)


def test_vllm_nulls_are_keys_that_are_not_there() -> None:
    keys = {"method": "ngram", "revision": None, "quantization": None, "prompt_lookup_max": None}
    told: list[str] = []
    assert EngineConfig().with_speculative(keys, told.append) == EngineConfig(method="lookup")
    assert told == []


def test_without_a_listener_a_key_without_effect_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="enforce_eager has no effect"):
        config = EngineConfig.from_mapping({"speculative_config": {"method": "ngram", "enforce_eager": True}})
    assert config == EngineConfig(method="lookup")
