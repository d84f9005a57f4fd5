"""What a policy is expected to score on a prompt, before it has tried.

V_0.5's prior is a frozen model that reads (prompt, outcome) pairs of the current policy as its context (V_0, arXiv
2602.03584). What is here fits on a CPU and keeps its spirit: nothing is trained together with the policy, and all that
is known of it are outcomes of earlier steps. Those of the step that is scored are never in the context, or they would
leak.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist

from lissom.errors import UserError

Features = np.ndarray  # float64 `[prompts, features]`


@dataclass(frozen=True)
class Outcome:
    """What became of a prompt in an earlier step.

    Attributes:
        prompt: as text.
        features: of it, `[features]`, or nothing where the prior needs none.
        mean: of its rewards.
        size: how many there were.
        step: when.
    """

    prompt: str
    features: np.ndarray | None
    mean: float
    size: int
    step: int


class Prior(Protocol):
    """Expected rewards.

    Attributes:
        needs_features: whether prompts must come with the policy's features.
        window: steps back from which outcomes are still looked at.
    """

    @property
    def needs_features(self) -> bool:
        """See above."""
        ...

    @property
    def window(self) -> int:
        """See above."""
        ...

    def predict(
        self, prompts: Sequence[str], features: Features | None, context: Sequence[Outcome]
    ) -> np.ndarray | None:
        """Expected mean reward of each prompt, from outcomes of earlier steps; None where there are too few."""
        ...


@dataclass
class Context:
    """The outcomes of the last steps, which the trainer keeps in its checkpoints.

    Attributes:
        window: steps.
        outcomes: the oldest first.
    """

    window: int
    outcomes: deque[Outcome] = field(default_factory=deque)

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """What a step has come to; those of too long ago are forgotten."""
        self.outcomes.extend(outcomes)
        while self.outcomes and self.outcomes[0].step <= self.outcomes[-1].step - self.window:
            self.outcomes.popleft()

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(
            [
                [own.prompt, None if own.features is None else own.features.tolist(), own.mean, own.size, own.step]
                for own in self.outcomes
            ]
        )

    def load(self, text: str) -> None:
        """What `to_json` gave."""
        self.outcomes = deque(
            Outcome(prompt, None if features is None else np.asarray(features), mean, size, step)
            for prompt, features, mean, size, step in json.loads(text)
        )


def _average(context: Sequence[Outcome]) -> float:
    return float(np.average([own.mean for own in context], weights=[own.size for own in context]))


@dataclass(frozen=True)
class Constant:
    """The same for every prompt: for tests of what a bad prior does."""

    value: float
    needs_features = False
    window = 1

    def predict(
        self, prompts: Sequence[str], features: Features | None, context: Sequence[Outcome]
    ) -> np.ndarray | None:
        """See `Prior`."""
        return np.full(len(prompts), self.value)


@dataclass(frozen=True)
class BatchMean:
    """The mean of the last steps, for every prompt."""

    window: int = 4
    needs_features = False

    def predict(
        self, prompts: Sequence[str], features: Features | None, context: Sequence[Outcome]
    ) -> np.ndarray | None:
        """See `Prior`."""
        return np.full(len(prompts), _average(context)) if context else None


@dataclass(frozen=True)
class History:
    """A prompt's own past: its outcomes, each older one with less weight, and one rollout's worth of everybody's mean.

    Attributes:
        decay: weight that a step takes away.
        window: see `Prior`.
    """

    decay: float = 0.98
    window: int = 1000
    needs_features = False

    def predict(
        self, prompts: Sequence[str], features: Features | None, context: Sequence[Outcome]
    ) -> np.ndarray | None:
        """See `Prior`."""
        if not context:
            return None
        middle, now = _average(context), context[-1].step
        sums: dict[str, list[float]] = {}
        for own in context:
            weight = own.size * self.decay ** (now - own.step)
            held = sums.setdefault(own.prompt, [middle, 1.0])
            held[0] += weight * own.mean
            held[1] += weight
        known = {prompt: total / weight for prompt, (total, weight) in sums.items()}
        return np.array([known.get(prompt, middle) for prompt in prompts])


def _scaled(features: Features, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in units of the deviations of `known`, and around its middle."""
    middle, deviation = known.mean(0), known.std(0) + 1e-6 * (1 + np.abs(known).max())
    return (features - middle) / deviation, (known - middle) / deviation


