from __future__ import annotations

import json

import pytest
import torch
from tiny import random_ids, tiny_model

from lissom import AttentionMatching
from lissom.devices.meters import EnergyMeter, interleaved, peak_memory, threads, time_generation
from lissom.devices.profiles import Profile
from lissom.errors import UserError


def zone(root, name, energy, span=1000):
    folder = root / name
    folder.mkdir()
    (folder / "energy_uj").write_text(str(energy))
    (folder / "max_energy_range_uj").write_text(str(span))
    return folder


def test_energy_is_summed_over_packages_and_a_counter_may_start_again(tmp_path):
    first, second = zone(tmp_path, "intel-rapl:0", 100), zone(tmp_path, "intel-rapl:1", 990)
    zone(tmp_path, "intel-rapl:0:0", 5)  # a part of package 0, counted with it
    meter = EnergyMeter(tmp_path)
    with meter:
        (first / "energy_uj").write_text("400")
        (second / "energy_uj").write_text("9")
    assert meter.joules == pytest.approx((300 + 20) / 1e6)


def test_no_counters_no_figure(tmp_path):
    with EnergyMeter(tmp_path) as meter:
        pass
    assert meter.joules is None
    (zone(tmp_path, "intel-rapl:0", 1) / "energy_uj").write_text("no number")
    with EnergyMeter(tmp_path) as meter:
        pass
    assert meter.joules is None


def test_arms_take_turns_in_both_directions():
    arms = {"a": lambda: 1, "b": lambda: 2, "c": lambda: 3}
    assert [name for name, _ in interleaved(arms, 3)] == list("abccbaabc")


def test_timing_of_a_generation_inside_a_method():
    model, ids = tiny_model("llama"), random_ids(100)
    with AttentionMatching(ratio=0.2)(model):
        timing = time_generation(model, ids, 6)
    assert timing.prompt_tokens == 100
    # The repeat pass and the fit come between the end of reading and the first token.
    assert 0 < timing.read < timing.first_token < timing.total
    assert timing.first_token + 5 * timing.decode < 2 * timing.total
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with pytest.raises(ValueError), threads(1):
        assert torch.get_num_threads() == 1
        raise ValueError
    assert torch.get_num_threads() == before


def test_peak_memory_is_of_the_new_process_alone():
    ballast = torch.ones(100_000_000)  # 400 MB that the child must not be charged with
    small = peak_memory("builtins:len", [1])
    large = peak_memory("torch:ones", 50_000_000)
    assert large - small == pytest.approx(200e6, rel=0.2)
    assert ballast.sum() > 0
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        peak_memory("operator:truediv", 1, 0)


def test_profiles(tmp_path):
    here = Profile.load("this")
    assert here.measured and here.compute == here.bandwidth == 1.0
    with pytest.raises(UserError, match="lissom doctor --json"):
        Profile.load("toaster")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(UserError, match="no device profile"):
        Profile.load(str(tmp_path / "x.json"))
    rates = {"gemm_fp32_gflop_s": 1e-3, "read_bandwidth_gb_s": 1e-3}
    (tmp_path / "slow.json").write_text(json.dumps({"machine": {"cpu": "board", "memory": 1}, "measured": rates}))
    slow = Profile.load(str(tmp_path / "slow.json"))
    assert slow.name == "board" and not slow.measured and slow.compute < 0.1 and slow.bandwidth < 0.1
