"""EAGLE-3, P-EAGLE and Medusa heads exported in each form: read again they are the same, and the command says what the
engine must be told."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantspec.calibrate.export.config import ExportConfig
from quantspec.calibrate.export.run import run
from quantspec.drafters import eagle3_files, medusa_files, peagle_files
from quantspec.drafters.eagle3_head import Eagle3Config
from quantspec.drafters.medusa_files import MedusaConfig
from quantspec.drafters.peagle_files import PEagleConfig
from quantspec.errors import ModelError, UsageError
from quantspec.models import atomic
from quantspec.models.config import ModelConfig
from quantspec.models.resolve import FAMILY
from quantspec.models.tensors import TensorStore

TARGET, IDS = FAMILY / "target-w4", torch.arange(0, 80, 2)


def shape(layers: int = 1, **settings: Any) -> Eagle3Config:
    raw = json.loads((FAMILY / "eagle-target/config.json").read_text())
    layer = {key: value for key, value in raw.items() if key not in ("quantspec", "bias", "architectures")}
    layer["num_hidden_layers"] = layers
    return Eagle3Config(ModelConfig.of(layer), layer, 256, len(IDS), **settings)


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator).bfloat16() for name, size in shapes.items()}


def eagle3(folder: Path, **settings: Any) -> Path:
    config = shape(**settings)
    eagle3_files.save_flat(folder, config, random(config.shapes()), IDS)
    return folder


def peagle(folder: Path, rank: int = 0, **settings: Any) -> Path:
    config = PEagleConfig(shape(layers=2, **settings), 99, rank)
    peagle_files.save_flat(folder, config, random(config.shapes()), IDS)
    return folder


def medusa(folder: Path, vocab: int = 4096) -> Path:
    config = MedusaConfig(4, 1, 256, vocab, len(IDS))
    medusa_files.save_medusa(folder, config, random(config.shapes()), IDS)
    return folder


def speculative_config(command: str) -> dict[str, Any]:
    words = shlex.split(command)
    return json.loads(words[words.index("--speculative-config") + 1])


def same(before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
    """Tensors and vocabulary of two heads."""
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(tensor, after[1][name]) for name, tensor in before[1].items())
    assert torch.equal(before[2], after[2])


def test_eagle3_in_the_form_of_speculators(tmp_path: Path) -> None:
    flags = frozenset({"fc_norm", "norm_output"})
    head, out = eagle3(tmp_path / "head", taps=(0, 2, 5), flags=flags), tmp_path / "out"
    config = ExportConfig(model=TARGET, to="vllm", out=out, draft_model=head, draft_form="speculators")
    report = run(replace(config, num_speculative_tokens=4))
    raw = json.loads((out / "draft/config.json").read_text())
    assert (raw["speculators_model_type"], raw["architectures"]) == ("eagle3", ["Eagle3Speculator"])
    # vLLM takes a flag that is missing for true, or for false: each is named.
    assert [raw[name] for name in ("fc_norm", "norm_output", "norm_before_residual", "norm_before_fc")] == [
        True, True, False, False
    ]  # fmt: skip
    assert raw["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]  # the layers that the streams enter
    assert raw["speculators_config"]["verifier"] == {"name_or_path": str(out), "architectures": ["LlamaForCausalLM"]}
    assert raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert raw["transformer_layer_config"]["model_type"] == "llama"
    assert speculative_config(report.commands[0]) == {
        "method": "eagle3", "model": str(out / "draft"), "num_speculative_tokens": 4
    }  # fmt: skip
    before, after = eagle3_files.read_eagle3(head), eagle3_files.read_eagle3(out / "draft")
    same(before, after)
    assert (after[0].flags, after[0].taps) == (flags, (0, 2, 5))
    assert atomic.verify_manifest(out / "draft")


@pytest.mark.parametrize("form", ["flat", "speculators"])
def test_peagle_in_both_forms(tmp_path: Path, form: Any) -> None:
    head, out = peagle(tmp_path / "head"), tmp_path / "out"
    report = run(ExportConfig(model=TARGET, to="vllm", out=out, draft_model=head, draft_form=form))
    assert speculative_config(report.commands[0]) == {
        "method": "eagle3", "model": str(out / "draft"), "num_speculative_tokens": 3, "parallel_drafting": True
    }  # fmt: skip
    raw = json.loads((out / "draft/config.json").read_text())
    assert raw["mask_token_id"] == 99
    assert raw["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]  # named, though the head leaves them out
    assert raw["architectures"] == ["LlamaForCausalLMEagle3" if form == "flat" else "PEagleSpeculator"]
    assert {"mask_hidden", "embed_tokens.weight", "layers.1.mlp.up_proj.weight"} <= set(TensorStore(out / "draft"))
    before, after = peagle_files.read_peagle(head), peagle_files.read_peagle(out / "draft")
    same(before, after)
    assert after[0].mask_token_id == 99


@pytest.mark.parametrize("form", ["flat", "speculators"])
def test_no_engine_is_given_a_path_network(tmp_path: Path, form: Any) -> None:
    """What is left is the paper's head; a note says so."""
    head, out = peagle(tmp_path / "head", rank=8), tmp_path / "out"
    report = run(ExportConfig(model=TARGET, to="vllm", out=out, draft_model=head, draft_form=form))
    config, tensors, ids = peagle_files.read_peagle(out / "draft")
    assert config.path_rank == 0
    same((config, tensors, ids), (config, *peagle_files.read_peagle(peagle(tmp_path / "bare"))[1:]))
    assert any("path network" in note for note in report.notes)


