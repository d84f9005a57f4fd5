"""A lean generation loop: one forward call and one draw per token, with streaming and stop strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lissom.decode.native import next_logits
from lissom.decode.sampling import Sampler, Sampling
from lissom.errors import UserError

_UNFINISHED = "�"  # what a tokenizer makes of the first bytes of a letter


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Tokens that end an answer of `model`."""
    found = model.generation_config.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else list(found)


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    cache: Cache | None = None,
    mask: torch.Tensor | None = None,
    stop: Sequence[int] | None = None,
) -> Iterator[torch.Tensor]:
    """Generate token after token, natively inside a block of `NativeDecode`.

    Args:
        ids: int64 `[rows, tokens]`, with everything that `cache` has read already in front.
        max_new_tokens: at most.
        cache: what was read before; it grows. Default: an empty one.
        mask: `[rows, tokens]`, 0 where a token is padding (on the left).
        stop: tokens after which a row is finished; default: the model's own.

    Yields:
        `[rows]` the next tokens; -1 in rows that are finished.

    Raises:
        UserError: there is nothing to read, or `ids` does not go on where the cache ends.
    """
    cache = DynamicCache(config=model.config) if cache is None else cache
    read = cache.get_seq_length()
    if ids.ndim != 2 or ids.shape[1] <= read:
        raise UserError(f"The prompt has {ids.shape[-1]} tokens, the cache has read {read}: there is nothing to read.")
    stop = end_tokens(model) if stop is None else stop
    ends = set(stop)
    sampler = Sampler(sampling, ids, mask)
    positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)
    new, done = ids[:, read:], [False] * len(ids)
    places = None if positions is None else positions[:, read:]
    for number in range(max_new_tokens):
        tokens = sampler.draw(next_logits(model, new, cache, mask, places))
        drawn = tokens.tolist()
        yield tokens.masked_fill(torch.tensor(done, device=tokens.device), -1) if any(done) else tokens.clone()
        done = [over or token in ends for over, token in zip(done, drawn, strict=True)]
        if all(done) or number + 1 == max_new_tokens:
            return
        new = tokens[:, None]
        if mask is not None and places is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            places = places[:, -1:] + 1


@dataclass
class Answer:
    """How a generation ended, filled while it runs.

    Attributes:
        tokens: what was generated, the end token included.
        finish: `stop` (end token or stop string) or `length`.
    """

    tokens: list[int]
    finish: str = "length"


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    cache: Cache | None = None,
    stop_strings: Sequence[str] = (),
    answer: Answer | None = None,
) -> Iterator[str]:
    """Generate the answer to one prompt and yield its text as it comes, whole letters at a time.

    Args:
        ids: int64 `[1, tokens]`; see `generate_tokens` for the others.
        stop_strings: the answer ends before the first of them; none of it is yielded.
        answer: filled with the tokens and why it ended.
    """
    if any(not text for text in stop_strings):
        raise UserError("A stop string is empty.")
    answer = Answer([]) if answer is None else answer
    ends, text, given = set(end_tokens(model)), _Text(tokenizer), 0
    stream = generate_tokens(model, ids, max_new_tokens=max_new_tokens, sampling=sampling, cache=cache)
    for tokens in stream:
        answer.tokens.append(int(tokens[0]))
        if answer.tokens[-1] in ends:
            answer.finish = "stop"
            break
        if not text.add(answer.tokens[-1]):
            continue
        found = [place for stop in stop_strings if (place := text.whole.find(stop, max(0, given - len(stop)))) >= 0]
        if found:
            answer.finish = "stop"
            if min(found) > given:
                yield text.whole[given : min(found)]
            return
        safe = len(text.whole) - _begun(text.whole, stop_strings)
        if safe > given:
            yield text.whole[given:safe]
            given = safe
    text.finish()
    if len(text.whole) > given:
        yield text.whole[given:]


def _begun(text: str, stop_strings: Sequence[str]) -> int:
    """How many letters at the end of `text` may be the beginning of a stop string."""
    return max((n for stop in stop_strings for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


class _Text:
    """The text of a growing list of tokens. A letter may be spread over several tokens, and some tokenizers drop a
    space at the beginning: so the last tokens are decoded together with some that are decided already."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._tokens = tokenizer, []  # type: ignore[var-annotated]
        self._context = self._decided = 0
        self.whole = ""

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True))

    def add(self, token: int) -> bool:
        """Take one more token; whether there is new text."""
        self._tokens.append(token)
        return self._extend(final=False)

    def finish(self) -> None:
        """Nothing more comes: what is not a whole letter yet never will be."""
        self._extend(final=True)

    def _extend(self, final: bool) -> bool:
        known = self._decode(self._context, self._decided)
        text = self._decode(self._context, len(self._tokens))
        if len(text) <= len(known) or (text.endswith(_UNFINISHED) and not final):
            return False
        self.whole += text[len(known) :]
        self._context, self._decided = self._decided, len(self._tokens)
        return True
