"""Each tensor's own learning rate, through schedules, stops and a Trainer that knows nothing of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from lissom import NobleConfig
from lissom.train import TokenWindows, TrainConfig, new_model, train
from lissom.train.schedule import learning_rate
from lissom.train.trainer import CausalTrainer
from lissom.weights.noble import noble_parameter_groups
from lissom.weights.noble.apply import layers_of
from lissom.weights.noble.layer import kind_of

CONFIG = TrainConfig(
    steps=12, context=16, batch_size=4, learning_rate=3e-3, warmup_steps=2, logging_steps=1, eval_steps=6, save_steps=4,
    schedule="wsd",
)  # fmt: skip


def windows() -> TokenWindows:
    tokens = np.random.default_rng(0).integers(0, 60, 80 * 16)
    return TokenWindows(tokens.astype(np.uint16), 16)


def fresh(**changes):
    return NobleConfig(rank=4, **changes).convert(
        new_model(60, hidden=48, layers=2, heads=3, intermediate=96, context=16, seed=1)
    )


def rates(optimizer) -> dict[int, float]:
    return {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


def wanted_factors(model) -> dict[int, float]:
    found = {id(parameter): 1.0 for parameter in model.parameters()}
    for layer in layers_of(model).values():
        rho = min(layer.matrix().shape) / 4
        by_kind = {"up": rho**0.6, "mix": rho**0.45, "omega": 3.0, "phi": 5.0}
        for own, parameter in layer.noble.named_parameters():
            found[id(parameter)] = by_kind.get(kind_of(own), 1.0)
    return found


def test_rates_of_every_step_are_the_schedule_times_each_tensors_own_factor(tmp_path, monkeypatch):
    model, seen = fresh(), []
    begin = CausalTrainer.begin_step

    def look(self, step):
        begin(self, step)
        seen.append((step, rates(self.optimizer.optimizer)))

    monkeypatch.setattr(CausalTrainer, "begin_step", look)
    train(CONFIG, model, None, windows(), None, tmp_path)
    factors = wanted_factors(model)
    assert len(seen) == 12 and len(set(factors.values())) >= 5
    for step, found in seen:
        base = learning_rate(step, CONFIG)
        assert found.keys() == factors.keys()
        for parameter, rate in found.items():
            assert rate == pytest.approx(base * factors[parameter], rel=1e-9)


def test_a_run_that_was_killed_goes_on_with_the_same_rates(tmp_path):
    whole, model = train(CONFIG, one := fresh(), None, windows(), None, tmp_path / "whole"), one

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 7:
            raise Killed

    with pytest.raises(Killed):
        train(CONFIG, fresh(), None, windows(), None, tmp_path / "parts", progress=kill)
    again = train(CONFIG, other := fresh(), None, windows(), None, tmp_path / "parts")
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in whole]
    assert [entry["omega_drift"] for entry in again] == [entry["omega_drift"] for entry in whole]
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


def test_frequencies_move_and_do_not_decay(tmp_path):
    model = fresh()
    history = train(replace(CONFIG, weight_decay=10.0), model, None, windows(), None, tmp_path)
    drifts = [entry["omega_drift"] for entry in history]
    assert drifts[0] < drifts[-1]
    omegas = torch.cat([layer.noble.omega_0.detach() for layer in layers_of(model).values()])
    assert 0.95 < float(omegas.mean()) < 1.05  # decay of 10 would have left 0.75 of them


def test_a_plain_trainer_takes_the_groups(tmp_path):
    model = fresh()
    optimizer = torch.optim.AdamW(noble_parameter_groups(model, 1e-3, 0.1))
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    rows = [{"input_ids": windows()[i]["input_ids"], "labels": windows()[i]["input_ids"]} for i in range(32)]
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule)).train()
    for parameter, rate in rates(optimizer).items():
        assert rate == pytest.approx(1e-3 / 5 * wanted_factors(model)[parameter], rel=1e-9)


@pytest.mark.parametrize("wrapped", [lambda model: torch.compile(model), lambda model: torch.nn.Sequential(model)])
def test_groups_of_a_wrapped_model_are_the_same(wrapped):
    model = fresh()
    one, other = noble_parameter_groups(model, 1e-3, 0.1), noble_parameter_groups(wrapped(model), 1e-3, 0.1)
    for left, right in zip(one, other, strict=True):
        assert (left["lr"], left["weight_decay"]) == (right["lr"], right["weight_decay"])
        assert [id(p) for p in left["params"]] == [id(p) for p in right["params"]]


def test_trained_models_go_on_from_their_folder(tmp_path):
    import lissom

    train(CONFIG, model := fresh(), None, windows(), None, tmp_path)
    assert Path(tmp_path / "config.json").exists()
    loaded = type(model).from_pretrained(tmp_path)
    ids = windows()[0]["input_ids"][None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    history = train(replace(CONFIG, steps=3), loaded, None, windows(), None, tmp_path / "on")
    assert history[-1]["omega_drift"] > 0 and lissom.NobleConfig is NobleConfig


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"gradient_checkpointing": True}])
def test_precision_and_checkpointing(changes, tmp_path):
    plain = train(replace(CONFIG, steps=4), fresh(), None, windows(), None, tmp_path / "plain")
    other = train(replace(CONFIG, steps=4, **changes), fresh(), None, windows(), None, tmp_path / "other")
    exact = "precision" not in changes
    assert [e["loss"] for e in other] == pytest.approx([e["loss"] for e in plain], rel=1e-5 if exact else 2e-2)
