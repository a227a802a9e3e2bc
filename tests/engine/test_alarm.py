"""The alarm for a drafter that is as good as never right: planted causes raise it, and sound heads do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_eagle import CONFIG, HIDDEN, VOCAB, model_folder
from tiny_eagle3 import FLAT, head_tensors
from torch import Tensor

import quantspec
from quantspec.core.drafter import NoDrafter, TargetParts
from quantspec.drafters.cascade import Cascade
from quantspec.drafters.eagle3 import Eagle3
from quantspec.engine import watch as watching
from quantspec.engine.alarm import DRAFTS, FALSE_ALARM, MARGIN, Alarm, most_hits
from quantspec.engine.causes import Subject, _layers
from quantspec.engine.watch import InnerWatch
from quantspec.models.load import load_model
from quantspec.models.resolve import resolve
from quantspec.types import Batch, Draft, SamplingParams, Verdict

PROMPTS = ("Question: Anna has 3 apples and buys 4 more. How many?\nAnswer:", "The President of the United States")
Edit = dict[str, Any]


def changed(folder: Path, edit: Edit, broken: bool, name: str = "default/eagle-target") -> str:
    """A shipped head under another config; ``broken``: its inputs mixed up, as another target's features would be."""
    shipped = resolve(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((shipped / "config.json").read_text()) | edit))
    tensors = load_file(shipped / "model.safetensors")
    if broken:
        order = torch.randperm(tensors["fc.weight"].shape[1], generator=torch.Generator().manual_seed(0))
        tensors["fc.weight"] = tensors["fc.weight"][:, order].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def told(head: str, temperature: float = 0.0) -> list[str]:
    """Lines about the drafter, after enough drafts to judge it."""
    lines: list[str] = []
    llm = quantspec.load("default", notice=lines.append, head=head, method="eagle", tree_depth=3)
    for seed in range(8):
        if llm._engine.alarm.drafts >= DRAFTS:
            break
        params = SamplingParams(max_new_tokens=96, ignore_eos=True, temperature=temperature, seed=seed)
        llm.generate(PROMPTS[seed % 2], params)
    assert llm._engine.alarm.drafts == DRAFTS
    return [line for line in lines if "hardly ever right" in line]


@pytest.mark.parametrize(
    ("edit", "first"),
    [
        ({"rope_theta": 2.0}, "its rope parameters (theta 2) differ from the target's (theta 10000)"),
        ({"quantspec": {"base": "0" * 64}}, "it was trained on other weights than this target's"),
        ({"quantspec": {}}, "it was trained on another quantization of the target"),
    ],
    ids=["rope", "another target's head", "of unknown origin"],
)
def test_a_useless_head_is_told_with_what_is_found_first(tmp_path: Path, edit: Edit, first: str) -> None:
    (line,) = told(changed(tmp_path / "head", edit, broken=True))
    assert "\n" not in line
    assert line.partition("likely causes: ")[2].startswith(first)


def told_of_a_cascade(head: str) -> list[str]:
    """Lines about drafters, after enough rounds inside a cascade to judge the head there."""
    lines: list[str] = []
    llm = quantspec.load("default", notice=lines.append, head=head, method="cascade", tree_depth=3)
    assert isinstance(llm._engine.drafter, Cascade)
    watch = llm._engine.drafter.watch
    assert isinstance(watch, InnerWatch)
    for seed in range(8):
        if watch.alarm.drafts >= DRAFTS:
            break
        llm.generate(PROMPTS[seed % 2], SamplingParams(max_new_tokens=96, ignore_eos=True, seed=seed))
    assert watch.alarm.drafts == DRAFTS
    return [line for line in lines if "hardly ever right" in line]


@pytest.mark.parametrize(
    ("edit", "first"),
    [
        ({"rope_theta": 2.0}, "its rope parameters (theta 2) differ from the target's (theta 10000)"),
        ({"quantspec": {"base": "0" * 64}}, "it was trained on other weights than this target's"),
    ],
    ids=["rope", "another target's head"],
)
def test_a_useless_head_inside_a_cascade_is_told_too(tmp_path: Path, edit: Edit, first: str) -> None:
    """Where the intermediate stands in for it, the target's verdicts show nothing."""
    (line,) = told_of_a_cascade(changed(tmp_path / "head", edit, True, "default/eagle-intermediate"))
    assert line.startswith("drafter eagle inside the cascade is hardly ever right")
    assert line.partition("likely causes: ")[2].startswith(first)


