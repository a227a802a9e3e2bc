"""Quantized drafters: what is written, what it is worth, and that no text changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_eagle import VOCAB, head_tensors, model_folder, save, save_family
from tiny_eagle3 import IDS, head_folder
from tiny_peagle import peagle_folder

import quantspec
from quantspec.calibrate.quantize.config import QuantizeReport
from quantspec.calibrate.quantize.head_config import HeadQuantizeConfig
from quantspec.calibrate.quantize.head_kinds import is_head
from quantspec.calibrate.quantize.head_text import Text
from quantspec.calibrate.quantize.heads import run
from quantspec.calibrate.train.checkpoint import fake_quantize
from quantspec.calibrate.train.rollout import Rollout, fingerprint, write_rollouts
from quantspec.drafters.eagle3_files import read_eagle3
from quantspec.drafters.eagle3_head import Eagle3Head, IntegerEagle3Head, NativeEagle3Head
from quantspec.drafters.eagle_head import DRAFT_IDS, LM_HEAD, EagleHead, IntegerEagleHead, NativeEagleHead, read_head
from quantspec.drafters.peagle_files import read_peagle
from quantspec.errors import ModelError, UsageError
from quantspec.models.atomic import verify_manifest
from quantspec.models.resolve import resolve
from quantspec.numerics.scheme import Scheme
from quantspec.types import SamplingParams

GROUP = 32  # the tiny heads' width
PARAMS = [
    SamplingParams(max_new_tokens=40, ignore_eos=True, seed=1),
    SamplingParams(max_new_tokens=40, ignore_eos=True, seed=2, temperature=0.9, top_p=0.9),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target, heads of every kind, and text in the target's tokens."""
    root = tmp_path_factory.mktemp("heads")
    save_family(root)
    head_folder(root / "eagle3")
    peagle_folder(root / "peagle")
    peagle_folder(root / "peagle-path", rank=6)
    texts = [Rollout(torch.arange(n).mul(7).remainder(VOCAB), torch.zeros(n, 32).half(), 2, 0.0) for n in range(20, 36)]
    (root / "rollouts").mkdir()
    write_rollouts(root / "rollouts" / "part-0.safetensors", texts, fingerprint(root / "target"))
    return root


def quantized(root: Path, kind: str, out: Path, **options) -> QuantizeReport:
    given = {"group_size": GROUP, "target": root / "target", "calibration": root / "rollouts"} | options
    return run(HeadQuantizeConfig(model=root / kind, out=out, **given))


