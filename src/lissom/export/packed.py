"""The packed form of a model in training, as a folder for transformers."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.files import atomic_path, require_new
from lissom.training_plugin import method_in_training


def export_packed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Pack `model` in place and write it to the folder `path`, atomically.

    Raises:
        UserError: the model is not in training with a method, cannot be packed, or there is something at `path`.
    """
    method = method_in_training(model)
    if method is None:
        raise UserError("The model is not in training with a method that has a packed form, as sparse-bitnet.")
    require_new(path)
    method.check_packable(model)
    with atomic_path(path) as temporary:
        method.pack(model).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
