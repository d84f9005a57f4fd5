"""`lissom align`: a language model that learns from reward, in TRL's trainers."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lissom.cli.common import JSON, MODEL, bars
from lissom.cli.train import processes, setting_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lissom.rl.tasks import NumberTask
    from lissom.rl.world import World
    from lissom.train.align import Settings
    from lissom.train.warm_start import WarmStart

_NEW = "new"


def register(app: typer.Typer) -> None:
    app.command()(align)


def align(
    model: str = typer.Argument(
        ..., help=f"{MODEL} `new`: a small policy in characters, which first learns the format of the task."
    ),
    task: str = typer.Option(..., "--task", "-t", help="countdown, arithmetic, or a .jsonl file of prompts."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder of the run and of the model that it leaves."),
    method: str = typer.Option("bandpo", help="grpo, bandpo, v05 or tree-distill."),
    settings: list[str] = typer.Option([], "--set", metavar="NAME=VALUE", help="Of the method; may be repeated."),
    bounds: str = typer.Option(None, help="Of bandpo: band, clip (low, high), dcpo or dppo. [default: band]"),
    prior: str = typer.Option(None, help="Of v05: gp, ridge, neighbours, history, batch-mean. [default: gp]"),
    reward: str = typer.Option(
        None, help="package.module:function, called as TRL does; for a file. Of a task: correct or dense. [correct]"
    ),
    reward_range: str = typer.Option(None, metavar="LOW,HIGH", help="Between what the function's rewards are."),
    steps: int = typer.Option(100, help="Batches of rollouts."),
    prompts: int = typer.Option(32, help="Of a step."),
    num_generations: int = typer.Option(None, help="Completions of a prompt; of v05 at first. [default: 8; v05: 4]"),
    minibatches: int = typer.Option(4, help="Steps of the optimiser that a batch of rollouts is divided into."),
    num_iterations: int = typer.Option(1, help="How often a batch of rollouts is gone over."),
    micro_batches: int = typer.Option(1, help="Parts of a minibatch that are read at a time, to save memory."),
    learning_rate: float = typer.Option(None, "--lr", help="[default: 0.0001 for `new`, otherwise 0.000001]"),
    max_completion_length: int = typer.Option(None, help="Tokens. [default: what the task needs, or 256]"),
    temperature: float = typer.Option(1.0, help="Of rollouts."),
    beta: float = typer.Option(0.0, help="Weight of the divergence from the model as it was."),
    loss_type: str = typer.Option(
        None,
        help="Of TRL: grpo, dapo, bnpo, dr_grpo; but of bandpo also cispo and others. [default: grpo; of trees: cispo]",
    ),
    scale_rewards: str = typer.Option("group", help="What advantages are divided by: group, batch or none."),
    token_budget: int = typer.Option(None, help="Generated tokens after which the run ends."),
    held_out: int = typer.Option(100, help="Problems of a task that are measured."),
    eval_steps: int = typer.Option(20, help="Steps between measurements."),
    eval_completions: int = typer.Option(16, help="Completions of a held-out prompt."),
    save_steps: int = typer.Option(20, help="Steps between checkpoints."),
    seed: int = typer.Option(0, help="Of a new policy, of the order of prompts, and of rollouts."),
    format_steps: int = typer.Option(None, help="Of a new policy that learns the format. [default: 800]"),
    hidden_size: int = typer.Option(96, help="Of a new policy."),
    layers: int = typer.Option(4, help="Of a new policy."),
    heads: int = typer.Option(4, help="Of a new policy."),
    report_to: str = typer.Option("none", help="none, tensorboard or trackio."),
    use_vllm: bool = typer.Option(False, "--use-vllm", help="Generate with vLLM: TRL's own switch."),
    json_file: str = JSON,
) -> None:
    """Learn from reward. The same command goes on where a run was stopped.

    Runs on several processes as `torchrun --nproc-per-node 2 -m lissom align ...` or under `accelerate launch`.
    """
    from rich.console import Console

    from lissom.errors import UserError
    from lissom.files import write_json
    from lissom.train.align import AlignConfig
    from lissom.train.align import align as run
    from lissom.train.folder import RunFolder, is_first, last_checkpoint
    from lissom.train.warm_start import WarmStart

    num_generations = num_generations or (4 if method == "v05" else 8)
    chosen = _settings(method, bounds, prior, settings, num_generations)
    kind = _task(task, model)
    loss_type = loss_type or ("cispo" if method == "tree-distill" else "grpo")
    enough = kind.longest if kind is not None and model == _NEW else 256
    config = AlignConfig(
        method=method,  # type: ignore[arg-type]
        steps=steps, prompts=prompts, num_generations=num_generations, minibatches=minibatches,
        num_iterations=num_iterations, micro_batches=micro_batches,
        learning_rate=learning_rate or (1e-4 if model == _NEW else 1e-6),
        max_completion_length=max_completion_length or enough, temperature=temperature, beta=beta,
        loss_type=loss_type, scale_rewards=scale_rewards, seed=seed, token_budget=token_budget,  # type: ignore[arg-type]
        eval_steps=eval_steps, eval_completions=eval_completions, save_steps=save_steps,
        report_to=report_to, use_vllm=use_vllm,  # type: ignore[arg-type]
    )  # fmt: skip
    world = _world(kind, task, reward, reward_range, steps * prompts, held_out, seed)
    start = WarmStart(hidden=hidden_size, layers=layers, heads=heads)
    steps_of_format = format_steps or start.config.steps
    start = replace(
        start,
        config=replace(start.config, seed=seed, steps=steps_of_format, warmup_steps=min(50, steps_of_format // 2)),
    )
    facts: dict[str, Any] = {
        "model": model,
        "task": [task, None if kind is None else str(kind), reward, reward_range, held_out],
        "settings": None if chosen is None else str(chosen),
        "config": asdict(config),
        "policy": asdict(start) if model == _NEW else None,
    }
    console = Console(stderr=True, quiet=not is_first())
    with RunFolder.open(output, facts) as folder:
        if (begun := last_checkpoint(output)) is not None:
            console.print(f"Going on from {begun}.", highlight=False, soft_wrap=True)
        network, tokenizer = _policy(model, kind, output, start, console)
        with bars(console) as progress, processes():
            bar = progress.add_task("updates", total=config.steps * config.updates)
            history = run(
                config, network, tokenizer, world, output, chosen,
                lambda done, total: progress.update(bar, completed=done, total=total),
                lambda entry: console.print(_line(entry), highlight=False, soft_wrap=True),
            )  # fmt: skip
        if not is_first():
            return
        folder.end(history)
    if json_file:
        write_json({**facts, "history": history}, json_file)
    if json_file != "-":
        name = f"mean@{eval_completions}"
        measured = [entry for entry in history if name in entry]
        if not measured:
            raise UserError(f"Nothing was measured: {output} has a model, and no record of how good it is.")
        typer.echo(
            f"{output}: {name} of held-out prompts {measured[0][name]:.3f} before, {measured[-1][name]:.3f} after "
            f"{measured[-1]['tokens/generated']:,.0f} generated tokens. Use it:"
        )
        typer.echo(f'  lissom generate {output} "your question"')


def _settings(method: str, bounds: str | None, prior: str | None, settings: list[str], first: int) -> Settings | None:
    """What is asked of the method."""
    from lissom.errors import UserError
    from lissom.rl.band import BOUNDS
    from lissom.rl.tree_search.config import SearchConfig
    from lissom.rl.tree_search.trainer import DistillConfig
    from lissom.rl.value_prior import PRIORS, Budget, Fusion, ValuePriorConfig

    given = setting_values(settings)
    if bounds is not None and method != "bandpo":
        raise UserError("--bounds is of --method bandpo.")
    if prior is not None and method != "v05":
        raise UserError("--prior is of --method v05.")
    if method == "bandpo":
        if (bounds or "band") not in BOUNDS:
            raise UserError(f"--bounds {bounds}: expected {', '.join(BOUNDS)}.")
        return _made(BOUNDS[bounds or "band"], given)
    if method == "v05":
        if (prior or "gp") not in PRIORS:
            raise UserError(f"--prior {prior}: expected {', '.join(PRIORS)}.")
        of_budget = {name: given.pop(name) for name in ("most", "cost", "extra") if name in given}
        budget = _made(Budget, {"first": first, "most": max(first, 16)} | of_budget)
        return ValuePriorConfig(_made(Fusion, given), PRIORS[prior or "gp"](), budget)
    if method == "tree-distill":
        names = {field.name for field in fields(SearchConfig)} - {"low", "high"}
        of_search = {name: given.pop(name) for name in list(given) if name in names}
        search = replace(DistillConfig().search, **of_search)
        return _made(DistillConfig, {"search": search, "step_tokens": 64} | given)  # type: ignore[no-any-return]
    if given:
        raise UserError(f"--set: the method {method} has no settings.")
    return None


def _made(kind: Any, settings: dict[str, Any]) -> Any:
    from lissom.errors import UserError

    try:
        return kind(**settings)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(kind))
        raise UserError(f"--set: there is no such setting among {known} ({error}).") from error


def _task(task: str, model: str) -> NumberTask | None:
    """The task of that name, in steps for a new policy and otherwise as a chat; None: it is a file."""
    from lissom.errors import UserError
    from lissom.rl.tasks import TASKS

    if task in TASKS:
        return TASKS[task](style="steps" if model == _NEW else "chat")  # type: ignore[call-arg]
    if model == _NEW:
        raise UserError(f"A new policy learns {' or '.join(TASKS)}: give a model for {task}.")
    return None


def _world(
    kind: NumberTask | None,
    task: str,
    reward: str | None,
    reward_range: str | None,
    prompts: int,
    held_out: int,
    seed: int,
) -> World:
    from lissom.errors import UserError
    from lissom.rl.rewards import RANGES, load_reward
    from lissom.rl.world import file_world, task_world

    if kind is not None:
        if reward not in (None, *RANGES):
            raise UserError(f"--reward {reward}: the task {task} has {' and '.join(RANGES)}; functions are for files.")
        if reward_range is not None:
            raise UserError(f"--reward-range is of a function: the task {task} has its own.")
        return task_world(kind, prompts, held_out, reward or "correct", seed)  # type: ignore[arg-type]
    if reward is None:
        raise UserError(f"Who judges completions of {task}? Give --reward package.module:function.")
    sys.path.insert(0, os.getcwd())  # where a user's own modules are, which an installed command does not see
    limits = None
    if reward_range is not None:
        try:
            low, high = (float(part) for part in reward_range.split(","))
        except ValueError as error:
            raise UserError(f"--reward-range {reward_range}: expected two numbers, LOW,HIGH.") from error
        limits = low, high
    return file_world(Path(task), load_reward(reward), limits)


def _policy(
    model: str, kind: NumberTask | None, output: Path, start: WarmStart, console: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """What the run begins with; of a new policy kept in the run's folder."""
    import lissom
    from lissom.train.warm_start import warm_start

    if model != _NEW:
        with console.status(f"loading {model}"):
            return lissom.load(model, "float32")
    assert kind is not None
    folder = output / "policy"
    if not (folder / "config.json").exists():
        with bars(console) as progress:
            bar = progress.add_task("learning the format", total=start.config.steps)
            warm_start(kind, folder, start, lambda done, total: progress.update(bar, completed=done, total=total))
    return lissom.load(str(folder), "float32")


def _line(entry: dict[str, float]) -> str:
    """An entry of the log."""
    words = {
        "reward": "reward",
        "entropy": "entropy",
        "clip_ratio/region_mean": "clipped",
        "tokens/generated": "tokens",
    }
    shown = {words.get(name, name): value for name, value in entry.items() if name in words or "@" in name}
    return f"step {entry.get('step', 0)}: " + ", ".join(
        f"{name} {value:,.0f}" if name == "tokens" else f"{name} {value:.4g}" for name, value in shown.items()
    )
