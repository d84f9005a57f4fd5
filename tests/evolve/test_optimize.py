from __future__ import annotations

import itertools
import time

import pytest
import torch
from evolve.fake import FakeBench, fake_profile
from hypothesis import given
from hypothesis import strategies as st

from lissom.devices.meters import Timing
from lissom.devices.profiles import Profile
from lissom.errors import UserError
from lissom.evals.peers import Comparison
from lissom.evals.stats import Interval
from lissom.evolve.measure import Measured
from lissom.evolve.optimize import Outcome, compare, costs, dominates, gain, optimize
from lissom.recipes import Recipe


def measured(loss, size, first, decode):
    return Measured(
        Recipe(),
        [{"cache_bytes": size, "weight_bytes": 0, "scores": []}],
        [Timing(1, first, first, decode, 1.0, None)],
        Interval(loss, loss, loss),
    )


figures = st.integers(1, 4).map(float)


@given(st.lists(st.tuples(figures, figures, figures, figures), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(points):
    group = [measured(*point) for point in points]
    front = Outcome(group[0], group, 1.0, "balanced", fake_profile()).front
    for m in group:
        beaten = any(
            all(a <= b for a, b in zip(costs(o), costs(m), strict=True)) and costs(o) != costs(m) for o in group
        )
        assert any(m is f for f in front) == (not beaten)


def test_nothing_is_dropped_for_a_time_within_the_noise():
    fast, slow = measured(0.0, 1.0, 1.0, 1.0), measured(0.0, 1.0, 1.04, 1.04)
    assert dominates(fast, slow) and not dominates(fast, slow, 1.05)
    worse = measured(0.1, 1.0, 0.97, 0.97)
    assert dominates(fast, worse, 1.05) and not dominates(fast, worse)
    assert not any(
        dominates(a, b, 1.05) and dominates(b, a, 1.05) for a, b in itertools.combinations((fast, slow, worse), 2)
    )


def test_the_search_finds_the_best_recipe_within_the_floor():
    bench = FakeBench()
    outcome = optimize(bench, 0.04, 10, profile=fake_profile())
    assert outcome.finished and outcome.measured[0] is outcome.base
    # bfloat16 is twice as fast, and attention matching at 25 % loses 0.0375 + 0.001 in NLL; at 10 % it is above 4 %.
    assert outcome.best.recipe.dtype == "bfloat16"
    assert "attention-matching 25%" in outcome.best.label
    assert outcome.best.peak_bytes == outcome.base.peak_bytes == 10**9
    assert all(m.timings and m.quality for m in outcome.measured)
    assert outcome.best.loss.estimate <= 0.04
    assert optimize(FakeBench(), 0.0, 10, profile=fake_profile()).best.label == "untouched"


def test_native_passes_come_first_and_everything_else_on_top_of_them():
    bench = FakeBench(architecture="llama", packed=True)
    outcome = optimize(bench, 0.04, 10, profile=fake_profile())
    best = outcome.best.recipe
    assert best.weights == "packed" and list(best.methods[0]) == ["native-decode"]
    assert "attention-matching" in best.methods[1] and len(best.methods) == 2
    others = [m.recipe for m in outcome.measured if m is not outcome.base]
    assert all(recipe.weights == "packed" and "native-decode" in recipe.methods[0] for recipe in others)
    assert {tuple(recipe.methods[0]["native-decode"].items()) for recipe in others if len(recipe.methods) == 2} == {
        (("kv", "int8"),), (),
    }  # fmt: skip
    assert outcome.base.label == "untouched"


def test_of_a_dense_checkpoint_the_weights_are_next():
    bench = FakeBench(architecture="llama")
    outcome = optimize(bench, 0.04, 10, profile=fake_profile())
    keys = [[key for step in m.recipe.methods for key in step] for m in outcome.measured]
    assert keys[:3] == [[], ["native-decode"], ["native-decode"]]
    assert ["quantize", "native-decode"] in keys
    # Four bits would spend most of the accepted loss; what comes on top begins with eight.
    assert {m.recipe.methods[0]["quantize"]["bits"] for m in outcome.measured if len(m.recipe.methods) == 3} == {8}
    assert outcome.best.memory == outcome.best.weight_bytes + outcome.best.cache_bytes < outcome.base.memory / 3


def test_the_recommended_recipe_is_compared_with_peers_in_what_time_is_left():
    bench, asked = FakeBench(architecture="llama", packed=True), []

    def peers(recipe, deadline):
        asked.append((recipe, deadline - time.monotonic()))
        return Comparison("m", [], {"llama.cpp": "is not installed"}, [])

    outcome = optimize(bench, 0.04, 2, profile=fake_profile(), peers=peers)
    assert outcome.peers.failed and len(asked) == 1
    assert asked[0][0] == outcome.best.recipe and 60 < asked[0][1] <= 120


def test_peers_are_left_out_where_times_are_predicted_and_after_ctrl_c():
    def peers(recipe, deadline):
        raise AssertionError

    elsewhere = Profile("a board", measured=False)
    assert optimize(FakeBench(), 0.04, 2, profile=elsewhere, peers=peers).finished
    assert optimize(FakeBench(stop_after=9), 0.04, 2, profile=fake_profile(), peers=peers).interrupted


def test_ctrl_c_while_peers_are_measured_keeps_the_search():
    def peers(recipe, deadline):
        raise KeyboardInterrupt

    outcome = optimize(FakeBench(), 0.04, 2, profile=fake_profile(), peers=peers)
    assert outcome.interrupted and outcome.peers is None and outcome.best is not outcome.base


def test_the_dominated_are_dropped_early():
    bench = FakeBench()
    optimize(bench, 0.04, 10, profile=fake_profile())
    rounds = {
        label: sum(kind == "timing" and name == label for kind, name, _ in bench.calls) for _, label, _ in bench.calls
    }
    # Eviction loses ten times as much quality as attention matching for the same bytes and time.
    assert rounds["bfloat16 + 8-bit rtn + h2o 50%"] == 1
    assert rounds["bfloat16 + 8-bit rtn + attention-matching 25%"] == bench.workload.rounds
    assert rounds["untouched"] > bench.workload.rounds  # timed again beside the candidates


@pytest.mark.parametrize("calls", [2, 3, 7, 20])
def test_interrupted_anywhere_what_is_measured_is_returned(calls):
    outcome = optimize(FakeBench(stop_after=calls), 0.05, 10, profile=fake_profile())
    assert outcome.interrupted and not outcome.finished
    assert outcome.measured and all(m.timings and m.quality for m in outcome.measured)
    assert outcome.best in outcome.measured


def test_interrupted_while_memory_is_measured():
    whole = FakeBench()
    optimize(whole, 0.05, 10, profile=fake_profile())
    first = next(number for number, call in enumerate(whole.calls) if call[0] == "peak")
    outcome = optimize(FakeBench(stop_after=first), 0.05, 10, profile=fake_profile())
    assert outcome.interrupted and not outcome.finished and outcome.best is not outcome.base


def test_a_process_that_is_killed_costs_no_report():
    bench = FakeBench()

    def killed(recipe):
        raise RuntimeError("it was killed")

    bench.peak = killed
    outcome = optimize(bench, 0.05, 10, profile=fake_profile())
    assert outcome.finished and outcome.base.peak_bytes is None


def test_a_recipe_that_fails_is_named_and_the_others_are_measured():
    bench = FakeBench()
    quality = bench.quality

    def failing(recipe, number):
        if "eviction" in str(recipe.methods):
            raise UserError("There is nothing to evict.")
        return quality(recipe, number)

    bench.quality = failing
    outcome = optimize(bench, 0.05, 10, profile=fake_profile())
    assert outcome.finished and outcome.failed and set(outcome.failed.values()) == {"There is nothing to evict."}
    assert not any("eviction" in str(m.recipe.methods) for m in outcome.measured)
    assert "attention-matching" in outcome.best.label and not outcome.untried


def test_without_the_untouched_model_there_is_no_search():
    bench = FakeBench()

    def failing(recipe, number):
        raise UserError("It has no attention.")

    bench.quality = failing
    with pytest.raises(UserError):
        optimize(bench, 0.05, 10, profile=fake_profile())


def test_what_is_recommended_was_measured_fully_however_early_the_search_ended(monkeypatch):
    bench = FakeBench()
    clock = iter(range(10**6))
    monkeypatch.setattr("lissom.evolve.optimize.time.monotonic", lambda: float(next(clock)))
    outcome = optimize(bench, 0.05, 30 / 60, profile=fake_profile())  # thirty looks at the clock
    assert not outcome.finished and outcome.untried and outcome.best is not outcome.base
    assert len(outcome.best.timings) >= bench.workload.rounds
    assert len(outcome.best.quality) == bench.workload.documents


def test_a_small_cache_is_no_gain_where_the_answer_takes_longer():
    base, slow, fast = measured(0.0, 4.0, 1.0, 0.1), measured(0.0, 0.1, 9.0, 0.1), measured(0.0, 2.0, 1.0, 0.1)
    outcome = Outcome(base, [base, slow, fast], 1.0, "balanced", fake_profile())
    assert outcome.best is fast
    assert Outcome(base, [base, slow, fast], 1.0, "memory", fake_profile()).best is slow


def test_recipes_of_one_label_are_measured_each():
    recipes = [Recipe(model="m", methods=({"eviction": {"seed": seed}},)) for seed in (1, 2)]
    assert len(compare(FakeBench(), recipes, lambda *unused: None).measured) == 3


def test_a_bfloat16_checkpoint_is_tried_in_float32():
    bench = FakeBench()
    bench.own_dtype = torch.bfloat16
    outcome = optimize(bench, 0.05, 10, profile=fake_profile())
    assert {m.recipe.dtype for m in outcome.measured} == {"auto", "float32"}


def test_interrupted_before_anything_is_known():
    with pytest.raises(KeyboardInterrupt):
        optimize(FakeBench(stop_after=1), 0.05, 10, profile=fake_profile())


def test_out_of_time_the_base_is_still_measured():
    outcome = optimize(FakeBench(), 0.05, 0.0, profile=fake_profile())
    assert not outcome.finished and not outcome.interrupted
    assert [m.label for m in outcome.measured] == ["untouched"] and outcome.base.peak_bytes


def test_compare_drops_nothing():
    recipes = [Recipe(model="m", threads=1), Recipe(model="m", methods=({"eviction": {}},))]
    bench = FakeBench()
    outcome = compare(bench, recipes, lambda *unused: None)
    assert [m.label for m in outcome.measured] == ["untouched", "1 thread", "snapkv 10%"]
    assert all(len(m.timings) == bench.workload.rounds for m in outcome.measured)


def test_preferences():
    base, small = measured(0.0, 4.0, 1.0, 1.0), measured(0.0, 1.0, 1.0, 1.0)
    device = fake_profile()
    assert gain(small, base, "memory", device) == 4 and gain(small, base, "speed", device) == 1
    assert gain(small, base, "balanced", device) == pytest.approx(2)
