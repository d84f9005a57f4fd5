"""The mathematics of compaction by attention matching: pure functions, tensors in, tensors out.

Notation of the paper (arXiv 2602.16284, section 3): for one KV head with keys K and values V, reference queries Q and
logits S = QKᵀ·scaling (+ old biases), Φ = e^(S − row maximum), the mass is m = Φ1 and the output is softmax(S)V. A
compaction keeps t keys, gives each a weight w = e^β so that the mass is matched, and fits new values so that the
output is matched. Everything here is batched over heads; Gram matrices are solved in float64 where no ridge bounds
their condition.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F

from lissom.kernels.matmul import matmul


def row_maximum(logits: torch.Tensor) -> torch.Tensor:
    """`[heads, queries, 1]`, 0 where a row has no key."""
    top = logits.amax(-1, keepdim=True)
    return torch.where(top.isfinite(), top, 0.0)


def mass_features(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Φ `[heads, queries, keys]` and the target mass m `[heads, queries]`, each row divided by e^(its maximum).

    The division leaves β unbiased (both sides scale) and weighs every query by its relative mass. A logit of -inf
    (an absent or future key) gives 0; a row without any key gives zeros.
    """
    features = torch.exp(logits - row_maximum(logits))
    return features, features.sum(-1)


def attention(logits: torch.Tensor) -> torch.Tensor:
    """Row softmax of `logits` `[..., keys]`; a row without any key gives zeros instead of NaN."""
    features, mass = mass_features(logits)
    return features / mass.clamp(min=torch.finfo(features.dtype).tiny)[..., None]


