"""What is learned from a tree: its path, its visits, its steps' advantages, or pairs of steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lissom.rl.tree_search.config import Extraction
from lissom.rl.tree_search.draws import Prefix
from lissom.rl.tree_search.policy import Written
from lissom.rl.tree_search.search import extract, terminals
from lissom.rl.tree_search.tree import Node, Tree

Target = Literal["trajectory", "visits", "steps"]


@dataclass(frozen=True)
class Path:
    """A completion that a search has found.

    Attributes:
        prompt, completion: tokens.
        reward: of it; the lowest where it is not ended.
        ended: whether it is.
        version: of the policy that wrote it.
    """

    prompt: Prefix
    completion: Prefix
    reward: float
    ended: bool
    version: int


@dataclass(frozen=True)
class Weighted:
    """Tokens to make likelier, or less likely, behind a prefix.

    Attributes:
        prefix, tokens: what stands before them, and they.
        weight: of the log probability of each token.
    """

    prefix: Prefix
    tokens: Prefix
    weight: float


@dataclass(frozen=True)
class Pair:
    """Two steps from one state, the better one first.

    Attributes:
        prefix: tokens of the state.
        chosen, rejected: tokens of the steps.
        gap: between their worths.
    """

    prefix: Prefix
    chosen: Prefix
    rejected: Prefix
    gap: float


def paths(tree: Tree[Written], how: Extraction = "best", most: int = 1) -> list[Path]:
    """The completion that was extracted; with `most` above 1 that many distinct ends, the best first."""
    found = terminals(tree, most) if most > 1 else []
    nodes = found or [extract(tree, how)[-1]]
    return [_path(tree, node) for node in nodes if node.state.completion]


def _path(tree: Tree[Written], node: Node[Written]) -> Path:
    state = node.state
    reward = tree.config.low if node.reward is None else node.reward
    return Path(state.tokens[: state.begin], state.completion, reward, node.reward is not None, tree.version)


def visit_targets(tree: Tree[Written], least: int = 2) -> list[Weighted]:
    """AlphaZero's: at each state the share of visits of each step, as weights of a cross-entropy.

    Args:
        least: visits below which a state says too little.
    """
    found = []
    for node in _looked_at(tree, least):
        tried = [child for child in node.children if child.visits]
        total = sum(child.visits for child in tried)
        found += [_weighted(node, child, child.visits / total) for child in tried]
    return found


def step_targets(tree: Tree[Written], least: int = 2) -> list[Weighted]:
    """The advantage of each step, Q(s, a) - V(s), with what came back through the steps for both."""
    found = []
    for node in _looked_at(tree, least):
        tried = [child for child in node.children if child.visits]
        worths = [child.total / child.visits for child in tried]
        middle = np.average(worths, weights=[child.visits for child in tried])
        found += [_weighted(node, child, float(worth - middle)) for child, worth in zip(tried, worths, strict=True)]
    return found


def pairs(tree: Tree[Written], margin: float = 0.2, least: int = 2) -> list[Pair]:
    """The best and the worst step of each state, for preference training such as TRL's DPOTrainer.

    Args:
        margin: of their worths, at least.
        least: see `visit_targets`.
    """
    found = []
    for node in _looked_at(tree, least):
        tried = sorted((child for child in node.children if child.visits), key=lambda child: child.worth(tree.config))
        if len(tried) < 2:
            continue
        worst, best = tried[0], tried[-1]
        gap = best.worth(tree.config) - worst.worth(tree.config)
        if gap >= margin:
            found.append(Pair(node.state.tokens, _tokens(best), _tokens(worst), gap))
    return found


def backed_up(tree: Tree[Written], least: int = 1) -> list[tuple[Prefix, float]]:
    """States with the mean of what came back through them: a critic that is fitted to found paths alone thinks too
    highly of all others."""
    return [(node.state.tokens, node.total / node.visits) for node in _looked_at(tree, least)]


def _looked_at(tree: Tree[Written], least: int) -> Iterator[Node[Written]]:
    for node in tree.root.below():
        if node.reward is None and node.visits >= least and any(child.visits for child in node.children):
            yield node


def _weighted(node: Node[Written], child: Node[Written], weight: float) -> Weighted:
    return Weighted(node.state.tokens, _tokens(child), weight)


def _tokens(child: Node[Written]) -> Prefix:
    assert child.step is not None
    return child.step.tokens


def returns_and_advantages(
    rewards: Sequence[float], values: Sequence[np.ndarray], discount: float = 1.0, decay: float = 1.0
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each token of each path: what the critic should have said, and the advantage (GAE, arXiv 1506.02438).

    With `discount` and `decay` 1, the published choice, the advantage is `R - V(s_t)`, and the return `R`.

    Args:
        rewards: of whole paths.
        values: V of the state before each token, `[tokens]` for each path.
    """
    targets, advantages = [], []
    for reward, own in zip(rewards, values, strict=True):
        following = np.append(own[1:], 0.0)
        surprises = discount * following - own
        surprises[-1] = reward - own[-1]
        found = np.zeros(len(own))
        held = 0.0
        for place in range(len(own) - 1, -1, -1):
            held = surprises[place] + discount * decay * held
            found[place] = held
        advantages.append(found)
        targets.append(found + own)
    return targets, advantages
