"""Shape-scaled models: the small model's numbers, text and acceptance, in every form that is written."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import quantspec
from quantspec.benchmarks.scaled.config import GROUP, INTERMEDIATES, SHARE, ScaleBench, lm_rows, model_bytes
from quantspec.benchmarks.scaled.run import SUMMARY, run
from quantspec.benchmarks.scaled.sheet import Dense, Noise, Packed, Sheet
from quantspec.benchmarks.shapes import SHAPES, parse_shape
from quantspec.calibrate.export.gguf import export_gguf
from quantspec.errors import UsageError
from quantspec.models.load import load_model
from quantspec.models.resolve import FAMILY
from quantspec.numerics.affine import dequantize, quantize
from quantspec.numerics.packing import unpack_weight
from quantspec.numerics.scheme import Scheme
from quantspec.types import Batch, SamplingParams

# Four times as wide as the family's members, so that every norm is scaled by a power of two.
TARGET = "1b,hidden=1024,inner=2048,layers=9,heads=8,kv_heads=4,vocab=4352"
INTERMEDIATE = "1b,hidden=512,inner=512,layers=3,heads=4,kv_heads=4,vocab=4352"
# Twice as wide, and with larger heads: norms and rotation are rounded.
ODD = "8b,hidden=512,inner=768,layers=8,heads=4,kv_heads=2,vocab=4224,tied=0"


def scale(out: Path, shape: str = TARGET, bits: int = 4, only: tuple[str, ...] = ()) -> Path:
    intermediate = f"{INTERMEDIATE},vocab={parse_shape(shape).vocab}"
    run(ScaleBench(out, shape, intermediate, bits, only=only), lambda line: None)
    return out


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scale(tmp_path_factory.mktemp("scaled") / "family")


@dataclass(frozen=True)
class Read:
    """What a model makes of some tokens, as far as the small one has it, and the logits of the other tokens."""

    logits: torch.Tensor
    normed: torch.Tensor
    masked: torch.Tensor


def read(folder: Path, backend: str, count: int = 24) -> Read:
    model, tokens = load_model(folder, backend=backend), torch.randint(4096, (count,), generator=torch.Generator())
    out = model.forward(Batch.chain(tokens.tolist()), [model.new_cache(count, 0)], ["norm"])
    size = 128 if "intermediate" in folder.name else 256
    return Read(out.logits[:, :4096], out.taps["norm"][:, :size], out.logits[:, 4096:])


@pytest.mark.parametrize("name", ["target-w4", "intermediate-w4"])
@pytest.mark.parametrize("backend", ["cpu-int8", "cpu-fp32"])
def test_states_have_the_same_bits_where_the_width_is_multiplied_by_a_power_of_four(
    family: Path, name: str, backend: str
) -> None:
    small, large = read(FAMILY / name, backend), read(family / name, backend)
    assert torch.equal(small.normed, large.normed)
    # The constant adds 2^-20 or so to every logit of a real token, in fp32: two roundings of numbers up to 16.
    assert torch.allclose(small.logits, large.logits, rtol=0, atol=4e-6)
    assert large.masked.max() < -60  # e^-60 of 124,000 tokens is nothing beside one logit above 0


@pytest.mark.parametrize("bits", [4, 16])
def test_other_shapes_say_the_same_up_to_rounding(tmp_path: Path, bits: int) -> None:
    name = "target-w4" if bits == 4 else "target"
    small = read(FAMILY / name, "reference-fast")
    large = read(scale(tmp_path / "odd", ODD, bits, ("target",)) / name, "reference-fast")
    # Nine layers in fp32, each of which rounds by 6e-8 of logits up to 16; 1e-5 was seen.
    assert torch.allclose(small.logits, large.logits, rtol=0, atol=1e-4)
    assert large.masked.max() < -60


METHODS = {
    "draft": {"draft_model": "intermediate-w4"},
    "eagle": {"head": "eagle-target-w4"},
    "eagle3": {"head": "eagle3-target-w4"},
    "peagle": {"head": "peagle-target-w4"},
    "medusa": {"head": "medusa-target"},
    "cascade": {"draft_model": "intermediate-w4", "head": "eagle-intermediate"},
}


@pytest.mark.parametrize("method", METHODS)
def test_text_and_acceptance_are_the_small_models(family: Path, method: str) -> None:
    found = []
    for folder in (FAMILY, family):
        # Heads that ship in 16 bits are scaled in 8.
        member = {key: folder / name for key, name in METHODS[method].items()}
        parts = {key: str(path if path.is_dir() else f"{path}-w8") for key, path in member.items()}
        llm = quantspec.load(str(folder / "target-w4"), method=method, **parts)
        prompt = "Question: Tom has 3 boxes of 12 pencils and gives away 7. How many are left?\nAnswer:"
        for temperature in (0.0, 0.8):
            params = SamplingParams(max_new_tokens=32, temperature=temperature, seed=5, ignore_eos=True)
            done = llm.generate(prompt, params)
            found.append((done.token_ids, done.stats.target_forwards))
    small, large = found[:2], found[2:]
    assert [text for text, _ in small] == [text for text, _ in large]
    # A draft on the edge may fall the other way where a head was rounded to 8 bits, and nowhere else.
    rounded = any("w4" not in part for part in METHODS[method].values())
    assert all(abs(a - b) <= rounded for (_, a), (_, b) in zip(small, large, strict=True))


def test_transformers_computes_the_same_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = scale(tmp_path / "dense", ODD, 16, ("target",)) / "target"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(4096, (24,), generator=torch.Generator())
    logits = model(tokens[None]).logits[0]
    own = read(FAMILY / "target", "reference-fast")
    # As above: two implementations of the same sums.
    assert torch.allclose(own.logits, logits[:, :4096], rtol=0, atol=1e-4)
    assert logits[:, 4096:].max() < -60


def test_a_gguf_export_computes_the_same_logits(tmp_path: Path) -> None:
    folder = scale(tmp_path / "odd", ODD, 4, ("target",)) / "target-w4"
    export_gguf(folder, tmp_path / "target.gguf")
    own, exported = read(folder, "reference-fast"), read(tmp_path / "target.gguf", "reference-fast")
    # Scales become float16, which bfloat16 ones of this size fit into exactly; the rest is the order of sums.
    assert torch.allclose(own.logits, exported.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [Packed(Scheme(4), Noise(1)), Packed(Scheme(8), Noise(1)), Dense(Noise(1))])
def test_a_sheet_is_random_but_for_what_is_put_and_silenced(make: Packed | Dense) -> None:
    sheet, small = make(48, 512), torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, cols = torch.arange(5) * 3 + 1, torch.arange(96) + 140
    sheet.silence(torch.arange(128, 256))
    sheet.put(small, rows, cols)
    weight = dense(sheet, make)
    rounded = small.float() if isinstance(make, Dense) else dequantize(quantize(small.float(), make.scheme))
    assert torch.equal(weight[rows[:, None], cols], rounded)
    weight[rows[:, None], cols] = 0
    assert not weight[:, 128:256].any()
    random = torch.cat((weight[:, :128], weight[:, 256:]), dim=1)
    assert 0.5 < float(random.norm(dim=1).mean() / 0.75**0.5) < 1.5  # rows of size 1, of which three quarters are left
    assert float((random == 0).float().mean()) < 0.1


def dense(sheet: Sheet, make: Packed | Dense) -> torch.Tensor:
    tensors = {name.removeprefix("x."): tensor for name, tensor in sheet.tensors("x").items()}
    return tensors["weight"].float() if isinstance(make, Dense) else dequantize(unpack_weight(tensors, make.scheme))


@pytest.mark.parametrize(("row", "value"), [(0, 1.0), (3, -(2.0**15))])
def test_a_mark_is_one_value_in_its_group(row: int, value: float) -> None:
    make = Packed(Scheme(4), Noise(1))
    sheet = make(4, 256)
    sheet.silence(torch.arange(128, 256))
    sheet.mark(torch.tensor([row]), 128, value)
    weight = dense(sheet, make)
    assert float(weight[row, 128]) == value
    assert weight[:, 128:].count_nonzero() == 1


def test_presets_cost_an_eighth_to_a_ninth() -> None:
    for name, intermediate in INTERMEDIATES.items():
        assert 8 <= model_bytes(SHAPES[name], 4) / model_bytes(intermediate, 4) <= 9


def test_an_lm_head_has_at_most_the_tokens_that_it_can_draft() -> None:
    shape = SHAPES["70b"]
    assert lm_rows(shape, 1e12, 1, 4, used=3072, vocab=4096) == shape.vocab - 1024
    assert lm_rows(shape, 0, 1, 4, used=3000, vocab=4096) == 3200
    assert lm_rows(SHAPES["1b"], 4e7, 1, 4, used=3072, vocab=4096) % GROUP == 0


def test_the_family_says_what_it_is_and_heads_keep_to_their_share(tmp_path: Path) -> None:
    folder = scale(tmp_path / "wide", TARGET.replace("4352", "128256"), only=("target", "eagle-target"))
    report = json.loads((folder / SUMMARY).read_text())
    assert report["label"] == "shape-scaled"
    head = report["members"]["eagle-target-w4"]
    assert (
        0.9 / SHARE < head["share"] <= 1.02 / SHARE
    )  # rows of an LM head go by 128; biases, norms and maps come on top
    for name in ("target-w4", "eagle-target-w4"):
        assert json.loads((folder / name / "config.json").read_text())["quantspec"]["label"] == "shape-scaled"


def test_a_run_goes_on_and_keeps_to_one_shape(family: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in family.glob("*/*.safetensors")}
    (family / "medusa-target-w8" / "quantspec_manifest.json").unlink()
    scale(family)
    changed = {path.parent.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"medusa-target-w8"}
    with pytest.raises(UsageError, match="holds something else"):
        scale(family, ODD)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shape": "1b,layers=2"}, "no intermediate"),
        ({"bits": 5}, "--bits"),
        ({"only": ("nothing",)}, "has no 'nothing'"),
        ({"dequantized": True}, "--bits 16"),
        ({"intermediate_shape": "1b,vocab=5000"}, "128256 and 5000 tokens"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ScaleBench(tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["hidden=256", "hidden=1000", "layers=3", "heads=4", "head_dim=96", "vocab=4000"])
def test_a_shape_that_is_too_small_is_refused(tmp_path: Path, change: str) -> None:
    shape = f"{TARGET},{change}"
    config = ScaleBench(tmp_path, shape, f"{INTERMEDIATE},{change if 'vocab' in change else ''}".rstrip(","))
    with pytest.raises(UsageError, match="does not go into that shape"):
        run(config, lambda line: None)


def test_a_head_wider_than_the_shape_is_refused(tmp_path: Path) -> None:
    config = ScaleBench(tmp_path / "out", f"{TARGET},inner=1024", INTERMEDIATE, only=("target", "eagle3-target"))
    with pytest.raises(UsageError, match=r"inner is at least 1792"):
        run(config, lambda line: None)


def test_what_was_refused_leaves_the_folder_usable(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no target"):
        run(ScaleBench(tmp_path / "out", TARGET, INTERMEDIATE, source=tmp_path), lambda line: None)
    report = run(ScaleBench(tmp_path / "out", TARGET, INTERMEDIATE, only=("intermediate",)), lambda line: None)
    assert list(report["members"]) == ["intermediate-w4"]
