from __future__ import annotations

import math

import numpy as np
import torch

from lissom.rl.band.diagnostics import BUCKETS, EDGES, ClipCounts, count


def test_against_a_loop():
    random = torch.Generator().manual_seed(0)
    shape = (7, 40)
    logp = -12 * torch.rand(shape, generator=random)
    logp[0, :6] = torch.tensor([0.0, 1e-3, 1e-2, 0.1, 0.5, 0.9]).clamp(min=1e-30).log()  # edges
    ratio = 4 * torch.rand(shape, generator=random)
    advantages = torch.randn((7, 1), generator=random)
    advantages[3] = 0
    mask = (torch.rand(shape, generator=random) < 0.7).long()
    bounds = torch.rand(shape, generator=random), 1 + torch.rand(shape, generator=random)
    other = torch.full(shape, 0.8), torch.full(shape, 1.28)
    found = count(logp, ratio, advantages, mask, bounds, other)
    expected = np.zeros((4, 2, len(BUCKETS)), int)
    for row in range(7):
        for column in range(40):
            p, r, a = math.exp(logp[row, column].double()), float(ratio[row, column]), float(advantages[row])
            if not mask[row, column] or a == 0:
                continue
            bucket = sum(p >= edge for edge in EDGES[1:-1])

            def clips(limits, r=r, a=a, place=(row, column)):
                return r > float(limits[1][place]) if a > 0 else r < float(limits[0][place])

            ours, theirs = clips(bounds), clips(other)
            for number, hit in enumerate((True, ours, theirs and not ours, ours and not theirs)):
                expected[number, int(a < 0), bucket] += hit
    assert np.array_equal(found.stacked().numpy(), expected)


def test_shares():
    counts = torch.zeros(4, 2, len(BUCKETS), dtype=torch.long)
    counts[0, 0, :2] = torch.tensor([8, 2])
    counts[1, 0, 0], counts[2, 0, 1] = 4, 1
    shares = ClipCounts(*counts).shares()
    assert shares["clipped/up/0-0.001"] == 0.5
    assert shares["freed/up/0.001-0.01"] == 0.5
    assert shares["clipped/up"] == 0.4
    assert math.isnan(shares["clipped/down"])
