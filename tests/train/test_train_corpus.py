from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from quantspec.calibrate.train.config import Source
from quantspec.calibrate.train.corpus import PackedRows, TokenDocs, documents, load_corpus, split_held_out


def docs(*texts: list[int]) -> TokenDocs:
    return TokenDocs(np.concatenate([np.array(t, dtype=np.int32) for t in texts]), np.cumsum([0, *map(len, texts)]))


def test_tokenizer_splits_digits_and_round_trips(corpus: Path) -> None:
    tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
    encoded = tokenizer.encode("She pays 1234 <<12+3=15>>  für Ünïcode \x07\n")
    assert encoded.ids[0] == 0  # the beginning-of-text id, from the post-processor
    assert not any(sum(c.isdigit() for c in token) > 1 for token in encoded.tokens)
    assert tokenizer.decode(encoded.ids) == "She pays 1234 <<12+3=15>>  für Ünïcode \x07\n"


def test_transformers_reads_the_tokenizer(corpus: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(corpus)
    text = "What is 3 + 14?\nAnswer:"
    assert tokenizer(text).input_ids == Tokenizer.from_file(str(corpus / "tokenizer.json")).encode(text).ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_held_out_documents_are_in_no_training_row(corpus: Path) -> None:
    train, held = load_corpus(corpus, "train")[0][0], load_corpus(corpus, "held")[0][0]
    assert (len(train), len(held)) == (32, 8)
    seen = {train.document(i).tobytes() for i in range(len(train))}
    assert not seen & {held.document(i).tobytes() for i in range(len(held))}
    assert all(train.document(i)[0] == 0 and train.document(i)[-1] == 1 for i in range(len(train)))


def test_split_takes_the_last_or_every_twentieth() -> None:
    texts = [str(i) for i in range(40)]
    assert split_held_out(texts, Source("x", 1.0, held_out=3))[1] == ["37", "38", "39"]
    assert split_held_out(texts, Source("x", 1.0))[1] == ["19", "39"]


def test_a_folder_gives_its_python_files(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    for name in ("a.py", "b.txt", "test/test_c.py"):
        (tmp_path / name).write_text("x = 1\n" * 20)
    assert len(documents(tmp_path)) == 1


def test_an_epoch_covers_every_token_once_and_sources_follow_their_weights() -> None:
    first, second = docs(*[[10 * i + j for j in range(3)] for i in range(10)]), docs([500] * 40)
    rows = PackedRows([first, second], [0.75, 0.25], seq_len=4, seed=1)
    batch = rows.batch(8)
    assert rows.taken == [6, 2]
    mine = batch[batch[:, 0] != 500]
    assert sorted(mine.flatten().tolist()) == sorted(first.ids.tolist())  # 6 rows of 5 ids are the whole epoch
    assert rows.batch(8)[0].tolist() != batch[0].tolist()  # the next epoch has another order


def test_rows_are_a_function_of_the_counts() -> None:
    source = docs(*[[i] * 7 for i in range(30)])
    rows = PackedRows([source], [1.0], seq_len=6, seed=2)
    rows.batch(3)
    expected, taken = rows.batch(4), [3]
    again = PackedRows([source], [1.0], seq_len=6, seed=2)
    again.taken[:] = taken
    assert again.batch(4).equal(expected)
