"""Tree search over reasoning steps, to find what a policy alone would not, and to learn from it.

`TreeSearch` works on anything with two methods: `expand` draws steps from states, `evaluate` says what states are
worth. Many trees are searched side by side in waves, so that each call is for many states; the same seed gives the
same trees.
"""

from lissom.rl.tree_search.config import SearchConfig
from lissom.rl.tree_search.draws import Drawn, Draws, TransformersDraws, VLLMDraws
from lissom.rl.tree_search.policy import PolicyWorld, Written
from lissom.rl.tree_search.search import TreeSearch, World, extract, terminals
from lissom.rl.tree_search.symbolic import SymbolicCountdown, root_of
from lissom.rl.tree_search.tree import Node, Step, Tree, to_dict
from lissom.rl.tree_search.value import ValueHead, values_of

__all__ = [
    "Drawn",
    "Draws",
    "Node",
    "PolicyWorld",
    "SearchConfig",
    "Step",
    "SymbolicCountdown",
    "TransformersDraws",
    "Tree",
    "TreeSearch",
    "VLLMDraws",
    "ValueHead",
    "World",
    "Written",
    "extract",
    "root_of",
    "terminals",
    "to_dict",
    "values_of",
]
