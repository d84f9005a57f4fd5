from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from tiny import ARCHITECTURES, tiny_model
from trl import GRPOConfig, GRPOTrainer

from lissom.errors import UserError
from lissom.rl.band import BandConfig, BandPOTrainer, DynamicClip, FixedClip, ProbabilityMask
from lissom.rl.rewards import TaskReward
from lissom.rl.tasks import Countdown
from lissom.rl.tasks.characters import character_tokenizer
from lissom.rl.trainer import RewardTrainer

TASK = Countdown()
PROBLEMS = TASK.problems("train", 12)
ROWS = Dataset.from_list([{"prompt": TASK.prompt(problem), "index": i} for i, problem in enumerate(PROBLEMS)])


def varied(completions, completion_ids, **_):
    """Of random letters: something to tell them apart by."""
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


def trainer_of(kind, folder, architecture="llama", reward=varied, **options):
    arguments = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 4, "num_iterations": 2,
        "max_completion_length": 8, "learning_rate": 1e-2, "epsilon": 0.2, "epsilon_high": 0.28, "beta": 0.0,
        "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    named = {name: options.pop(name) for name in list(options) if name in GRPOConfig.__dataclass_fields__}
    tokenizer = character_tokenizer()
    model = tiny_model(architecture, initializer_range=0.05)
    return kind(
        model, reward_funcs=reward, args=GRPOConfig(str(folder), **arguments | named), train_dataset=ROWS,
        processing_class=tokenizer, **options,
    )  # fmt: skip


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_constant_bounds_are_stock_grpo_to_the_bit(architecture, loss, tmp_path):
    stock = trainer_of(GRPOTrainer, tmp_path, architecture, loss_type=loss)
    begin = weights(stock)
    stock.train()
    ours = trainer_of(BandPOTrainer, tmp_path, architecture, loss_type=loss, band=FixedClip(0.2, 0.28))
    ours.train()
    assert not same(begin, weights(stock))
    assert same(weights(stock), weights(ours))
    assert ours.state.log_history[1]["clip_ratio/region_mean"] == stock.state.log_history[1]["clip_ratio/region_mean"]


def test_with_nothing_else_the_base_is_stock_grpo(tmp_path):
    trained = []
    for kind in (GRPOTrainer, RewardTrainer):
        trainer = trainer_of(kind, tmp_path)
        trainer.train()
        trained.append(weights(trainer))
    assert same(*trained)


@pytest.mark.parametrize(
    "band", [BandConfig(), BandConfig("tv", cap=None), DynamicClip(), ProbabilityMask(0.01, 0.02)], ids=str
)
def test_the_loss_is_the_clipped_objective(band, tmp_path):
    """Against the formula, from the log probabilities that the trainer has, by hand."""
    trainer = trainer_of(BandPOTrainer, tmp_path, band=band, loss_type="bnpo")
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.6 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs).detach()
    old, mask, advantages = inputs["old_per_token_logps"], inputs["completion_mask"], inputs["advantages"]
    ratio = (trainer._newest - old).exp()
    lower, upper = band.bounds(old)
    terms = torch.minimum(ratio * advantages[:, None], ratio.clamp(lower, upper) * advantages[:, None])
    assert float(loss) == pytest.approx(-float((terms * mask).sum() / mask.sum()), rel=1e-5)
    assert advantages.abs().max() > 0
    assert ((ratio > upper) | (ratio < lower))[mask.bool()].any()


def test_a_mask_has_the_gradient_of_a_clip_at_the_same_place():
    """DPPO leaves out tokens that moved too far the way of their advantage; elsewhere its loss is ratio * advantage."""
    random = torch.Generator().manual_seed(0)
    old = -4 * torch.rand(2000, generator=random)
    new = (old + 0.8 * torch.randn(2000, generator=random)).clamp(max=0).requires_grad_()
    advantages = torch.randn(2000, generator=random)
    lower, upper = ProbabilityMask(0.1, 0.2).bounds(old)
    ratio = (new - old).exp()
    torch.minimum(ratio * advantages, ratio.clamp(lower, upper) * advantages).sum().backward()
    clipped, new.grad = new.grad.clone(), None
    moved = new.detach().exp() - old.exp()
    left = torch.where(advantages > 0, moved <= 0.2, moved >= -0.1)
    ((new - old).exp() * advantages * left).sum().backward()
    assert int((~left).sum()) > 100
    differs = clipped != new.grad
    assert int(differs.sum()) <= 2  # on the very edge


