"""What a scheduler of diffusers works on, whichever it is: how a sample is mixed, and what a model's output says of it.

A sample is `x = a x₀ + b ε`. A model's output is linear in it, so that the clean picture which it means is
`x₀ = c x + d · output`, with numbers that depend on the scheduler, what the model predicts, and the step.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin

from lissom.errors import UserError

_TAKEN = ("model_output", "timestep", "sample")
_PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass(frozen=True)
class Mix:
    """A noise level, and how a model's output is read there.

    Attributes:
        a, b: shares of picture and noise in a sample.
        c, d: of the sample and of the output in the clean picture that the output means.
    """

    a: float
    b: float
    c: float
    d: float

    def clean(self, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The picture that is meant, in fp32."""
        return self.c * sample.float() + self.d * output.float()

    def noise(self, sample: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """What is left of the sample then."""
        return (sample.float() - self.a * clean) / self.b


def mix_of(scheduler: SchedulerMixin, timestep: Any) -> Mix:
    """Of the step that the scheduler takes next.

    Raises:
        UserError: the scheduler has no noise levels, or its model predicts something else than noise, picture or
            velocity.
    """
    name = type(scheduler).__name__
    predicts = scheduler.config.get("prediction_type", "flow_prediction" if name.startswith("FlowMatch") else None)
    if predicts not in _PREDICTIONS or "sigma_data" in scheduler.config:
        raise UserError(f"{name} predicts {predicts!r}, or in a way of its own: expected {', '.join(_PREDICTIONS)}.")
    if "Inverse" in name or hasattr(scheduler, "sigmas_interpol") or hasattr(scheduler, "noise_sampler"):
        raise UserError(f"The noise level of a step of {name} is not known: take another scheduler.")
    a, b = _shares(scheduler, timestep, predicts)
    if predicts == "flow_prediction":
        return Mix(a, b, 1.0, -b)
    if predicts == "sample":
        return Mix(a, b, 0.0, 1.0)
    if predicts == "epsilon" and a == 0:
        raise UserError("A model that predicts noise cannot begin at noise alone: leave out rescale_betas_zero_snr.")
    if predicts == "epsilon":
        return Mix(a, b, 1 / a, -b / a)
    length = (a * a + b * b) ** 0.5  # the velocity is that of the sample when its variance is kept
    return Mix(a, b, a / length**2, -b / length)


def _shares(scheduler: SchedulerMixin, timestep: Any, predicts: str) -> tuple[float, float]:
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and hasattr(scheduler, "step_index"):
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        sigma = float(sigmas[scheduler.step_index])
        if predicts == "flow_prediction":
            return 1 - sigma, sigma
        if float(scheduler.init_noise_sigma) != 1.0:  # samples are not scaled
            return 1.0, sigma
        return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
    if getattr(scheduler, "alphas_cumprod", None) is not None and predicts != "flow_prediction":
        product = float(scheduler.alphas_cumprod[int(timestep)])
        return product**0.5, (1 - product) ** 0.5
    raise UserError(f"{type(scheduler).__name__} has neither sigmas nor alphas, so that its noise level is not known.")


Step = Callable[..., Any]
Around = Callable[[Step, torch.Tensor, Any, torch.Tensor], Any]


@contextmanager
def around_steps(scheduler: SchedulerMixin, around: Around) -> Iterator[None]:
    """Every `scheduler.step` is made by `around(step, output, timestep, sample)` until the block ends.

    `step` is the scheduler's own, which takes the same three and knows the other arguments of the call.
    """
    own = scheduler.step
    if "step" in vars(scheduler):
        raise UserError("Another method has hold of this pipeline's steps already.")
    signature = inspect.signature(own)
    if list(signature.parameters)[:3] != list(_TAKEN):
        raise UserError(f"{type(scheduler).__name__}.step takes other things than {', '.join(_TAKEN)}.")

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        if call.arguments.get("s_churn"):
            raise UserError("s_churn makes noise before a step, whose level is then another: leave it out.")

        def rest(output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> Any:
            call.arguments.update(zip(_TAKEN, (output, timestep, sample), strict=True))
            return own(*call.args, **call.kwargs)

        return around(rest, *(call.arguments[name] for name in _TAKEN))

    scheduler.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del scheduler.step


def changed(result: Any, sample: torch.Tensor) -> Any:
    """What a step gave, with another sample."""
    if isinstance(result, tuple):
        return (sample, *result[1:])
    result.prev_sample = sample
    return result


def sample_of(result: Any) -> torch.Tensor:
    """The sample that a step gave."""
    sample: torch.Tensor = result[0] if isinstance(result, tuple) else result.prev_sample
    return sample
