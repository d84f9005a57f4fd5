"""`lissom generate`: answer a question, from a compacted document where one is given."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    model: str = typer.Argument("smollm2-135m", help="Asset, model folder, .gguf file or Hub id."),
    prompt: str = typer.Argument(..., help="The question."),
    cache: Path = typer.Option(None, "--cache", help="Cache file of `lissom compact` for this model."),
    max_new_tokens: int = typer.Option(128, min=1, help="Tokens to generate at most."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy."),
    dtype: str = typer.Option("float32", help="float32, bfloat16 or float16."),
    seed: int = typer.Option(0, help="Seed, where temperature is above 0."),
) -> None:
    """Generate an answer and print it as it comes."""
    import torch
    from rich.console import Console
    from transformers import TextStreamer

    import lissom.models
    from lissom.errors import UserError
    from lissom.kv import file
    from lissom.kv.document import question_ids

    if not prompt.strip():
        raise UserError("The prompt is empty.")
    with Console(stderr=True).status(f"loading {model}"):
        network, tokenizer = lissom.models.load(model, dtype)
    stored, tokens = None, torch.empty(1, 0, dtype=torch.int64)
    if cache is not None:
        stored, kept, _ = file.load(cache, network)
        if kept is None:
            raise UserError(f"{cache} does not hold the document's tokens; write it with `lissom compact`.")
        tokens = kept
    ids = torch.cat([tokens, question_ids(tokenizer, prompt, follows_document=cache is not None)], 1)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    network.generate(
        ids.to(network.device),
        attention_mask=torch.ones_like(ids),
        past_key_values=stored,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
