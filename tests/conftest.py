from __future__ import annotations

import pytest

import lissom


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model and its tokenizer: fetched and converted at the first use on a machine."""
    return lissom.load()
