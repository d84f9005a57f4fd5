"""Tree search over reasoning steps, to find what a policy alone would not, and to learn from it.

`TreeSearch` works on anything with two methods: `expand` draws steps from states, `evaluate` says what states are
worth. Many trees are searched side by side in waves, so that each call is for many states; the same seed gives the
same trees.
"""

from lissom.rl.tree_search.config import SearchConfig
from lissom.rl.tree_search.search import TreeSearch, World, extract, terminals
from lissom.rl.tree_search.symbolic import SymbolicCountdown, root_of
from lissom.rl.tree_search.tree import Node, Step, Tree, to_dict

__all__ = [
    "Node",
    "SearchConfig",
    "Step",
    "SymbolicCountdown",
    "Tree",
    "TreeSearch",
    "World",
    "extract",
    "root_of",
    "terminals",
    "to_dict",
]
