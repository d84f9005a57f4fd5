"""Against a search written anew, one path at a time; and a test for each defect that is known of the published code."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.errors import UserError
from lissom.rl.tasks import Countdown, CountdownProblem
from lissom.rl.tree_search import (
    SearchConfig,
    Step,
    SymbolicCountdown,
    Tree,
    TreeSearch,
    extract,
    root_of,
    terminals,
    to_dict,
)


class Numbers:
    """Paths of digits: each has a reward of its own at `length`, and a value on the way. Steps are the same for a state
    and a count, whoever asks."""

    def __init__(self, length=4, branches=3, low=-1.0, twins=False):
        self.length, self.branches, self.low, self.twins = length, branches, low, twins
        self.expanded, self.evaluated = [], []

    def _draw(self, state, *salt):
        return np.random.default_rng([*state, 99, *salt])

    def reward(self, state):
        return float(self._draw(state).uniform(self.low, 1))

    def value(self, state):
        return float(self._draw(state, 5).uniform(self.low, 1))

    def expand(self, states, counts, seed):
        self.expanded += states
        return [[self._step(state, n) for n in range(count)] for state, count in zip(states, counts, strict=True)]

    def _step(self, state, n):
        digit = n % self.branches if self.twins else n
        after = (*state, digit)
        ends = len(after) == self.length
        logp = float(self._draw(after, 7).uniform(-6, 0))
        return Step(digit, after, logp, (1,) * (1 + digit), self.reward(after) if ends else None)

    def evaluate(self, states, seed):
        self.evaluated += states
        return [self.value(state) for state in states]


def one_path_at_a_time(world, config):
    """Statistics by state: visits, sum, best."""
    stats, children = {(): [0, 0.0, -math.inf]}, {}
    for _ in range(config.simulations):
        state, path = (), [()]
        while state in children:
            best, chosen = -math.inf, None
            around = stats[state][0]
            logps = np.array([step.logp for step in children[state]])
            prior = np.exp(logps - logps.max())
            prior /= prior.sum()
            for step, p in zip(children[state], prior, strict=True):
                visits, total, most = stats.get(step.state, [0, 0.0, -math.inf])
                q = (total / visits if config.backup == "mean" else most) if visits else 0.0
                if config.rule == "puct":
                    score = q + config.exploration * p * math.sqrt(max(around, 1)) / (1 + visits)
                else:
                    score = (
                        q + config.exploration * math.sqrt(math.log(max(around, 1)) / visits) if visits else math.inf
                    )
                if score > best:
                    best, chosen = score, step
            state = chosen.state
            path.append(state)
            if chosen.reward is not None:
                break
        found = chosen.reward if state and len(state) == world.length else None
        if found is None:
            children[state] = world.expand([state], [config.children], 0)[0]
            found = world.value(state)
        for own in path:
            entry = stats.setdefault(own, [0, 0.0, -math.inf])
            entry[0] += 1
            entry[1] += found
            entry[2] = max(entry[2], found)
    return stats


@pytest.mark.parametrize("rule", ["puct", "uct"])
@pytest.mark.parametrize("backup", ["mean", "max"])
@given(exploration=st.floats(0.05, 4), simulations=st.integers(1, 120), low=st.sampled_from([-1.0, -3.0]))
@settings(max_examples=25, deadline=None)
def test_against_a_search_written_anew(rule, backup, exploration, simulations, low):
    config = SearchConfig(
        simulations=simulations, children=3, rule=rule, backup=backup, exploration=exploration, wave=1, low=low
    )
    if rule == "uct":  # steps that were not tried are all alike: ties are drawn, and here the first is taken
        config = replace(config, children=1)
    (tree,) = TreeSearch(Numbers(low=low), config)([()])
    expected = one_path_at_a_time(Numbers(low=low), config)
    found = {node.state: node for node in tree.root.below() if node.visits}
    assert set(found) == {state for state, (visits, *_) in expected.items() if visits}
    for state, node in found.items():
        visits, total, best = expected[state]
        assert (node.visits, node.best, node.flying) == (visits, best, 0)
        assert node.total == pytest.approx(total)


def check(tree):
    """What must always be so."""
    for node in tree.root.below():
        assert node.flying == 0
        if node.visits:
            mean = node.total / node.visits
            assert tree.config.low - 1e-9 <= mean <= node.best + 1e-9 <= tree.config.high + 2e-9
        own = node.visits - sum(child.visits for child in node.children)
        assert own >= (1 if node.visits and node.reward is None else 0)
        if node.children:
            assert sum(child.prior for child in node.children) == pytest.approx(1)


@given(
    seed=st.integers(0, 1000), wave=st.integers(1, 9), close=st.booleans(), merge=st.booleans(),
    widening=st.sampled_from([None, (1.0, 0.5), (2.0, 0.3)]),
    prior=st.sampled_from(["policy", "uniform", "length-normalised"]),
    rule=st.sampled_from(["puct", "uct"]), backup=st.sampled_from(["mean", "max"]), normalise=st.booleans(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_what_must_always_be_so(**options):
    config = SearchConfig(simulations=60, children=4, **options)
    trees = TreeSearch(Numbers(twins=True), config)([(), (1,), (2, 2)])
    again = TreeSearch(Numbers(twins=True), config)([(), (1,), (2, 2)])
    for tree, same in zip(trees, again, strict=True):
        check(tree)
        assert to_dict(tree) == to_dict(same)
        assert tree.finished == 60 or tree.root.closed
        json.dumps(to_dict(tree))


def test_the_value_of_a_leaf_counts_once():
    """The published code stores it and then adds it: after one visit Q is twice the value."""
    world = Numbers()
    (tree,) = TreeSearch(world, SearchConfig(simulations=5, wave=1))([()])
    for node in tree.root.below():
        if node.visits == 1 and node.reward is None:
            assert node.worth(tree.config) == world.value(node.state)
    (single,) = TreeSearch(world, SearchConfig(simulations=1))([()])
    assert single.root.total == world.value(())


@pytest.mark.parametrize("value", [-0.9, -0.2, 0.4])
def test_a_path_under_way_makes_a_step_less_attractive(value):
    """The published code's virtual visit draws Q towards 0: a negative step becomes more attractive."""
    (tree,) = TreeSearch(Numbers(), SearchConfig(simulations=2, wave=1))([()])
    child = tree.root.children[0]
    child.visits, child.total, child.best = 3, 3 * value, value
    before = tree.score(tree.root, child)
    worth = child.worth(tree.config)
    child.flying += 1
    assert tree.score(tree.root, child) < before
    assert child.worth(tree.config) < worth
    child.flying -= 1
    assert tree.score(tree.root, child) == before


