"""Choosing the next token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lissom.errors import UserError

_FIRST = 512  # candidates that are sorted before the whole vocabulary is


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The settings work in the order of their names here, as in transformers.

    Attributes:
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely (CTRL, section 4.1).
        temperature: 0 takes the most likely token.
        top_k: only the k most likely tokens; 0 is all.
        top_p: only the most likely tokens that have this mass together.
        min_p: only tokens that have this share of the most likely one's probability.
        seed: of the generator.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("repetition_penalty", 1e-3, 1e3),
            ("temperature", 0, 1e3),
            ("top_k", 0, 2**31),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name}={value}: expected a number from {low:g} to {high:g}.")
        if self.top_p == 0:
            raise UserError("top_p=0 leaves no token: expected a number above 0, up to 1.")
        if 0 < self.temperature < 1e-3:
            raise UserError(f"temperature={self.temperature} is next to greedy: use 0 for that, or at least 0.001.")


class Sampler:
    """Draws tokens for one generation."""

    def __init__(self, sampling: Sampling, ids: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """`ids` `[rows, tokens]` is the prompt, `mask` of the same shape is 0 where it is padding (on the left)."""
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        # Nobody has said the padding. What the row ends with stands for it: no token counts twice.
        self._seen = ids if mask is None else torch.where(mask.bool(), ids, ids[:, -1:])

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """One token per row `[rows]` from `logits` `[rows, vocabulary]`.

        Raises:
            UserError: a logit is NaN.
        """
        settings = self.sampling
        if settings.repetition_penalty != 1.0:
            logits = penalised(logits, self._seen, settings.repetition_penalty)
        if settings.temperature == 0:
            tokens = _most_likely(logits)
        else:
            values, places = candidates(logits / settings.temperature, settings.top_k, settings.top_p, settings.min_p)
            shares = values.softmax(-1)
            _check(bool(shares[:, 0].isnan().any()))  # one NaN makes all of them NaN
            chosen = torch.multinomial(shares, 1, generator=self._generator)
            tokens = places.gather(-1, chosen)[:, 0]
        if settings.repetition_penalty != 1.0:
            self._seen = torch.cat([self._seen, tokens[:, None]], 1)
        return tokens


def _most_likely(logits: torch.Tensor) -> torch.Tensor:
    """`argmax` over the vocabulary, which is a NaN where there is one; NumPy's is several times as fast on a CPU."""
    if logits.is_cpu and logits.dtype == torch.float32:
        values = logits.detach().numpy()
        places = values.argmax(-1)
        _check(any(math.isnan(row[place]) for row, place in zip(values, places, strict=True)))
        return torch.from_numpy(places)
    tokens = logits.argmax(-1)
    _check(bool(logits.gather(-1, tokens[:, None]).isnan().any()))
    return tokens


def _check(damaged: bool) -> None:
    if damaged:
        raise UserError("The model's logits are NaN: its weights are damaged, or overflow in its dtype.")


def penalised(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits with those of tokens in `seen` `[rows, tokens]` divided by `penalty` where positive, else multiplied."""
    known = logits.gather(1, seen)
    return logits.scatter(1, seen, torch.where(known > 0, known / penalty, known * penalty))


def candidates(
    logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that may be drawn.

    Returns:
        Logits `[rows, n]` in descending order, -inf where a token may not be drawn, and the tokens `[rows, n]`.
    """
    vocabulary = logits.shape[-1]
    if not top_k and top_p == 1.0 and min_p == 0.0:
        return logits, torch.arange(vocabulary, device=logits.device).expand_as(logits)
    count = min(top_k or _FIRST, vocabulary)
    while True:
        values, places = logits.topk(count)
        # Shares among the k most likely tokens, or among all.
        mass = values.logsumexp(-1, keepdim=True) if top_k else logits.logsumexp(-1, keepdim=True)
        shares = (values - mass).exp()
        before = shares.cumsum(-1) - shares
        enough = bool((before[:, -1] + shares[:, -1] >= top_p).all()) and (top_p < 1.0 or min_p == 0.0)
        enough = enough or bool((shares[:, -1] < min_p * shares[:, 0]).all())
        if top_k or enough or count == vocabulary:
            break
        count = min(8 * count, vocabulary)
    dropped = (before >= top_p) & (before > 0) if top_p < 1.0 else torch.zeros_like(shares, dtype=torch.bool)
    if min_p > 0:
        dropped = dropped | (shares < min_p * shares[:, :1])
    return values.masked_fill(dropped, -torch.inf), places
