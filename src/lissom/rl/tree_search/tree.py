"""A search tree: what nodes know, which one is next, and how what was found comes back."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from lissom.rl.tree_search.config import SearchConfig

State = TypeVar("State")


@dataclass(frozen=True)
class Step(Generic[State]):
    """A step from a state, as a world has drawn it.

    Attributes:
        key: steps of a node with the same key are the same.
        state: where it leads.
        logp: log probability of all its tokens together, at a temperature of 1.
        tokens: of it, as they were drawn.
        reward: of the path that it ends; None where it goes on.
        note: words for those who look at the tree.
    """

    key: Hashable
    state: State
    logp: float = 0.0
    tokens: tuple[int, ...] = ()
    reward: float | None = None
    note: str = ""


@dataclass
class Node(Generic[State]):
    """A state in the tree.

    Attributes:
        state: it.
        parent: None: it is the root.
        step: that led here.
        children: in the order in which they were drawn.
        drawn: how often the step to it was.
        prior: probability among its siblings.
        visits, total: paths that came back through it, and the sum of what they found.
        best: the most that one of them found.
        flying: paths through it that have not come back.
        value: what it was thought to be worth; NaN: it was not looked at.
        samples: steps that were drawn here, equal ones too.
        expanded, closed: whether it was, and whether nothing is left to be found below it.
    """

    state: State
    parent: Node[State] | None = None
    step: Step[State] | None = None
    children: list[Node[State]] = field(default_factory=list)
    drawn: int = 1
    prior: float = 1.0
    visits: int = 0
    total: float = 0.0
    best: float = -math.inf
    flying: int = 0
    value: float = math.nan
    samples: int = 0
    expanded: bool = False
    closed: bool = False

    @property
    def reward(self) -> float | None:
        """Of the path that ends here; None: it does not."""
        return None if self.step is None else self.step.reward

    @property
    def depth(self) -> int:
        """Steps from the root."""
        return 0 if self.parent is None else 1 + self.parent.depth

    def path(self) -> list[Node[State]]:
        """From the root to this node."""
        found, node = [], self
        while True:
            found.append(node)
            if node.parent is None:
                return found[::-1]
            node = node.parent

    def below(self) -> Iterator[Node[State]]:
        """This node and all below it, parents first."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children)

    def worth(self, config: SearchConfig) -> float:
        """Q: of paths that came back; those that are under way count as if they had found the lowest reward."""
        known = self.total if config.backup == "mean" else self.best * self.visits if self.visits else 0.0
        return (known + config.low * self.flying) / (self.visits + self.flying)