def pooled(scores: torch.Tensor, width: int) -> torch.Tensor:
    """Max-pool of odd `width` over neighbouring keys; 0 or 1 = none."""
    if width <= 1:
        return scores
    return F.max_pool1d(scores[:, None], width, stride=1, padding=width // 2)[:, 0]


def solve_spd(gram: torch.Tensor, right: torch.Tensor, ridge: float = 0.0) -> torch.Tensor:
    """Least squares from normal equations, `(gram + ridge·mean(diag)·I) x = right`, batched, stable.

    `gram` `[..., t, t]` and `right` `[..., t, k]`, in the precision of `gram_dtype`. A Cholesky solve; where the matrix
    is singular (duplicate keys, fewer queries than keys) the minimum-norm solution by eigenvalues, small ones cut off.
    """
    size, tiny = gram.shape[-1], torch.finfo(gram.dtype).tiny
    smallest_pivot = 1e-11 if gram.dtype == torch.float64 else 1e-6
    level = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=tiny)
    damped = gram + ridge * level * torch.eye(size, dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    smallest = factor.diagonal(dim1=-2, dim2=-1).amin(-1, keepdim=True)[..., None]
    singular = (failed[..., None, None] > 0) | ~(smallest.square() > smallest_pivot * level)
    if not singular.any():
        return torch.cholesky_solve(right, factor)
    eigenvalues, vectors = torch.linalg.eigh(damped)
    cut = smallest_pivot * eigenvalues[..., -1:].clamp(min=tiny)
    inverse = torch.where(eigenvalues > cut, 1.0 / eigenvalues.clamp(min=tiny), 0.0)
    return vectors @ (inverse[..., None] * (vectors.mT @ right))


def gram_dtype(ridge: float, given: torch.dtype) -> torch.dtype:
    """A ridge bounds the condition of a Gram matrix by t/ridge, so that the `given` precision will do, fp32 at least;
    without one it is float64."""
    return torch.promote_types(given, torch.float32 if ridge >= 1e-4 else torch.float64)


def fit_mass(
    features: torch.Tensor,
    mass: torch.Tensor,
    lower: float,
    upper: float,
    steps: int = 2,
    exact: bool = False,
    ridge: float = 0.0,
) -> torch.Tensor:
    """Weights w `[heads, t]` in `[lower, upper]` with `features @ w ≈ mass` (section 3.2).

    The published solver: unconstrained least squares, clamped, then `steps` projected gradient steps of size
    1/‖M‖² (three power iterations). With `exact` the bounded problem is solved to optimality instead (SciPy).

    Args:
        features: Φ of the kept keys, `[heads, queries, t]`.
        mass: `[heads, queries]`.
        ridge: pulls w towards 1, an entry that stands for itself, by ridge·‖M‖²_F/t; 0 is the published fit.
    """
    dtype = torch.float64 if exact else gram_dtype(ridge, features.dtype)
    matrix, target = features.to(dtype), mass.to(dtype)
    if ridge:
        # Extra rows: the same problem for every solver below.
        level = (ridge * matrix.square().sum((1, 2)) / matrix.shape[2]).sqrt()[:, None, None]
        anchor = level * torch.eye(matrix.shape[2], dtype=matrix.dtype, device=matrix.device)
        matrix, target = torch.cat([matrix, anchor], 1), torch.cat([target, level[:, 0].expand(-1, matrix.shape[2])], 1)
    if exact:
        return _fit_mass_exactly(matrix, target, lower, upper)
    gram = matmul(matrix.mT, matrix)
    right = matmul(matrix.mT, target[..., None])
    weights = solve_spd(gram, right).clamp(lower, upper)
    if steps:
        vector = torch.ones_like(right)
        for _ in range(3):
            vector = gram @ vector
            vector = vector / vector.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        step = 1.0 / (vector.mT @ gram @ vector).clamp(min=torch.finfo(dtype).tiny)
        for _ in range(steps):
            weights = (weights - step * (gram @ weights - right)).clamp(lower, upper)
    return weights[..., 0]


def _fit_mass_exactly(matrix: torch.Tensor, target: torch.Tensor, lower: float, upper: float) -> torch.Tensor:
    solutions = []
    for rows, aim in zip(matrix.cpu().numpy(), target.cpu().numpy(), strict=True):
        if math.isinf(upper) and lower == 0.0:
            solution, _ = scipy.optimize.nnls(rows, aim, maxiter=30 * rows.shape[1])
        else:
            solution = scipy.optimize.lsq_linear(rows, aim, bounds=(lower, upper), method="bvls").x
        solutions.append(np.clip(solution, lower, upper))
    return torch.as_tensor(np.stack(solutions), dtype=matrix.dtype, device=matrix.device)


def fit_values(
    weights: torch.Tensor,
    outputs: torch.Tensor,
    ridge: float = 0.0,
    prior: torch.Tensor | None = None,
) -> torch.Tensor:
    """Values C `[heads, t, head_dim]` with `weights @ C ≈ outputs` (section 3.2, last step).

    Args:
        weights: X = softmax(QC_kᵀ·scaling + β), `[heads, queries, t]`.
        outputs: Y = softmax(S)V, `[heads, queries, head_dim]`.
        ridge: λ = ridge·‖X‖²_F/t; 0 is the published fit.
        prior: `[heads, t, head_dim]`, what the ridge draws towards; None = zero.
    """
    target = outputs if prior is None else outputs - matmul(weights, prior.to(weights.dtype))
    dtype = gram_dtype(ridge, weights.dtype)
    matrix, target = weights.to(dtype), target.to(dtype)
    change = solve_spd(matmul(matrix.mT, matrix), matmul(matrix.mT, target), ridge)
    return change if prior is None else prior.to(dtype) + change


def orthogonal_matching_pursuit(
    features: torch.Tensor,
    mass: torch.Tensor,
    count: int,
    upper: float,
    lower: float = 1e-12,
    keys_per_step: int | None = 1,
    refit_every: int = 1,
    forced: torch.Tensor | None = None,
) -> torch.Tensor:
    """Greedy choice of keys whose mass adds up to the target (Algorithms 1 and 2), in Gram form.

    Args:
        features: Φ `[heads, queries, keys]`.
        mass: `[heads, queries]`.
        count: keys to choose per head.
        upper, lower: bounds of the weights when they are refitted.
        keys_per_step, refit_every: k and τ; `keys_per_step=None` is the progressive schedule: (1, 1) below 300
            chosen keys, (2, 2) below 1500, then (4, 2).
        forced: bool `[heads, keys]`, keys that are chosen first.

    Returns:
        Indices `[heads, count]` in the order of choice.
    """
    gram, aim = _normal_equations(features, mass)
    forced = torch.zeros_like(aim, dtype=torch.bool) if forced is None else forced
    return _pursue(gram, aim, features.amax(1) > 0, count, upper, lower, keys_per_step, refit_every, forced)[0]


def _normal_equations(features: torch.Tensor, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ΦᵀΦ `[heads, keys, keys]` and Φᵀm `[heads, keys]` in float64."""
    matrix = features.double()
    return matmul(matrix.mT, matrix), matmul(matrix.mT, mass.double()[..., None])[..., 0]


def _pursue(
    gram: torch.Tensor,
    aim: torch.Tensor,
    allowed: torch.Tensor,
    count: int,
    upper: float,
    lower: float,
    keys_per_step: int | None,
    refit_every: int,
    forced: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pursuit on normal equations, among the `allowed` keys `[heads, keys]`.

    Returns:
        Indices in the order of choice and their refitted weights, both `[heads, count]`.
    """
    keys, first = aim.shape[1], int(forced.sum(-1).min())
    chosen = forced.to(torch.int8).topk(first, dim=-1).indices
    free = allowed.scatter(1, chosen, False)
    weights = gram.new_full(chosen.shape, lower)
    rounds, refit_due = 0, first > 0
    while True:
        size = chosen.shape[1]
        step, period = (keys_per_step, refit_every) if keys_per_step else _progressive(size)
        if refit_due or rounds % period == 0 or size >= count:
            weights = _refit(gram, aim, chosen, lower, upper)
            refit_due = False
        if size >= count:
            return chosen, weights
        columns = gram.gather(2, chosen[:, None].expand(-1, keys, -1))
        correlation = aim - (columns @ weights[..., None])[..., 0]
        take = min(step, count - size)
        best = correlation.masked_fill(~free, -torch.inf).topk(take, dim=-1).indices
        free.scatter_(1, best, False)
        chosen = torch.cat([chosen, best], dim=1)
        weights = F.pad(weights, (0, take), value=lower)
        rounds += 1


def refined_pursuit(
    features: torch.Tensor,
    mass: torch.Tensor,
    count: int,
    upper: float,
    lower: float,
    keys_per_step: int | None,
    refit_every: int,
    forced: torch.Tensor,
    rounds: int,
    floor: float = math.exp(-7.0),
) -> list[torch.Tensor]:
    """`orthogonal_matching_pursuit`, then `rounds` times: keys of a weight below `floor` are banned and others chosen.

    Arguments as there. Forced keys are never banned.

    Returns:
        Per head the indices in the order of choice, at most `count`: what has no weight in the end is dropped.
    """
    gram, aim = _normal_equations(features, mass)
    allowed = features.amax(1) > 0
    for left in range(rounds, -1, -1):
        size = min(count, int((allowed | forced).sum(-1).min()))
        order, weights = _pursue(gram, aim, allowed, size, upper, lower, keys_per_step, refit_every, forced)
        weightless = (weights < floor) & ~forced.gather(1, order)
        if not left or not weightless.any():
            break
        allowed = allowed & ~torch.zeros_like(allowed).scatter(1, order, weightless)
    if rounds == 0:
        return list(order)
    return [indices[~without] for indices, without in zip(order, weightless, strict=True)]


def _progressive(size: int) -> tuple[int, int]:
    if size < 300:
        return 1, 1
    return (2, 2) if size < 1500 else (4, 2)


def _refit(gram: torch.Tensor, aim: torch.Tensor, chosen: torch.Tensor, lower: float, upper: float) -> torch.Tensor:
    size = chosen.shape[1]
    if size == 0:
        return gram.new_empty(gram.shape[0], 0)
    rows = gram.gather(1, chosen[..., None].expand(-1, -1, gram.shape[-1]))
    part = rows.gather(2, chosen[:, None].expand(-1, size, -1))
    return solve_spd(part, aim.gather(1, chosen)[..., None])[..., 0].clamp(lower, upper)
