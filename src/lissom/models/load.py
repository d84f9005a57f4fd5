"""`load`: any decoder of transformers from a name, a folder, a GGUF file or the Hub."""

from __future__ import annotations

import difflib
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.models import assets
from lissom.models.gguf import NAMES, GgufFile, load_dense, load_packed

DEFAULT_MODEL = "smollm2-135m"
_DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load(
    name_or_path: str | Path = DEFAULT_MODEL,
    dtype: str | torch.dtype = torch.float32,
    attn_implementation: str | None = None,
    weights: str = "dense",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready for inference.

    Args:
        name_or_path: an asset (`lissom assets list`), a folder of transformers, a .gguf file, or a Hub id.
        dtype: a torch dtype or its name; `auto` is the checkpoint's own (of a .gguf file: float32). Of packed weights
            it is the dtype of what is between them.
        attn_implementation: as in transformers; default `sdpa` where the model has it.
        weights: `dense`, or `packed`: a GGUF file, or an asset that has one, computes with the file's own blocks and
            loses nothing (see `lissom.models.gguf`). What is no GGUF is loaded as it is.

    Raises:
        UserError: the model is unknown, its files are damaged, or it is no causal language model.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise UserError(f"dtype={dtype!r}: expected one of {', '.join(_DTYPES)}.")
        dtype = _DTYPES[dtype]
    if weights not in ("dense", "packed"):
        raise UserError(f"weights={weights!r}: expected 'dense' or 'packed'.")
    source, file = locate(str(name_or_path), weights == "packed")
    if file is not None and dtype == "auto":
        dtype = torch.float32
    if file is not None and (weights == "packed" or GgufFile(Path(source) / file).architecture in NAMES):
        read = load_packed if weights == "packed" else load_dense
        return read(Path(source) / file, dtype, attn_implementation)  # type: ignore[arg-type]
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if file is not None:  # of an architecture that transformers alone reads
        options |= {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}
    tokenizer = load_tokenizer(source, file)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, struct.error) as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(f"{name_or_path} cannot be loaded as a causal language model: {reason}") from error
    model.eval()
    return model, tokenizer


def load_tokenizer(place: str, file: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a folder or on the Hub, or in the .gguf `file` there.

    Raises:
        UserError: there is none.
    """
    try:
        options: dict[str, Any] = {"gguf_file": file} if file else {}
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, **options)
        if len(tokenizer) > len(tokenizer.all_special_ids):  # else transformers made it from nothing
            return tokenizer
        reason = ""
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, struct.error) as error:
        reason = ": " + str(error).strip().splitlines()[0][:300].rstrip(".: ")
    raise UserError(f"No tokenizer was found in {place}{reason}.")


def _say(text: str) -> None:
    print(f"lissom: {text}", file=sys.stderr)


def locate(name: str, packed: bool) -> tuple[str, str | None]:
    """What `from_pretrained` takes: (folder or Hub id, GGUF file name or None); `packed`: a GGUF file where one is."""
    path = Path(name)
    models = [asset.name for asset in assets.ASSETS.values() if asset.kind == "model"]
    if name in models:
        folder = assets.path(assets.find(name).packed or name if packed else name, _say)
        return str(folder), assets.GGUF_NAME if (folder / assets.GGUF_NAME).is_file() else None
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is a file, but no .gguf file. Give a model folder, a .gguf file or a Hub id.")
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(f"{name} is damaged: it does not begin as a GGUF file does.")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is a folder without config.json: it holds no model of transformers.")
        return name, None
    if "/" not in name or name.startswith((".", "/", "~")):
        near = difflib.get_close_matches(name, models, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else f" Known names: {', '.join(models)}."
        raise UserError(f"There is no model {name!r}, neither as a name nor as a path.{hint}")
    return name, None