@pytest.mark.parametrize("kind", ["head", "eagle3", "peagle", "peagle-path"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_kind_reads_back_under_the_same_names(root: Path, tmp_path: Path, kind: str, method: str) -> None:
    report = quantized(root, kind, tmp_path / "out", method=method)
    read = {"head": read_head, "eagle3": read_eagle3}.get(kind, read_peagle)
    before, after = read(root / kind)[1], read(tmp_path / "out")[1]
    assert list(before) == list(after) or set(before) == set(after)
    assert is_head(tmp_path / "out")
    assert verify_manifest(tmp_path / "out")
    assert report.bytes_after < report.bytes_before
    rounded = {f"{result.name}.weight".replace("midlayer.", "layers.0.") for result in report.layers}
    assert rounded == set(after.packed)
    assert {result.method for result in report.layers} <= {method, "rtn"}
    for name, weight in before.items():
        if name not in rounded:
            assert torch.equal(after[name], weight), name
        elif method == "rtn":
            step = Scheme(4, GROUP, dtype="float32")
            assert (after[name] - weight.float()).abs().max() <= weight.abs().max() / 7, (name, step)


def test_gptq_beats_rounding_on_the_outputs_of_what_it_measured(tmp_path: Path) -> None:
    """The shipped head, whose inputs correlate."""
    options = {"model": resolve("default/eagle-target"), "target": resolve("default/target-w4"), "num_samples": 6}
    errors = {
        method: run(HeadQuantizeConfig(out=tmp_path / method, method=method, **options)) for method in ("rtn", "gptq")
    }
    weights = {method: read_head(tmp_path / method)[1]["fc.weight"] for method in errors}
    exact = read_head(resolve("default/eagle-target"))[1]["fc.weight"].float()
    assert (weights["rtn"] - exact).norm() < (weights["gptq"] - exact).norm()  # it is not the nearest
    fc = next(layer for layer in errors["gptq"].layers if layer.name == "fc")
    assert fc.method == "gptq"
    assert fc.error < 0.02  # rounding to nearest at 4 bits leaves about 1% of a Gaussian weight's power


@pytest.mark.parametrize("kind", ["head", "eagle3"])
def test_the_cpu_kernels_run_packed_weights_as_the_eager_head(root: Path, tmp_path: Path, kind: str) -> None:
    quantized(root, kind, tmp_path / "out", head_bits=8)
    where = torch.device("cpu"), torch.float32
    generator = torch.Generator().manual_seed(0)
    features, embeddings = torch.randn(2, 9, 32, generator=generator)
    bias = torch.full((9, 9), -torch.inf).triu(1)
    if kind == "head":
        kinds = EagleHead, NativeEagleHead, IntegerEagleHead
        heads = [one(*read_head(tmp_path / "out"), *where) for one in kinds]
        logits = [head.lm_head for head in heads]
    else:
        config, tensors, _ = read_eagle3(tmp_path / "out")
        heads = [one(config, tensors, *where) for one in (Eagle3Head, NativeEagle3Head, IntegerEagle3Head)]
        logits = [head.logits for head in heads]
    found = [head.forward(features, embeddings, slice(0, 9), head.new_kv(16), 0, bias) for head in heads]
    torch.testing.assert_close(*found[:2], rtol=1e-4, atol=1e-4)  # fp32 sums in another order
    rows = [each(found[0]) for each in logits]
    torch.testing.assert_close(*rows[:2], rtol=1e-4, atol=1e-4)
    # A row's inputs are rounded to 127ths of their largest, four times in a row: half a percent each.
    for exact, rounded in ((found[0], found[2]), (rows[0], rows[2])):
        assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.02


def test_a_head_that_borrows_its_targets_gets_the_rows_of_the_commonest_tokens(root: Path, tmp_path: Path) -> None:
    report = quantized(root, "head", tmp_path / "out", draft_vocab=20, head_bits=4)
    config, tensors = read_head(tmp_path / "out")
    counts = Text.read(root / "target", root / "rollouts", None, 0, VOCAB).counts
    ids = tensors[DRAFT_IDS]
    assert config.draft_vocab_size == len(ids) == len(tensors[LM_HEAD]) == 20
    assert int(counts[ids].min()) >= int(counts.sort(descending=True).values[20])
    assert LM_HEAD in tensors.packed
    assert any("20 of 48 tokens can be drafted" in note for note in report.notes)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "quantspec_manifest.json"} <= files


def test_a_draft_vocabulary_is_trimmed_further(root: Path, tmp_path: Path) -> None:
    quantized(root, "eagle3", tmp_path / "out", draft_vocab=11, method="rtn")
    config, tensors, ids = read_eagle3(tmp_path / "out")
    assert ids is not None
    assert config.draft_vocab_size == len(ids) == 11
    assert set(ids.tolist()) < set(IDS.tolist())
    before, rows = read_eagle3(root / "eagle3")[1]["lm_head.weight"], torch.searchsorted(IDS, ids)
    assert torch.equal(tensors["lm_head.weight"], before[rows])


@pytest.mark.parametrize("bits", [None, 8])
def test_a_path_network_loses_the_rows_of_the_tokens_that_go(root: Path, tmp_path: Path, bits: int | None) -> None:
    quantized(root, "peagle-path", tmp_path / "out", draft_vocab=11, head_bits=bits, method="rtn")
    (_, before, every), (config, after, ids) = read_peagle(root / "peagle-path"), read_peagle(tmp_path / "out")
    assert every is not None
    assert ids is not None
    assert (config.head.draft_vocab_size, config.path_rank, len(ids)) == (11, 6, 11)
    rows = torch.isin(every, ids)
    for name in ("path.lm_head.weight", *([] if bits else ["lm_head.weight"])):
        assert torch.equal(after[name], before[name][rows]), name
    assert torch.equal(after["path.up_proj.weight"], before["path.up_proj.weight"])


@pytest.mark.parametrize("options", [{}, {"head_bits": 4}, {"head_bits": 4, "draft_vocab": 1500}])
def test_text_is_that_of_plain_decoding(tmp_path: Path, options: dict[str, int]) -> None:
    """The shipped head; as the target's drafter."""
    run(
        HeadQuantizeConfig(
            resolve("default/eagle-target"),
            tmp_path / "w4",
            method="rtn",
            target=resolve("default/target-w4"),
            **options,
        )
    )
    heads = {"plain": quantspec.load("default", method="none")}
    heads["w4"] = quantspec.load("default", method="eagle", head=str(tmp_path / "w4"), tree_depth=3)
    for params in PARAMS:
        found = [llm.generate("Question: Tom has 4 hens.", params) for llm in heads.values()]
        assert found[0].token_ids == found[1].token_ids
        assert found[1].stats.acceptance_length > 1.5  # and it drafts


def test_without_a_target_scales_are_searched_on_weights(root: Path, tmp_path: Path) -> None:
    report = quantized(root, "eagle3", tmp_path / "out", target=None, calibration=None)
    assert {layer.method for layer in report.layers} == {"mse"}
    assert any("measures inputs, which takes --target" in note for note in report.notes)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("head", {"target": None, "head_bits": 4}, "borrows the LM head of its target"),
        ("head", {"target": None, "draft_vocab": 9}, "--draft-vocab counts tokens of the target's text"),
        ("eagle3", {"draft_vocab": 41}, "41 tokens of 40"),
        ("eagle3", {"draft_vocab": 0}, "at least 1"),
        ("head", {"method": "awq"}, "--method awq does not quantize"),
        ("head", {"bits": 1}, "bits"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_written(
    root: Path, tmp_path: Path, kind: str, options: dict, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        quantized(root, kind, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_another_target_and_a_quantized_head_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="was made for a target of width 32"):
        quantized(root, "head", tmp_path / "out", target=resolve("default/target-w4"))
    quantized(root, "head", tmp_path / "out", method="rtn")
    with pytest.raises(UsageError, match="exists already"):
        quantized(root, "head", tmp_path / "out")
    with pytest.raises(ModelError, match="is quantized already"):
        run(HeadQuantizeConfig(tmp_path / "out", tmp_path / "again"))


def test_a_damaged_quantized_head_is_refused(root: Path, tmp_path: Path) -> None:
    quantized(root, "eagle3", tmp_path / "out", method="rtn")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="no quantization_config says how"):
        read_eagle3(tmp_path / "out")


def test_models_are_no_heads(tmp_path: Path) -> None:
    assert not is_head(model_folder(tmp_path / "target"))
    assert is_head(save(tmp_path / "head", {"architectures": ["LlamaForCausalLM"]}, head_tensors()))


def test_training_rounds_what_will_be_stored() -> None:
    """The straight-through weights are those that `quantize --method rtn` stores, and gradients pass as if they were
    not rounded."""
    from quantspec.calibrate.train.distill import straight_through

    layer = torch.nn.Linear(64, 3, bias=False)
    scheme = Scheme(4, 32)
    rounded = straight_through(layer, scheme)["weight"]
    assert torch.equal(rounded.detach(), layer.weight + (fake_quantize(layer.weight, scheme) - layer.weight))
    rounded.square().sum().backward()
    assert torch.equal(layer.weight.grad, 2 * rounded.detach())
