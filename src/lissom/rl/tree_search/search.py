"""Trees that are searched side by side, in waves, so that every call of a world is for many states at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from lissom.errors import UserError
from lissom.rl.tree_search.config import Extraction, SearchConfig
from lissom.rl.tree_search.tree import Node, Step, Tree

State = TypeVar("State")
StateIn = TypeVar("StateIn")


class World(Protocol[StateIn]):
    """What is searched: steps from states, and what states are worth."""

    def expand(self, states: Sequence[StateIn], counts: Sequence[int], seed: int) -> Sequence[Sequence[Step[StateIn]]]:
        """Draw so many steps from each state; there may be fewer. The same seed draws the same."""
        ...

    def evaluate(self, states: Sequence[StateIn], seed: int) -> Sequence[float]:
        """What each state is worth: the reward that is expected of paths through it."""
        ...


class TreeSearch(Generic[State]):
    """Monte-Carlo tree search over steps, for training and for use alike. The same seed gives the same trees.

    Args:
        world: see there.
        config: of it.
        tree: kind of tree, for those who want to know what another one would find.
    """

    def __init__(
        self, world: World[State], config: SearchConfig | None = None, tree: type[Tree[Any]] | None = None
    ) -> None:
        self.world, self.config, self.tree = world, config or SearchConfig(), tree or Tree

    def __call__(
        self,
        roots: Sequence[State],
        version: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Tree[State]]:
        """A tree from each root.

        Args:
            version: of the policy; see `Tree`.
            progress: called with (simulations done, all).

        Raises:
            UserError: the world gives a value or a reward that is not in the range, or not one for each state.
        """
        if not roots:
            raise UserError("There is nothing to search: expected at least one root.")
        trees = [self.tree(root, self.config, number, version) for number, root in enumerate(roots)]
        total, wave = self.config.simulations * len(trees), 0
        while any(not tree.is_over for tree in trees):
            self._wave([tree for tree in trees if not tree.is_over], wave)
            wave += 1
            progress(sum(self.config.simulations if tree.is_over else tree.finished for tree in trees), total)
        return trees

    def _wave(self, trees: Sequence[Tree[State]], number: int) -> None:
        flying: list[tuple[Tree[State], Node[State]]] = []
        try:
            for tree in trees:
                flying += [(tree, leaf) for leaf in self._leaves(tree)]
            self._look(flying, number)
        except BaseException:
            for tree, leaf in flying:
                tree.give_up(leaf)
            raise
        while flying:  # nothing can fail any more
            tree, leaf = flying.pop(0)
            tree.come_back(leaf, leaf.value if leaf.reward is None else leaf.reward)

    def _leaves(self, tree: Tree[State]) -> list[Node[State]]:
        """Paths of a wave, to nodes that are all different; paths that end are come back from at once."""
        found: list[Node[State]] = []
        left = self.config.simulations - tree.finished
        while len(found) < min(self.config.wave, left) and not tree.root.closed:
            leaf = tree.descend()
            if leaf.reward is not None:
                tree.come_back(leaf, leaf.reward)
                left -= 1
            elif any(leaf is other for other in found):
                tree.give_up(leaf)
                tree.collisions += 1
                break
            else:
                found.append(leaf)
        return found

    def _look(self, flying: Sequence[tuple[Tree[State], Node[State]]], number: int) -> None:
        """Expand and evaluate what was chosen, all together."""
        if not flying:
            return
        config = self.config
        seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
        nodes = [node for _, node in flying]
        growing = [(tree, node) for tree, node in flying if node.depth < config.depth]
        counts = [max(1, config.allowed(node.visits) - node.samples) for _, node in growing]
        drawn = self.world.expand([node.state for _, node in growing], counts, seed) if growing else []
        fresh = [node for node in nodes if node.value != node.value]
        values = [float(value) for value in self.world.evaluate([node.state for node in fresh], seed)] if fresh else []
        if len(drawn) != len(growing) or len(values) != len(fresh):
            raise UserError("The world did not answer for every state.")
        rewards = [step.reward for steps in drawn for step in steps if step.reward is not None]
        for number_ in (*values, *rewards):
            if not config.low - 1e-6 <= number_ <= config.high + 1e-6:
                raise UserError(f"The world gives {number_}, which is not from {config.low:g} to {config.high:g}.")
        for (tree, node), steps in zip(growing, drawn, strict=True):
            tree.grow(node, steps)
        for node, value in zip(fresh, values, strict=True):
            node.value = value
        for _, node in flying:
            node.expanded = True


def extract(tree: Tree[State], how: Extraction = "visits") -> list[Node[State]]:
    """The path that a search has found, from the root, which is the first of it.

    Args:
        how: `visits` (published): the step that was tried most, again and again, until nothing was tried: it may stop
            before the end. `value`: the same by worth. `best`: the ended path with the highest reward, the most visited
            of those; where none has ended, as `visits`.
    """
    if how == "best":
        ended = terminals(tree)
        if ended:
            return ended[0].path()
    path = [tree.root]
    while True:
        tried = [child for child in path[-1].children if child.visits]
        if not tried:
            return path
        if how == "value":
            path.append(max(tried, key=lambda child: (child.worth(tree.config), child.visits)))
        else:
            path.append(max(tried, key=lambda child: (child.visits, child.worth(tree.config))))


def terminals(tree: Tree[State], most: int | None = None) -> list[Node[State]]:
    """Ends of paths by reward, those that were visited or merely seen, the best first; the visited first among equals.

    Args:
        most: of them.
    """
    ended = [node for node in tree.root.below() if node.reward is not None]
    ended.sort(key=lambda node: (-(node.reward or 0.0), -node.visits))
    return ended[:most]
