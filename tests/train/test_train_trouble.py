"""Text, states and data files that a training must refuse in one line, and its two logs."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from train_helpers import RUN, TINY, quick

from quantspec.calibrate.train import lm, rollout
from quantspec.calibrate.train.config import Eagle3Config, LMConfig, RolloutConfig
from quantspec.calibrate.train.corpus import documents
from quantspec.calibrate.train.events import crc32c
from quantspec.calibrate.train.methods import eagle3
from quantspec.calibrate.train.rollout import Rollout, read_rollouts, write_rollouts
from quantspec.errors import ModelError


@pytest.fixture(scope="module")
def texts(model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rollouts") / "texts"
    rollout.run(RolloutConfig(model, corpus, out, texts=8, slots=8, max_len=48, run=RUN))
    return out


def rewritten(texts: Path, folder: Path, **changes: str) -> Path:
    """The same texts, said to be by another writer."""
    folder.mkdir()
    part = next(texts.iterdir())
    with safe_open(str(part), "pt") as handle:
        metadata = handle.metadata()
    save_file(load_file(part), folder / part.name, metadata | {key.replace("_", " "): v for key, v in changes.items()})
    return folder


def config_of(model: Path, texts: Path, out: Path, **options) -> Eagle3Config:
    return Eagle3Config(model, texts, out, layer_ids=(0, 1), optim=quick(2), run=RUN, **options)


@pytest.mark.parametrize("what", ["tokenizer", "chat_template"])
def test_text_in_another_language_is_refused(model: Path, texts: Path, tmp_path: Path, what: str) -> None:
    other = rewritten(texts, tmp_path / "texts", **{what: "0"})
    with pytest.raises(ModelError, match=f"another {what.replace('_', ' ')}"):
        eagle3.run(config_of(model, other, tmp_path / "out"))


@pytest.mark.parametrize("processes", [1, 2])
def test_held_out_text_of_another_model_is_refused(model: Path, texts: Path, tmp_path: Path, processes: int) -> None:
    other = rewritten(texts, tmp_path / "texts", model="0")
    config = config_of(model, texts, tmp_path / "out", held_out=other)
    with pytest.raises(ModelError, match="was not written by") as caught:
        eagle3.run(replace(config, run=replace(RUN, processes=processes)))
    assert caught.value.hint == "make held-out rollouts with the base itself"


def test_acceptance_on_held_out_text_is_logged(model: Path, texts: Path, tmp_path: Path) -> None:
    config = config_of(model, texts, tmp_path / "out", held_out=texts, unroll=3)
    result = eagle3.run(config)
    assert result["tree_acceptance"] >= 1.0
    last = json.loads((config.out / "log.jsonl").read_text().splitlines()[-1])
    for step in range(3):
        assert 0 <= last[f"held.accuracy.{step}"] <= 1
        assert 0 < last[f"held.acceptance.{step}"] < 1


def test_damaged_mixed_and_missing_rollouts_are_refused(texts: Path, tmp_path: Path) -> None:
    part = next(texts.iterdir())
    with pytest.raises(ModelError, match="no rollouts in"):
        read_rollouts(tmp_path)
    (tmp_path / "part-0.safetensors").write_bytes(part.read_bytes()[:200])
    with pytest.raises(ModelError, match="holds no rollouts"):
        read_rollouts(tmp_path)
    tensors = load_file(part)
    del tensors["prompt_lens"]
    save_file(tensors, tmp_path / "part-0.safetensors", {"model": "1"})
    with pytest.raises(ModelError, match="prompt_lens"):
        read_rollouts(tmp_path)
    for name in ("0", "1"):
        save_file(load_file(part), tmp_path / f"part-{name}.safetensors", {"model": name})
    with pytest.raises(ModelError, match="different models"):
        read_rollouts(tmp_path)


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("features", lambda x: x.index_fill_(0, torch.tensor([3]), torch.nan), "features that are not finite"),
        ("features", lambda x: x[:-1], "columns of different lengths"),
        ("temperatures", lambda x: x[:-1], "columns of different lengths"),
        ("prompt_lens", lambda x: x + 100, "longer than its text"),
        ("prompt_lens", lambda x: x * 0, "a prompt that is empty"),
        ("ids", lambda x: x - 300, "a token below 0"),
    ],
)
def test_rollouts_that_contradict_themselves_are_refused(texts: Path, tmp_path: Path, column, change, message) -> None:
    part = next(texts.iterdir())
    tensors = load_file(part)
    tensors[column] = change(tensors[column]).contiguous()
    save_file(tensors, tmp_path / part.name, {"model": "1"})
    with pytest.raises(ModelError, match=message):
        read_rollouts(tmp_path)


def test_features_stay_in_their_files(tmp_path: Path) -> None:
    """Rows of several parts are those that were written, over the parts' ends too, and read when they are asked for."""
    ids, rows = torch.arange(20).int(), torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).half()
    texts = [Rollout(ids[a:b], rows[a:b], 2, 0.0) for a, b in ((0, 5), (5, 9), (9, 20))]
    for number, part in enumerate((texts[:2], texts[2:])):
        write_rollouts(tmp_path / f"part-{number}.safetensors", part, "model")
    found = read_rollouts(tmp_path)
    assert (len(found.features), tuple(found.features.shape)) == (20, (20, 8))
    for span in (slice(0, 20), slice(3, 15), slice(9, 12), slice(20, 25), slice(4, 4)):
        assert found.features[span].equal(rows[span])
    batch = found.batch([2, 0])
    assert batch.features[0].half().equal(rows[9:20])
    assert batch.features[1, :5].half().equal(rows[:5])
    (tmp_path / "part-1.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="ended inside tensor features"):
        found.batch([2])


def test_tokens_that_the_base_has_not_are_refused(model: Path, texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "texts"
    other.mkdir()
    part = next(texts.iterdir())
    tensors = load_file(part)
    tensors["ids"][5] = 384
    save_file(tensors, other / part.name, {"model": "1"})
    with pytest.raises(ModelError, match="has token 384"):
        eagle3.run(config_of(model, other, tmp_path / "out"))


def test_a_state_of_other_options_is_refused_and_kept(model: Path, texts: Path, tmp_path: Path) -> None:
    config = config_of(model, texts, tmp_path / "out", draft_vocab_size=100)
    eagle3.run(config)
    before = (config.out / "state.safetensors").read_bytes()
    with pytest.raises(ModelError, match="other options"):
        eagle3.run(replace(config, draft_vocab_size=90))
    assert (config.out / "state.safetensors").read_bytes() == before


def test_a_data_file_without_text_is_refused(tmp_path: Path) -> None:
    for line in ('{"question": "2 + 2?"}', "{", "[1]", '{"text": 3}'):
        first = json.dumps({"text": "long enough to be kept " * 3})
        (tmp_path / "data.jsonl").write_text(f"{first}\n{line}\n")
        with pytest.raises(ModelError, match="line 2 has no text"):
            documents(tmp_path / "data.jsonl")


def test_accumulated_batches_are_one_large_batch(corpus: Path, tmp_path: Path) -> None:
    whole = LMConfig(corpus, tmp_path / "whole", TINY, quick(3, batch=8), RUN)
    parts = replace(whole, out=tmp_path / "parts", optim=quick(3, batch=4, accumulate=2))
    a, b = lm.run(whole), lm.run(parts)
    # Gradients are summed in another order, which Newton-Schulz amplifies in the smallest singular directions.
    assert a["held.0"] == pytest.approx(b["held.0"], rel=1e-3)


def test_both_logs_tell_the_same(corpus: Path, tmp_path: Path) -> None:
    lm.run(LMConfig(corpus, tmp_path, TINY, quick(3), RUN), stop_after=2)
    lm.run(LMConfig(corpus, tmp_path, TINY, quick(3), RUN))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    data = next((tmp_path / "tensorboard").iterdir()).read_bytes()
    records = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        records.append(data[12 : 12 + length])
        for content, stored in ((data[:8], data[8:12]), (records[-1], data[12 + length : 16 + length])):
            crc = crc32c(content)
            assert struct.unpack("<I", stored)[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
        data = data[16 + length :]
    assert b"brain.Event:2" in records[0]
    assert len(records) == 1 + len(rows) + 1  # the version, and the new start
    losses = [row["loss"] for row in rows if "loss" in row]
    found = [record for record in records if b"\x0a\x04loss\x15" in record]
    values = [struct.unpack("<f", record.partition(b"\x0a\x04loss\x15")[2][:4])[0] for record in found]
    assert values == pytest.approx(losses, abs=1e-5)  # log.jsonl has five digits
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert torch.isfinite(torch.tensor(values)).all()
