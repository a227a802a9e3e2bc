"""Prompts of ``bench generate``: every form of line, tasks, contexts that are too short, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantspec.benchmarks.generate_config import GenerateBench
from quantspec.benchmarks.generate_prompts import HELD_OUT, read_prompts
from quantspec.errors import ModelError, UsageError
from quantspec.models.resolve import FAMILY
from quantspec.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(FAMILY / "target-w4")


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_form_of_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(
        tmp_path / "mine.jsonl",
        {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."], "task": "mt_bench"},
        {"question": "How many?", "answer": "2"},
        {"prompt": "Once upon"},
        {"text": "A time", "task": "mbpp"},
        {"turns": ["Original lines have no task."], "category": "coding"},
    )
    found, left_out = read_prompts(GenerateBench(prompts=path), tokenizer, None)
    assert [(one.task, one.text) for one in found] == [
        ("mt_bench", "Question: Write.\nAnswer:"),
        ("mine", "Question: How many?\nAnswer:"),
        ("mine", "Once upon"),
        ("mbpp", "A time"),
        ("coding", "Question: Original lines have no task.\nAnswer:"),
    ]
    assert [one.rank for one in found] == [0, 0, 1, 0, 0]
    assert all(list(one.tokens) == tokenizer.encode(one.text) for one in found)
    assert not left_out


def test_limits_tasks_and_contexts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": f"{task} {number}" + " word" * 40 * (number == 1), "task": task}
        for task in "ab"
        for number in range(4)
    ]
    path = written(tmp_path / "p.jsonl", *rows)
    found, _ = read_prompts(GenerateBench(prompts=path, limit=2), tokenizer, None)
    assert [(one.number, one.task, one.rank) for one in found] == [(0, "a", 0), (1, "a", 1), (2, "b", 0), (3, "b", 1)]
    config = GenerateBench(prompts=path, limit=2, tasks=("b",), max_new_tokens=8)
    found, left_out = read_prompts(config, tokenizer, 30)
    # What does not fit makes room for the next one.
    assert [one.text for one in found] == ["b 0", "b 2"]
    assert len(left_out) == 1
    assert "does not fit into a context of 30" in left_out[0]
    with pytest.raises(UsageError, match="has no task 'c'"):
        read_prompts(GenerateBench(prompts=path, tasks=("c",)), tokenizer, None)
    with pytest.raises(ModelError, match=r"no prompt of .* fits"):
        read_prompts(GenerateBench(prompts=path), tokenizer, 20)


def test_a_chat_template_is_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((FAMILY / "target-w4" / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    path = written(tmp_path / "p.jsonl", {"turns": ["Hello"]}, {"prompt": "Hello"})
    found, _ = read_prompts(GenerateBench(prompts=path), Tokenizer(tmp_path), None)
    assert [one.text for one in found] == ["<Hello>", "Hello"]
    assert list(found[0].tokens) == tokenizer.encode("<Hello>", add_special=False)


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "has no prompts"),
        (b"\n \n", "has no prompts"),
        (b'{"prompt": "x"}\nno JSON\n', "line 2, is not JSON"),
        (b'{"prompt": "x"}\n[1]\n', "line 2, has no prompt"),
        (b'{"turns": []}\n', "line 1, has no prompt"),
        (b'{"turns": [3]}\n', "line 1, has no prompt"),
        (b'{"prompt": "  "}\n', "line 1, has no prompt"),
        (b"\xff\xfe\n", "is not UTF-8"),
    ],
)
def test_files_that_are_none(content: bytes, complaint: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=complaint):
        read_prompts(GenerateBench(prompts=path), tokenizer, None)
    with pytest.raises(UsageError, match="cannot read"):
        read_prompts(GenerateBench(prompts=tmp_path / "nowhere"), tokenizer, None)


def test_the_bundled_prompts(tokenizer: Tokenizer) -> None:
    found, left_out = read_prompts(GenerateBench(limit=1000), tokenizer, 4096)
    assert (len(found), left_out) == (100, [])
    assert {one.task for one in found} == {HELD_OUT.stem}
