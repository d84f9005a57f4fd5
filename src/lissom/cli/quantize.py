"""`lissom quantize`: a model with low-bit weights, as a folder of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lissom.cli.common import JSON, MODEL, bars

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HELD_OUT = 2048  # tokens


def register(app: typer.Typer) -> None:
    app.command()(quantize)


def quantize(
    model: str = typer.Argument("smollm2-135m", help=MODEL),
    output: Path = typer.Option(..., "--output", "-o", help="Folder to write."),
    bits: int = typer.Option(4, help="4 or 8, of the decoder's matrices."),
    method: str = typer.Option("gptq", help="rtn (no text needed), search, gptq."),
    group_size: int = typer.Option(32, help="Inputs that share a scale, a multiple of 32."),
    symmetric: bool = typer.Option(False, "--symmetric", help="Scales without minima: smaller, less exact."),
    head_bits: int = typer.Option(8, help="Of embedding and output head: 4, 8, or 16, which leaves them as they are."),
    target_bits: float = typer.Option(None, metavar="BITS", help="Mix 4 and 8 bits up to this per weight, e.g. 6."),
    max_loss: float = typer.Option(None, metavar="NATS", help="Mix 4 and 8 bits until the NLL rises by less."),
    calibration: Path = typer.Option(None, "--calibration", help="Text file. [default: a built-in text]"),
    calibration_tokens: int = typer.Option(8192, help="Tokens that are taken of it."),
    held_out: Path = typer.Option(None, "--held-out", help="Text that is measured on. [default: a built-in text]"),
    dtype: str = typer.Option("auto", help="Of what stays: float32, bfloat16, float16 or auto, the checkpoint's own."),
    json_file: str = JSON,
) -> None:
    """Store the weights in 4 or 8 bits, and tell what that costs on a text that was not used for it.

    `lissom generate FOLDER` runs it; after `import lissom` so does transformers' `from_pretrained`.
    """
    from rich.console import Console

    import lissom
    from lissom.errors import UserError
    from lissom.files import atomic_path, require_writable, write_json
    from lissom.kernels.packed_layers import weight_count
    from lissom.models.linear import require_original
    from lissom.weights.quant import Quantize
    from lissom.weights.quant.apply import calibration_ids, formats, stored_bytes

    settings = Quantize(
        bits=bits,
        method=method,  # type: ignore[arg-type]
        group_size=group_size,
        symmetric=symmetric,
        head_bits=head_bits,
        target_bits=target_bits,
        max_loss=max_loss,
        calibration=None if calibration is None else str(calibration),
        calibration_tokens=calibration_tokens,
    )
    if output.exists() and not _is_ours(output):
        raise UserError(f"{output} exists and was not written by `lissom quantize`; give another folder.")
    require_writable(output)
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        network, tokenizer = lissom.load(model, dtype)
        require_original(network)
        ids = _held_out_ids(network, tokenizer, held_out)
        calibration_ids(network, settings, tokenizer)  # a text that is too short is refused before anything is measured
    facts: dict[str, float] = {"bytes_before": stored_bytes(network), "weights": weight_count(network)}
    with bars(console) as bar:
        tasks: dict[str, int] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        facts["nll_before"] = _nll(network, ids, lambda *counts: progress("held-out text, before", *counts))
        settings.convert(network, tokenizer, progress)
        facts["nll_after"] = _nll(network, ids, lambda *counts: progress("held-out text, after", *counts))
    facts["bytes_after"] = stored_bytes(network)
    facts["bits_per_weight"] = 8 * facts["bytes_after"] / facts["weights"]
    with console.status(f"writing {output}"), atomic_path(output) as temporary:
        network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    if json_file:
        write_json({"folder": str(output), "model": model, "method": str(settings), **facts,
                    "formats": formats(network)}, json_file)  # fmt: skip
    if json_file != "-":
        typer.echo(
            f"{output}: {settings}, {facts['bytes_before'] / 1e6:.1f} MB to {facts['bytes_after'] / 1e6:.1f} MB "
            f"({facts['bits_per_weight']:.2f} bits per weight).\n"
            f"NLL of held-out text: {facts['nll_before']:.4f} before, {facts['nll_after']:.4f} after "
            f"({facts['nll_after'] - facts['nll_before']:+.4f} nats per token). Use it:\n"
            f'  lissom generate {output} "your question"'
        )


def _is_ours(folder: Path) -> bool:
    """Whether `folder` may be replaced: it is empty or holds a model with packed weights."""
    if folder.is_dir() and not any(folder.iterdir()):
        return True
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return (config.get("quantization_config") or {}).get("quant_method") == "lissom"


def _held_out_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path | None) -> torch.Tensor:
    from lissom.cli.common import read_text
    from lissom.errors import UserError
    from lissom.evals.texts import passages

    text = read_text(file) if file else "\n\n".join(text for _, text in passages()[::8])
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0].long()
    if len(ids) < 2:
        raise UserError(f"{file} has less than two tokens: nothing can be measured on it.")
    return ids[:_HELD_OUT]


def _nll(model: PreTrainedModel, ids: torch.Tensor, progress) -> float:  # type: ignore[no-untyped-def]
    import torch

    from lissom.evals.perplexity import window_nll
    from lissom.models import describe_decoder

    window = min(512, describe_decoder(model).max_position_embeddings)
    pieces = [piece for piece in ids.split(window) if len(piece) > 1]
    losses = []
    for number, piece in enumerate(pieces):
        progress(number, len(pieces))
        losses.append(window_nll(model, piece, window, window // 2))
    progress(len(pieces), len(pieces))
    return float(torch.cat(losses).mean())
