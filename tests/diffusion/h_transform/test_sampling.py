"""What a model's output means, against the schedulers' own way to add noise."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from lissom.diffusion.sampling import around_steps, mix_of
from lissom.errors import UserError

VP = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
)
VE = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


def outputs(kind, a, b, clean, noise):
    """What a perfect model predicts."""
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "flow_prediction":
        return noise - clean
    length = np.hypot(a, b)
    return (a * noise - b * clean) / length


@pytest.mark.parametrize("name", VP + VE + FLOW)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_a_perfect_output_means_the_picture(name, kind):
    if (kind == "flow_prediction") != (name in FLOW):
        pytest.skip("no such scheduler")
    options = {} if name in FLOW else {"prediction_type": kind}
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(10)
    random = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 4, 4, generator=random) for _ in range(2))
    for index in (0, 4, 9):
        timestep = scheduler.timesteps[index]
        if name in FLOW:
            noisy = torch.lerp(clean, noise, timestep / 1000)
        else:
            noisy = scheduler.add_noise(clean, noise, timestep[None])
        if hasattr(scheduler, "_step_index"):
            scheduler._step_index = index
        mix = mix_of(scheduler, timestep)
        torch.testing.assert_close(mix.a * clean + mix.b * noise, noisy, atol=2e-3, rtol=2e-3)
        found = mix.clean(noisy, outputs(kind, mix.a, mix.b, clean, noise))
        torch.testing.assert_close(found, clean, atol=3e-2, rtol=3e-2)  # 1/a is 80 at the first step
        torch.testing.assert_close(mix.noise(noisy, clean), noise, atol=3e-2, rtol=3e-2)


def test_multistep_solvers_of_flows():
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(5)
    mix = mix_of(scheduler, scheduler.timesteps[0])
    assert mix.a + mix.b == pytest.approx(1) and (mix.c, mix.d) == (1, -mix.b)


def test_schedulers_without_levels_are_refused():
    with pytest.raises(UserError, match="in a way of its own"):
        mix_of(diffusers.ScoreSdeVeScheduler(), 0)
    for name, words in (
        ("EDMEulerScheduler", "predicts 'epsilon'"),
        ("CMStochasticIterativeScheduler", "in a way of its own"), ("KDPM2DiscreteScheduler", "is not known"),
        ("DDIMInverseScheduler", "is not known"),
    ):  # fmt: skip
        scheduler = getattr(diffusers, name)()
        scheduler.set_timesteps(4)
        with pytest.raises(UserError, match=words):
            mix_of(scheduler, scheduler.timesteps[0])
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    sample = torch.zeros(1, 3, 4, 4)
    with around_steps(scheduler, lambda step, *given: step(*given)), pytest.raises(UserError, match="s_churn"):
        scheduler.step(sample, scheduler.timesteps[0], sample, s_churn=5.0)


def test_steps_are_given_back():
    scheduler = diffusers.DDIMScheduler()
    own = scheduler.step
    with around_steps(scheduler, lambda step, *given: step(*given)):
        assert scheduler.step != own
        with (
            pytest.raises(UserError, match="hold of this pipeline"),
            around_steps(scheduler, lambda step, *given: None),
        ):
            pass
    assert scheduler.step == own
