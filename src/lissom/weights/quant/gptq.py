"""GPTQ (arXiv 2210.17323): columns are rounded one by one, and those that are left make up for the error."""

from __future__ import annotations

import torch

from lissom.errors import UserError
from lissom.kernels.rounding import Coded, Grid, nearest
from lissom.weights.quant.search import search


def damped(hessian: torch.Tensor, damping: float, shrinkage: float = 0.0) -> torch.Tensor:
    """`hessian` in float64 with `damping` times its mean diagonal added to the diagonal (section 3.3, step 3), after
    what lies beside the diagonal was made smaller by the share `shrinkage`."""
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    hessian = torch.lerp(hessian, diagonal.diag(), shrinkage)
    mean = float(diagonal.mean()) or 1.0  # inputs that are always zero leave nothing to choose by
    return hessian + damping * mean * torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    group: int,
    damping: float = 0.01,
    act_order: bool = True,
    shrinkage: float = 0.0,
    block: int = 128,
) -> Coded:
    """Codes with little error of the layer's output on the calibration inputs x, i.e. of tr(E H Eᵀ), E the weights'.

    The scales of all groups are found first, by `search` on the diagonal; so groups stay contiguous whatever the order
    of the columns.

    Args:
        weight: `[rows, columns]`.
        hessian: `[columns, columns]`, mean of x xᵀ.
        damping: share of the mean diagonal that is added to the diagonal (paper: 0.01).
        act_order: columns with large inputs first.
        shrinkage: share that is taken off all of the Hessian but its diagonal (paper: 0). At 1 nothing makes up for
            anything, and the codes are the nearest.
        block: columns after which the update of the others is done in one product (paper: 128).

    Raises:
        UserError: the Hessian is not finite.
    """
    columns = weight.shape[1]
    if not bool(torch.isfinite(hessian).all()):
        raise UserError("The calibration text gives inputs that are NaN or infinite: the model is damaged.")
    hessian = damped(hessian, damping, shrinkage)
    importance = hessian.diagonal()
    found = search(weight, importance, grid, group)
    order = importance.argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True).float()

    groups = order // group
    # Columns lie in rows here, so that what the loop touches is contiguous.
    left = weight.float()[:, order].T.contiguous()
    scales = found.scales.float()[:, groups].T.contiguous()
    lows = torch.zeros_like(scales) if found.mins is None else found.mins.float()[:, groups].T.contiguous()
    codes = torch.empty_like(left)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty_like(left[start:end])
        for column in range(start, end):
            codes[column] = nearest(left[column], scales[column], lows[column], grid)
            value = (codes[column] - grid.zero) * scales[column] + lows[column]
            errors[column - start] = (left[column] - value) / factor[column, column]
            left[column + 1 : end].addr_(factor[column, column + 1 : end], errors[column - start], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    placed = torch.empty_like(found.codes)
    placed[:, order] = codes.T.to(torch.uint8)
    return Coded(grid, group, placed, found.scales, found.mins)
