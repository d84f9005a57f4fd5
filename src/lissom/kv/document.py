"""Documents and questions as token ids, in the model's own chat format where it has one."""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerBase

_DOCUMENT = "\x00"


def _around_document(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[str, str]:
    """What a user's turn of document and question has before the document and after it."""
    if not tokenizer.chat_template:
        return tokenizer.bos_token or "", f"\n\n{question}\n\n"
    content = f"{_DOCUMENT}\n\n{question}"
    rendered = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    )
    before, _, after = rendered.partition(_DOCUMENT)
    return before, after


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].long()


def document_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """`[1, tokens]`: the start of a user's turn that holds the document, up to where a question may follow."""
    return _encode(tokenizer, _around_document(tokenizer, "")[0] + text)


def question_ids(tokenizer: PreTrainedTokenizerBase, question: str, follows_document: bool = True) -> torch.Tensor:
    """`[1, tokens]`: the rest of the turn with the question, up to where the answer starts."""
    before, after = _around_document(tokenizer, question)
    return _encode(tokenizer, after if follows_document else before + after.lstrip("\n"))