class Failing(Numbers):
    """Fails in its third call, in one way or another."""

    def __init__(self, how):
        super().__init__()
        self.how, self.calls = how, 0

    def evaluate(self, states, seed):
        self.calls += 1
        if self.calls < 3:
            return super().evaluate(states, seed)
        if self.how == "raise":
            raise OSError("no grader")
        if self.how == "interrupt":
            raise KeyboardInterrupt
        return {"short": [0.0] * (len(states) - 1), "nan": [math.nan] * len(states), "far": [2.0] * len(states)}[
            self.how
        ]


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("raise", OSError),
        ("interrupt", KeyboardInterrupt),
        ("short", UserError),
        ("nan", UserError),
        ("far", UserError),
    ],
)
def test_no_path_stays_under_way_when_a_world_fails(how, error):
    trees = []

    def kept(*given):
        trees.append(Tree(*given))
        return trees[-1]

    with pytest.raises(error):
        TreeSearch(Failing(how), SearchConfig(simulations=50, wave=5), kept)([(), (1,)])
    assert len(trees) == 2
    for tree in trees:
        assert all(node.flying == 0 for node in tree.root.below())
        assert sum(node.visits for node in [tree.root]) == tree.finished


def test_what_is_known_is_left_alone():
    """The published code grades ends again and again, and never closes what is exhausted."""
    world = Numbers(length=3)
    (tree,) = TreeSearch(world, SearchConfig(simulations=500, children=2, close=True))([()])
    assert tree.root.closed
    ends = [node for node in tree.root.below() if node.reward is not None]
    assert len(ends) == 8 and all(node.visits == 1 for node in ends)
    assert tree.finished == 8 + 7  # each end and each state before once
    assert len(world.expanded) == len(set(world.expanded)) == 7


class Drawn(Numbers):
    """Steps are drawn, and drawn anew each time."""

    def expand(self, states, counts, seed):
        random = np.random.default_rng(seed)
        return [
            [self._step(state, int(n)) for n in random.integers(9, size=count)]
            for state, count in zip(states, counts, strict=True)
        ]


def test_with_widening_more_can_be_reached():
    (narrow,) = TreeSearch(Drawn(), SearchConfig(simulations=200, children=2, merge=False))([()])
    (wide,) = TreeSearch(Drawn(), SearchConfig(simulations=200, children=2, widening=(1.0, 0.6)))([()])
    assert len(narrow.root.children) == 2
    assert len(wide.root.children) > 5
    assert wide.root.samples <= math.ceil(200**0.6) + 1


def test_equal_steps_are_one_and_their_prior_is_how_often_they_were_drawn():
    """The softmax of log probabilities of steps that were drawn from the policy counts it twice."""
    config = SearchConfig(simulations=1, children=4, prior="uniform")
    (tree,) = TreeSearch(Numbers(branches=3, twins=True), config)([()])
    assert [(child.step.key, child.drawn, child.prior) for child in tree.root.children] == [
        (0, 2, 0.5),
        (1, 1, 0.25),
        (2, 1, 0.25),
    ]
    (apart,) = TreeSearch(Numbers(branches=3, twins=True), replace(config, merge=False))([()])
    assert [child.step.key for child in apart.root.children] == [0, 1, 2, 0]
    assert tree.generated == apart.generated == 1 + 2 + 3 + 1