def _known(context: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    features = np.stack([own.features for own in context if own.features is not None])
    return features, np.array([own.mean for own in context]), np.array([float(own.size) for own in context])


@dataclass(frozen=True)
class Neighbours:
    """The mean of the nearest prompts of the last steps, by the policy's features.

    Attributes:
        count: of neighbours.
        window: see `Prior`.
    """

    count: int = 16
    window: int = 8
    needs_features = True

    def predict(
        self, prompts: Sequence[str], features: Features | None, context: Sequence[Outcome]
    ) -> np.ndarray | None:
        """See `Prior`."""
        if features is None or len(context) < self.count:
            return None
        known, means, sizes = _known(context)
        nearest = np.argpartition(cdist(*_scaled(features, known)), self.count - 1, axis=1)[:, : self.count]
        return (means[nearest] * sizes[nearest]).sum(1) / sizes[nearest].sum(1)


@dataclass(frozen=True)
class Ridge:
    """A linear function of the policy's features, fitted to the last steps.

    Attributes:
        penalty: of its squared weights, per outcome.
        window: see `Prior`.
    """

    penalty: float = 0.3
    window: int = 8
    needs_features = True

    def predict(
        self, prompts: Sequence[str], features: Features | None, context: Sequence[Outcome]
    ) -> np.ndarray | None:
        """See `Prior`."""
        if features is None or len(context) < 2:
            return None
        known, means, sizes = _known(context)
        x, own = _scaled(features, known)
        middle, weights = np.average(means, weights=sizes), sizes / sizes.mean()
        gram = (own * weights[:, None]).T @ own + self.penalty * len(own) * np.eye(own.shape[1])
        slope = cho_solve(cho_factor(gram), (own * weights[:, None]).T @ (means - middle))
        return middle + x @ slope


@dataclass(frozen=True)
class GaussianProcess:
    """A Gaussian process over the policy's features, whose length and noise are those that the last steps are likeliest
    under, of a few.

    Attributes:
        most: outcomes that are looked at, the newest.
        window: see `Prior`.
    """

    most: int = 512
    window: int = 8
    needs_features = True

    def predict(
        self, prompts: Sequence[str], features: Features | None, context: Sequence[Outcome]
    ) -> np.ndarray | None:
        """See `Prior`."""
        if features is None or len(context) < 4:
            return None
        known, means, sizes = _known(list(context)[-self.most :])
        x, own = _scaled(features, known)
        middle = float(np.average(means, weights=sizes))
        values, spread = means - middle, float(means.var()) + 1e-12
        distance = cdist(own, own, "sqeuclidean")
        typical = float(np.median(distance)) or 1.0
        best: tuple[float, Any, float] | None = None
        for length in (0.25, 1.0, 4.0):
            for noise in (0.3, 1.0, 3.0):
                kernel = np.exp(-distance / (2 * length * typical))
                kernel[np.diag_indices_from(kernel)] += noise * sizes.mean() / sizes
                factor = cho_factor(kernel * spread, lower=True)
                likelihood = -0.5 * values @ cho_solve(factor, values) - np.log(np.diag(factor[0])).sum()
                if best is None or likelihood > best[0]:
                    best = float(likelihood), factor, length
        assert best is not None
        cross = spread * np.exp(-cdist(x, own, "sqeuclidean") / (2 * best[2] * typical))
        return middle + cross @ cho_solve(best[1], values)


@dataclass(frozen=True)
class Flipped:
    """What another prior says, mirrored at the middle of the range: an adversary, for tests.

    Attributes:
        prior: the other.
        low, high: of rewards.
    """

    prior: Prior
    low: float
    high: float

    @property
    def needs_features(self) -> bool:
        """As the other."""
        return self.prior.needs_features

    @property
    def window(self) -> int:
        """As the other."""
        return self.prior.window

    def predict(
        self, prompts: Sequence[str], features: Features | None, context: Sequence[Outcome]
    ) -> np.ndarray | None:
        """See `Prior`."""
        found = self.prior.predict(prompts, features, context)
        return None if found is None else self.low + self.high - found


@dataclass(frozen=True)
class Generalist:
    """A model of one's own, such as V_0: a function of (prompts, context) that gives the probability of success of each
    prompt, from pairs of an instruction and an outcome between 0 and 1.

    Attributes:
        function: called with a list of prompts and a list of (prompt, outcome).
        low, high: of rewards, which 0 and 1 are mapped to.
        most: pairs of the context, the newest (V_0: 256).
        window: see `Prior`.
    """

    function: Callable[[list[str], list[tuple[str, float]]], Sequence[float]]
    low: float
    high: float
    most: int = 256
    window: int = 8
    needs_features = False

    def predict(
        self, prompts: Sequence[str], features: Features | None, context: Sequence[Outcome]
    ) -> np.ndarray | None:
        """See `Prior`."""
        width = self.high - self.low
        pairs = [(own.prompt, (own.mean - self.low) / width) for own in list(context)[-self.most :]]
        found = np.asarray(self.function(list(prompts), pairs), dtype=float)
        if found.shape != (len(prompts),) or not ((found >= 0) & (found <= 1)).all():
            raise UserError("The generalist prior must give a probability from 0 to 1 for each prompt.")
        return self.low + width * found


def expected(
    prior: Prior, prompts: Sequence[str], features: Features | None, context: Context, low: float, high: float
) -> torch.Tensor | None:
    """What `prior` says, within the range of rewards, float64 `[prompts]`; None: it knows too little.

    Raises:
        UserError: it gives something else than a finite number for each prompt.
    """
    found = prior.predict(prompts, features, list(context.outcomes))
    if found is None:
        return None
    if found.shape != (len(prompts),) or not np.isfinite(found).all():
        raise UserError(f"The prior {type(prior).__name__} did not give a finite number for each prompt.")
    return torch.from_numpy(np.clip(found, low, high))
