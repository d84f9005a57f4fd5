"""Text that statistics of a model's activations are collected on, as token ids."""

from __future__ import annotations

import ast
import importlib.util
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.models.load import load_tokenizer

# Modules of Python's library with much prose in their docstrings; never the texts of `lissom.evals`.
_MODULES = (
    "statistics", "argparse", "difflib", "configparser", "threading", "typing", "ipaddress", "socketserver",
    "_pydecimal", "subprocess", "shutil", "optparse", "smtplib", "textwrap", "traceback", "codecs", "inspect",
    "fractions", "uuid", "tempfile", "_pyio", "doctest", "turtle", "pdb", "wave", "mimetypes",
    "timeit", "os", "random", "logging",
)  # fmt: skip
_LONG = 300  # characters that make a docstring prose


@lru_cache(1)
def builtin_text() -> str:
    """Long docstrings of Python's library: English and code, about 360 KB, on every machine, nothing imported."""
    found = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(Path(spec.origin).read_text(errors="replace"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                found += [text] if len(text) > _LONG else []
    return "\n\n".join(found)


def tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer that lies where the model came from.

    Raises:
        UserError: there is none.
    """
    try:
        return load_tokenizer(model.config.name_or_path)
    except UserError as error:
        raise UserError(
            f"No tokenizer was found beside {model.config.name_or_path or 'the model'}; calibration needs one: give it "
            "as `tokenizer`."
        ) from error


def calibration_windows(
    tokenizer: PreTrainedTokenizerBase, file: str | Path | None, tokens: int, length: int
) -> torch.Tensor:
    """About `tokens` token ids, int64 `[windows, length]`, from places spread evenly over a text.

    Args:
        file: a text file; None is the built-in text.

    Raises:
        UserError: the file is missing, no text, or has fewer tokens.
    """
    try:
        text = builtin_text() if file is None else Path(file).read_text()
    except OSError as error:
        raise UserError(f"The calibration text {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The calibration text {file} is no text file in UTF-8.") from error
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0].long()
    windows = max(1, tokens // length)
    if len(ids) < windows * length:
        raise UserError(
            f"The calibration text {file or 'of this Python installation'} has {len(ids)} tokens, but "
            f"{windows * length} are asked for: give a longer text, or ask for fewer."
        )
    starts = torch.linspace(0, len(ids) - length, windows).long() if windows > 1 else torch.zeros(1).long()
    return torch.stack([ids[start : start + length] for start in starts.tolist()])
