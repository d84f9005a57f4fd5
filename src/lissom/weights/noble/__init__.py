"""NOBLE (arXiv 2603.06492): nonlinear low-rank branches beside linear layers, trained with the model from its start.

A layer becomes `y = x W + b + act(x W_down) W_up`. In the paper's best activation, CosNet, each channel goes through a
cosine with a frequency and a phase of its own, all are mixed by a small matrix, and go through a second cosine. Main
weights begin half as large as usual, W_up next to zero, and tensors of the branch have learning rates of their own. The
branch stays when the model runs: it costs parameters and time for ever, in exchange for fewer steps of training.

`NobleConfig(rank=64).convert(model)` puts branches into a model; `lissom train --method noble` trains it.
"""

from lissom.weights.noble.apply import prune
from lissom.weights.noble.config import NobleConfig
from lissom.weights.noble.diagnostics import BranchReport, report, useless
from lissom.weights.noble.training import noble_parameter_groups

__all__ = ["BranchReport", "NobleConfig", "noble_parameter_groups", "prune", "report", "useless"]
