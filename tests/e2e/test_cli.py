"""The command line on the real embedded model, as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

LICENCE = Path(__file__).parents[2] / "LICENSE"


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("document") / "document.txt"
    path.write_text(LICENCE.read_text()[:1500])
    return path


@pytest.fixture(scope="module")
def cache_file(lissom_cli, document, smollm2):
    path = document.parent / "cache.safetensors"
    given = ("--document", document, "-o", path, "--ratio", "20%", "--queries", "context", "--json", "-")
    result = lissom_cli("compact", *given)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["stored_entries"] / facts["full_entries"] == pytest.approx(0.2, rel=0.01)
    return path


def test_help_is_light(lissom_cli):
    code = "import sys, lissom.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "compact" in lissom_cli("--help").stdout


def test_generate_from_a_cache_file(run, cache_file):
    code, out, err = run(
        "generate", "smollm2-135m", "--cache", cache_file, "What is this text?", "--max-new-tokens", 12
    )
    assert code == 0, err
    assert len(out.split()) > 3


def test_generate_says_what_a_sparse_prompt_met(run, tiny_folder, tmp_path):
    (tmp_path / "note.txt").write_text("The meeting is on Monday. " * 60)
    (tmp_path / "r.yaml").write_text(
        "methods: [flash-prefill: {alpha: 2, min_tokens: 0, block_size: 64, window: 1, last: 0}]"
    )
    arguments = ("--recipe", tmp_path / "r.yaml", "-d", tmp_path / "note.txt", "--max-new-tokens", 2)
    code, _, err = run("generate", tiny_folder, "When?", *arguments)
    assert code == 0 and "The prompt's attention met " in err and "100.0% of its blocks" not in err


def test_generate_without_a_cache(lissom_cli, smollm2):
    result = lissom_cli("generate", "smollm2-135m", "What is the capital of France?", "--max-new-tokens", 10)
    assert result.returncode == 0 and "Paris" in result.stdout


def test_doctor_writes_json(lissom_cli):
    result = lissom_cli("doctor", "--json", "-")
    assert result.returncode == 0
    assert '"decode"' in result.stdout and '"ragged_attention"' in result.stdout


def test_kernels_off_says_so(lissom_cli):
    result = lissom_cli("doctor", "--json", "-", LISSOM_ISA="off")
    assert "switched off" in result.stdout


def test_real_model_ratio_one_equals_the_full_cache(smollm2, document):
    from lissom import compact
    from lissom.kv.document import document_ids, question_ids

    model, tokenizer = smollm2
    ids = document_ids(tokenizer, document.read_text())
    question = question_ids(tokenizer, "What is this text about?")
    cache = compact(model, ids, ratio=1.0, queries="context")
    with torch.no_grad():
        wanted = model(torch.cat([ids, question], 1)).logits[:, -question.shape[1] :]
        got = model(question, past_key_values=cache).logits
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
    small = compact(model, ids, ratio=0.1, tokenizer=tokenizer)
    full_bytes = 2 * 4 * 64 * 90 * ids.shape[1]
    assert small.stored_bytes / full_bytes == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["compact", "smollm", "-d", LICENCE, "-o", "x"], "Did you mean 'smollm2-135m'"),
        (["compact", "-d", "missing.txt", "-o", "x"], "missing.txt"),
        (["compact", "-d", LICENCE, "-o", "x", "--ratio", "1.5"], "not in (0, 1]"),
        (["compact", "-d", LICENCE, "-o", "x", "--ratio", "a tenth"], "is no share"),
        (["compact", "-d", LICENCE, "-o", "x", "--select", "best"], "expected one of"),
        (["compact", "-d", LICENCE, "-o", "/proc/x/y"], "Cannot write"),
        (["generate", "smollm2-135m", ""], "prompt is empty"),
        (["generate", "smollm2-135m", "--cache", LICENCE, "a"], "no readable cache file"),
        (["assets", "fetch", "gpt-5"], "no asset 'gpt-5'"),
        (["check", "attention"], "no check of 'attention'. Did you mean 'attention-matching'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(run, arguments, words, smollm2):
    code, _, err = run(*arguments)
    assert code == 2
    assert words in err and "Traceback" not in err


@pytest.mark.parametrize("output", ["/proc/cache.safetensors", "."])
def test_an_output_that_cannot_be_written_is_known_before_the_work(run, document, output):
    code, _, err = run("compact", "no/model", "-d", document, "-o", output)
    assert code == 2 and ("Cannot write" in err or "is a folder" in err)


def test_a_second_search_in_one_folder_is_refused(lissom_cli, tmp_path):
    with FileLock(tmp_path / ".lock"):
        done = lissom_cli("optimize", "no/model", "-o", tmp_path)
    assert done.returncode == 2 and "Another lissom optimize" in done.stderr


def test_empty_document(run, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    code, _, err = run("compact", "-d", tmp_path / "empty.txt", "-o", tmp_path / "x")
    assert code == 2 and "is empty" in err
