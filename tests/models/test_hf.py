"""HFModel on tiny random models of many families: every row equals the model's own plain forward over its path."""

import json

import pytest
import torch

from quantspec.errors import ModelError
from quantspec.models.hf import HFModel
from quantspec.models.hf_cache import MAX_SNAPSHOTS
from quantspec.types import Batch

VOCAB = 48
# Differences are fp32 rounding: about 1e-6 of logits of size 1 to 30. A wrong mask, position or state gives above 1e-2.
TOLERANCE = 1e-4
WINDOW = 6  # shorter than the sequences below, so that masks must respect it
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
OLD_SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
TREES = {
    "gpt2": OLD_SHAPE,
    "gpt_neox": SHAPE,
    "opt": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "phi3": SHAPE | {"sliding_window": WINDOW},
    "llama": SHAPE,
    "qwen3": SHAPE,
    "mistral": SHAPE | {"sliding_window": WINDOW},
    "gemma2": SHAPE | MIXED | {"query_pre_attn_scalar": 8},
    "gemma3_text": SHAPE | MIXED,
    "gpt_oss": SHAPE | MIXED | {"num_local_experts": 4},
    "cohere": SHAPE,
}
CHAINS = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "window_size": WINDOW,
        "attention_types": [[["global", "local"], 1]],
    },
}
RECURRENT = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "jamba": SHAPE
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "lfm2": SHAPE | {"layer_types": ["conv", "full_attention"]},
}
FAMILIES = TREES | CHAINS | RECURRENT


def make_module(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(sorted(FAMILIES).index(family))
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, pad_token_id=None, **FAMILIES[family]
    )
    module = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:  # the usual 0.02 would leave attention almost uniform: mistakes would not show
                parameter.normal_(0, 0.3)
    return module


