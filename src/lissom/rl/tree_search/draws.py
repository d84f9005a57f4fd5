"""Continuations of token prefixes, up to the end of a step: by transformers, or by vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.rl.sampling import ends_of, pad_of, padded_left, positions_of

Prefix = tuple[int, ...]


class Drawn(NamedTuple):
    """A continuation, as it was drawn: it is never made text and tokens again.

    Attributes:
        tokens: of it, with those of the boundary or the end.
        logp: log probability of all of them at a temperature of 1.
        ended: whether the policy has ended the whole completion.
        cut: whether it was stopped because it was too long.
    """

    tokens: Prefix
    logp: float
    ended: bool
    cut: bool


class Draws(Protocol):
    """Draws continuations."""

    def __call__(self, prefixes: Sequence[Prefix], counts: Sequence[int], most: int, seed: int) -> list[list[Drawn]]:
        """So many continuations of each prefix, of at most `most` tokens, up to a boundary."""
        ...


@dataclass(frozen=True)
class TransformersDraws:
    """By the model itself. A prefix is read once, however many continuations are drawn of it.

    Attributes:
        model, tokenizer: of the policy.
        boundary: text that ends a step, alone or inside a token; None: only the end of the completion does.
        temperature: 0 takes the likeliest token.
        batch_size: continuations that are drawn at a time.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    boundary: str | None = "\n"
    temperature: float = 0.8
    batch_size: int = 512

    @torch.no_grad()
    def __call__(self, prefixes: Sequence[Prefix], counts: Sequence[int], most: int, seed: int) -> list[list[Drawn]]:
        """See `Draws`."""
        training = self.model.training
        self.model.eval()
        random = torch.Generator(self.model.device).manual_seed(seed)
        found: list[list[Drawn]] = []
        begin = 0
        while begin < len(prefixes):
            end, rows = begin, 0
            while end < len(prefixes) and (end == begin or rows + counts[end] <= self.batch_size):
                rows += counts[end]
                end += 1
            found += self._draw(prefixes[begin:end], counts[begin:end], most, random)
            begin = end
        self.model.train(training)
        return found

    def _draw(
        self, prefixes: Sequence[Prefix], counts: Sequence[int], most: int, random: torch.Generator
    ) -> list[list[Drawn]]:
        device = self.model.device
        ids, mask = padded_left(prefixes, pad_of(self.tokenizer), device)
        places = positions_of(mask)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
        owner = torch.arange(len(prefixes)).repeat_interleave(torch.tensor(counts)).to(device)
        cache = out.past_key_values
        cache.batch_select_indices(owner)
        logits, mask, place = out.logits[owner, -1], mask[owner], places[owner, -1:]
        ends = torch.tensor(ends_of(self.model, self.tokenizer), device=device)
        stops = torch.tensor(self._boundaries, device=device, dtype=torch.long)
        rows = len(owner)
        logps, going = torch.zeros(rows, device=device, dtype=torch.float64), torch.ones(rows, device=device).bool()
        tokens, lengths = [], torch.zeros(rows, dtype=torch.long, device=device)
        ended = torch.zeros_like(going)
        for step in range(most):
            chosen = self._choose(logits, random)
            logps += going * logits.double().log_softmax(1).gather(1, chosen).squeeze(1)
            lengths += going
            tokens.append(chosen)
            over = torch.isin(chosen.squeeze(1), ends)
            ended |= going & over
            going &= ~(over | torch.isin(chosen.squeeze(1), stops))
            if step + 1 == most or not bool(going.any()):
                break
            mask, place = torch.cat([mask, mask.new_ones(rows, 1)], 1), place + 1
            out = self.model(
                input_ids=chosen, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True
            )
            logits = out.logits[:, -1]
        drawn = torch.cat(tokens, 1).tolist()
        flags = zip(lengths.tolist(), logps.tolist(), ended.tolist(), going.tolist(), strict=True)
        flat = [
            Drawn(tuple(row[:length]), logp, end, cut)
            for row, (length, logp, end, cut) in zip(drawn, flags, strict=True)
        ]
        found, place_of = [], 0
        for count in counts:
            found.append(flat[place_of : place_of + count])
            place_of += count
        return found

    def _choose(self, logits: torch.Tensor, random: torch.Generator) -> torch.Tensor:
        if self.temperature == 0:
            return logits.argmax(1, keepdim=True)
        return torch.multinomial((logits.float() / self.temperature).softmax(1), 1, generator=random)

    @cached_property
    def _boundaries(self) -> list[int]:
        """Tokens whose text holds the boundary: there may be several (`\\n`, `\\n\\n`, `.\\n`)."""
        if self.boundary is None:
            return []
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        found = [token for token, text in enumerate(texts) if self.boundary in text]
        if not found:
            raise UserError(f"No token of the tokenizer holds the boundary {self.boundary!r}, which ends a step.")
        return found


@dataclass(frozen=True)
class VLLMDraws:
    """By an engine of vLLM, which keeps the keys and values of prefixes itself (`enable_prefix_caching`).

    Attributes:
        engine: `vllm.LLM`, whose log probabilities are those before the temperature (`logprobs_mode="raw_logprobs"`,
            its default).
        ends: tokens that end a completion.
        boundary, temperature: see `TransformersDraws`.
    """

    engine: Any
    ends: tuple[int, ...]
    boundary: str | None = "\n"
    temperature: float = 0.8

    def __call__(self, prefixes: Sequence[Prefix], counts: Sequence[int], most: int, seed: int) -> list[list[Drawn]]:
        """See `Draws`."""
        from vllm import SamplingParams, TokensPrompt

        settings = [
            SamplingParams(
                n=count, temperature=self.temperature, max_tokens=most, seed=seed + number, logprobs=0,
                stop=None if self.boundary is None else [self.boundary], include_stop_str_in_output=True,
            )
            for number, count in enumerate(counts)
        ]  # fmt: skip
        prompts = [TokensPrompt(prompt_token_ids=list(prefix)) for prefix in prefixes]
        answers = self.engine.generate(prompts, settings, use_tqdm=False)
        return [[self._drawn(output) for output in answer.outputs] for answer in answers]

    def _drawn(self, output: Any) -> Drawn:
        tokens = tuple(output.token_ids)
        logp = sum(own[token].logprob for own, token in zip(output.logprobs, tokens, strict=True))
        ended = bool(tokens) and tokens[-1] in self.ends
        return Drawn(tokens, float(logp), ended, output.finish_reason == "length")