def test_priors_by_length():
    world = Numbers()
    for prior, form in (("policy", lambda s: s.logp), ("length-normalised", lambda s: s.logp / len(s.tokens))):
        (tree,) = TreeSearch(world, SearchConfig(simulations=1, prior=prior))([()])
        weights = np.exp([form(child.step) for child in tree.root.children])
        assert np.allclose([child.prior for child in tree.root.children], weights / weights.sum())


class Trap(Numbers):
    """The step that looks best leads nowhere; another one, seldom tried, is solved."""

    def _step(self, state, n):
        after = (*state, n)
        solved = n == 1 and len(after) == 2
        return Step(n, after, 0.0 if n == 0 else -3.0, (1,), 1.0 if solved else None)

    def value(self, state):
        return 0.9 if all(digit == 0 for digit in state) else -0.5

    def reward(self, state):
        raise AssertionError


def test_a_solved_path_is_found_where_visits_lead_astray():
    (tree,) = TreeSearch(Trap(), SearchConfig(simulations=80, children=2, depth=6, exploration=2.0))([()])
    by_visits, best = extract(tree), extract(tree, "best")
    assert by_visits[-1].reward is None
    assert best[-1].reward == 1.0 and best[0] is tree.root
    assert terminals(tree)[0] is best[-1]
    assert extract(tree, "value")[0] is tree.root


def test_several_ends_are_distinct_and_in_order():
    (tree,) = TreeSearch(Numbers(length=2), SearchConfig(simulations=60))([()])
    ends = terminals(tree, 3)
    assert len({node.state for node in ends}) == 3
    assert [node.reward for node in ends] == sorted(
        (node.reward for node in tree.root.below() if node.reward is not None), reverse=True
    )[:3]


def test_trees_know_the_policy_that_drew_them():
    (tree,) = TreeSearch(Numbers(), SearchConfig(simulations=3))([()], version=7)
    assert tree.version == 7 and to_dict(tree)["version"] == 7


def test_values_in_the_middle_of_nowhere_are_scaled():
    """With rewards from -1000 to 1000 whose spread is small, plain pUCT sees no difference to what was not tried."""
    config = SearchConfig(simulations=40, low=-1000.0, high=1000.0, normalise=True)
    (tree,) = TreeSearch(Numbers(), config)([()])
    scores = [tree.score(tree.root, child) for child in tree.root.children if child.visits]
    assert all(-0.01 <= score <= 1 + config.exploration * 7 for score in scores)


@pytest.mark.parametrize("reward", ["correct", "dense"])
def test_the_puzzle_is_solved(reward):
    problems = Countdown().problems("test", 12)
    config = SearchConfig(simulations=300, exploration=2.0, close=True, prior="uniform")
    trees = TreeSearch(SymbolicCountdown(reward), config)([root_of(problem) for problem in problems])
    for problem, tree in zip(problems, trees, strict=True):
        check(tree)
        path = extract(tree, "best")
        assert path[-1].reward == 1.0
        lines, left = [], tuple(sorted(problem.numbers))
        for node in path[1:]:
            rest = " ".join(map(str, node.state.numbers))
            lines.append(f"{node.step.key};{rest}" if len(node.state.numbers) > 1 else node.step.key)
        assert Countdown().correct(problem, "\n".join(lines)) == 1, (problem, lines, left)


def test_closing_finds_more_than_visiting_the_same_ends_again():
    problems = Countdown(numbers=4).problems("train", 10)
    roots = [root_of(problem) for problem in problems]
    seen = []
    for close in (False, True):
        config = SearchConfig(simulations=200, close=close, prior="uniform", exploration=0.5)
        trees = TreeSearch(SymbolicCountdown("dense"), config)(roots)
        ends = [sum(1 for node in tree.root.below() if node.reward is not None and node.visits) for tree in trees]
        seen.append(sum(ends))
    assert seen[1] > 1.5 * seen[0]


def test_a_target_of_nothing():
    trees = TreeSearch(SymbolicCountdown(), SearchConfig(simulations=20))([root_of(CountdownProblem((2, 2), 0))])
    assert extract(trees[0], "best")[-1].reward == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"simulations": 0},
        {"wave": 0},
        {"low": 1.0},
        {"exploration": -1.0},
        {"widening": (0.5, 0.5)},
        {"rule": "ucb"},
        {"seed": -1},
    ],
)
def test_settings_out_of_range(options):
    with pytest.raises(UserError):
        SearchConfig(**options)


def test_nothing_to_search():
    with pytest.raises(UserError, match="at least one root"):
        TreeSearch(Numbers())([])
