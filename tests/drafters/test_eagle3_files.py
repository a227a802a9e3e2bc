"""EAGLE-3 heads on disk: every published layout, what is refused, and what is written."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_eagle import HIDDEN, VOCAB, save
from tiny_eagle3 import FLAT, IDS, LAYER, SPECULATORS, head_folder, head_tensors, midlayer, vocabulary

from quantspec.drafters.eagle3_files import read_eagle3, read_eagle3_config, save_flat, save_speculators
from quantspec.drafters.eagle3_head import FLAGS
from quantspec.errors import ModelError

THREE = {"taps": 3}
TOP, NESTED = "eagle_aux_hidden_state_layer_ids", {"use_aux_hidden_state": True}
HUGGING_FACE = {
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.3",
    "use_cache": True,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
"""What every library leaves in a config.json."""
LAYOUTS = {
    # yuhuili/EAGLE3-*: no layer ids, and so the default ones of its target.
    "authors": (FLAT | HUGGING_FACE, midlayer(head_tensors(**THREE)), None),
    # AngelSlim: the same names, and an embedding of its own.
    "angelslim": (
        FLAT | HUGGING_FACE | {"target_hidden_size": HIDDEN},
        midlayer(head_tensors(**THREE)) | {"embed_tokens.weight": torch.ones(VOCAB, HIDDEN)},
        None,
    ),
    # SpecForge: ids by the layer that a stream leaves.
    "specforge": (
        FLAT | HUGGING_FACE | {"eagle_config": NESTED | {TOP: [1, 3, 5]}},
        midlayer(head_tensors(**THREE)),
        (1, 3, 5),
    ),
    # The same streams by the layer that they enter: a list that begins with 2.
    "entering": (
        FLAT | {"eagle_config": NESTED | {TOP: [2, 4, 6]}},
        midlayer(head_tensors(**THREE)),
        (1, 3, 5),
    ),
    # ModelOpt: numbered layers, no t2d, and all its own switches.
    "modelopt": (
        FLAT
        | HUGGING_FACE
        | {
            "eagle_config": NESTED
            | {
                TOP: [1, 3, 5],
                "use_input_layernorm_in_first_layer": True,
                "use_last_layernorm": True,
                "use_mtp_layernorm": False,
                "next_layer_regular": True,
                "parallel_draft_step": 1,
                "parallel_draft_heads_num_layers": None,
            }
        },
        {name: tensor for name, tensor in head_tensors(**THREE).items() if name != "t2d"},
        (1, 3, 5),
    ),
    # speculators: the layers' config nested, ids by the layer that a stream enters.
    "speculators": (
        SPECULATORS | {TOP: [2, 4, 6], "norm_before_residual": True, "transformer_layer_config": LAYER | HUGGING_FACE},
        head_tensors(**THREE),
        (1, 3, 5),
    ),
    "speculators 3.1": (
        SPECULATORS | {TOP: [0, 4, 6], "fc_norm": True, "norm_output": True},
        head_tensors(**THREE, flags=("fc_norm", "norm_output")),
        ("embed", 3, 5),
    ),
    "speculators, layers": (
        SPECULATORS | {"transformer_layer_config": LAYER | {"num_hidden_layers": 2}, "norm_before_fc": True},
        head_tensors(layers=2, flags=("norm_before_fc",)),
        (0, 1),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_is_read(tmp_path: Path, layout: str) -> None:
    raw, written, taps = LAYOUTS[layout]
    config, tensors, ids = read_eagle3(save(tmp_path / "head", raw, written))
    assert config.taps == taps
    assert config.flags == {name for name in FLAGS if raw.get(name)}
    assert ids is not None
    assert ids.equal(IDS)
    for name, tensor in tensors.items():
        assert tensor.equal(written.get(name, written.get(name.replace("layers.0.", "midlayer."))))
    assert len(tensors) == len(written) - len({"d2t", "t2d"} & written.keys())


def test_default_layers_are_those_that_published_heads_read(tmp_path: Path) -> None:
    raw, tensors, _ = LAYOUTS["authors"]
    config = read_eagle3_config(save(tmp_path / "head", raw, tensors))
    assert config.taps_of(32) == (1, 15, 28)  # the streams that enter 2, 16 and 29
    assert config.taps_of(None) is None


def test_a_head_on_the_whole_vocabulary_needs_no_map(tmp_path: Path) -> None:
    for name, more in (("without", {}), ("with", vocabulary(torch.arange(VOCAB)))):
        raw = {key: value for key, value in FLAT.items() if key != "draft_vocab_size"}
        ids = read_eagle3(save(tmp_path / name, raw, head_tensors(**THREE, ids=None) | more))[2]
        assert ids is None if not more else ids.equal(torch.arange(VOCAB))


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    renamed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in (head_tensors(**THREE) | renamed).items() if tensor is not None}


WRONG = vocabulary(IDS)


@pytest.mark.parametrize(
    ("more", "tensors", "message"),
    [
        ({}, changed(norm__weight=None), "has no tensor norm.weight"),
        ({}, changed(layers__0__hidden_norm__weight=None), "has no tensor layers.0.hidden_norm.weight"),
        ({}, changed(fc_norm__0__weight=torch.ones(HIDDEN)), "fc_norm.0.weight has no place.*|flag missing"),
        ({}, changed(lm_head__weight_scale=torch.ones(1)), "no quantization_config says how"),
        ({}, changed(midlayer__hidden_norm__weight=torch.ones(HIDDEN)), "both as midlayer and as layers.0"),
        ({}, changed(fc__weight=torch.ones(HIDDEN, HIDDEN)), r"fc.weight is \[32, 32\].*asks for \[32, 96\]"),
        ({}, changed(d2t=None, t2d=None), "40 of 48 tokens but has no tensor d2t"),
        ({}, changed(d2t=WRONG["d2t"] + 9), "outside the target's 48"),
        ({}, changed(d2t=IDS - IDS[0] - 40), "outside the target's 48"),
        ({}, changed(d2t=WRONG["d2t"] * 0 - torch.arange(40)), "one twice"),
        ({}, changed(d2t=WRONG["d2t"].float()), "whole numbers"),
        ({}, changed(d2t=WRONG["d2t"][1:].clone()), "must be 40 whole numbers"),
        ({}, changed(t2d=~WRONG["t2d"]), "name different tokens"),
        ({"fc_norms": True}, changed(), "key 'fc_norms', .*not known.*did you mean 'fc_norm'"),
        ({"gated": True}, changed(), "key 'gated'"),
        ({"fc_norm": True}, changed(), "has no tensor fc_norm.0.weight"),
        ({"fc_norm": "yes"}, changed(), "must be true or false"),
        ({"draft_vocab_size": 49}, changed(), "draft_vocab_size must be a whole number from 1 to 48"),
        ({"target_hidden_size": -1}, changed(), "target_hidden_size must be"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, changed(), "use_mtp_layernorm True"),
        ({"eagle_config": {"parallel_draft_step": 4}}, changed(), "parallel_draft_step 4"),
        ({"eagle_config": [1, 3, 5]}, changed(), "eagle_config is not an object"),
        ({}, changed(norm__weight=torch.full((HIDDEN,), torch.nan)), "norm.weight does not hold finite numbers"),
        ({}, changed(norm__weight=torch.ones(HIDDEN, dtype=torch.int32)), "norm.weight has int32 values"),
        ({"eagle_config": {TOP: [1, 3, 5]}, TOP: [1, 3, 5]}, changed(), "twice, and differently"),
        ({TOP: [1.5]}, changed(), "layer ids must be"),
        ({TOP: []}, changed(), "layer ids must be"),
        ({"attention_bias": True}, changed(), "biases"),
        ({"architectures": ["LlamaForCausalLM"]}, changed(), "does not describe an EAGLE-3 head"),
        ({"quantspec": {"tua": {}}}, changed(), "may only have"),
        ({"quantspec": {"tau": {"1": -1}}}, changed(), "tau"),
        ({"auto_map": {}}, changed(), "auto_map"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, more: dict, tensors: dict, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_eagle3(save(tmp_path / "head", FLAT | more, tensors))
    text = f"{caught.value} hint: {caught.value.hint}"
    assert "\n" not in text
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mask_token_id": 3}, "mask_token_id"),
        ({"transformer_layer_config": []}, "not an object"),
        ({"transformer_layer_config": LAYER | {"draft_depth": 3}}, "draft_depth"),
        ({"speculators_model_type": "dflash", "architectures": ["DFlashSpeculator"]}, "does not describe"),
    ],
)
def test_what_does_not_fit_of_speculators_is_refused(tmp_path: Path, more: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_eagle3(save(tmp_path / "head", SPECULATORS | more, head_tensors()))


def test_fp64_becomes_fp32(tmp_path: Path) -> None:
    norm = torch.linspace(0.5, 1.5, HIDDEN, dtype=torch.float64)
    _, read, _ = read_eagle3(save(tmp_path / "head", FLAT, changed(norm__weight=norm)))
    assert read["norm.weight"].dtype == torch.float32
    assert torch.equal(read["norm.weight"], norm.float())


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLAT))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickle") as caught:
        read_eagle3(tmp_path)
    assert "safetensors" in (caught.value.hint or "")


@pytest.mark.parametrize("flags", [(), ("fc_norm", "norm_output")])
@pytest.mark.parametrize("layers", [1, 2])
def test_both_written_forms_are_read_as_what_was_written(tmp_path: Path, flags: tuple[str, ...], layers: int) -> None:
    config, tensors, ids = read_eagle3(head_folder(tmp_path / "head", flags=flags, layers=layers))
    save_flat(tmp_path / "flat", config, tensors, ids)
    names = {"verifier": "org/target", "verifier_architectures": ["LlamaForCausalLM"]}
    save_speculators(tmp_path / "speculators", config, tensors, ids, **names)
    for form in ("flat", "speculators"):
        again, same, same_ids = read_eagle3(tmp_path / form)
        assert (again.taps, again.flags, again.model) == (config.taps, config.flags, config.model)
        assert same_ids.equal(ids)
        assert same.keys() == tensors.keys()
        assert all(same[name].equal(tensors[name]) for name in same)
    flat, nested = (json.loads((tmp_path / form / "config.json").read_text()) for form in ("flat", "speculators"))
    assert flat["architectures"] == ["LlamaForCausalLMEagle3"]
    assert flat[TOP] == nested[TOP] == [1, 2]  # the streams that enter layers 1 and 2
    assert "eagle_config" not in flat  # SGLang would add one
    assert nested["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert nested["transformer_layer_config"]["num_hidden_layers"] == layers
