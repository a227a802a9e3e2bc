"""EAGLE heads on targets that were rotated after the heads were trained: the same trees, and no silent loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_transform import write_transformed
from tiny_eagle import VOCAB, save_family

from quantspec.core.drafter import Drafter, TargetParts, View
from quantspec.core.noise import Stream
from quantspec.core.sampling import WarpChain
from quantspec.drafters import eagle_rotation
from quantspec.drafters.config import EagleOptions
from quantspec.drafters.eagle import Eagle
from quantspec.drafters.eagle_rotation import export_head
from quantspec.errors import ModelError
from quantspec.kernels.cpu import library
from quantspec.models import atomic
from quantspec.models.config import ModelConfig
from quantspec.models.load import load_model
from quantspec.models.resolve import resolve
from quantspec.models.tensors import TensorStore
from quantspec.types import Budget, Draft, PendingDraft, SamplingParams, Verdict

PROMPTS = [[seed % VOCAB, (7 * seed) % VOCAB, 5] for seed in range(12)]
GREEDY, SAMPLED = SamplingParams(max_new_tokens=10), SamplingParams(max_new_tokens=10, temperature=0.8)
NATIVE = "cpu-fp32"
"""The backend whose heads run on the CPU kernels."""


class Recorder:
    """An ``Eagle`` that keeps what it proposed."""

    def __init__(self, inner: Eagle) -> None:
        self._inner, self.drafts = inner, list[Draft]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def propose(self, *arguments: Any) -> Any:
        drafts = self._inner.propose(*arguments)
        self.drafts += drafts
        return drafts


def rotate(source: Path, out: Path, seed: int = 0) -> Path:
    write_transformed(source, out, torch.tensor([[1, 2, 3]]), method="rtn", rotate=True, seed=seed)
    return out


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny family with an uneven final norm, and its target rotated."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("rotation")
    folders = save_family(root)
    tensors = {name: TensorStore(folders["target"]).get(name) for name in TensorStore(folders["target"])}
    size = tensors["model.norm.weight"].shape[0]
    g = torch.Generator().manual_seed(3)
    tensors["model.norm.weight"] = torch.exp(0.3 * torch.randn(size, generator=g))
    tensors["lm_head.weight"] /= tensors["model.norm.weight"]  # the logits that the head was made for
    atomic.save_tensors(folders["target"] / "model.safetensors", tensors)
    return folders | {"rotated": rotate(folders["target"], root / "rotated")}


def drafted(generate: Any, target: Path, head: Path, backend: str, prompts: list[list[int]], **options: Any) -> Any:
    """A run, and all drafts in it."""
    drafter: Any = Recorder(Eagle(head, EagleOptions(**options)))
    params = [GREEDY, SAMPLED] * (len(prompts) // 2)
    run = generate(load_model(target, backend=backend), prompts, params, drafter, budget=Budget(10, 6))
    return run, drafter.drafts


def assert_same(found: list[Draft], expected: list[Draft]) -> None:
    assert [(draft.tokens, draft.parents) for draft in found] == [(draft.tokens, draft.parents) for draft in expected]
    scores = ([score for draft in drafts for score in draft.scores] for drafts in (found, expected))
    torch.testing.assert_close(*(torch.tensor(each) for each in scores), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference-fast", NATIVE])
@pytest.mark.parametrize("own", [False, True])
def test_trees_are_those_of_the_parent(
    family: dict[str, Path], generate: Any, tmp_path: Path, backend: str, own: bool
) -> None:
    """Also of a head with an embedding of its own, which is that of the parent."""
    if backend == NATIVE and library.usable() is not None:
        pytest.skip("no native library here")
    head = family["head"]
    if own:
        head = tmp_path / "head"
        head.mkdir()
        tensors = {name: TensorStore(family["head"]).get(name) for name in TensorStore(family["head"])}
        tensors["embed_tokens.weight"] = TensorStore(family["target"]).get("model.embed_tokens.weight")
        atomic.save_tensors(head / "model.safetensors", tensors)
        (head / "config.json").write_text((family["head"] / "config.json").read_text())
    expected, trees = drafted(generate, family["target"], head, backend, PROMPTS, top_k=3, depth=3)
    found, rotated = drafted(generate, family["rotated"], head, backend, PROMPTS, top_k=3, depth=3)
    assert found.texts == expected.texts
    assert found.acceptance == expected.acceptance > 1.2
    assert_same(rotated, trees)  # fp32 sums of rotated numbers


def test_a_tree_on_the_device_is_that_of_the_host(
    family: dict[str, Path], triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from quantspec.drafters.eagle_triton import TritonEagle
    from quantspec.kernels.triton import attention
    from quantspec.models import triton_frame
    from quantspec.models.load_triton import load_triton_decoder

    if triton_device.type == "cpu":
        monkeypatch.setattr(attention, "CHUNK", 64)
        monkeypatch.setattr(TritonEagle, "_flaw", lambda drafter: None)  # tested elsewhere, and slow when interpreted
        monkeypatch.setattr(triton_frame, "TILES", (1, 4, 9))
    folder, options, drafts = family["rotated"], EagleOptions(top_k=3, depth=2), []
    with torch.device("cpu"):
        host: Any = load_model(folder)
        model = load_triton_decoder(folder, ModelConfig.load(folder), triton_device, torch.float32)
        model.rotation = host.rotation
        chain, tokens = WarpChain(SamplingParams(), [1], frozenset()), tuple(PROMPTS[3])
        view = View(tokens, 1, chain, chain.at(tokens[1:]), Stream(3), frozenset(), 9, VOCAB)
        features = torch.randn(2, host.hidden_size, generator=torch.Generator().manual_seed(1))
        for kind, target in ((Eagle, host), (TritonEagle, model)):
            drafter = kind(family["head"], options)
            drafter.prepare(TargetParts(target))
            state = drafter.open(view)
            drafter.observe(state, Verdict((), (), 0, (0,), (), taps={"norm": features.to(target.device)}))
            draft = drafter.propose([state], [view], [Budget(8, 8)])[0]
            drafts.append(draft.resolve() if isinstance(draft, PendingDraft) else draft)
    assert len(drafts[0].tokens) > 3
    assert_same(drafts[1:], drafts[:1])


def test_an_exported_head_needs_no_rotation(family: dict[str, Path], generate: Any, tmp_path: Path) -> None:
    """A plain EAGLE folder; with an uneven final norm it drafts almost as well, with an even one the same."""
    export_head(family["head"], family["rotated"], tmp_path / "plain")
    names = set(TensorStore(tmp_path / "plain"))
    assert names == set(TensorStore(family["head"]))
    expected, _ = drafted(generate, family["target"], family["head"], "reference-fast", PROMPTS, top_k=3, depth=3)
    found, _ = drafted(generate, family["rotated"], tmp_path / "plain", "reference-fast", PROMPTS, top_k=3, depth=3)
    assert found.texts == expected.texts
    assert found.acceptance > 1 + 0.8 * (expected.acceptance - 1)

    even = tmp_path / "even"
    even.mkdir()
    tensors = {name: TensorStore(family["target"]).get(name) for name in TensorStore(family["target"])}
    tensors["lm_head.weight"] *= tensors["model.norm.weight"] / 1.7
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1.7)
    atomic.save_tensors(even / "model.safetensors", tensors)
    (even / "config.json").write_text((family["target"] / "config.json").read_text())
    rotated = rotate(even, tmp_path / "even rotated")
    export_head(family["head"], rotated, tmp_path / "even head")
    _, trees = drafted(generate, even, family["head"], "reference-fast", PROMPTS, top_k=3, depth=3)
    _, turned = drafted(generate, rotated, tmp_path / "even head", "reference-fast", PROMPTS, top_k=3, depth=3)
    assert_same(turned, trees)


def test_heads_of_other_rotations_are_refused(family: dict[str, Path], tmp_path: Path) -> None:
    export_head(family["head"], family["rotated"], tmp_path / "plain")
    other = rotate(family["target"], tmp_path / "other", seed=1)
    for target in (family["target"], other):
        drafter: Drafter = Eagle(tmp_path / "plain")
        with pytest.raises(ModelError, match="made for a rotated target"):
            drafter.prepare(TargetParts(load_model(target)))
    with pytest.raises(ModelError, match="is not rotated"):
        export_head(family["head"], family["target"], tmp_path / "no")
    with pytest.raises(ModelError, match="already"):
        export_head(tmp_path / "plain", family["rotated"], tmp_path / "no")


def test_a_rotation_that_was_lost_or_swapped_is_told(family: dict[str, Path], tmp_path: Path) -> None:
    rotated = rotate(family["target"], tmp_path / "rotated", seed=2)
    file = rotated / "quantspec_rotation.safetensors"
    file.write_bytes((family["rotated"] / file.name).read_bytes())
    with pytest.raises(ModelError, match="is not of this model"):
        load_model(rotated)
    file.unlink()
    with pytest.raises(ModelError, match="is missing"):
        load_model(rotated)


def test_the_default_family(generate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped head on the shipped target, before and after a rotation: in fp32, the trees are the same. Without the
    folding the text is, too, and hardly any draft is right."""
    target, head = resolve("default/target"), resolve("default/eagle-target")
    rotated = rotate(target, tmp_path / "rotated")
    ids = torch.randint(300, 1500, (4, 12), generator=torch.Generator().manual_seed(0)).tolist()
    backend = NATIVE if library.usable() is None else "reference-fast"
    expected, trees = drafted(generate, target, head, backend, ids, top_k=4, depth=4)
    found, turned = drafted(generate, rotated, head, backend, ids, top_k=4, depth=4)
    assert found.texts == expected.texts
    assert found.acceptance == expected.acceptance > 1.5
    assert_same(turned, trees)
    monkeypatch.setattr(eagle_rotation, "fold_rotation", lambda tensors, target: tensors)
    lost, _ = drafted(generate, rotated, head, backend, ids, top_k=4, depth=4)
    assert lost.texts == expected.texts
    assert lost.acceptance < 1.1
