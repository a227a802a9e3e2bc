"""Rounding a drafter for its target's acceptance: on a drafter of another depth, cut and resumed, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quantspec.calibrate.quantize import acceptance
from quantspec.calibrate.quantize.config import AcceptanceReport, MethodOptions, QuantizeConfig
from quantspec.calibrate.quantize.run import run
from quantspec.calibrate.quantize.work import WorkFolder
from quantspec.errors import ModelError, UsageError
from quantspec.models import atomic

OPTIONS = MethodOptions(learn_steps=20, acceptance_steps=40, acceptance_rate=0.05)


@pytest.fixture
def drafting(configure: Callable[..., QuantizeConfig], model: Path) -> QuantizeConfig:
    """The first layer of the test's model as a drafter for the whole, in 2 bits."""
    folder = Path(shutil.copytree(model, model.parent / "drafter"))
    settings = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers" not in name or ".layers.0." in name}
    atomic.save_tensors(folder / "model.safetensors", kept)
    config = configure("drafted", bits=2, method="learned", options=OPTIONS)
    return replace(config, model=folder, target=model, eval_samples=0)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_acceptance_rises_and_scales_stay(drafting: QuantizeConfig) -> None:
    report = run(drafting)
    assert report.acceptance is not None
    assert 0 < report.acceptance.before < report.acceptance.after < 1
    assert 0 < report.acceptance.changed < 0.5
    assert any("acceptance" in note for note in report.notes)
    run(replace(drafting, target=None, out=drafting.out.with_name("plain")))
    tuned, plain = weights(drafting.out), weights(drafting.out.with_name("plain"))
    differing = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert tuned.keys() == plain.keys()
    assert differing
    assert all(name.endswith("weight_packed") for name in differing)
    # The report of a finished run is read back whole.
    assert run(drafting) == report


def test_total_variation_is_the_chance_of_refusal(drafting: QuantizeConfig, model: Path) -> None:
    run(replace(drafting, target=None))
    drafter = acceptance.Drafter.load(drafting.out, "cpu")
    ids = torch.randint(3, 60, (3, 16), generator=torch.Generator().manual_seed(0))
    targets = acceptance.Targets.of(model, ids, "cpu")
    with torch.no_grad():
        places = torch.arange(48)
        p = targets.probs(torch.arange(3), places)
        q = drafter.log_probs(ids, places, {}).exp()
    # fp32 sums of 64 words: seven digits each.
    assert acceptance.acceptance(drafter, targets, torch.arange(3), drafter.quantized) == pytest.approx(
        float(torch.minimum(p, q).sum(1).mean()), abs=1e-5
    )


def test_a_cut_last_stage_ends_in_the_same_bytes(drafting: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run(drafting)
    again = replace(drafting, out=drafting.out.with_name("again"))
    monkeypatch.setattr(WorkFolder, "_take_next", lambda self: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        run(again)  # new shards lie there, and count, and none has taken its place
    monkeypatch.undo()
    monkeypatch.setattr(acceptance, "learn", None)  # need not be done anew
    run(again)
    whole, resumed = weights(drafting.out), weights(again.out)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not list(again.out.glob("*.next"))


def test_new_shards_that_do_not_count_are_dropped(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out", "same", 1, resume=True)
    work.record({"a": torch.zeros(2)}, [])
    atomic.save_tensors(work.shard(0).with_suffix(".next"), {"a": torch.ones(2)})
    work.close()
    work = WorkFolder(tmp_path / "out", "same", 1, resume=True)
    assert len(work.results) == 1
    assert torch.equal(weights(work.path)["a"], torch.zeros(2))
    assert not list(work.path.glob("*.next"))
    work.replace_layers([{"a": torch.ones(2)}], AcceptanceReport(0.1, 0.2, 0.3))
    assert torch.equal(weights(work.path)["a"], torch.ones(2))
    work.close()
    assert WorkFolder(tmp_path / "out", "same", 1, resume=True).acceptance == AcceptanceReport(0.1, 0.2, 0.3)


def test_refusals(drafting: QuantizeConfig, model: Path) -> None:
    with pytest.raises(UsageError, match="--target goes with learned rounding"):
        replace(drafting, method="gptq")
    settings = json.loads((model / "config.json").read_text())
    tensors = load_file(model / "model.safetensors")
    other = Path(shutil.copytree(model, model.parent / "other"))
    (other / "config.json").write_text(json.dumps(settings | {"vocab_size": 128}))
    embedding = tensors["model.embed_tokens.weight"]
    atomic.save_tensors(
        other / "model.safetensors", tensors | {"model.embed_tokens.weight": torch.cat([embedding, embedding])}
    )
    with pytest.raises(ModelError, match="128 words and its drafter 64"):
        run(replace(drafting, target=other))


def test_hardness_goes_from_soft_to_hard() -> None:
    assert acceptance.hardness(0.1) == 0.0
    assert acceptance.hardness(0.5) == pytest.approx(0.5)
    assert acceptance.hardness(0.9) == 1.0