def test_a_sound_head_inside_a_cascade_raises_nothing() -> None:
    assert told_of_a_cascade("default/eagle-intermediate") == []


def test_causes_that_cannot_be_found_out_raise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "causes", lambda *_: 1 / 0)
    line = watching.useless(Alarm(64, 0, 0), Subject(NoDrafter(), load_model("default/target"), None), [1, 2], [1])
    assert "likely causes: not found out (ZeroDivisionError" in line


@pytest.mark.parametrize("temperature", [0.0, 1.3], ids=["greedy", "hard text"])
def test_a_sound_head_raises_nothing(temperature: float) -> None:
    assert told("default/eagle-target", temperature) == []


def test_it_is_said_once(tmp_path: Path) -> None:
    alarm, wrong = Alarm(), Verdict((), (), 5, (5, 5), ("target",), Draft((3,), (-1,), (0.5,), ("eagle",)))
    assert [i for i in range(3 * DRAFTS) if alarm.count((1, 1, 2), wrong)] == [DRAFTS - 1]
    assert (alarm.hits, alarm.chance) == (0, 0)


def test_what_the_commonest_tokens_would_have_is_counted() -> None:
    draft = Draft((3, 4), (-1, -1), (0.5, 0.4), ("eagle", "eagle"))
    alarm = Alarm()
    for y in (1, 2, 9):
        alarm.count((1, 1, 1, 2, 2, 9), Verdict((), (), y, (y, 0, 0), ("target",), draft))
    assert (alarm.drafts, alarm.chance) == (3, 2)


@pytest.mark.parametrize("chance", [0, 6, 20])
def test_the_probability_of_a_false_alarm_is_bounded(chance: int) -> None:
    """Drawn: a drafter that is right in the margin more than chance raises it as rarely as is said."""
    generator = torch.Generator().manual_seed(chance)
    hits = (torch.rand(20_000, DRAFTS, generator=generator) < chance / DRAFTS + MARGIN).sum(1)
    share = float((hits <= most_hits(DRAFTS, chance)).float().mean())
    assert share <= FALSE_ALARM + 0.0025  # 3.5 standard errors of 20,000 draws
    assert float((hits <= most_hits(DRAFTS, chance) + 1).float().mean()) > FALSE_ALARM - 0.0025  # and no stricter


def of_differences(folder: Path, entering: list[int]) -> Path:
    """An EAGLE-3 head that knows its target's tokens by what the last layer adds to its stream: of other layers it can
    make nothing."""
    target = load_model(str(folder.parent / "target"))
    text = torch.arange(VOCAB * 3).mul(7).remainder(VOCAB).tolist()
    cache = target.new_cache(len(text), 0)
    taps = target.forward(Batch.chain(text, 0, num_logits=1), [cache], (0, 1)).taps
    state = taps[1] - taps[0]
    normed = state * torch.rsqrt(state.square().mean(1, keepdim=True) + CONFIG["rms_norm_eps"])
    wanted = torch.nn.functional.one_hot(torch.tensor(text).add(14).remainder(VOCAB), VOCAB).float()
    tensors: dict[str, Tensor] = head_tensors(ids=None, scale=0.0)
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = torch.zeros_like(tensors[name])
    tensors["norm.weight"] = torch.ones(HIDDEN)
    tensors["fc.weight"] = torch.cat((-torch.eye(HIDDEN), torch.eye(HIDDEN)), 1)
    tensors["lm_head.weight"] = (torch.linalg.pinv(normed) @ wanted).T.contiguous()
    folder.mkdir()
    raw = FLAT | {"draft_vocab_size": VOCAB, "eagle_aux_hidden_state_layer_ids": entering}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_layers_that_are_one_off_are_found_by_trying(tmp_path: Path) -> None:
    model = load_model(str(model_folder(tmp_path / "target")))
    text = torch.arange(64).mul(7).remainder(VOCAB).tolist()
    lines = {}
    for name, entering in (("right", [1, 2]), ("wrong", [0, 1])):
        drafter = Eagle3(of_differences(tmp_path / name, entering))
        drafter.prepare(TargetParts(model))
        lines[name] = _layers(drafter, text)
    assert lines["right"] == []
    (line,) = lines["wrong"]
    assert line.startswith("it reads the target after layers embed, 0 (from 0): after 0, 1 it is right on")
