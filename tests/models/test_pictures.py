from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from PIL import Image

from lissom.errors import UserError
from lissom.models.pictures import NAMES, PICTURE_SIZE, code, emoji

CIRCLE = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><circle cx="36" cy="36" r="18" fill="red"/></svg>'


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package"
    folder.mkdir()
    Image.new("RGBA", (64, 64), (0, 0, 255, 255)).save(folder / "1f600.png")
    Image.new("RGB", (256, 128), (0, 255, 0)).save(folder / "263a-fe0f.webp", lossless=True)
    Image.new("RGBA", (64, 64)).save(folder / "1f44b-1f3fd.png")
    (folder / "1F601.svg").write_text(CIRCLE)
    entry = {"unified": "263A-FE0F", "name": "SMILING", "category": "Smileys", "subcategory": "face", "sort_order": 1}
    (folder / "emoji.json").write_text(json.dumps([entry]))
    return folder


def made(package, tmp_path):
    (tmp_path / "made").mkdir()
    emoji(package, sorted(package.iterdir()), tmp_path / "made")
    return tmp_path / "made"


def test_every_form_becomes_a_square_picture_named_by_its_code_points(package, tmp_path):
    folder = made(package, tmp_path)
    assert {file.name for file in folder.iterdir()} == {"1f600.png", "263a.png", "1f601.png", NAMES}
    pictures = {file.stem: np.asarray(Image.open(file)) for file in folder.glob("*.png")}
    assert all(picture.shape == (PICTURE_SIZE, PICTURE_SIZE, 4) for picture in pictures.values())
    assert (pictures["1f600"] == (0, 0, 255, 255)).all() and (pictures["263a"] == (0, 255, 0, 255)).all()
    assert tuple(pictures["1f601"][32, 32]) == (255, 0, 0, 255) and pictures["1f601"][2, 2, 3] == 0
    names = json.loads((folder / NAMES).read_text())
    assert names == {"263a": {"name": "SMILING", "category": "Smileys", "subcategory": "face"}}


def test_drawings_need_a_package_that_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"lissom\[diffusion\]"):
        made(package, tmp_path)


@pytest.mark.parametrize("name", ["1F468-200D-2695-FE0F", "1f468-200d-2695"])
def test_code_points_are_called_alike(name):
    assert code(name) == "1f468-200d-2695"
