from __future__ import annotations

import math
from dataclasses import replace

import torch

from lissom import AttentionMatching, Eviction, compact
from lissom.evals.checks import attention_matching as study
from lissom.evals.fidelity import answer_ids, score, teach
from lissom.evals.texts import planted_documents
from lissom.kv.document import document_ids, question_ids
from lissom.report.checks import attention_matching as report


def test_documents_hold_their_facts_and_differ(smollm2):
    documents = planted_documents(smollm2[1], 3, 500)
    assert len({d.text for d in documents}) == 3
    for document in documents:
        assert all(q.answer in document.text for q in document.questions if q.answer)
        assert 450 < document_ids(smollm2[1], document.text).shape[1] < 700
    assert planted_documents(smollm2[1], 3, 500) == documents


def test_the_full_cache_scores_perfectly_and_a_random_one_does_not(smollm2):
    model, tokenizer = smollm2
    document = planted_documents(tokenizer, 1, 200)[0]
    ids = document_ids(tokenizer, document.text)
    full = compact(model, ids, ratio=1.0, queries="context")
    (teacher,) = teach(model, tokenizer, ids, full, document.questions[:1], max_new_tokens=6)
    (perfect,) = score(model, tokenizer, ids, full, [teacher])
    assert perfect.kl < 1e-5 and perfect.output_error < 1e-5 and perfect.mass_error < 1e-5 and perfect.top1 == 1
    assert math.isclose(perfect.nll, float(-teacher.log_probs.max(-1).values.mean()), abs_tol=1e-3)
    (poor,) = score(model, tokenizer, ids, compact(model, ids, Eviction(ratio=0.05, score="random")), [teacher])
    assert poor.kl > 0.05 and poor.output_error > 0.1 and poor.mass_error > 0.1


def test_answers_of_a_batch_are_those_of_each_question_alone(smollm2):
    model, tokenizer = smollm2
    document = planted_documents(tokenizer, 1, 200)[0]
    ids = document_ids(tokenizer, document.text)
    asked = [question_ids(tokenizer, text) for text in ("Who?", "In which year did this happen? Answer briefly.")]
    with torch.no_grad():
        full = model(ids, use_cache=True).past_key_values
    for cache in (compact(model, ids, ratio=0.3, queries="context"), full):
        together = answer_ids(model, ids, asked, cache, 12)
        alone = [answer_ids(model, ids, [question], cache, 12)[0] for question in asked]
        assert [answer.tolist() for answer in together] == [answer.tolist() for answer in alone]
        assert [a[:, : q.shape[1]].equal(q) for a, q in zip(together, asked, strict=True)] == [True, True]


def test_the_paper_s_size_runs_at_a_tiny_setting(small, tmp_path, monkeypatch):
    speech = "My fellow citizens, the year has been long and the harvest was good.\n\n" * 30
    monkeypatch.setattr(study, "corpus", lambda name: [(f"{name} {n}", f"{n}. {speech}") for n in range(4)])
    size = replace(study.PAPER, documents=1, tokens=150, ratios=(0.1,), ablation_ratios=(), questions=2)
    size = replace(size, needle_lengths=(100, 16000))  # the second is beyond the model's context
    run = study.run(*small, size, tmp_path / "journal.jsonl")
    assert {record["arm"] for record in run.records} == {study.OURS, *study.BASELINES}
    assert [needle["length"] for needle in run.needles] == [100] * 3
    result = report.result(run)
    assert len(result.claims) == 2 and all(row.value == row.value for row in result.rows)
    assert [table.row_count for table in report.tables(run)] == [len(study.BASELINES) + 1, 6]


def test_a_stopped_check_goes_on_where_it_was(small, tmp_path):
    size = study.Size(1, 200, (0.2,), questions=2)
    methods = {study.OURS: AttentionMatching(ratio=0.2), "h2o": Eviction(ratio=0.2, score="h2o")}
    journal = tmp_path / "journal.jsonl"
    first = study.measure(*small, size, journal, arms=lambda ratio, size: methods)
    journal.write_text(journal.read_text()[:-50])  # killed in the middle of the second record
    again = study.measure(*small, size, journal, arms=lambda ratio, size: methods)
    assert again[0] == first[0]
    assert again[1]["scores"] == first[1]["scores"]
    assert study.measure(*small, size, journal, arms=lambda ratio, size: methods) == again
