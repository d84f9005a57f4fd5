from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import ARCHITECTURES, tiny_model
from trl import GRPOConfig, GRPOTrainer

from lissom.errors import UserError
from lissom.rl.band import BandPOTrainer
from lissom.rl.tasks import Countdown
from lissom.rl.tasks.characters import character_tokenizer
from lissom.rl.value_prior import (
    Budget,
    Constant,
    Fusion,
    GaussianProcess,
    History,
    LeaveOneOut,
    Mean,
    Ridge,
    ShrinkToBatch,
    ValuePriorConfig,
    ValuePriorTrainer,
)
from lissom.rl.value_prior.features import features_of

TASK = Countdown()
PROBLEMS = TASK.problems("train", 12)
ROWS = Dataset.from_list([{"prompt": TASK.prompt(problem), "index": i} for i, problem in enumerate(PROBLEMS)])


def varied(completions, completion_ids, **_):
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def equal(completions, **_):
    return [1.0] * len(completions)


def trainer_of(kind, folder, architecture="llama", reward=varied, **options):
    arguments = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 4, "steps_per_generation": 2,
        "max_completion_length": 8, "learning_rate": 1e-2, "beta": 0.0, "use_cpu": True, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "loss_type": "grpo", "scale_rewards": "none",
    }  # fmt: skip
    named = {name: options.pop(name) for name in list(options) if name in GRPOConfig.__dataclass_fields__}
    if issubclass(kind, ValuePriorTrainer):
        options.setdefault("reward_range", (0.0, 1.0))
    model = tiny_model(architecture, initializer_range=0.05)
    return kind(
        model, reward_funcs=reward, args=GRPOConfig(str(folder), **arguments | named), train_dataset=ROWS,
        processing_class=character_tokenizer(), **options,
    )  # fmt: skip


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def settings(**changes):
    return replace(ValuePriorConfig(Mean(), History(), None), **changes)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_groups_mean_is_stock_grpo(architecture, loss, tmp_path):
    stock = trainer_of(GRPOTrainer, tmp_path, architecture, loss_type=loss)
    begin = weights(stock)
    stock.train()
    ours = trainer_of(ValuePriorTrainer, tmp_path, architecture, loss_type=loss, value_prior=settings())
    ours.train()
    assert not same(begin, weights(stock))
    for one, other in zip(weights(stock), weights(ours), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def generated(trainer, rows=16):
    trainer.model.train()
    return trainer._generate_and_score_completions([ROWS[i // 4] for i in range(rows)])


def test_prompts_with_more_rollouts_have_the_same_weight(tmp_path):
    """Rows of a prompt, by their prompt: the sizes differ, and the sums of weights do not."""
    config = ValuePriorConfig(Fusion(), Constant(0.0), Budget(4, 12))
    trainer = trainer_of(ValuePriorTrainer, tmp_path, value_prior=config, steps_per_generation=4)
    found = generated(trainer)
    rows = len(found["advantages"])
    assert rows > 16 and rows % 4 == 0
    real = found["completion_mask"].any(1)
    owners = [
        tuple(ids[mask.bool()].tolist()) for ids, mask in zip(found["prompt_ids"], found["prompt_mask"], strict=True)
    ]
    sizes = {own: sum(1 for o, r in zip(owners, real, strict=True) if o == own and r) for own in set(owners)}
    assert len(set(sizes.values())) > 1 and min(sizes.values()) == 4 and max(sizes.values()) <= 12
    assert trainer._metrics["train"]["prior/rollouts"] == [sum(sizes.values()) / 4]
    # The prior is 0 and rewards are 0 or 1: where it is distrusted altogether the advantages of a prompt cancel out.
    assert (found["advantages"][~real] == 0).all()
    for own, size in sizes.items():
        mine = torch.tensor([a for o, a, r in zip(owners, found["advantages"], real, strict=True) if o == own and r])
        steps = (mine[:, None] - mine[None]).abs()
        differs = steps[steps > 1e-6]
        if len(differs):  # rewards differ by 1, so advantages differ by the weight
            assert float(differs.max()) == pytest.approx(rows / 4 / size, rel=1e-5)


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_the_gradient_is_the_mean_over_prompts(loss, tmp_path):
    """Of each prompt the mean over its rollouts, of each of those over its tokens: by hand, in one batch."""
    config = ValuePriorConfig(Fusion(), Constant(0.0), Budget(4, 12))
    trainer = trainer_of(ValuePriorTrainer, tmp_path, value_prior=config, steps_per_generation=2, loss_type=loss)
    found = generated(trainer)
    trainer.current_gradient_accumulation_steps = 1
    whole = {name: value for name, value in found.items() if name != "num_items_in_batch"}
    mask = found["completion_mask"]
    owners = [tuple(ids[m.bool()].tolist()) for ids, m in zip(found["prompt_ids"], found["prompt_mask"], strict=True)]
    loss_of = trainer._compute_loss(trainer.model, {**whole, "num_items_in_batch": mask.sum() * 2})
    loss_of.backward()
    ours = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    trainer.model.zero_grad()
    logps = trainer._get_per_token_logps_and_entropies(
        trainer.model, torch.cat([found["prompt_ids"], found["completion_ids"]], 1),
        torch.cat([found["prompt_mask"], mask], 1), mask.shape[1],
    )[0]  # fmt: skip
    real = mask.any(1)
    rewards = [
        float(sum(ids[m.bool()].tolist()) % 3 == 0) for ids, m in zip(found["completion_ids"], mask, strict=True)
    ]
    total = 0.0
    for own in set(owners):
        rows = [n for n, other in enumerate(owners) if other == own and real[n]]
        mean, size = np.mean([rewards[n] for n in rows]), len(rows)
        squared = max(0.0, mean**2 - 0.25 / size)
        baseline = mean * squared / (squared + 0.25 / size)
        for n in rows:
            advantage = rewards[n] - baseline
            ratio = (logps[n] - logps[n].detach()).exp() * mask[n]
            per_row = (ratio * advantage).sum() / (mask[n].sum() if loss == "grpo" else mask.sum() / int(real.sum()))
            total = total - per_row / size / len(set(owners))
    total.backward()
    for mine, parameter in zip(ours, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-6, rtol=1e-3)


def test_groups_of_equal_rewards_teach(tmp_path):
    silent = trainer_of(ValuePriorTrainer, tmp_path, reward=equal, value_prior=settings())
    begin = weights(silent)
    silent.train()
    assert same(begin, weights(silent))
    assert silent.state.log_history[0]["prior/silent"] == 1
    fused = trainer_of(
        ValuePriorTrainer, tmp_path, reward=equal, value_prior=ValuePriorConfig(Fusion(), Constant(0.8), None)
    )
    fused.train()
    assert not same(begin, weights(fused))
    assert fused.state.log_history[0]["prior/silent"] == 0
    assert fused.state.log_history[0]["prior/accepted"] == 1


@pytest.mark.parametrize(
    "baseline", [LeaveOneOut(), ShrinkToBatch(), Fusion("empirical"), Fusion(leave_one_out=True)], ids=str
)
def test_every_baseline_trains(baseline, tmp_path):
    trainer = trainer_of(ValuePriorTrainer, tmp_path, value_prior=settings(baseline=baseline, scale_rewards="batch"))
    begin = weights(trainer)
    trainer.train()
    assert not same(begin, weights(trainer))


@pytest.mark.parametrize("prior", [GaussianProcess(), Ridge(), History()], ids=str)
def test_a_prior_learns_from_earlier_steps_alone(prior, tmp_path, monkeypatch):
    trainer = trainer_of(ValuePriorTrainer, tmp_path, max_steps=8, value_prior=ValuePriorConfig(Fusion(), prior, None))
    seen = []
    predict = type(prior).predict

    def watched(self, prompts, features, context):
        seen.append(
            (trainer.state.global_step, [own.step for own in context], None if features is None else features.shape)
        )
        return predict(self, prompts, features, context)

    monkeypatch.setattr(type(prior), "predict", watched)
    trainer.train()
    assert [step for step, _, _ in seen] == [0, 2, 4, 6]
    assert all(step > own for step, context, _ in seen for own in context)
    assert [len(context) for _, context, _ in seen] == [0, 4, 8, 12]
    assert all(shape == ((4, 64) if prior.needs_features else None) for _, _, shape in seen)
    assert "prior/error" in trainer.state.log_history[4]  # the first step of the third batch of rollouts


def test_a_run_goes_on_with_what_the_prior_knew(tmp_path):
    options = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 4,
        "value_prior": ValuePriorConfig(Fusion(), Ridge(), Budget(4, 8)),
    }  # fmt: skip
    whole = trainer_of(ValuePriorTrainer, tmp_path, **options)
    whole.train()
    again = trainer_of(ValuePriorTrainer, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(weights(whole), weights(again))
    assert again.ledger == whole.ledger
    assert [o.mean for o in again.context.outcomes] == [o.mean for o in whole.context.outcomes]


def test_silent_prompts_can_be_left_out_of_the_mean(tmp_path):
    """As DAPO does: the others count for more, by as much as there are fewer of them."""

    def of_some(completions, completion_ids, prompts, **_):
        return [
            float(sum(ids) % 3 == 0) if p == ROWS[0]["prompt"] else 1.0
            for p, ids in zip(prompts, completion_ids, strict=True)
        ]

    found = []
    for drop in (False, True):
        trainer = trainer_of(ValuePriorTrainer, tmp_path, reward=of_some, value_prior=settings(drop_silent=drop))
        found.append(generated(trainer)["advantages"])
    assert found[0].abs().max() > 0
    assert torch.allclose(found[1], found[0] * 4)  # one of four prompts teaches


def test_with_bounds_of_tokens_as_well(tmp_path):
    class Both(BandPOTrainer, ValuePriorTrainer):
        pass

    trainer = trainer_of(Both, tmp_path, value_prior=ValuePriorConfig(Fusion(), Constant(0.0), Budget(4, 8)))
    found = generated(trainer)
    assert len(found["ratio_lower"]) == len(found["advantages"]) > 16 - 1
    trainer.train()
    assert "band/clipped/up" in trainer.state.log_history[1]
    assert "prior/rollouts" in trainer.state.log_history[0]


def test_rewards_are_logged_by_prompt(tmp_path):
    trainer = trainer_of(
        ValuePriorTrainer, tmp_path, value_prior=ValuePriorConfig(Fusion(), Constant(0.0), Budget(4, 12))
    )
    generated(trainer)
    metrics = trainer._metrics["train"]
    means = [own.mean for own in trainer.context.outcomes]
    assert metrics["reward"] == [pytest.approx(np.mean(means))]
    assert len(metrics["frac_reward_zero_std"]) == 1
    assert trainer.ledger.completions == sum(own.size for own in trainer.context.outcomes) > 16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_means_of_last_hidden_states(architecture):
    model, tokenizer = tiny_model(architecture), character_tokenizer()
    prompts = ["12", "3 4 5>6:", "1+1="]
    found = features_of(model, tokenizer, prompts, batch_size=2)
    for prompt, own in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        states = model(ids, output_hidden_states=True).hidden_states[-1][0]
        assert np.allclose(own, states.detach().numpy().mean(0), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"reward_range": None}, "state it"),
        ({"value_prior": ValuePriorConfig(Fusion(), History(), Budget(2, 8))}, "begins with 2"),
    ],
)
def test_settings_that_do_not_fit(options, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        trainer_of(ValuePriorTrainer, tmp_path, **options)


def test_a_completion_without_a_reward(tmp_path):
    trainer = trainer_of(ValuePriorTrainer, tmp_path, reward=lambda completions, **_: [None] * len(completions))
    with pytest.raises(UserError, match="has no reward"):
        trainer.train()


def test_configs_that_do_not_fit():
    with pytest.raises(UserError, match="scale_rewards"):
        ValuePriorConfig(scale_rewards="group")
    with pytest.raises(UserError, match="only the fused"):
        ValuePriorConfig(Mean(), History(), Budget())
