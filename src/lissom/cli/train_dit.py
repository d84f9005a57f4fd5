"""`lissom train-dit`: a small diffusion transformer that draws from words and reference pictures."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from lissom.cli.common import JSON, bars
from lissom.cli.train import processes


def register(app: typer.Typer) -> None:
    app.command("train-dit")(train_dit)


def train_dit(
    output: Path = typer.Option(..., "--output", "-o", help="Folder of the run and of the pipeline that it leaves."),
    small: bool = typer.Option(False, "--small", help="A model that two cores train in about 20 minutes."),
    cacheable: str = typer.Option(
        None,
        "--make-cacheable",
        metavar="PIPELINE",
        help="Go on with this one until its references can be read once: set or each, see --references.",
    ),
    lora: int = typer.Option(None, metavar="RANK", help="With --make-cacheable: train adapters, which are merged."),
    size: int = typer.Option(None, help="Pixels of a side, 16 to 64. [default: 32]"),
    patch: int = typer.Option(None, help="Pixels of a side of a token. [default: 4]"),
    width: int = typer.Option(None, help="Of the hidden states. [default: 224; small: 128]"),
    double: int = typer.Option(None, help="Blocks in which text has weights of its own. [default: 2]"),
    single: int = typer.Option(None, help="Blocks in which all tokens share them. [default: 4]"),
    references: str = typer.Option("set", help="What references see: joint (everything), set (each other), each."),
    task: str = typer.Option(
        None,
        help="all; words: pictures from words and edits by a word; or by-word: edits by a word alone, which the "
        "shortest training learns. [default: all; small: words]",
    ),
    steps: int = typer.Option(None, help="Of the optimiser. [default: 4000; small: 2200; cacheable: 300]"),
    batch_size: int = typer.Option(None, help="Requests that a process takes in a step. [default: 16]"),
    learning_rate: float = typer.Option(
        None, "--lr", help="Highest learning rate. [default: 0.001; small: 0.0015; cacheable: 0.0005; adapters: 0.002]"
    ),
    min_learning_rate: float = typer.Option(None, "--min-lr", help="Last learning rate. [default: 0.00001]"),
    warmup_steps: int = typer.Option(
        None, help="Steps in which it rises. [default: 100; cacheable: 50; at most half of them]"
    ),
    schedule: str = typer.Option(
        None, help="cosine, or wsd: constant, then falling over the last steps. [default: wsd]"
    ),
    weight_decay: float = typer.Option(None, help="Of matrices. [default: 0.01]"),
    ema_decay: float = typer.Option(
        None, help="Share that a step leaves of the average of the weights. [default: 0.998]"
    ),
    precision: str = typer.Option(None, help="Of products: bf16, fp32, or auto: the faster one here. [default: auto]"),
    seed: int = typer.Option(None, help="Of new weights, of batches and of noise. [default: 0]"),
    eval_steps: int = typer.Option(None, help="Steps between measurements on held-out concepts. [default: 500]"),
    save_steps: int = typer.Option(None, help="Steps between checkpoints. [default: 250]"),
    logging_steps: int = typer.Option(None, help="Steps between lines of the log. [default: 25]"),
    sample_steps: int = typer.Option(
        None, help="Steps between sheets of pictures, in the run's folder `samples`. [default: 1000]"
    ),
    json_file: str = JSON,
) -> None:
    """Train on emoji of five sets, which are fetched. The same command goes on where a run was stopped.

    Runs on several processes as `torchrun --nproc-per-node 2 -m lissom train-dit ...` or under `accelerate launch`.
    """
    from rich.console import Console

    from lissom.diffusion.demo import load_emoji
    from lissom.diffusion.demo.model import new_pipeline
    from lissom.diffusion.demo.pipeline import PixelEditPipeline
    from lissom.diffusion.load import load_pipeline
    from lissom.errors import UserError
    from lissom.files import write_json
    from lissom.train.dit import ADAPTER_RATE, FULL, SHORT, SMALL, make_cacheable
    from lissom.train.dit import train_dit as run
    from lissom.train.folder import RunFolder, is_first, last_checkpoint

    form = SMALL if small else FULL
    default = SHORT if cacheable else form.config
    settings: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "warmup_steps": warmup_steps,
        "min_learning_rate": min_learning_rate, "schedule": schedule, "weight_decay": weight_decay,
        "ema_decay": ema_decay, "task": task, "precision": precision, "seed": seed, "eval_steps": eval_steps,
        "save_steps": save_steps, "logging_steps": logging_steps, "sample_steps": sample_steps,
    }  # fmt: skip
    if lora is not None and learning_rate is None:
        settings["learning_rate"] = ADAPTER_RATE
    if warmup_steps is None and steps is not None:
        settings["warmup_steps"] = min(default.warmup_steps, steps // 2)
    config = replace(default, **{name: value for name, value in settings.items() if value is not None})
    sizes = {"size": size, "patch": patch, "width": width, "double": double, "single": single}
    given = {name: value for name, value in sizes.items() if value is not None}
    facts: dict[str, Any] = {"config": asdict(config)}
    if cacheable:
        if given or small:
            raise UserError(f"The sizes are those of {cacheable}: leave out {', '.join(given) or '--small'}.")
        facts["model"] = {"pipeline": cacheable, "references": references, "lora": lora}
    elif lora is not None:
        raise UserError("--lora adapts a model that is trained: give one with --make-cacheable.")
    else:
        facts["model"] = asdict(replace(form.shape, **given, references=references))
    console = Console(stderr=True, quiet=not is_first())
    with RunFolder.open(output, facts) as folder:
        if (begun := last_checkpoint(output)) is not None:
            console.print(f"Going on from {begun}.", highlight=False, soft_wrap=True)
        with console.status("reading pictures"):

            def say(text: str) -> None:
                console.print(text, highlight=False, soft_wrap=True)

            if cacheable:
                pipeline = load_pipeline(cacheable)
                if not isinstance(pipeline, PixelEditPipeline):
                    raise UserError(
                        f"{cacheable} is a {type(pipeline).__name__}, which this command has no data for: train it as "
                        "docs/methods/klein-kv.md tells."
                    )
                make_cacheable(pipeline, references, lora, config.seed)
                emoji = load_emoji(pipeline.config.size, say)
            else:
                shape = replace(form.shape, **given, references=references)
                emoji = load_emoji(shape.size, say)
                pipeline = new_pipeline(shape, emoji, config.seed)
        with bars(console) as progress, processes():
            bar = progress.add_task("steps", total=config.steps)
            history = run(
                pipeline, config, emoji, output,
                lambda done, total: progress.update(bar, completed=done, total=total),
                lambda entry: say(_line(entry)),
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
