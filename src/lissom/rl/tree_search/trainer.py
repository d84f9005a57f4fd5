"""TRL's GRPOTrainer, whose rollouts are what a tree search has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lissom.errors import UserError
from lissom.models.method import check_types
from lissom.rl.hidden import hidden_states, read_states
from lissom.rl.sampling import padded_left
from lissom.rl.trainer import RewardTrainer
from lissom.rl.tree_search.config import Extraction, SearchConfig
from lissom.rl.tree_search.draws import Prefix, TransformersDraws
from lissom.rl.tree_search.policy import PolicyWorld, Written
from lissom.rl.tree_search.search import TreeSearch
from lissom.rl.tree_search.targets import (
    Target,
    backed_up,
    paths,
    returns_and_advantages,
    step_targets,
    visit_targets,
)
from lissom.rl.tree_search.tree import Tree
from lissom.rl.tree_search.value import ValueHead, values_of

_OVER_TOKENS = ("cispo", "dapo", "bnpo")  # losses of TRL that divide by all tokens of a batch


@dataclass(frozen=True)
class DistillConfig:
    """What is searched, and what is learned of it.

    Attributes:
        search: of each prompt; its `low` and `high` are those of the rewards.
        target: `trajectory` (published): the found completion, each token with the advantage of its reward over the
            critic's value; `visits`: the share of visits of each step (AlphaZero); `steps`: Q(s, a) - V(s) of each.
        extraction: of the completion: `best` (default), `visits` (published) or `value`.
        failed: what becomes of paths that are not ended or have the lowest reward: `train` (published), or `drop`.
        value: `head` (published): a critic on the policy's last hidden state, which is trained along; `playouts`:
            completions by the policy, whose tokens are counted, and no critic: advantages are rewards less their mean.
        value_coef: weight of the critic's squared error.
        value_learning_rate: of the critic alone.
        backups: fit the critic to what came back through other states, too (extension); published: to found paths.
        discount, decay: of GAE; 1 (published): the reward less the value.
        boundary: text that ends a step; None: steps are whole completions, and a search of one simulation is best-of-N
            for N `children`.
        step_tokens: longest step (published: 64).
        temperature: of steps (published: 0.8).

    Raises:
        UserError: a value is out of range.
    """

    search: SearchConfig = field(default_factory=lambda: SearchConfig(prior="uniform", close=True))
    target: Target = "trajectory"
    extraction: Extraction = "best"
    failed: Literal["train", "drop"] = "train"
    value: Literal["head", "playouts"] = "head"
    value_coef: float = 1.0
    value_learning_rate: float = 1e-3
    backups: bool = True
    discount: float = 1.0
    decay: float = 1.0
    boundary: str | None = "\n"
    step_tokens: int = 64
    temperature: float = 0.8

    def __post_init__(self) -> None:
        check_types(self)
        if min(self.value_coef, self.discount, self.decay) < 0 or max(self.discount, self.decay) > 1:
            raise UserError("Expected value_coef from 0, and discount and decay from 0 to 1.")
        if not self.value_learning_rate > 0 or not self.temperature >= 0 or self.step_tokens < 1:
            raise UserError("Expected value_learning_rate above 0, temperature from 0, and step_tokens from 1.")


class TreeDistillTrainer(RewardTrainer):
    """TRL's GRPOTrainer on completions that a tree search has found (Tree Search Distillation, 2026).

    Each prompt has one tree. What is clipped, the divergence from the first policy, and steps for each batch are TRL's:
    `loss_type="cispo"` with `epsilon_high=5` is the published loss, `"grpo"` PPO's. Ratios are to the trainer's own log
    probabilities before the first step; with one step for a batch they are all 1, and it is REINFORCE with a critic, on
    completions that a search has selected.

    The critic is saved beside the policy, in checkpoints too (`value_head.safetensors`).

    Args:
        distill: see `DistillConfig`.
        value_head: a critic to go on with.
        all others: of `RewardTrainer` and `GRPOTrainer`; `num_generations` is not used.

    Raises:
        UserError: rewards are not said to be in the search's range.
    """

    def __init__(
        self, *arguments: Any, distill: DistillConfig | None = None, value_head: ValueHead | None = None, **options: Any
    ) -> None:
        self.distill = distill or DistillConfig()
        search = self.distill.search
        options["callbacks"] = [*(options.get("callbacks") or []), _OfTheCritic(self)]
        super().__init__(*arguments, **options)
        if self.reward_range != (search.low, search.high):
            raise UserError(
                f"Rewards are in the range {self.reward_range}, and the search is told {(search.low, search.high)}: "
                "state reward_range, and give the search the same."
            )
        self.num_generations = 1  # every row of a batch is another prompt
        self.head: ValueHead | None = None
        self.trees: list[Tree[Written]] = []  # of the last batch
        if self.distill.value == "head":
            hidden = self.model.config.get_text_config(decoder=True).hidden_size
            self.head = (value_head or ValueHead(hidden, search.low, search.high)).to(self.accelerator.device)

    def create_optimizer(self, model: Any = None) -> Any:
        """With the critic's parameters."""
        optimizer = super().create_optimizer(model)
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self.head is not None and not known & {id(parameter) for parameter in self.head.parameters()}:
            rate = self.distill.value_learning_rate
            optimizer.add_param_group({"params": list(self.head.parameters()), "lr": rate, "weight_decay": 0.0})
        return optimizer

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)  # type: ignore[no-any-return]
        world = self._world(inputs)
        own = [self.distill.search.seed, self.args.seed, self.state.global_step, self.accelerator.process_index]
        seed = int(np.random.SeedSequence(own).generate_state(1)[0])  # another one for each batch and process
        search = TreeSearch(world, replace(self.distill.search, seed=seed))
        self.trees = search(world.roots([row["prompt"] for row in inputs]), version=self.state.global_step)
        spent = torch.tensor([world.generated, len(inputs)], device=self.accelerator.device)
        generated, trees = self.accelerator.reduce(spent, "sum").tolist()
        self.ledger.spend(generated=generated, completions=trees)
        batch = self._trajectories() if self.distill.target == "trajectory" else self._steps()
        self._log_search()
        return self._with_old(batch)

    def _world(self, inputs: Sequence[dict[str, Any]]) -> PolicyWorld:
        settings, model = self.distill, self.accelerator.unwrap_model(self.model)
        draws = TransformersDraws(model, self.processing_class, settings.boundary, settings.temperature)
        values = None
        if self.head is not None:
            head, padding = self.head, int(self.processing_class.pad_token_id)

            def values(prefixes: Sequence[Prefix]) -> Sequence[float]:
                return values_of(model, head, prefixes, padding)

        return PolicyWorld(
            draws, self.processing_class, self._grader(inputs), settings.step_tokens,
            self.max_completion_length or settings.step_tokens, settings.search.low, values,
        )  # fmt: skip

    def _grader(self, inputs: Sequence[dict[str, Any]]) -> Any:
        weights = self.reward_weights.tolist()

        def grade(number: int, text: str) -> float:
            row = inputs[number]
            chat = not isinstance(row["prompt"], str)
            completion: Any = [{"role": "assistant", "content": text}] if chat else text
            columns = {name: [value] for name, value in row.items() if name != "prompt"}
            given = [
                function(
                    completions=[completion], prompts=[row["prompt"]], completion_ids=[[]], trainer_state=self.state,
                    **columns,
                )[0]
                for function in self.reward_funcs
            ]  # fmt: skip
            known = [w * reward for w, reward in zip(weights, given, strict=True) if reward is not None]
            if not known:
                raise UserError("A completion has no reward: a search needs a number for each.")
            return sum(known)

        return grade

    def _trajectories(self) -> dict[str, Tensor]:
        settings = self.distill
        found = [path for tree in self.trees for path in paths(tree, settings.extraction)]
        if not found:
            raise UserError("No tree has a step: the policy wrote nothing.")
        rewards = [path.reward for path in found]
        if self.head is None:
            middle = float(np.mean(rewards))
            values = [np.full(len(path.completion), middle) for path in found]
        else:
            values = self._path_values([(path.prompt, path.completion) for path in found])
        returns, advantages = returns_and_advantages(rewards, values, settings.discount, settings.decay)
        if settings.failed == "drop":
            kept = [path.ended and path.reward > settings.search.low for path in found]
            advantages = [own * keep for own, keep in zip(advantages, kept, strict=True)]
        rows = [(path.prompt, path.completion) for path in found]
        return self._batch(rows, advantages, returns)

    def _steps(self) -> dict[str, Tensor]:
        made = visit_targets if self.distill.target == "visits" else step_targets
        found = [target for tree in self.trees for target in made(tree)]
        if not found:
            raise UserError("No state of a tree was visited twice: give the search more simulations.")
        rows = [(target.prefix, target.tokens) for target in found]
        # A mean over rows would make a tree with many states the more important; each is to have the same weight. And a
        # step is as likely as all its tokens together: their sum is wanted, and not their mean.
        scale = len(rows) / len(self.trees)
        return self._batch(rows, [np.full(len(t.tokens), t.weight * scale * len(t.tokens)) for t in found], None)

    @torch.no_grad()
    def _path_values(self, rows: Sequence[tuple[Prefix, Prefix]]) -> list[np.ndarray]:
        """V of the state before each token: at the position that predicts it."""
        assert self.head is not None
        model, padding = self.accelerator.unwrap_model(self.model), int(self.processing_class.pad_token_id)
        found = read_states(model, [prompt + tokens for prompt, tokens in rows], padding, len(rows))
        ((states, _),) = found
        values = self.head(states).double().cpu().numpy()
        width = values.shape[1]
        return [values[n, width - len(tokens) - 1 : width - 1] for n, (_, tokens) in enumerate(rows)]

    def _batch(
        self,
        rows: Sequence[tuple[Prefix, Prefix]],
        advantages: Sequence[np.ndarray],
        returns: Sequence[np.ndarray] | None,
    ) -> dict[str, Tensor]:
        """As TRL has it: prompts padded on the left, completions on the right, filled up with rows without tokens until
        it divides into its parts, and is as long on every process. What is lost is the mean over rows of the means over
        tokens, whichever loss of TRL's it is.
        """
        device, padding = self.accelerator.device, int(self.processing_class.pad_token_id)
        parts = self.args.steps_per_generation
        most = self.accelerator.gather(torch.tensor([len(rows)], device=device)).max()
        count = -(-int(most) // parts) * parts
        empty = count - len(rows)
        padded = [*rows, *[rows[0]] * empty]
        prompts, prompt_mask = padded_left([prompt for prompt, _ in padded], padding, device)
        width = max(len(tokens) for _, tokens in rows)

        def right(values: Sequence[Sequence[float]], fill: float, dtype: torch.dtype) -> Tensor:
            filled = [[*own, *[fill] * (width - len(own))] for own in values]
            return torch.tensor(filled, dtype=dtype, device=device)

        lengths = [len(tokens) for _, tokens in rows]
        shares = {
            "tokens": [sum(lengths) / len(rows) / own for own in lengths],
            "rows": [count / len(rows)] * len(rows),
        }
        if self.loss_type == "dr_grpo":
            shares["rows"] = [count / len(rows) * (self.max_completion_length or 1) / own for own in lengths]
        over = shares["tokens" if self.loss_type in _OVER_TOKENS else "rows"]
        scaled = [(own * share).tolist() for own, share in zip(advantages, over, strict=True)]
        ones = [[1] * own for own in lengths]
        mask = right([*ones, *[[0] * width] * empty], 0, torch.long)
        batch = {
            "prompt_ids": prompts,
            "prompt_mask": prompt_mask,
            "completion_ids": right([tokens for _, tokens in padded], padding, torch.long),
            "completion_mask": mask,
            "advantages": right([*scaled, *[[0.0] * width] * empty], 0.0, torch.float32),
            "num_items_in_batch": self.accelerator.gather(mask.sum()).sum(),
        }
        if returns is not None and self.head is not None:
            batch["returns"] = right([*(own.tolist() for own in returns), *[[0.0] * width] * empty], 0.0, torch.float32)
        return batch

    def _with_old(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Log probabilities that ratios are taken to, where more than one step is made, and the first policy's."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        size, keep = self.args.per_device_train_batch_size, batch["completion_ids"].shape[1]
        every = self.args.steps_per_generation * self.num_iterations
        with torch.no_grad():
            if self.args.gradient_accumulation_steps % every:
                batch["old_per_token_logps"] = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, keep, batch_size=size
                )[0]
            if self.beta:
                if self.ref_model is None:
                    raise UserError("beta needs the first policy, which adapters of peft do not keep here: leave it 0.")
                batch["ref_per_token_logps"] = self._get_per_token_logps_and_entropies(
                    self.ref_model, ids, mask, keep, batch_size=size
                )[0]
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.head is None or "returns" not in inputs:
            return loss
        error = self._value_error(inputs)
        self._metrics["train"]["value/error"].append(float(error.detach()))
        return loss + self.distill.value_coef * error / self.current_gradient_accumulation_steps

    def _value_error(self, inputs: dict[str, Any]) -> Tensor:
        """Mean squared error of the critic at the states before the tokens, and at states of the trees."""
        assert self.head is not None
        model = self.accelerator.unwrap_model(self.model)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        hidden = hidden_states(model, ids, mask)
        count, real = inputs["completion_ids"].shape[1], inputs["completion_mask"]
        values = self.head(hidden[:, -count - 1 : -1])
        error = ((values - inputs["returns"]).square() * real).sum() / real.sum().clamp(min=1)
        if not self.distill.backups:
            return error
        states = [state for tree in self.trees for state in backed_up(tree)]
        if not states:
            return error
        drawn = np.random.default_rng([self.args.seed, self.state.global_step]).choice(
            len(states), min(len(states), len(ids)), replace=False
        )
        prefixes, wanted = zip(*(states[n] for n in drawn), strict=True)
        padding = int(self.processing_class.pad_token_id)
        found = self.head(hidden_states(model, *padded_left(prefixes, padding, ids.device))[:, -1])
        return error + (found - torch.tensor(wanted, device=found.device)).square().mean()

    def _log_search(self) -> None:
        found, low = self._metrics["train"], self.distill.search.low
        ends = [paths(tree, self.distill.extraction)[0].reward if tree.root.children else low for tree in self.trees]
        seen = [max((n.reward for n in tree.root.below() if n.reward is not None), default=low) for tree in self.trees]
        found["reward"].append(float(np.mean(ends)))
        found["search/best seen"].append(float(np.mean(seen)))
        found["search/depth"].append(float(np.mean([max(n.depth for n in tree.root.below()) for tree in self.trees])))
        found["search/tokens"].append(float(np.mean([tree.generated for tree in self.trees])))

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        if self.head is not None and self.is_world_process_zero():
            folder = File(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self.head.save(folder)
        super()._save_checkpoint(*arguments, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.head is not None:
            self.head.load_state_dict(ValueHead.load(File(resume_from_checkpoint)).state_dict())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """With the critic."""
        super().save_model(output_dir, _internal_call)
        if self.head is not None and self.is_world_process_zero() and not _internal_call:
            self.head.save(File(output_dir or self.args.output_dir))


class _OfTheCritic(TrainerCallback):
    """The critic is no part of the model, whose gradients processes average and the Trainer forgets behind a step."""

    def __init__(self, trainer: TreeDistillTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.head is None or trainer.accelerator.num_processes == 1:
            return
        for parameter in trainer.head.parameters():
            if parameter.grad is not None:
                parameter.grad = trainer.accelerator.reduce(parameter.grad, "mean")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.head is not None:
            self.trainer.head.zero_grad()
