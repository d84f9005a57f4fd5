"""The packed form of a model in training, as a folder for transformers."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.files import atomic_path, require_new
from lissom.models.method import Packable
from lissom.training_plugin import method_in_training


def require_packable(model: PreTrainedModel) -> Packable:
    """The method that `model` is in training with.

    Raises:
        UserError: there is none that has a packed form, or the model cannot be packed.
    """
    method = method_in_training(model)
    if not isinstance(method, Packable):
        words = "not in training with a method" if method is None else f"in training with {method}, which is none"
        raise UserError(f"The model is {words} that has a packed form, as sparse-bitnet.")
    method.check_packable(model)
    return method


def export_packed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Pack `model` in place and write it to the folder `path`, atomically.

    Raises:
        UserError: see `require_packable`; or there is something at `path`.
    """
    method = require_packable(model)
    require_new(path)
    with atomic_path(path) as temporary:
        method.pack(model).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