@pytest.fixture(scope="module")
def models():
    """Made once per family, on demand."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = HFModel(make_module(family))
        return made[family]

    return get


def plain(model, tokens):
    with torch.no_grad():
        return model.module(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


def tokens_of(count, seed):
    return torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_rows(model, cache, committed, tokens, parents, num_logits=None):
    """Forward rows past ``cache`` and compare each with the plain forward over the committed tokens and its path."""
    batch = Batch.of([(tokens, parents)], [cache.length], None if num_logits is None else [num_logits])
    logits = model.forward(batch, [cache]).logits
    expected = {}
    for path in batch.ancestors():
        if path[-1] not in set(parents):  # a leaf: its plain forward has the rows of the whole path
            rows = plain(model, [*committed, *(tokens[i] for i in path)])[len(committed) :]
            expected |= dict(zip(path, rows, strict=True))
    first = len(tokens) - len(logits)
    for i, row in enumerate(logits):
        torch.testing.assert_close(row, expected[first + i], atol=TOLERANCE, rtol=0)


def chain_parents(count):
    return range(-1, count - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_chains_prefill_in_chunks_partial_commits_and_truncation(models, family):
    model = models(family)
    cache = model.new_cache(100, 8)
    committed = []
    prompt = tokens_of(13, seed=1)
    for start, end, num_logits in ((0, 5, 0), (5, 6, 1), (6, 13, 3)):
        check_rows(model, cache, committed, prompt[start:end], chain_parents(end - start), num_logits)
        cache.commit(range(end - start))
        committed += prompt[start:end]
    for round_, (rows, kept) in enumerate([(4, 2), (1, 1), (5, 0), (3, 3), (6, 1), (4, 2), (1, 1)]):
        draft = tokens_of(rows, seed=10 + round_)
        check_rows(model, cache, committed, draft, chain_parents(rows))
        cache.commit(range(kept))
        committed += draft[:kept]
        assert cache.length == len(committed)
    for length in (len(committed), len(committed) - 1, 15, 4):  # the last is before all snapshots
        cache.truncate(length)
        del committed[length:]
        tokens = tokens_of(3, seed=length)
        check_rows(model, cache, committed, tokens, chain_parents(3))
        cache.commit([0, 1])
        committed += tokens[:2]
    # rows of a forward that nobody committed (an interrupt, say) leave nothing behind
    model.forward(Batch.chain(tokens_of(4, seed=3), cache.length), [cache])
    check_rows(model, cache, committed, tokens_of(2, seed=4), chain_parents(2))


@pytest.mark.parametrize("family", TREES)
def test_trees_and_commits_of_paths(models, family):
    model = models(family)
    assert not model.chains_only, model.notes
    cache = model.new_cache(100, 16)
    committed = tokens_of(9, seed=2)
    check_rows(model, cache, [], committed, chain_parents(9), 1)
    cache.commit(range(9))
    for round_, (parents, path) in enumerate(
        [
            ([-1, -1, 0, 0, 1, 3, 4], [0, 3, 5]),
            ([-1, 0, 1, -1, 0], [0, 4]),
            ([-1, -1, -1], [2]),
            ([-1, -1, 0, 2, 3, 4, 5, 6, 7], [0, 2, 3, 4, 5, 6, 7, 8]),  # deeper than the window, slots unlike depths
            ([-1, 0, 1, -1], [0, 1]),  # a lag of accepted rows, then a branch
            ([-1, -1], []),
        ]
    ):
        tokens = tokens_of(len(parents), seed=20 + round_)
        check_rows(model, cache, committed, tokens, parents)
        cache.commit(path)
        committed += [tokens[i] for i in path]
        assert cache.length == len(committed)
    cache.truncate(12)
    check_rows(model, cache, committed[:12], tokens_of(4, seed=9), [-1, -1, 0, 1])


def test_what_each_family_was_found_to_take(models):
    for family in CHAINS:
        assert models(family).chains_only, family
        assert "takes chains only" in models(family).notes[0]
    for family in RECURRENT:
        cache = models(family).new_cache(8, 8)
        assert cache.chains_only, family
        assert "cannot be cut" in models(family).notes[-1]
    assert not models("llama").notes
    assert not models("llama").row_invariant


def test_recurrent_replay_after_many_rejections_and_long_drafts(models):
    for family in ("mamba", "mamba2", "jamba"):
        model = models(family)
        cache = model.new_cache(200, 64)
        committed = tokens_of(5, seed=5)
        check_rows(model, cache, [], committed, chain_parents(5), 0)
        cache.commit(range(5))
        for round_ in range(9):  # rejections only: the replay grows past its limit and is read on its own
            draft = tokens_of(4, seed=30 + round_)
            check_rows(model, cache, committed, draft, chain_parents(4), 2)
            cache.commit(range(3))
            committed += draft[:3]
        assert len(cache._snapshots) <= MAX_SNAPSHOTS
        draft = tokens_of(40, seed=6)  # read anew from the start by models that would step through it
        check_rows(model, cache, committed, draft, chain_parents(40), 3)
        cache.commit(range(39))
        committed += draft[:39]
        check_rows(model, cache, committed, draft[:2], chain_parents(2))


def test_ragged_batches(models):
    for family in ("gemma3_text", "mamba"):
        model = models(family)
        prompts = [tokens_of(count, seed=count) for count in (4, 11, 1)]
        caches = [model.new_cache(50, 8) for _ in prompts]
        batch = Batch.of([(prompt, chain_parents(len(prompt))) for prompt in prompts], [0, 0, 0], [1, 11, 0])
        output = model.forward(batch, caches, taps=("norm",))
        expected = torch.cat([plain(model, prompts[0])[-1:], plain(model, prompts[1])])
        torch.testing.assert_close(output.logits, expected, atol=TOLERANCE, rtol=0)
        assert output.logits.dtype == torch.float32
        assert output.taps["norm"].shape == (16, model.hidden_size)
        for cache, prompt in zip(caches, prompts, strict=True):
            cache.commit(range(len(prompt)))
        rows = [([7, 8], [-1, 0]), ([9], [-1]), ([1, 2, 3], [-1, 0, 1])]
        logits = model.forward(Batch.of(rows, [4, 11, 1]), caches).logits
        expected = torch.cat([plain(model, [*p, *r])[-len(r) :] for p, (r, _) in zip(prompts, rows, strict=True)])
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma2", "cohere", "bloom", "mamba", "lfm2"])
def test_taps_embedding_norm_and_head(models, family):
    model = models(family)
    tokens = tokens_of(6, seed=7)
    taps = ("embed", 0, 1, "norm")
    output = model.forward(Batch.chain(tokens, 0, 2), [model.new_cache(9, 9)], taps)
    with torch.no_grad():
        theirs = model.module(
            input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False
        ).hidden_states
    if family == "mamba":  # leaves out the embeddings, and appends the norm to both layers
        theirs = (model.embed(tokens)[None], *theirs)
    else:  # the last entry is after the norm: no entry is after layer 1
        theirs = (*theirs[:2], None, theirs[-1])
    for tap, expected in zip(taps, theirs, strict=True):
        if expected is not None and not (
            family == "opt" and tap == "norm"
        ):  # OPT's hidden states stop short of its head
            torch.testing.assert_close(output.taps[tap], expected[0], atol=TOLERANCE, rtol=0)
    assert output.taps[1].shape == output.taps["embed"].shape == (6, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.head(output.taps["norm"])[-2:], output.logits, atol=TOLERANCE, rtol=0)
        if family == "opt":  # a projection stands between its norm and its head
            with pytest.raises(ModelError, match="final norm of OPTForCausalLM"):
                model.final_norm(output.taps[1])
        else:
            torch.testing.assert_close(model.final_norm(output.taps[1]), output.taps["norm"], atol=TOLERANCE, rtol=0)
    if family == "llama":
        torch.testing.assert_close(model.embed(tokens), output.taps["embed"], atol=0, rtol=0)


def test_taps_of_a_replay_are_of_the_new_rows_alone(models):
    model = models("mamba")
    tokens = tokens_of(8, seed=8)
    cache = model.new_cache(20, 8)
    model.forward(Batch.chain(tokens, 0), [cache])
    cache.commit(range(6))  # two rejected: six are replayed from the start
    output = model.forward(Batch.chain(tokens[6:], 6), [cache], taps=(0, "norm"))
    whole = model.forward(Batch.chain(tokens, 0), [model.new_cache(20, 8)], taps=(0, "norm"))
    for tap in (0, "norm"):
        torch.testing.assert_close(output.taps[tap], whole.taps[tap][6:], atol=TOLERANCE, rtol=0)


def test_sizes(models):
    model = models("gpt2")
    assert (model.vocab_size, model.hidden_size, model.max_positions) == (VOCAB, 32, 128)
    assert model.weight_bytes == sum(tensor.nbytes for tensor in (*model.module.parameters(), *model.module.buffers()))
    assert models("mamba").max_positions > 10**9


def test_flash_attention_takes_chains_only(models):
    model = models("llama")
    model.config._attn_implementation = "flash_attention_2"
    try:
        assert "flash_attention_2" in model._why_no_trees()
    finally:
        model.config._attn_implementation = "eager"
    try:
        assert model._try(tree=True) is None
    finally:
        model.config._attn_implementation = "sdpa"


def test_half_precision_passes_its_own_probe():
    model = HFModel(make_module("qwen3").bfloat16())
    assert not model.chains_only
    output = model.forward(Batch.chain([1, 2, 3]), [model.new_cache(8, 8)], taps=(0,))
    assert output.logits.dtype == torch.float32
    assert output.taps[0].dtype == torch.bfloat16


def test_models_that_cannot_be_used_are_named():
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", vocab_size=VOCAB, **sizes))
    with pytest.raises(ModelError, match="BertLMHeadModel cannot be used"):  # it sees both ways
        HFModel(bert)
    config = AutoConfig.for_model(
        "rwkv", vocab_size=VOCAB, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2
    )
    with pytest.raises(ModelError, match="RwkvForCausalLM has no cache"):
        HFModel(AutoModelForCausalLM.from_config(config))


@pytest.fixture
def folder(tmp_path, models):
    models("gpt2").module.save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_load_from_a_folder(folder, models, capfd):
    model = HFModel.load(folder)
    torch.testing.assert_close(plain(model, [1, 2, 3]), plain(models("gpt2"), [1, 2, 3]), atol=0, rtol=0)
    assert capfd.readouterr().out == ""
    assert HFModel.load(folder, dtype=torch.bfloat16).parts.dtype == torch.bfloat16


def test_load_refuses_code_unknown_architectures_and_damage(folder):
    edit_config(folder, auto_map={"AutoModelForCausalLM": "code.Model"})
    with pytest.raises(ModelError, match="auto_map"):
        HFModel.load(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))

    edit_config(folder, model_type="martian", architectures=["MartianForCausalLM"])
    with pytest.raises(ModelError, match="MartianForCausalLM") as caught:
        HFModel.load(folder)
    assert "\n" not in str(caught.value)
    edit_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"], n_layer=3)
    with pytest.raises(ModelError, match=r"has no tensor transformer\.h\.2"):  # and not a random third layer
        HFModel.load(folder)
    edit_config(folder, n_layer=2, n_embd=16)
    with pytest.raises(ModelError, match=r"c_attn\.bias is \[96\], and config\.json says \[48\]"):
        HFModel.load(folder)

    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        HFModel.load(folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="pickle"):
        HFModel.load(folder)
