"""What a user would run instead of lissom, measured beside it.

Each runtime runs in a process of its own, so that thread pools, memory and imports do not mix, and by a Python of its
own where `LISSOM_<RUNTIME>_PYTHON` names one. This process asks them in turns:

    comparison = compare("smollm2-135m", contexts=(512,), threads=(1, 2), arms=choose(["lissom", "llama.cpp"]))
    for value in summarise(comparison):
        print(value.threads, value.context, value.label, value.metric.name, value.interval)

Not compared: torchao, whose int8 and int4 products are slower than fp32 on a CPU.
"""

from lissom.evals.peers.arms import ARMS, OURS, RECOMMENDED, Arm, choose, recommended
from lissom.evals.peers.compare import Comparison, Figure, Size, compare
from lissom.evals.peers.kept import identity, stands
from lissom.evals.peers.summary import METRICS, Metric, Value, summarise

__all__ = [
    "ARMS", "METRICS", "OURS", "RECOMMENDED", "Arm", "Comparison", "Figure", "Metric", "Size", "Value", "choose",
    "compare", "identity", "recommended", "stands", "summarise",
]  # fmt: skip