def test_medusa(tmp_path: Path, models_by_form: dict[str, Path]) -> None:
    head, out = medusa(tmp_path / "head"), tmp_path / "out"
    report = run(ExportConfig(model=TARGET, to="vllm", out=out, draft_model=head))
    assert speculative_config(report.commands[0]) == {
        "method": "medusa", "model": str(out / "draft"), "num_speculative_tokens": 4
    }  # fmt: skip
    same(medusa_files.read_medusa(head), medusa_files.read_medusa(out / "draft"))
    with pytest.raises(ModelError, match="for a target of width 256 and 4000 tokens"):
        run(ExportConfig(model=TARGET, to="vllm", out=tmp_path / "other", draft_model=medusa(tmp_path / "m", 4000)))


def test_a_quantized_head_is_written_dense(tmp_path: Path) -> None:
    from quantspec.calibrate.export.draft_eagle3 import in_one_dtype
    from quantspec.drafters.head_tensors import HeadTensors

    tensors = {"norm.weight": torch.ones(4).bfloat16(), "fc.weight": torch.randn(4, 4)}
    dense = in_one_dtype(HeadTensors(tensors, {"fc.weight": None}))  # type: ignore[dict-item]
    assert {tensor.dtype for tensor in dense.values()} == {torch.bfloat16}
    assert torch.equal(dense["fc.weight"], tensors["fc.weight"].bfloat16())


def test_what_engines_do_not_run(tmp_path: Path) -> None:
    out, heads = tmp_path / "out", {"eagle3": eagle3, "peagle": peagle, "medusa": medusa}
    folders = {name: write(tmp_path / name) for name, write in heads.items()}
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("eagle3", "SGLang does not read the speculators form", {"to": "sglang", "draft_form": "speculators"}),
        ("peagle", "SGLang does not run P-EAGLE heads", {"to": "sglang"}),
        ("medusa", "SGLang does not run Medusa heads", {"to": "sglang"}),
        ("medusa", "no EAGLE-3 or P-EAGLE head", {"to": "vllm", "draft_form": "speculators"}),
        ("medusa", "a drafting head, which transformers does not run", {"to": "transformers"}),
    ]
    for name, complaint, options in cases:
        with pytest.raises((ModelError, UsageError), match=complaint):
            run(ExportConfig(model=TARGET, out=out, draft_model=folders[name], **options))
    for draft in (FAMILY / "eagle-target", FAMILY / "intermediate-w4"):
        with pytest.raises(UsageError, match="no EAGLE-3 or P-EAGLE head"):
            run(ExportConfig(model=TARGET, out=out, to="vllm", draft_model=draft, draft_form="speculators"))
    normed = peagle(tmp_path / "normed", flags=frozenset({"norm_output"}))
    with pytest.raises(ModelError, match="it has norm_output"):
        run(ExportConfig(model=TARGET, out=out, to="vllm", draft_model=normed, draft_form="speculators"))
    assert not out.exists()
