from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lissom.rl.tree_search.config import SearchConfig
from lissom.rl.tree_search.policy import Written
from lissom.rl.tree_search.targets import backed_up, pairs, paths, returns_and_advantages, step_targets, visit_targets
from lissom.rl.tree_search.tree import Step, Tree


def made(shape, version=3):
    """A tree of `{token: (visits, total, reward, {...})}`, behind the prompt (9, 9)."""
    tree = Tree(Written(0, (9, 9), 2), SearchConfig(), 0, version)

    def grow(node, below):
        steps = []
        for token, (_, _, reward, _) in below.items():
            steps.append(Step((token,), Written(0, (*node.state.tokens, token), 2), -1.0, (token,), reward))
        tree.grow(node, steps)
        for child, (visits, total, _, inner) in zip(node.children, below.values(), strict=True):
            child.visits, child.total, child.best = visits, total, total / visits if visits else -np.inf
            if inner:
                grow(child, inner)
        node.visits = 1 + sum(child.visits for child in node.children)
        node.total = sum(child.total for child in node.children)

    grow(tree.root, shape)
    return tree


SHAPE = {
    1: (6, 3.0, None, {3: (4, 2.0, None, {}), 4: (1, 1.0, 1.0, {})}),
    2: (3, -1.5, None, {}),
    5: (0, 0.0, -0.9, {}),
}


def test_paths():
    tree = made(SHAPE)
    (by_visits,), (best,) = paths(tree, "visits"), paths(tree, "best")
    assert (by_visits.completion, by_visits.reward, by_visits.ended) == ((1, 3), -1.0, False)
    assert (best.completion, best.reward, best.ended, best.version) == ((1, 4), 1.0, True, 3)
    assert best.prompt == (9, 9)
    assert [path.completion for path in paths(tree, most=5)] == [(1, 4), (5,)]
    assert paths(made({})) == []


def test_visits_are_a_distribution_at_each_state():
    found = visit_targets(made(SHAPE))
    assert [(t.prefix, t.tokens, round(t.weight, 6)) for t in found] == [
        ((9, 9), (1,), round(6 / 9, 6)), ((9, 9), (2,), round(3 / 9, 6)),
        ((9, 9, 1), (3,), 0.8), ((9, 9, 1), (4,), 0.2),
    ]  # fmt: skip


def test_advantages_of_steps_cancel_out():
    found = step_targets(made(SHAPE))
    q1, q2 = 3 / 6, -1.5 / 3
    v = (6 * q1 + 3 * q2) / 9
    assert [t.weight for t in found[:2]] == pytest.approx([q1 - v, q2 - v])
    assert 6 * found[0].weight + 3 * found[1].weight == pytest.approx(0)


def test_pairs():
    found = pairs(made(SHAPE), margin=0.2)
    assert [(pair.prefix, pair.chosen, pair.rejected) for pair in found] == [
        ((9, 9), (1,), (2,)),
        ((9, 9, 1), (4,), (3,)),
    ]
    assert found[0].gap == pytest.approx(1.0)
    assert pairs(made(SHAPE), margin=2.0) == []


def test_states_with_what_came_back():
    assert backed_up(made(SHAPE)) == [((9, 9), pytest.approx(1.5 / 10)), ((9, 9, 1), pytest.approx(3.0 / 6))]


@given(
    st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=9), min_size=1, max_size=4),
    st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1),
)  # fmt: skip
def test_gae_against_its_definition(values, discount, decay, reward):
    """A_t = sum over k of (discount decay)^k (r + discount V(s_{t+k+1}) - V(s_{t+k}))."""
    rewards = [reward] * len(values)
    targets, advantages = returns_and_advantages(rewards, [np.array(own) for own in values], discount, decay)
    for own, target, found in zip(values, targets, advantages, strict=True):
        last = len(own) - 1
        for t in range(len(own)):
            expected = 0.0
            for k in range(t, len(own)):
                surprise = (reward if k == last else discount * own[k + 1]) - own[k]
                expected += (discount * decay) ** (k - t) * surprise
            assert found[t] == pytest.approx(expected, abs=1e-9)
            assert target[t] == pytest.approx(expected + own[t], abs=1e-9)


def test_the_published_choice_is_the_reward_less_the_value():
    values = [np.array([0.3, -0.2, 0.8])]
    targets, advantages = returns_and_advantages([0.5], values)
    assert np.allclose(advantages[0], 0.5 - values[0])
    assert np.allclose(targets[0], 0.5)
