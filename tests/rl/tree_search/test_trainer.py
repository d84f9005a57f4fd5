from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import ARCHITECTURES, tiny_model
from trl import GRPOConfig

from lissom.errors import UserError
from lissom.rl.rewards import TaskReward
from lissom.rl.tasks import Countdown
from lissom.rl.tasks.characters import character_tokenizer
from lissom.rl.tree_search import SearchConfig, ValueHead
from lissom.rl.tree_search.targets import paths, visit_targets
from lissom.rl.tree_search.trainer import DistillConfig, TreeDistillTrainer

TASK = Countdown()
PROBLEMS = TASK.problems("train", 12)
ROWS = Dataset.from_list([{"prompt": TASK.prompt(problem), "index": i} for i, problem in enumerate(PROBLEMS)])
SEARCH = SearchConfig(simulations=10, children=3, depth=3)
DISTILL = DistillConfig(SEARCH, step_tokens=8)


def varied(completions, **_):
    return [(sum(map(ord, text)) % 7) / 3.5 - 1 for text in completions]


def trainer_of(folder, architecture="llama", reward=varied, **options):
    arguments = {
        "per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 4, "max_completion_length": 24,
        "learning_rate": 1e-2, "beta": 0.0, "use_cpu": True, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "loss_type": "cispo", "epsilon_high": 5.0, "bf16": False,
    }  # fmt: skip
    named = {name: options.pop(name) for name in list(options) if name in GRPOConfig.__dataclass_fields__}
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    model = options.pop("model", None) or tiny_model(architecture, vocab_size=len(tokenizer), initializer_range=0.05)
    return TreeDistillTrainer(
        model, reward_funcs=reward, args=GRPOConfig(str(folder), **arguments | named), train_dataset=ROWS,
        processing_class=tokenizer, **{"distill": DISTILL, "reward_range": (-1.0, 1.0)} | options,
    )  # fmt: skip


