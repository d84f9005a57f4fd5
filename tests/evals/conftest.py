from __future__ import annotations

import pytest
from tiny import STUDY_TEXT

from lissom.models import assets


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """What studies train on, instead of what would be fetched."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(STUDY_TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "path", lambda name: folder)
        patch.setattr(assets, "corpus", lambda name: [("a", STUDY_TEXT)])
        yield


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    return tmp_path_factory.mktemp("check") / "journal.jsonl"
