"""Calibration text in the forms that people have it, and what is said when it has another."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantspec.calibrate import data
from quantspec.calibrate.documents import Document, load_documents
from quantspec.errors import ModelError, QuantSpecError, Unavailable, UsageError


def rows_file(folder: Path, *rows: object, suffix: str = ".jsonl") -> Path:
    path = folder / f"rows{suffix}"
    path.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(json.dumps(row) for row in rows))
    return path


def chat(messages: Sequence[Any]) -> str:
    if messages[0]["role"] == "refused":
        raise UsageError("the chat template refuses these messages: no such role", hint="use user and assistant")
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("row", "plain", "templated"),
    [
        ({"text": " a b "}, "a b", None),
        ({"content": "code"}, "code", None),
        ({"messages": MESSAGES}, "User: hi\nAssistant: ho", "<user>hi<assistant>ho"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
            "User: hi\nAssistant: ho",
            "<user>hi<assistant>ho",
        ),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            "User: Add\n\n1 2\nAssistant: 3",
            "<user>Add\n\n1 2<assistant>3",
        ),
        ({"instruction": "Say", "input": "", "output": "3"}, "User: Say\nAssistant: 3", "<user>Say<assistant>3"),
        ({"prompt": "p", "completion": "c"}, "User: p\nAssistant: c", "<user>p<assistant>c"),
        ({"question": "q", "answer": "a"}, "Question: q\nAnswer: a", "<user>q<assistant>a"),
    ],
)
def test_rows_with_and_without_a_template(tmp_path: Path, row: object, plain: str, templated: str | None) -> None:
    for suffix in (".jsonl", ".json"):
        path = rows_file(tmp_path, row, suffix=suffix)
        assert load_documents(path) == [Document(plain)]
        assert load_documents(path, None, chat) == [Document(templated or plain, templated is not None)]


def test_a_named_column(tmp_path: Path) -> None:
    path = rows_file(tmp_path, {"text": "no", "body": "yes"}, {"text": "no", "body": MESSAGES})
    assert load_documents(path, "body", chat) == [Document("yes"), Document("<user>hi<assistant>ho", True)]


@pytest.mark.parametrize(
    ("rows", "column", "message", "hint"),
    [
        ([], None, "holds no text", "bundled set"),
        ([{"text": "  "}], None, "holds no text", ""),
        (
            [{"body": "x", "id": 1}],
            None,
            "line 1: no text",
            "its columns are body, id; rows need text, messages",
        ),
        ([{"text": "x"}, {"id": 1}], "text", "line 2: no column 'text'", "its columns are id"),
        ([{"text": 5}], "text", "neither text nor", ""),
        ([[1, 2]], None, "line 1: not a JSON object", ""),
        ([{"messages": [{"role": "user"}]}], None, "a message needs role and content", ""),
        ([{"messages": [{"role": "refused", "content": "x"}]}], None, "line 1: the chat template refuses", "use user"),
    ],
)
def test_wrong_rows(tmp_path: Path, rows: list[object], column: str | None, message: str, hint: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        load_documents(rows_file(tmp_path, *rows), column, chat)
    assert hint in str(caught.value.hint or "")
    assert "\n" not in str(caught.value)


def test_not_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ModelError, match="line 2: not JSON"):
        load_documents(path)


class TestHub:
    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(Unavailable, match="needs the package datasets") as caught:
            load_documents(Path("hub:owner/name"))
        assert ".jsonl" in str(caught.value.hint)

    def test_offline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise ConnectionError("Couldn't reach the hub\nlong trace")

        self.install(monkeypatch, fail)
        with pytest.raises(QuantSpecError, match=r"cannot read the data set owner/name: Couldn't reach the hub$"):
            load_documents(Path("hub:owner/name"))

    def test_rows_subset_and_split(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []

        def load(name: str, subset: str | None, *, split: str, streaming: bool) -> list[object]:
            asked.extend((name, subset, split, streaming))
            return [{"text": "one"}, {"messages": MESSAGES}]

        self.install(monkeypatch, load)
        found = load_documents(Path("hub:owner/name:small@test"), None, chat)
        assert found == [Document("one"), Document("<user>hi<assistant>ho", True)]
        assert asked == ["owner/name", "small", "test", True]

    @staticmethod
    def install(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
        module = ModuleType("datasets")
        module.load_dataset = load  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_template_writes_its_own_special_tokens(model: Path) -> None:
    tokenizer = data.load_tokenizer(model)
    rows = data.token_rows([Document("w3 w4", True), Document("w5")], tokenizer, 1, 4, 1, None)
    assert rows.tolist() == [[3, 4, 5, 1]]


def test_the_bundled_set_is_a_chat_where_the_model_chats() -> None:
    found = load_documents(data.CALIBRATION, None, chat)
    assert sum(document.templated for document in found) > 300
    assert sum(not document.templated for document in found) > 300
