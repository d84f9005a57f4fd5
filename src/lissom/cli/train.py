"""`lissom train`: a causal language model, from scratch or from a checkpoint, with or without a teacher."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from lissom.cli.common import JSON, MODEL, bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lissom.models.method import Trainable
    from lissom.train.folder import RunFolder

_NEW = "new"
_HELD_OUT = 0.01  # of the text


def register(app: typer.Typer) -> None:
    app.command()(train)


def train(
    model: str = typer.Argument(..., help=f"{MODEL} `new`: a Llama-like model with random weights."),
    text: Path = typer.Option(..., "--text", "-t", help="Text file, or folder of .txt, .md, .rst and .jsonl files."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder of the run and of the model that it leaves."),
    held_out: Path = typer.Option(None, help="Text that is measured on. [default: the last hundredth of the text]"),
    method: str = typer.Option(None, help="Method that is trained, e.g. sparse-bitnet."),
    settings: list[str] = typer.Option([], "--set", metavar="NAME=VALUE", help="Of the method; may be repeated."),
    packed: Path = typer.Option(None, help="Also write the model here in the packed form that the method has."),
    teacher: str = typer.Option(None, help="Model to distill from, e.g. the one that is converted."),
    teacher_kl: float = typer.Option(1.0, help="Weight of the divergence from the teacher's distribution."),
    teacher_hidden: float = typer.Option(1.0, help="Weight of the distance to its hidden states; 0: other sizes."),
    teacher_labels: float = typer.Option(0.0, help="Weight of the text itself, where there is a teacher."),
    temperature: float = typer.Option(1.0, help="Of the teacher's and the model's distribution."),
    steps: int = typer.Option(1000, help="Of the optimiser."),
    context: int = typer.Option(512, help="Tokens of a window."),
    batch_size: int = typer.Option(8, help="Windows that a process takes at a time."),
    gradient_accumulation_steps: int = typer.Option(1, help="Of those in a step of the optimiser."),
    learning_rate: float = typer.Option(3e-4, "--lr", help="Highest learning rate."),
    min_learning_rate: float = typer.Option(1e-5, "--min-lr", help="Last learning rate."),
    warmup_steps: int = typer.Option(None, help="Steps in which it rises. [default: 100, or half of a shorter run]"),
    schedule: str = typer.Option("cosine", help="cosine, or wsd: constant, then falling over the last steps."),
    decay_share: float = typer.Option(0.2, help="Share of the steps that wsd falls in."),
    weight_decay: float = typer.Option(0.1, help="Of matrices."),
    weight_decay_until: float = typer.Option(None, help="Share of the steps over which it falls to 0, e.g. 0.5."),
    precision: str = typer.Option("fp32", help="fp32, or bf16: products in 16 bits, weights in 32."),
    gradient_checkpointing: bool = typer.Option(
        False, "--gradient-checkpointing", help="Compute activations twice to save memory."
    ),
    seed: int = typer.Option(0, help="Of new weights and of the order of windows."),
    eval_steps: int = typer.Option(500, help="Steps between measurements on held-out text."),
    save_steps: int = typer.Option(500, help="Steps between checkpoints."),
    logging_steps: int = typer.Option(20, help="Steps between lines of the log."),
    report_to: str = typer.Option("none", help="none, tensorboard or trackio."),
    layers: int = typer.Option(6, help="Of a new model."),
    hidden_size: int = typer.Option(384, help="Of a new model."),
    heads: int = typer.Option(6, help="Attention heads of a new model."),
    vocabulary: int = typer.Option(4096, help="Tokens of a new model, whose tokenizer is learned from the text."),
    json_file: str = JSON,
) -> None:
    """Train on a folder of text. The same command goes on where a run was stopped.

    Runs on several processes as `torchrun --nproc-per-node 2 -m lissom train ...` or under `accelerate launch`.
    """
    from rich.console import Console

    import lissom
    from lissom.errors import UserError
    from lissom.export.packed import export_packed, require_packable
    from lissom.files import require_new, write_json
    from lissom.train import Distillation, TrainConfig, text_fingerprint, token_windows
    from lissom.train import train as run
    from lissom.train.folder import RunFolder, is_first, last_checkpoint

    warmup_steps = min(100, steps // 2) if warmup_steps is None else warmup_steps
    config = TrainConfig(
        steps=steps, context=context, batch_size=batch_size, gradient_accumulation_steps=gradient_accumulation_steps,
        learning_rate=learning_rate, min_learning_rate=min_learning_rate, warmup_steps=warmup_steps,
        schedule=schedule, decay_share=decay_share, weight_decay=weight_decay,  # type: ignore[arg-type]
        weight_decay_until=weight_decay_until, precision=precision,  # type: ignore[arg-type]
        gradient_checkpointing=gradient_checkpointing, seed=seed, eval_steps=eval_steps, save_steps=save_steps,
        logging_steps=logging_steps, report_to=report_to,  # type: ignore[arg-type]
    )  # fmt: skip
    distillation = Distillation(teacher_kl, teacher_hidden, teacher_labels, temperature)
    chosen = _method(method, settings)
    if packed is not None:
        require_new(packed)
        if packed.resolve() == output.resolve() or output.resolve() in packed.resolve().parents:
            raise UserError(f"--packed {packed} lies in the folder of the run: give another one.")
    shape: dict[str, Any] = {"hidden": hidden_size, "layers": layers, "heads": heads, "context": context, "seed": seed}
    facts: dict[str, Any] = {
        "model": model,
        "text": [str(text), text_fingerprint(text)],
        "held out": None if held_out is None else [str(held_out), text_fingerprint(held_out)],
        "method": None if chosen is None else {"name": chosen.name, **asdict(chosen)},  # type: ignore[call-overload]
        "teacher": teacher,
        "config": asdict(config),
        "distillation": None if teacher is None else asdict(distillation),
        "new model": {**shape, "vocabulary": vocabulary} if model == _NEW else None,
    }
    console = Console(stderr=True, quiet=not is_first())
    with RunFolder.open(output, facts) as folder:
        if (begun := last_checkpoint(output)) is not None:
            console.print(f"Going on from {begun}.", highlight=False, soft_wrap=True)
        with console.status(f"loading {model}"):
            network, tokenizer = _load(model, folder, text, vocabulary, shape)
            mentor = None if teacher is None else _teacher(teacher, tokenizer)
        with bars(console) as progress:
            reading = progress.add_task("reading text", total=None)
            windows = token_windows(
                text, tokenizer, context, lambda done, total: progress.update(reading, completed=done, total=total)
            )
            measured = token_windows(held_out, tokenizer, context) if held_out else None
        if measured is None:
            windows, measured = windows.split(_HELD_OUT)
        _convert(network, model, chosen)
        if packed is not None:
            require_packable(network)
        with bars(console) as progress, processes():
            task = progress.add_task("steps", total=steps)
            history = run(
                config, network, tokenizer, windows, measured, output, mentor, distillation,
                lambda done, total: progress.update(task, completed=done, total=total),
                lambda entry: console.print(_line(entry), highlight=False, soft_wrap=True),
            )  # fmt: skip
        if not is_first():
            return
        if packed is not None:
            with console.status(f"packing into {packed}"):
                export_packed(*lissom.load(str(output), "float32"), packed)
        folder.end(history)
    if json_file:
        write_json({**facts, "history": history}, json_file)
    if json_file != "-":
        last = [entry["eval_loss"] for entry in history if "eval_loss" in entry][-1]
        typer.echo(f"{output}: NLL of held-out text {last:.4f} nats per token after {steps} steps. Use it:")
        typer.echo(f'  lissom generate {packed or output} "your question"')


def _method(name: str | None, settings: list[str]) -> Trainable | None:
    """The method that is asked for."""
    from lissom.errors import UserError
    from lissom.models.method import Trainable
    from lissom.models.registry import build

    if name is None:
        if settings:
            raise UserError("--set is of a method: name it with --method.")
        return None
    method = build(name, setting_values(settings))
    if not isinstance(method, Trainable):
        raise UserError(f"{name} is not trained: it is used in a recipe.")
    return method


def _convert(network: PreTrainedModel, name: str, chosen: Trainable | None) -> None:
    """Put the chosen method into the model called `name`, unless it has it already."""
    from lissom.errors import UserError
    from lissom.training_plugin import method_in_training

    known = method_in_training(network)
    if known is None and getattr(network, "is_quantized", False):
        raise UserError(f"{name} has packed weights, which cannot be trained: start from its original weights.")
    if known is not None and chosen not in (None, known):
        raise UserError(f"{name} is in training with {known}: leave out --method, or give the same.")
    if known is None and chosen is not None:
        chosen.convert(network)


def _load(
    name: str, folder: RunFolder, text: Path, vocabulary: int, shape: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import lissom
    from lissom.train import new_model

    if name != _NEW:
        return lissom.load(name, "float32")
    tokenizer = folder.tokenizer(text, vocabulary)
    return new_model(len(tokenizer), **shape), tokenizer


def _teacher(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The teacher, whose tokens are those of the model."""
    import lissom
    from lissom.errors import UserError

    teacher, own = lissom.load(name, "float32")
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"The teacher {name} has another tokenizer than the model: they must be the same.")
    return teacher


@contextmanager
def processes() -> Iterator[None]:
    """Ends the group of processes that the trainer makes: its threads must not outlive the interpreter."""
    try:
        yield
    finally:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
            gc.collect()  # what is left of the trainer still holds the group, and with it the threads


def setting_values(settings: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` as recipes read them."""
    import yaml

    from lissom.errors import UserError

    values = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise UserError(f"--set {setting}: expected NAME=VALUE.")
        values[name] = yaml.safe_load(value)
    return values


def _line(entry: dict[str, float]) -> str:
    """An entry of the log."""
    words = {"loss": "loss", "eval_loss": "held-out", "learning_rate": "rate"}
    skipped = ("step", "epoch", "grad_norm", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    parts = [f"{words.get(name, name)} {value:.4g}" for name, value in entry.items() if name not in skipped]
    return f"step {entry['step']}: " + ", ".join(parts)
