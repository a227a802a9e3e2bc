import json
from pathlib import Path

import pytest
import torch
from tiny_eagle import CONFIG, HEAD_CONFIG, HEAD_DIM, HIDDEN, KV_HEADS, VOCAB, head_tensors, save, save_family
from torch import Tensor

from quantspec.core.drafter import TargetParts
from quantspec.core.verify import Verifier
from quantspec.drafters.cascade import Cascade
from quantspec.drafters.config import CascadeOptions, EagleOptions
from quantspec.drafters.draft_model import draft_model
from quantspec.drafters.eagle import Eagle
from quantspec.drafters.eagle_head import EagleHead, HeadConfig, NativeEagleHead, read_head
from quantspec.errors import ModelError, UsageError
from quantspec.kernels.cpu import library
from quantspec.models.load import load_model
from quantspec.types import Budget, SamplingParams


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    folders = save_family(tmp_path_factory.mktemp("eagle"))
    return {name: folder if name == "head" else load_model(folder) for name, folder in folders.items()}


# --- the native head --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [False, True])
def test_the_native_head_gives_the_same_outputs(tmp_path: Path, biases: bool) -> None:
    """A prompt, a chain and a tree level, one after the other; heads of 8 values, two to each of keys and values."""
    if library.usable() is not None:
        pytest.skip("no native library here")
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors, config = head_tensors(), HEAD_CONFIG
    if biases:
        config = HEAD_CONFIG | {"model_type": "qwen2"}
        widths = {"q": HIDDEN, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        tensors |= {f"layers.0.self_attn.{name}_proj.bias": random(width) for name, width in widths.items()}
    folder = save(tmp_path / "head", config, tensors)
    heads = [kind(*read_head(folder), torch.device("cpu"), torch.float32) for kind in (EagleHead, NativeEagleHead)]
    caches = [head.new_kv(40) for head in heads]
    for m, start, width, positions in ((19, 0, 19, slice(0, 19)), (1, 19, 1, slice(19, 20)), (3, 20, 6, slice(20, 21))):
        bias = torch.full((m, width), -torch.inf).triu(1 + width - m)
        inputs = random(m, HIDDEN), random(m, HIDDEN)
        a, b = (head.forward(*inputs, positions, kv, start, bias) for head, kv in zip(heads, caches, strict=True))
        # fp32 sums of up to 64 products in another order, through one layer
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*caches, rtol=1e-4, atol=1e-4)


# --- text -------------------------------------------------------------------------------------------------------------

PROMPTS = [[seed % VOCAB, (7 * seed) % VOCAB, 5] for seed in range(32)]
PARAMS = [SamplingParams(max_new_tokens=10), SamplingParams(max_new_tokens=10, temperature=0.8, top_p=0.95)] * 16


def drafters(family) -> dict:
    def cascade(model: str, inner, min_draft: int) -> Cascade:
        return Cascade(inner, Verifier(family[model], stage="intermediate"), CascadeOptions(min_draft=min_draft))

    def head() -> Eagle:
        return Eagle(family["head"], EagleOptions(top_k=3, depth=3))

    return {
        "eagle": head(),
        "draft": draft_model(family["relative"]),
        "cascade": cascade("relative", head(), 5),
        "cascade of strangers": cascade("stranger", head(), 5),
        "nested": cascade("relative", cascade("stranger", head(), 2), 4),
    }


@pytest.fixture(scope="module")
def plain(family, generate):
    return generate(family["target"], PROMPTS, PARAMS, eos=frozenset({9})).texts


@pytest.mark.parametrize(
    ("kind", "prompts", "least", "most"),
    [
        ("eagle", 32, 1.3, 3.5),
        ("draft", 32, 1.5, 5.0),
        ("cascade", 32, 1.5, 5.0),
        ("cascade of strangers", 6, 1.0, 1.5),
        ("nested", 10, 1.3, 5.0),
    ],
)
def test_text_is_that_of_plain_decoding(family, generate, plain, kind, prompts, least, most) -> None:
    """Greedy and sampled in turn."""
    drafter, eos = drafters(family)[kind], frozenset({9})
    run = generate(family["target"], PROMPTS[:prompts], PARAMS[:prompts], drafter, budget=Budget(10, 6), eos=eos)
    assert run.texts == plain[:prompts]
    assert least <= run.acceptance <= most  # proposals are accepted, and rejected


def test_stages_of_a_cascade(family, generate) -> None:
    run = generate(family["target"], PROMPTS[:6], PARAMS[:6], drafters(family)["cascade"])
    stages = {stage for verdicts in run.verdicts for verdict in verdicts for stage in verdict.stages}
    assert stages == {"eagle", "intermediate", "target"}


