"""What a user would run instead of lissom, measured beside it.

Each runtime runs in a process of its own, so that thread pools, memory and imports do not mix, and by a Python of its own
where `LISSOM_<RUNTIME>_PYTHON` names one. This process asks them in turns.
"""

from lissom.evals.peers.arms import ARMS, OURS, Arm, choose
from lissom.evals.peers.compare import Comparison, Figure, Size, compare

__all__ = ["ARMS", "OURS", "Arm", "Comparison", "Figure", "Size", "choose", "compare"]