def weights(trainer):
    return [p.detach().clone() for module in (trainer.model, trainer.head) if module for p in module.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def generated(trainer, rows=4):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([ROWS[i] for i in range(rows)])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("target", ["trajectory", "visits", "steps"])
def test_every_target_trains_policy_and_critic(architecture, target, tmp_path):
    trainer = trainer_of(tmp_path, architecture, distill=replace(DISTILL, target=target))
    begin = weights(trainer)
    trainer.train()
    assert not same(begin, weights(trainer))
    assert trainer.ledger.generated > 0 and trainer.ledger.completions == 16
    assert [tree.version for tree in trainer.trees] == [3] * 4
    assert "search/best seen" in trainer.state.log_history[0]
    assert ("value/error" in trainer.state.log_history[0]) == (target == "trajectory")


def test_rows_are_what_was_extracted(tmp_path):
    trainer = trainer_of(tmp_path)
    batch = generated(trainer)
    for n, tree in enumerate(trainer.trees):
        (path,) = paths(tree, "best")
        real = batch["completion_mask"][n].bool()
        assert tuple(batch["completion_ids"][n][real].tolist()) == path.completion
        assert tuple(batch["prompt_ids"][n][batch["prompt_mask"][n].bool()].tolist()) == path.prompt
        assert torch.allclose(batch["returns"][n][real], torch.tensor(path.reward))
    assert len({tuple(row.tolist()) for row in batch["prompt_ids"]}) == 4  # every row is another prompt


def test_values_are_those_of_the_state_before_each_token(tmp_path):
    """One off is the classic mistake: V(s_t) is read where token t is predicted."""
    trainer = trainer_of(tmp_path, loss_type="grpo")
    batch = generated(trainer)
    for n, tree in enumerate(trainer.trees):
        (path,) = paths(tree, "best")
        for t in range(len(path.completion)):
            ids = torch.tensor([path.prompt + path.completion[:t]])
            state = trainer.model.get_decoder()(input_ids=ids).last_hidden_state[0, -1]
            expected = path.reward - float(trainer.head(state))
            assert float(batch["advantages"][n, t]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("loss", ["cispo", "grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("target", ["trajectory", "visits"])
def test_the_gradient_is_the_mean_over_trees(loss, target, tmp_path):
    """By hand: of paths the mean over tokens of A log pi; of steps the cross-entropy with the shares of visits."""
    distill = replace(DISTILL, target=target, value="head" if target == "trajectory" else "playouts", value_coef=0.0)
    trainer = trainer_of(tmp_path, loss_type=loss, distill=distill)
    batch = generated(trainer)
    trainer._compute_loss(trainer.model, batch).backward()
    ours = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()

    def logps(prefix, tokens):
        out = trainer.model(torch.tensor([[*prefix, *tokens]])).logits[0].log_softmax(1)
        return torch.stack([out[len(prefix) - 1 + n, token] for n, token in enumerate(tokens)])

    total = 0.0
    for tree in trainer.trees:
        if target == "visits":
            for own in visit_targets(tree):
                total = total - own.weight * logps(own.prefix, own.tokens).sum()
            continue
        (path,) = paths(tree, "best")
        found = logps(path.prompt, path.completion)
        states = trainer.model.get_decoder()(input_ids=torch.tensor([path.prompt + path.completion])).last_hidden_state[
            0
        ]
        begin = len(path.prompt) - 1
        advantages = path.reward - trainer.head(states[begin : begin + len(found)]).detach()
        total = total - (advantages * found).mean()
    (total / len(trainer.trees)).backward()
    for mine, parameter in zip(ours, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=2e-6, rtol=2e-3)


def test_failed_paths_can_be_left_out(tmp_path):
    def always_low(completions, **_):
        return [-1.0] * len(completions)

    trained = trainer_of(tmp_path, reward=always_low, distill=replace(DISTILL, failed="train"))
    assert generated(trained)["advantages"].abs().max() > 0
    dropped = trainer_of(tmp_path, reward=always_low, distill=replace(DISTILL, failed="drop"))
    assert generated(dropped)["advantages"].abs().max() == 0


def test_several_steps_for_a_batch_have_ratios(tmp_path):
    trainer = trainer_of(tmp_path, loss_type="grpo", num_iterations=2)
    assert "old_per_token_logps" in generated(trainer)
    assert "old_per_token_logps" not in generated(trainer_of(tmp_path))
    trainer.train()
    assert "clip_ratio/region_mean" in trainer.state.log_history[1]


def test_play_outs_in_the_place_of_a_critic(tmp_path):
    trainer = trainer_of(tmp_path, distill=replace(DISTILL, value="playouts"))
    assert trainer.head is None
    begin = weights(trainer)
    trainer.train()
    assert not same(begin, weights(trainer))
    assert trainer.ledger.generated > sum(tree.generated for tree in trainer.trees)


def test_a_run_goes_on_with_its_critic(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path, **options)
    whole.train()
    again = trainer_of(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(whole), weights(again))
    assert again.ledger == whole.ledger
    whole.save_model(str(tmp_path / "saved"))
    assert same(list(ValueHead.load(tmp_path / "saved").parameters()), list(whole.head.parameters()))


def test_the_critic_learns(tmp_path):
    """Rewards are the same, whatever is written: its values come to them."""

    def always(completions, **_):
        return [-1.0] * len(completions)

    trainer = trainer_of(
        tmp_path, reward=always, max_steps=12, learning_rate=1e-6, distill=replace(DISTILL, value_learning_rate=3e-3)
    )
    trainer.train()
    errors = [entry["value/error"] for entry in trainer.state.log_history if "value/error" in entry]
    assert np.mean(errors[-3:]) < 0.3 * errors[0]


def test_tasks_and_the_reference_policy(tmp_path):
    plain = trainer_of(tmp_path)
    plain.model.save_pretrained(tmp_path / "first")
    trainer = trainer_of(tmp_path, reward=TaskReward(TASK, PROBLEMS), beta=0.05, model=str(tmp_path / "first"))
    trainer.train()
    assert "kl" in trainer.state.log_history[0]


def test_a_range_that_is_another_one(tmp_path):
    with pytest.raises(UserError, match="give the search the same"):
        trainer_of(tmp_path, reward_range=(0.0, 1.0))
