from __future__ import annotations

import pytest

from lissom.decode.passes import NativePasses


@pytest.fixture
def calls(monkeypatch):
    """How many tokens each native pass read, in the test."""
    seen: list[int] = []
    read = NativePasses.read

    def counted(self, cache, ids, *args, **kwargs):
        logits = read(self, cache, ids, *args, **kwargs)
        seen.append(ids.shape[1])
        return logits

    monkeypatch.setattr(NativePasses, "read", counted)
    return seen