class Tree(Generic[State]):
    """One search.

    Args:
        root: where it begins.
        config: of it.
        seed: of its ties, beside the config's.
        version: of the policy that draws its steps: trees of an old one are told apart by it.
    """

    def __init__(self, root: State, config: SearchConfig, seed: int = 0, version: int = 0) -> None:
        self.root: Node[State] = Node(root)
        self.config, self.version = config, version
        self.random = np.random.default_rng([config.seed, seed])
        self.least, self.most = math.inf, -math.inf  # of what came back
        self.generated = 0  # tokens, those of equal steps too
        self.finished = 0  # simulations
        self.collisions = 0  # with one that was under way

    def descend(self) -> Node[State]:
        """Choose a path to a node that is to be looked at: one that was not expanded, may have more steps, or ends. All
        along it one more path is under way.
        """
        node = self.root
        node.flying += 1
        while node.expanded and node.reward is None and not self.wants_more(node):
            open_ones = [child for child in node.children if not child.closed]
            if not open_ones:
                break
            node = self._best(node, open_ones)
            node.flying += 1
        return node

    def wants_more(self, node: Node[State]) -> bool:
        """Whether an expanded node may have more steps than were drawn for it."""
        config = self.config
        return config.widening is not None and node.samples < config.allowed(node.visits) and not node.closed

    def _best(self, node: Node[State], children: Sequence[Node[State]]) -> Node[State]:
        scores = np.array([self.score(node, child) for child in children])
        ties = np.flatnonzero(scores == scores.max())
        return children[int(ties[self.random.integers(len(ties))]) if len(ties) > 1 else int(ties[0])]

    def score(self, node: Node[State], child: Node[State]) -> float:
        """What a step is chosen by: its worth, and how much it should be tried."""
        config = self.config
        tried = child.visits + child.flying
        around = max(node.visits + node.flying - 1, 0)  # without the path that is choosing
        if tried:
            worth = self._scaled(child.worth(config))
        elif config.unvisited == "parent" and node.visits:
            worth = self._scaled(node.total / node.visits)
        else:
            worth = 0.0
        if config.rule == "uct":
            if not tried:
                return math.inf
            return worth + config.exploration * math.sqrt(math.log(max(around, 1)) / tried)
        # Before anything has come back sqrt(0) would leave no say to the priors.
        return worth + config.exploration * child.prior * math.sqrt(max(around, 1)) / (1 + tried)

    def _scaled(self, worth: float) -> float:
        if not self.config.normalise or not self.most > self.least:
            return worth
        return (worth - self.least) / (self.most - self.least)

    def grow(self, node: Node[State], steps: Sequence[Step[State]]) -> None:
        """Give a node the steps that were drawn for it; equal ones are one, where they are to be."""
        known = {child.step.key: child for child in node.children if child.step} if self.config.merge else {}
        for step in steps:
            node.samples += 1
            self.generated += len(step.tokens)
            if (twin := known.get(step.key)) is not None:
                twin.drawn += 1
                continue
            child = Node(step.state, node, step)
            node.children.append(child)
            if self.config.merge:
                known[step.key] = child
        node.expanded = True
        if node.children:
            for child, prior in zip(node.children, self._priors(node.children), strict=True):
                child.prior = float(prior)

    def _priors(self, children: Sequence[Node[State]]) -> np.ndarray:
        drawn = np.array([child.drawn for child in children], dtype=float)
        if self.config.prior == "uniform":
            return drawn / drawn.sum()
        steps = [child.step for child in children if child.step]
        logps = np.array([step.logp for step in steps])
        if self.config.prior == "length-normalised":
            logps = logps / np.maximum([len(step.tokens) for step in steps], 1)
        weights = np.exp(logps - logps.max())
        return weights / weights.sum()

    def come_back(self, node: Node[State], found: float) -> None:
        """What a path has found, once for each node on it."""
        self.finished += 1
        self.least, self.most = min(self.least, found), max(self.most, found)
        for own in node.path():
            own.flying -= 1
            own.visits += 1
            own.total += found
            own.best = max(own.best, found)
        if self.config.close:
            self._close(node)

    def give_up(self, node: Node[State]) -> None:
        """A path that comes to nothing: as if it had not begun."""
        for own in node.path():
            own.flying -= 1

    def _close(self, node: Node[State]) -> None:
        own: Node[State] | None = node
        while own is not None:
            ends = own.reward is not None
            if not ends and not (own.expanded and all(child.closed for child in own.children)):
                return
            if not ends and self.config.widening is not None and own.samples < self.config.allowed(own.visits):
                return
            own.closed = True
            own = own.parent

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.finished >= self.config.simulations or self.root.closed


def to_dict(tree: Tree[Any]) -> dict[str, Any]:
    """The whole tree, as JSON has it; states are left out."""

    def of(node: Node[Any]) -> dict[str, Any]:
        mean = node.total / node.visits if node.visits else None
        return {
            "step": "" if node.step is None else node.step.note or str(node.step.key),
            "logp": None if node.step is None else node.step.logp,
            "prior": node.prior,
            "visits": node.visits,
            "mean": mean,
            "best": node.best if node.visits else None,
            "value": None if math.isnan(node.value) else node.value,
            "reward": node.reward,
            "drawn": node.drawn,
            "closed": node.closed,
        }

    made: dict[int, dict[str, Any]] = {}
    for node in tree.root.below():
        made[id(node)] = of(node) | {"children": []}
        if node.parent is not None:
            made[id(node.parent)]["children"].append(made[id(node)])
    return {
        "version": tree.version,
        "simulations": tree.finished,
        "generated": tree.generated,
        "collisions": tree.collisions,
        "root": made[id(tree.root)],
    }
