"""`lissom train-dit`: a small diffusion transformer that draws from words and reference pictures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from lissom.cli.common import JSON, bars
from lissom.cli.train import processes


def register(app: typer.Typer) -> None:
    app.command("train-dit")(train_dit)


def train_dit(
    output: Path = typer.Option(..., "--output", "-o", help="Folder of the run and of the pipeline that it leaves."),
    size: int = typer.Option(32, help="Pixels of a side, 16 to 64."),
    patch: int = typer.Option(4, help="Pixels of a side of a token."),
    width: int = typer.Option(256, help="Of the hidden states."),
    double: int = typer.Option(2, help="Blocks in which text has weights of its own."),
    single: int = typer.Option(5, help="Blocks in which all tokens share them."),
    references: str = typer.Option("set", help="What references see: joint (everything), set (each other), each."),
    steps: int = typer.Option(5000, help="Of the optimiser."),
    batch_size: int = typer.Option(32, help="Requests that a process takes in a step."),
    learning_rate: float = typer.Option(1e-3, "--lr", help="Highest learning rate."),
    min_learning_rate: float = typer.Option(1e-5, "--min-lr", help="Last learning rate."),
    warmup_steps: int = typer.Option(None, help="Steps in which it rises. [default: 100, or half of a shorter run]"),
    schedule: str = typer.Option("cosine", help="cosine, or wsd: constant, then falling over the last steps."),
    weight_decay: float = typer.Option(0.01, help="Of matrices."),
    average: float = typer.Option(0.999, help="Share that a step leaves of the average of the weights."),
    precision: str = typer.Option("bf16", help="bf16: products in 16 bits, weights in 32; or fp32."),
    seed: int = typer.Option(0, help="Of new weights, of batches and of noise."),
    eval_steps: int = typer.Option(500, help="Steps between measurements on held-out concepts."),
    save_steps: int = typer.Option(250, help="Steps between checkpoints."),
    logging_steps: int = typer.Option(25, help="Steps between lines of the log."),
    sample_steps: int = typer.Option(1000, help="Steps between sheets of pictures, in the run's folder `samples`."),
    json_file: str = JSON,
) -> None:
    """Train on emoji of five sets, which are fetched. The same command goes on where a run was stopped.

    Runs on several processes as `torchrun --nproc-per-node 2 -m lissom train-dit ...` or under `accelerate launch`.
    """
    from rich.console import Console

    from lissom.diffusion.demo import load_emoji
    from lissom.diffusion.demo.model import Shape, new_pipeline
    from lissom.files import write_json
    from lissom.train.dit import DitConfig
    from lissom.train.dit import train_dit as run
    from lissom.train.folder import RunFolder, is_first, last_checkpoint

    warmup_steps = min(100, steps // 2) if warmup_steps is None else warmup_steps
    config = DitConfig(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, min_learning_rate=min_learning_rate,
        warmup_steps=warmup_steps, schedule=schedule, weight_decay=weight_decay,  # type: ignore[arg-type]
        average=average, precision=precision, seed=seed, eval_steps=eval_steps,  # type: ignore[arg-type]
        save_steps=save_steps, logging_steps=logging_steps, sample_steps=sample_steps,
    )  # fmt: skip
    shape = Shape(size, patch, width, double=double, single=single, references=references)
    facts: dict[str, Any] = {"model": asdict(shape), "config": asdict(config)}
    console = Console(stderr=True, quiet=not is_first())
    with RunFolder.open(output, facts) as folder:
        if (begun := last_checkpoint(output)) is not None:
            console.print(f"Going on from {begun}.", highlight=False, soft_wrap=True)
        with console.status("reading pictures"):
            emoji = load_emoji(size, lambda text: console.print(text, highlight=False, soft_wrap=True))
            pipeline = new_pipeline(shape, emoji, seed)
        with bars(console) as progress, processes():
            task = progress.add_task("steps", total=steps)
            history = run(
                pipeline, config, emoji, output,
                lambda done, total: progress.update(task, completed=done, total=total),
                lambda entry: console.print(_line(entry), highlight=False, soft_wrap=True),
            )  # fmt: skip
        if not is_first():
            return
        folder.end(history)
    if json_file:
        write_json({**facts, "history": history}, json_file)
    if json_file != "-":
        typer.echo(f"{output}: a pipeline of diffusers, and {output / 'samples'}: what it draws of held-out concepts.")


def _line(entry: dict[str, float]) -> str:
    """An entry of the log."""
    words = {"learning_rate": "rate"} | {f"held_out_{count}": f"held-out, {count} references" for count in range(9)}
    parts = [f"{words.get(name, name)} {value:.4g}" for name, value in entry.items() if name != "step"]
    return f"step {entry['step']}: " + ", ".join(parts)
