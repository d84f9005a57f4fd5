from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import random_ids, tiny_model

from lissom import AttentionMatching, Eviction, KVBudget
from lissom.cli.apply import apply
from lissom.errors import UserError
from lissom.models import registry
from lissom.models.method import SearchContext
from lissom.recipes import Recipe, method_class, method_names


def written(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_round_trip(tmp_path):
    recipe = Recipe.of(
        AttentionMatching(ratio=0.25, queries="context"), KVBudget("8MB"), model="m", dtype="bfloat16", threads=1
    )
    recipe.save(tmp_path / "recipe.yaml")
    again = Recipe.load(tmp_path / "recipe.yaml")
    assert again == recipe and Recipe.load(tmp_path) == recipe
    assert again.build() == [AttentionMatching(ratio=0.25, queries="context"), KVBudget("8MB")]
    assert recipe.label == "bfloat16 + 1 thread + attention-matching 25% (queries=context) + kv-budget 8 MB"


def test_recipes_that_differ_have_different_labels_and_identities():
    methods = [
        AttentionMatching(ratio=0.1),
        AttentionMatching(ratio=0.104),
        AttentionMatching(ratio=0.1, ridge=0.0),
        AttentionMatching(ratio=0.1, select="omp"),
        Eviction(score="kvzip"),
        Eviction(score="kvzip", budgets="global"),
        KVBudget("8MB"),
        KVBudget("8MB", protect=10),
        KVBudget("8MB", "attention-matching"),
    ]
    recipes = [Recipe.of(method) for method in methods]
    assert len({recipe.label for recipe in recipes}) == len({recipe.identity for recipe in recipes}) == len(methods)
    assert recipes[0].label == "attention-matching 10%"


def test_a_method_inside_a_method(tmp_path):
    recipe = Recipe.of(KVBudget("8MB", Eviction(score="h2o", sinks=2)))
    recipe.save(tmp_path / "r.yaml")
    (method,) = Recipe.load(tmp_path / "r.yaml").build()
    assert method.compactor() == Eviction(score="h2o", sinks=2)


def test_a_folder_with_a_model_is_the_recipe_s_model(tmp_path):
    written(tmp_path, "model: somewhere/else\n").rename(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path).model == "somewhere/else"
    (tmp_path / "config.json").write_text("{}")
    assert Recipe.load(tmp_path).model == str(tmp_path)


def test_a_bare_key_and_an_empty_list(tmp_path):
    recipe = Recipe.load(written(tmp_path, "model: m\nmethods:\n  - eviction\n  - attention-matching:\n"))
    assert recipe.build() == [Eviction(), AttentionMatching()]
    assert Recipe.load(written(tmp_path, "model: m\n")).label == "untouched"


@pytest.mark.parametrize(
    "text,words",
    [
        ("methods: [atention-matching]", "Did you mean 'attention-matching'"),
        ("methods: [eviction: {scor: h2o}]", "Did you mean 'score'"),
        ("methods: [eviction: {score: best}]", "expected one of"),
        ("methods: [eviction: {ratio: much}]", "ratio='much'"),
        ("methods: [eviction: {ratio: 1.5}]", "not in (0, 1]"),
        ("methods: [attention-matching: 3]", "written as"),
        ("methods: [kv-budget: {size: 8MB, method: {ratio: 0.5}}]", "expected one of"),
        ("methods: 3", "a list of methods"),
        ("methods: [flash-prefill, {flash-prefill: {alpha: 0.2}}]", "flash-prefill is named twice"),
        ("methods: [{a: {}, b: {}}]", "one `key"),
        ("dtype: int3", "dtype='int3'"),
        ("threads: 0", "threads=0"),
        ("model: a\ncolour: red", "colour"),
        ("- 1", "expected the keys"),
        ("a: [", "no YAML"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, text, words):
    with pytest.raises(UserError) as caught:
        Recipe.load(written(tmp_path, text))
    assert words in str(caught.value) and "\n" not in str(caught.value) and "?." not in str(caught.value)


def test_no_code_is_run_from_a_recipe(tmp_path):
    with pytest.raises(UserError):
        Recipe.load(written(tmp_path, "model: !!python/object/apply:os.system ['touch /tmp/owned']"))


def test_running_restores_everything():
    model, ids = tiny_model("llama"), random_ids(80)
    before, threads = model(ids).logits, torch.get_num_threads()
    with Recipe.of(Eviction(ratio=0.5, score="h2o"), threads=1).running(model):
        assert torch.get_num_threads() == 1
        model.generate(ids, max_new_tokens=3)
    assert torch.get_num_threads() == threads and torch.equal(model(ids).logits, before)


@dataclass(frozen=True)
class Doubling:
    """A method that changes weights."""

    name: ClassVar[str] = "doubling"
    times: int = 1

    def convert(self, model, tokenizer=None):
        with torch.no_grad():
            model.lm_head.weight.mul_(2.0**self.times)
        return model


@pytest.fixture
def doubling(monkeypatch):
    known = registry.method_class
    monkeypatch.setattr(registry, "method_class", lambda key: Doubling if key == "doubling" else known(key))


def test_weights_are_changed_once_and_the_rest_runs(doubling, smollm2, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    smollm2[1].save_pretrained(tmp_path / "plain")
    steps = ({"doubling": {"times": 2}}, {"eviction": {"score": "h2o"}}, {"doubling": {}})
    recipe = Recipe(model=str(tmp_path / "plain"), methods=steps)
    converting, running = recipe.halves()
    assert [type(m) for m in converting.build()] == [Doubling, Doubling] and running.build() == [Eviction(score="h2o")]
    plain, (changed, _) = tiny_model("llama"), recipe.load_model()
    torch.testing.assert_close(changed.lm_head.weight, 8 * plain.lm_head.weight)
    recipe.save(tmp_path / "recipe.yaml")
    apply(tmp_path / "recipe.yaml", None, tmp_path / "out", None)
    again = Recipe.load(tmp_path / "out")
    assert again.build() == [Eviction(score="h2o")]
    torch.testing.assert_close(again.load_model()[0].lm_head.weight, 8 * plain.lm_head.weight)


@pytest.mark.parametrize("key", method_names())
def test_every_registered_method_offers_candidates_that_a_recipe_can_hold(key, tmp_path):
    kind = method_class(key)
    assert kind.name == key
    for quick in (True, False):
        for candidate in kind.candidates(SearchContext(1000, 50_000_000, quick)):
            recipe = Recipe.of(candidate)
            recipe.save(tmp_path / "r.yaml")
            assert Recipe.load(tmp_path / "r.yaml").build() == [candidate]
