from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from lissom.errors import UserError
from lissom.train import TokenWindows, new_tokenizer, text_fingerprint, token_windows
from lissom.train.data import documents, text_files


@pytest.fixture(scope="module")
def tokenizer():
    return new_tokenizer(["the cat sat on the mat and the dog ran to the cat"] * 20, 280)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path / "cache"))


def texts(file) -> list[str]:
    return ["".join(document) for document in documents(file)]


def test_documents_follow_each_other_with_an_end_between(tokenizer, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "b.txt").write_text("the dog ran")
    (tmp_path / "text" / "a.md").write_text("the cat sat")
    lines = [json.dumps({"text": "the mat"}), json.dumps({"text": "on the mat"})]
    (tmp_path / "text" / "c.jsonl").write_text("\n".join(lines))
    (tmp_path / "text" / "d.png").write_bytes(b"\x89")
    windows = token_windows(tmp_path / "text", tokenizer, 4)
    end = tokenizer.eos_token_id
    wanted = []
    for text in ("the cat sat", "the dog ran", "the mat", "on the mat"):
        wanted += [*tokenizer(text)["input_ids"], end]
    got = torch.cat([windows[i]["input_ids"] for i in range(len(windows))])
    assert got.tolist() == wanted[: len(got)] and len(wanted) - len(got) < 4
    assert got.dtype == torch.int64


def test_text_is_tokenised_once_and_again_where_it_changed(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the cat sat on the mat " * 10)
    calls = []
    for _ in range(2):
        token_windows(file, tokenizer, 4, lambda *done: calls.append(done))
    assert calls == [(0, 1), (1, 1)]
    file.write_text("another text, which is longer than the one before " * 10)
    assert len(token_windows(file, tokenizer, 4)) > 20


@pytest.mark.parametrize("name", ["text.txt", "text.jsonl"])
def test_large_texts_are_cut_at_line_ends(name, monkeypatch, tmp_path):
    monkeypatch.setattr("lissom.train.data._PIECE", 10)
    text = "one line\nanother line\nand a third one that is long\nend"
    (tmp_path / name).write_text(json.dumps({"text": text}) if name.endswith("l") else text)
    (pieces,) = (list(document) for document in documents(tmp_path / name))
    assert "".join(pieces) == text and len(pieces) > 2
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_windows_are_split_without_overlap():
    windows = TokenWindows(np.arange(103, dtype=np.uint16), 10)
    assert len(windows) == 10
    kept, held = windows.split(0.2)
    assert (len(kept), len(held)) == (8, 2)
    assert kept[7]["input_ids"].tolist() == list(range(70, 80)) and held[0]["input_ids"][0] == 80
    with pytest.raises(IndexError):
        held[2]


def test_what_is_no_text_is_a_sentence(tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="a folder without"):
        text_files(tmp_path / "empty")
    (tmp_path / "short.txt").write_text("the cat")
    with pytest.raises(UserError, match="less than a window of 512"):
        token_windows(tmp_path / "short.txt", tokenizer, 512)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        texts(tmp_path / "binary.txt")
    (tmp_path / "binary.jsonl").write_bytes(b'{"text": "a"}\n\xff\xfe\x00')
    with pytest.raises(UserError, match="UTF-8"):
        texts(tmp_path / "binary.jsonl")
    for line in ('{"other": 1}', '{"text": 3}', '{"text": null}', '{"text": ["a", "b"]}', "[]", "{"):
        (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n' + line + "\n")
        with pytest.raises(UserError, match="line 2"):
            texts(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="none are left"):
        TokenWindows(np.arange(10, dtype=np.uint16), 10).split(0.5)


def test_a_cache_that_cannot_be_written_is_named_with_its_remedy(tokenizer, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    (tmp_path / "a.txt").write_text("the cat sat")
    with pytest.raises(UserError, match=r"Cannot write to .*cache.*Set LISSOM_CACHE to another folder\."):
        token_windows(tmp_path / "a.txt", tokenizer, 2)


def test_byte_order_marks_and_empty_lines_are_passed_over(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "a"}\n\n  \n{"text": "b"}\n', encoding="utf-8-sig")
    assert texts(file) == ["a", "b"]


def test_text_is_known_by_its_content(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 200_000)
    (tmp_path / "b.md").write_text("y")
    known = text_fingerprint(tmp_path)
    os.utime(tmp_path / "a.txt", (0, 0))
    assert text_fingerprint(tmp_path) == known != text_fingerprint(tmp_path / "a.txt")
    for changed in ("z" + "x" * 199_999, "x" * 199_999 + "z", "x" * 199_999, "x" * 99_999 + "z" + "x" * 100_000):
        (tmp_path / "a.txt").write_text(changed)
        assert text_fingerprint(tmp_path) != known


def test_new_tokenizers_know_every_byte(tokenizer):
    text = "Ünïcödé\n\t漢字 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id is not None
    with pytest.raises(UserError, match="257"):
        new_tokenizer(["a"], 100)