# --- loading ----------------------------------------------------------------------------------------------------------


def load(folder: Path, config: dict, tensors: dict[str, Tensor]) -> Eagle:
    drafter = Eagle(save(folder, config, tensors))

    class Target:
        vocab_size, hidden_size = VOCAB, HIDDEN
        backend = "known"

        def embed(self, tokens) -> Tensor:
            return torch.zeros(len(tokens), HIDDEN)

        def head(self, x: Tensor) -> Tensor:
            return torch.zeros(len(x), VOCAB)

    drafter.prepare(TargetParts(Target()))
    return drafter


def test_an_embedding_of_its_own_and_a_missing_bias_are_taken(tmp_path: Path) -> None:
    tensors = head_tensors() | {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN)}
    assert load(tmp_path / "embedding", HEAD_CONFIG, tensors)._head.embed_weight is not None
    del tensors["fc.bias"]
    published = {**CONFIG, "num_hidden_layers": 1, "bias": False}
    del published["model_type"]
    assert load(tmp_path / "no bias", published, tensors)._head.fc_bias is None


def test_a_head_may_have_biases_on_queries_keys_and_values(tmp_path: Path) -> None:
    tensors, config = head_tensors(), HEAD_CONFIG | {"model_type": "qwen2"}
    for name, size in (("q", HIDDEN), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM)):
        tensors[f"layers.0.self_attn.{name}_proj.bias"] = torch.ones(size)
    assert load(tmp_path / "qwen", config, tensors)._head.layer.qkv_bias.shape == (HIDDEN + 2 * KV_HEADS * HEAD_DIM,)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({}, {"fc.bias": None}, "no tensor fc.bias"),
        ({}, {"lm_head.weight": torch.ones(2, 2)}, r"lm_head.weight is \[2, 2\]"),
        ({}, {"fc.weight": torch.ones(HIDDEN, HIDDEN)}, "fc.weight is \\[32, 32\\]"),
        ({"num_hidden_layers": 2}, {}, "one plain Llama layer"),
        ({"hidden_size": 64, "num_attention_heads": 4}, {}, "target of width 64"),
        ({"vocab_size": 50}, {}, "50 tokens"),
        ({"quantspec": {"tua": {}}}, {}, "may only have"),
        ({"quantspec": {"tau": {"0.8": 0}}}, {}, "tau"),
        ({"quantspec": {"tau": [1]}}, {}, "tau"),
        ({"auto_map": {}}, {}, "auto_map"),
        ({"fc_norm": True}, {}, "key 'fc_norm'"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, {}, "EAGLE-3 head"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(tmp_path: Path, config: dict, change: dict, message: str) -> None:
    tensors = {name: tensor for name, tensor in (head_tensors() | change).items() if tensor is not None}
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "head", HEAD_CONFIG | config, tensors)


def test_a_target_that_hands_out_no_parts_and_a_pickle_are_refused(tmp_path: Path, family) -> None:
    class Bare:
        vocab_size, hidden_size = VOCAB, HIDDEN

    with pytest.raises(ModelError, match="does not hand out"):
        Eagle(family["head"]).prepare(TargetParts(Bare()))
    (tmp_path / "config.json").write_text(json.dumps(HEAD_CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickle"):
        Eagle(tmp_path).prepare(TargetParts(family["target"]))


def test_tau_is_linear_between_temperatures_above_0(family) -> None:
    config = HeadConfig.load(family["head"])
    assert config.tau_at(0.3) == config.tau_at(1.5) == 0.7
    several = HeadConfig(config.model, True, {0.5: 0.6, 1.0: 1.0})
    assert [several.tau_at(t) for t in (0.2, 0.5, 0.75, 1.0, 2.0)] == pytest.approx([0.6, 0.6, 0.8, 1.0, 1.0])
    assert HeadConfig(config.model, True, {}).tau_at(0.8) == 1.0
    # Greedy text has no noise: a tau of its own, or none.
    assert (several.tau_at(0.0), HeadConfig(config.model, True, {0.0: 0.4, 1.0: 1.0}).tau_at(0.0)) == (1.0, 0.4)
    assert HeadConfig(config.model, True, {0.0: 0.4, 1.0: 0.9}).tau_at(0.1) == 0.9


@pytest.mark.parametrize("options", [{"top_k": 0}, {"depth": 0}])
def test_impossible_trees_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        EagleOptions(**options)
