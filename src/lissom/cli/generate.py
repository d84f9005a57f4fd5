"""`lissom generate`: answer a question, by a recipe or from a compacted document where one is given."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lissom.cli.common import MODEL, read_text

if TYPE_CHECKING:
    from lissom.recipes import Recipe


_NEW_TOKENS = 128


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    model: str = typer.Argument(..., help=MODEL),
    prompt: str = typer.Argument(..., help="The question."),
    cache: Path = typer.Option(None, "--cache", help="Cache file of `lissom compact` for this model."),
    recipe: Path = typer.Option(None, "--recipe", help="Recipe file: dtype, threads and methods to run with."),
    document: Path = typer.Option(None, "--document", "-d", help="Text file that the question is about."),
    kv_budget: str = typer.Option(None, metavar="SIZE", help="Keep the KV cache within this, e.g. 8MB."),
    max_new_tokens: int = typer.Option(
        None, min=1, help="Tokens to generate at most. [default: 128, or as many as the model has room for]"
    ),
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy."),
    top_k: int = typer.Option(0, min=0, help="Draw from the k most likely tokens only; 0 is all."),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Draw from the likeliest tokens of this mass only."),
    min_p: float = typer.Option(
        0.0, min=0.0, max=1.0, help="Draw from tokens of this share of the likeliest one only."
    ),
    repetition_penalty: float = typer.Option(1.0, help="Above 1: what was said already is less likely."),
    stop: list[str] = typer.Option([], "--stop", metavar="TEXT", help="End before this text; may be repeated."),
    native: bool = typer.Option(True, "--native/--no-native", help="Run in native code where the model allows."),
    kv: str = typer.Option(
        None, help="Keys and values of native passes: bf16, int8 or fp32. [default: the recipe's, or bf16]"
    ),
    dtype: str = typer.Option(None, help="float32, bfloat16, float16 or auto. [default: the recipe's, or auto]"),
    seed: int = typer.Option(0, min=0, max=2**61, help="Seed, where temperature is above 0."),
) -> None:
    """Generate an answer and print it as it comes."""
    import torch
    from rich.console import Console

    from lissom.decode import NativeDecode, Sampling, generate_text
    from lissom.errors import UserError
    from lissom.kv import KVBudget, file
    from lissom.kv.document import document_ids, question_ids
    from lissom.models import describe_decoder
    from lissom.recipes import Recipe

    if not prompt.strip():
        raise UserError("The prompt is empty.")
    if any(0xD800 <= ord(letter) < 0xE000 for letter in prompt):
        raise UserError("The prompt is no text in UTF-8.")
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    if cache is not None and document is not None:
        raise UserError("Give either --cache or --document: a cache file holds its document already.")
    text = None if document is None else read_text(document)
    chosen = _recipe(model, recipe, dtype)
    methods = chosen.build()
    if kv_budget:
        methods.append(KVBudget(kv_budget))
    facts = chosen.model_dump(exclude={"methods"})
    wanted = {} if kv is None else {"kv": kv}
    if not native:
        if wanted:
            raise UserError("--kv is the type of keys and values in native passes: leave out --kv or --no-native.")
        methods = [method for method in methods if not isinstance(method, NativeDecode)]
    elif any(isinstance(method, NativeDecode) for method in methods):
        methods = [replace(method, **wanted) if isinstance(method, NativeDecode) else method for method in methods]
    else:
        methods.insert(0, NativeDecode(**wanted))  # type: ignore[arg-type]
        # A dtype that is asked for is that of dense weights, and a method that changes weights begins with those.
        dense = dtype or any(hasattr(method, "convert") for method in methods)
        facts |= {} if dense else {"weights": "packed"}
    chosen = Recipe.of(*methods, **facts)
    with Console(stderr=True).status(f"loading {model}"):
        network, tokenizer = chosen.load_model()
    stored, tokens = None, torch.empty(1, 0, dtype=torch.int64)
    if cache is not None:
        stored, kept, _ = file.load(cache, network)
        if kept is None:
            raise UserError(f"{cache} does not hold the document's tokens; write it with `lissom compact`.")
        tokens = kept
    if text is not None:
        tokens = document_ids(tokenizer, text)
    ids = torch.cat([tokens, question_ids(tokenizer, prompt, follows_document=tokens.numel() > 0)], 1)
    limit = describe_decoder(network).max_position_embeddings
    room = limit - ids.shape[1]
    new_tokens = max(1, min(_NEW_TOKENS, room)) if max_new_tokens is None else max_new_tokens
    if new_tokens > room:
        raise UserError(
            f"The prompt has {ids.shape[1]} tokens and {new_tokens} are to come; the model reads at most {limit}. "
            "Shorten the document or --max-new-tokens."
        )
    with chosen.running(network) as reports:
        pieces = generate_text(
            network,
            tokenizer,
            ids.to(network.device),
            max_new_tokens=new_tokens,
            sampling=sampling,
            cache=stored,
            stop_strings=stop,
        )
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    for report in reports:
        if hasattr(report, "summary"):
            print(report.summary(), file=sys.stderr)


def _recipe(model: str, file: Path | None, dtype: str | None) -> Recipe:
    """The recipe of --recipe, or of a folder that `lissom apply` wrote, or none; for `model`, in `dtype` if given."""
    from lissom.recipes import Recipe
    from lissom.recipes.recipe import FILE_NAME

    beside = Path(model) / FILE_NAME
    found = Recipe.load(file) if file else Recipe.load(beside) if beside.is_file() else Recipe()
    return found.model_copy(update={"model": model} | ({"dtype": dtype} if dtype else {}))