def test_padding_is_not_solved_for(tmp_path, monkeypatch):
    trainer = trainer_of(BandPOTrainer, tmp_path)
    trainer.model.train()
    seen = []
    bounds = BandConfig.bounds
    monkeypatch.setattr(BandConfig, "bounds", lambda self, logp: (seen.append(logp.numel()), bounds(self, logp))[1])
    inputs = trainer._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    assert seen == [int(inputs["completion_mask"].sum())]
    padding = inputs["completion_mask"] == 0
    assert (inputs["ratio_lower"][padding] == 1).all()
    assert (inputs["ratio_upper"][padding] == 1).all()


def test_what_is_clipped_is_logged_by_probability(tmp_path):
    trainer = trainer_of(BandPOTrainer, tmp_path, learning_rate=5e-2)
    trainer.train()
    second = trainer.state.log_history[1]  # of the same completions as the first
    assert any(name.startswith("band/clipped/up/") for name in second)
    assert 0 <= second["band/freed/up"] <= 1


def test_a_setting_that_makes_every_clip_a_no_op_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trainer_of(BandPOTrainer, tmp_path, num_iterations=1)
    assert trainer.is_no_op
    assert "no clip does anything" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert not trainer_of(BandPOTrainer, tmp_path, num_iterations=1, steps_per_generation=2).is_no_op
    assert "no clip" not in caplog.text
    trainer.train()  # it trains as any


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"loss_type": "cispo"}, "loss_type='cispo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"token_budget": 0}, "token_budget=0"),
        ({"reward_range": (1.0, 1.0)}, "reward_range"),
    ],
)
def test_settings_that_do_not_fit(options, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        trainer_of(BandPOTrainer, tmp_path, **options)


def test_a_prompt_longer_than_the_context(tmp_path):
    trainer = trainer_of(RewardTrainer, tmp_path)
    trainer.model.config.max_position_embeddings = 12
    with pytest.raises(UserError, match="more than the 12"):
        trainer.train()


def test_an_empty_completion(tmp_path):
    def rollout(prompts, trainer):
        ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
        return {"prompt_ids": ids, "completion_ids": [[]] * len(ids), "logprobs": None}

    trainer = trainer_of(RewardTrainer, tmp_path, rollout_func=rollout)
    with pytest.raises(UserError, match="A completion is empty"):
        trainer.train()


def test_a_reward_function_that_fails_ends_the_run_with_a_sentence(tmp_path):
    def broken(completions, **_):
        raise KeyError("x")

    with pytest.raises(UserError, match="broken raised KeyError"):
        trainer_of(RewardTrainer, tmp_path, reward=broken).train()
    with pytest.raises(UserError, match=r"expected 0 to 0\.5"):
        trainer_of(RewardTrainer, tmp_path, reward_range=(0.0, 0.5)).train()


def test_the_ledger_counts_and_ends_the_training(tmp_path):
    whole = trainer_of(RewardTrainer, tmp_path, max_steps=8)
    lengths = []
    generate = GRPOTrainer._generate

    def counted(self, prompts):
        found = generate(self, prompts)
        lengths.extend(map(len, found[1]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate", counted)
        whole.train()
    assert whole.ledger.generated == sum(lengths)
    assert whole.ledger.completions == len(lengths) == 32
    assert whole.ledger.trained == 2 * sum(lengths)
    assert whole.state.log_history[0]["tokens/generated"] == sum(lengths[:8])
    short = trainer_of(RewardTrainer, tmp_path, max_steps=8, token_budget=sum(lengths[:9]))
    short.train()
    assert short.state.global_step == 4  # two for each batch of rollouts, and the second one is more


def test_the_ledger_goes_on_from_a_checkpoint(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    whole = trainer_of(BandPOTrainer, tmp_path / "a", **options)
    whole.train()
    again = trainer_of(BandPOTrainer, tmp_path / "a", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert again.ledger == whole.ledger
    assert same(weights(again), weights(whole))


def test_a_run_goes_on_in_a_later_epoch(tmp_path):
    """TRL's own sampler begins again with the order of the first one."""
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 14}  # an epoch has 12 steps
    whole = trainer_of(RewardTrainer, tmp_path / "a", **options)
    whole.train()
    stock = trainer_of(GRPOTrainer, tmp_path / "b", **options)
    stock.train()
    assert same(weights(whole), weights(stock))
    again = trainer_of(RewardTrainer, tmp_path / "a", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-14"))
    assert same(weights(whole), weights(again))


def test_task_rewards_train(tmp_path):
    trainer = trainer_of(BandPOTrainer, tmp_path, reward=TaskReward(TASK, PROBLEMS), reward_range=(-1.0, 1.0))
    trainer.train()
    assert "rewards/dense/mean" in trainer.state.log_history[0]
