from __future__ import annotations

import itertools
import math

import pytest

from lissom.errors import UserError
from lissom.train import TrainConfig
from lissom.train.schedule import learning_rate, weight_decay


def test_the_rate_rises_and_falls_by_a_cosine():
    config = TrainConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rates[10] == 1.0 and rates[110] == pytest.approx(0.1)
    assert rates[60] == pytest.approx(0.55)  # halfway down
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_the_rate_stays_and_falls_linearly():
    config = TrainConfig(
        steps=100, warmup_steps=0, learning_rate=1.0, min_learning_rate=0.0, schedule="wsd", decay_share=0.25
    )
    rates = [learning_rate(step, config) for step in range(101)]
    assert set(rates[:76]) == {1.0}
    assert rates[75:] == pytest.approx([1 - i / 25 for i in range(26)])


def test_weight_decay_is_gone_at_half_of_the_steps():
    config = TrainConfig(steps=100, weight_decay=0.1, weight_decay_until=0.5, warmup_steps=0)
    assert weight_decay(0, config) == 0.1
    assert weight_decay(25, config) == pytest.approx(0.05)
    assert weight_decay(20, config) == pytest.approx(0.1 * (1 + math.cos(0.4 * math.pi)) / 2)
    assert weight_decay(50, config) == weight_decay(99, config) == 0
    assert weight_decay(99, TrainConfig(weight_decay=0.3)) == 0.3


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"steps": 0}, "steps"), ({"context": 1}, "context"), ({"learning_rate": 0.0}, "learning_rate"),
        ({"min_learning_rate": 1.0}, "min_learning_rate"), ({"warmup_steps": 1000}, "warmup_steps"),
        ({"schedule": "step"}, "schedule"), ({"decay_share": 0.0}, "decay_share"),
        ({"weight_decay_until": 2.0}, "weight_decay_until"), ({"weight_decay": -1.0}, "weight_decay"),
        ({"beta2": 1.0}, "beta2"), ({"precision": "int8"}, "precision"),
    ],
)  # fmt: skip
def test_bad_settings_are_sentences(changes, words):
    with pytest.raises(UserError, match=words):
        TrainConfig(**changes)
