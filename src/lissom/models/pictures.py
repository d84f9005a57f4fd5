"""Pictures of emoji as files of one form, whichever set they come from: what assets of the kind `pictures` hold."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

from lissom.errors import UserError

PICTURE_SIZE = 64
NAMES = "names.json"
_VARIATION = "fe0f"  # asks for colour; sets do not agree on where it stands
_TONES = re.compile(r"1f3f[b-f]")


def emoji(package: Path, files: list[Path], target: Path) -> None:
    """Every emoji without skin tones as a PNG, `PICTURE_SIZE` square with transparency, named by its code points.

    Where the package has `emoji.json`, what it says of each goes to `names.json`: name, category, subcategory.
    """
    from PIL import Image

    for file in files:
        if file.name == "emoji.json":
            entries = json.loads(file.read_text())
            names = {
                code(entry["unified"]): {key: entry[key] for key in ("name", "category", "subcategory")}
                for entry in entries
            }
            (target / NAMES).write_text(json.dumps(names, indent=1))
        elif not _TONES.search(name := code(file.stem)):
            data = _drawn(file) if file.suffix == ".svg" else file.read_bytes()
            picture = Image.open(io.BytesIO(data)).convert("RGBA")
            if picture.size != (PICTURE_SIZE, PICTURE_SIZE):
                picture = picture.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
            picture.save(target / f"{name}.png")


def code(name: str) -> str:
    """The code points of an emoji in lower case with `-` between, as all sets call it: `1f468-200d-2695`."""
    return "-".join(part for part in name.lower().split("-") if part != _VARIATION)


def _drawn(file: Path) -> bytes:
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise UserError("Drawings are turned into pictures by resvg-py: pip install 'lissom[diffusion]'.") from error
    return bytes(svg_to_bytes(svg_path=str(file), width=PICTURE_SIZE, height=PICTURE_SIZE))
