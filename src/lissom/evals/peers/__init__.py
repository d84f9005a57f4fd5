"""What a user would run instead of lissom, measured beside it.

Each runtime runs in a process of its own, so that thread pools, memory and imports do not mix, and by a Python of its
own where `LISSOM_<RUNTIME>_PYTHON` names one. This process asks them in turns.

Not compared: torchao, whose int8 and int4 products are slower than fp32 on a CPU and would only lengthen the table.
"""

from lissom.evals.peers.arms import ARMS, OURS, Arm, choose
from lissom.evals.peers.compare import Comparison, Figure, Size, compare

__all__ = ["ARMS", "OURS", "Arm", "Comparison", "Figure", "Size", "choose", "compare"]
