"""Losses against their definitions in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from lissom.errors import UserError
from lissom.train import Distillation
from lissom.train.distill import cross_entropy, hidden_distance, kl_divergence


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cross_entropy_is_that_of_the_next_token():
    logits, ids = drawn(2, 5, 7), torch.randint(0, 7, (2, 5))
    wanted = [
        -log_softmax(logits[row, place].double().numpy())[ids[row, place + 1]] for row in range(2) for place in range(4)
    ]
    assert float(cross_entropy(logits, ids)) == pytest.approx(np.mean(wanted), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_from_the_teacher(temperature):
    student, teacher = drawn(2, 3, 7), drawn(2, 3, 7, seed=1)
    ours, theirs = (log_softmax(x.double().numpy() / temperature, -1) for x in (student, teacher))
    wanted = (np.exp(theirs) * (theirs - ours)).sum(-1).mean() * temperature**2
    assert float(kl_divergence(student, teacher, temperature)) == pytest.approx(wanted, rel=1e-5)
    assert float(kl_divergence(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


def test_hidden_states_are_compared_by_their_size():
    teacher = [10 * drawn(2, 3, 8), drawn(2, 3, 8, seed=1)]
    student = [1.1 * state for state in teacher]
    assert float(hidden_distance(student, teacher)) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("changes", [{"kl": -1.0}, {"kl": 0.0, "hidden": 0.0}, {"temperature": 0.0}])
def test_bad_weights_are_refused(changes):
    with pytest.raises(UserError):
        Distillation(**changes)
