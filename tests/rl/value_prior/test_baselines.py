"""Against loops in NumPy, against the identities of the fusion, and against simulations of rewards of -1 and 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissom.errors import UserError
from lissom.rl.value_prior.baselines import Fusion, LeaveOneOut, Mean, PriorOnly, Rollouts, ShrinkToBatch, fuse
from lissom.rl.value_prior.planner import Budget, gain, target


def ragged(seed, prompts=9, low=-1.0, high=1.0, least=2):
    random = np.random.default_rng(seed)
    own = np.concatenate([np.arange(prompts).repeat(least), random.integers(prompts, size=3 * prompts)])
    random.shuffle(own)
    rewards = random.choice([low, high], size=len(own)) if seed % 2 else random.uniform(low, high, len(own))
    return Rollouts(
        torch.from_numpy(rewards),
        torch.from_numpy(own),
        torch.from_numpy(random.uniform(low, high, prompts)),
        low,
        high,
    )


def groups_of(rollouts):
    rewards, own = rollouts.rewards.numpy(), rollouts.prompt.numpy()
    return rewards, own, [rewards[own == prompt] for prompt in range(len(rollouts.prior))]


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_against_loops(seed):
    rollouts = ragged(seed, low=-2.0, high=3.0)
    rewards, own, groups = groups_of(rollouts)
    prior = rollouts.prior.numpy()
    mean = np.array([groups[prompt].mean() for prompt in own])
    assert np.allclose(Mean()(rollouts), mean)
    assert np.allclose(PriorOnly()(rollouts), prior[own])
    left = [(groups[p].sum() - r) / (len(groups[p]) - 1) for r, p in zip(rewards, own, strict=True)]
    assert np.allclose(LeaveOneOut()(rollouts), left)
    fused, alone = Fusion()(rollouts).numpy(), Fusion(leave_one_out=True)(rollouts).numpy()
    worst = 25 / 4
    for n, (r, p) in enumerate(zip(rewards, own, strict=True)):
        for value, m, variance in (
            (fused[n], groups[p].mean(), worst / len(groups[p])),
            (alone[n], (groups[p].sum() - r) / (len(groups[p]) - 1), worst / (len(groups[p]) - 1)),
        ):
            squared = max(0.0, (m - prior[p]) ** 2 - variance)
            weight = squared / (squared + variance)
            assert value == pytest.approx(weight * m + (1 - weight) * prior[p])


@given(mean=st.floats(-1, 1), prior=st.floats(-1, 1), size=st.integers(1, 64))
def test_it_is_james_and_steins_rule_and_never_far_from_the_mean(mean, prior, size):
    m, v, variance = torch.tensor([mean, prior, 1 / size], dtype=torch.float64)
    found = fuse(m, v, variance)
    x = float(m - v)
    expected = float(v) + (max(0.0, 1 - 1 / (size * x * x)) * x if size * x * x else 0.0)
    assert float(found.baseline) == pytest.approx(expected, abs=1e-12)
    assert abs(float(found.baseline - m)) <= size**-0.5 + 1e-12
    assert (float(found.weight) == 0) == (x * x <= float(variance))


@given(st.integers(0, 10**6), st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize(
    "baseline", [Mean(), LeaveOneOut(), ShrinkToBatch(), Fusion(), Fusion("empirical"), Fusion("worst", True)]
)
def test_scaling_and_moving_rewards_does_the_same_to_baselines(baseline, seed, scale, shift):
    plain = ragged(seed)
    other = Rollouts(
        plain.rewards * scale + shift,
        plain.prompt,
        plain.prior * scale + shift,
        scale * plain.low + shift,
        scale * plain.high + shift,
    )
    assert torch.allclose(baseline(other), baseline(plain) * scale + shift, atol=1e-9)


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("baseline", [Mean(), ShrinkToBatch(), Fusion(), Fusion("empirical"), Fusion("worst", True)])
def test_the_order_of_rollouts_makes_no_difference(baseline, seed):
    plain = ragged(seed)
    order = torch.randperm(len(plain.rewards), generator=torch.Generator().manual_seed(seed))
    other = Rollouts(plain.rewards[order], plain.prompt[order], plain.prior, plain.low, plain.high)
    assert torch.allclose(baseline(other), baseline(plain)[order])


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_without_its_own_reward_a_baseline_does_not_know_it(seed):
    plain = ragged(seed)
    changed = plain.rewards.clone()
    changed[0] = plain.high
    other = Rollouts(changed, plain.prompt, plain.prior, plain.low, plain.high)
    for baseline in (LeaveOneOut(), Fusion(leave_one_out=True)):
        assert float(baseline(plain)[0]) == pytest.approx(float(baseline(other)[0]), abs=1e-12)
    assert float(Mean()(plain)[0]) != float(Mean()(other)[0]) or plain.rewards[0] == plain.high


def simulated(error, size, prompts=100_000, low=-1.0, seed=0):
    """Rewards of `low` or 1 with a U-shaped share of right ones; the truth; and a prior that is off by `error`."""
    random = np.random.default_rng(seed)
    truth = 2 * random.beta(0.5, 0.5, prompts) - 1
    noise = error(random, prompts, truth)
    prior = np.clip(noise, -1, 1)
    right = random.random((prompts, size)) < ((truth + 1) / 2)[:, None]
    scaled = [(x + 1) / 2 * (1 - low) + low for x in (truth, prior)]
    rewards = np.where(right, 1.0, low)
    return scaled[0], Rollouts(
        torch.from_numpy(rewards.ravel()),
        torch.arange(prompts).repeat_interleave(size),
        torch.from_numpy(scaled[1]),
        low,
        1.0,
    )


def gaussian(deviation):
    return lambda random, prompts, truth: truth + deviation * random.standard_normal(prompts)


def mixture(random, prompts, truth):
    """Four fifths nearly right, one fifth anything."""
    wild = random.random(prompts) < 0.2
    return np.where(wild, random.uniform(-1, 1, prompts), truth + 0.15 * random.standard_normal(prompts))


def error_of(baseline, truth, rollouts):
    size = len(rollouts.rewards) // len(truth)
    return float(((baseline(rollouts).numpy().reshape(-1, size)[:, 0] - truth) ** 2).mean())


def test_the_simulation_of_a_prior_that_is_seldom_wild():
    """A fusion of four rollouts has half the error of the better of its parts, and shares without a gradient shrink."""
    truth, rollouts = simulated(mixture, 4)
    fused, mean, prior = (error_of(baseline, truth, rollouts) for baseline in (Fusion(), Mean(), PriorOnly()))
    assert fused == pytest.approx(0.063, abs=0.004)
    assert mean == pytest.approx(0.125, abs=0.003)
    assert fused < 0.6 * min(mean, prior)
    silent = [
        float(((rollouts.rewards - b(rollouts)).view(-1, 4).abs().amax(1) < 1e-9).double().mean())
        for b in (Mean(), Fusion())
    ]
    assert silent[0] == pytest.approx(0.54, abs=0.02)
    assert silent[1] < 0.12


def test_no_shrinkage_is_best_everywhere():
    """With a prior that is right within 0.1 it alone is better, and with one that is far off the mean is."""
    for deviation, best in ((0.1, PriorOnly()), (0.8, Mean())):
        truth, rollouts = simulated(gaussian(deviation), 4)
        assert error_of(best, truth, rollouts) < error_of(Fusion(), truth, rollouts)


def test_the_range_matters():
    """With rewards of 0 and 1 and the range of -1 and 1 the prior is nearly always believed."""
    truth, right = simulated(mixture, 4, low=0.0)
    wrong = Rollouts(right.rewards, right.prompt, right.prior, -1.0, 1.0)
    assert error_of(Fusion(), truth, right) == pytest.approx(0.0158, abs=0.001)
    assert error_of(Fusion(), truth, wrong) > 1.2 * error_of(Fusion(), truth, right)


@pytest.mark.parametrize(
    ("distance", "size"), [(4.0, 16), (1.0, 15), (0.5, 14), (0.25, 12), (0.1, 6), (0.086, 4), (0.0, 0)]
)
def test_known_sizes(distance, size):
    found = int(target(torch.tensor([distance], dtype=torch.float64), 1 / 256))
    assert found == size or (size == 4 and found <= 4)


@given(distance=st.floats(1e-3, 50), cost=st.floats(1e-4, 0.2))
def test_the_target_is_where_a_rollout_no_longer_pays(distance, cost):
    d = torch.tensor([distance], dtype=torch.float64)
    size = int(target(d, cost))

    def error(k):
        return distance / (1 + k * distance)

    assert error(size) - error(size + 1) <= cost + 1e-9
    if size > 0:
        assert error(size - 1) - error(size) > cost - 1e-9
    assert float(gain(d, torch.tensor(size))) == pytest.approx(error(size) - error(size + 1), abs=1e-12)


@given(st.integers(0, 10**6), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_capped_wave_takes_the_best_rollouts(seed, extra):
    random = np.random.default_rng(seed)
    distance, sizes = torch.from_numpy(random.exponential(0.4, 12)), torch.full((12,), 4)
    free, capped = Budget(4, 16).second_wave(distance, sizes), Budget(4, 16, extra=extra).second_wave(distance, sizes)
    assert int(capped.sum()) == min(extra, int(free.sum()))
    assert (capped <= free).all() and (capped >= 0).all()
    taken = [float(gain(distance[i], sizes[i] + n)) for i in range(12) for n in range(int(capped[i]))]
    left = [float(gain(distance[i], sizes[i] + n)) for i in range(12) for n in range(int(capped[i]), int(free[i]))]
    assert not taken or not left or min(taken) >= max(left) - 1e-12


def test_a_second_wave_is_as_good_as_looking_again_behind_each_rollout():
    truth, rollouts = simulated(mixture, 16, prompts=40_000)
    rewards, prior = rollouts.rewards.view(-1, 16), rollouts.prior
    budget, fusion = Budget(), Fusion()

    def known(sizes):
        taken = torch.arange(16) < sizes[:, None]
        return Rollouts(rewards[taken], torch.arange(len(prior)).repeat_interleave(sizes), prior, -1.0, 1.0)

    first = torch.full((len(prior),), 4)
    two = first + budget.second_wave(fusion.fused(known(first)).distance, first)
    one_by_one = first.clone()
    while bool((more := budget.wants_more(fusion.fused(known(one_by_one)).distance, one_by_one)).any()):
        one_by_one = one_by_one + more
    results = {}
    for name, sizes in (("two", two), ("steps", one_by_one)):
        estimate = fusion.fused(known(sizes)).baseline.numpy()
        results[name] = float(sizes.double().mean()), float(((estimate - truth) ** 2).mean())
    assert results["two"][0] == pytest.approx(6.0, abs=0.2)
    assert results["two"][1] == pytest.approx(0.0368, abs=0.002)
    assert results["steps"][0] == pytest.approx(5.49, abs=0.2)
    assert results["steps"][1] == pytest.approx(0.0381, abs=0.002)


@pytest.mark.parametrize(
    ("rewards", "prompt", "prior", "low", "high"),
    [
        ([1.0], [0, 0], [0.0], -1, 1),
        ([1.0, 1.0], [0, 2], [0.0, 0.0, 0.0], -1, 1),
        ([1.0], [1], [0.0], -1, 1),
        ([float("nan")], [0], [0.0], -1, 1),
        ([1.0], [0], [float("inf")], -1, 1),
        ([1.0], [0], [0.0], 1, 1),
        ([1.0], [0], [0.0], float("-inf"), 1),
    ],
)
def test_what_does_not_fit(rewards, prompt, prior, low, high):
    with pytest.raises(UserError):
        Rollouts(torch.tensor(rewards), torch.tensor(prompt), torch.tensor(prior), low, high)


def test_one_rollout():
    rollouts = Rollouts(torch.tensor([1.0, -1.0]), torch.tensor([0, 1]), torch.tensor([0.9, 0.9]), -1.0, 1.0)
    with pytest.raises(UserError, match="one rollout"):
        LeaveOneOut()(rollouts)
    assert Fusion()(rollouts).tolist() == pytest.approx([0.9, 0.9 + (1 - 1 / 1.9**2) * -1.9])
    assert Fusion("empirical")(rollouts).tolist() == Fusion()(rollouts).tolist()


@pytest.mark.parametrize("settings", [{"first": 0}, {"first": 5, "most": 4}, {"cost": 0.0}, {"extra": -1}])
def test_budgets_out_of_range(settings):
    with pytest.raises(UserError):
        Budget(**settings)
