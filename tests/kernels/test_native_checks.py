"""csrc/tests: every kernel against plain loops, on this CPU, on emulated Arm CPUs, and under the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lissom.kernels import native

ROOT = Path(__file__).parents[2]
ARM = "aarch64-linux-gnu"
KERNELS = {
    "multiply",
    "unpack",
    "targets",
    "attention",
    "sparse",
    "statistics",
    "cosnet",
    "decode",
    "interpolate",
    "threads",
}


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def built(folder: Path, **settings: str) -> Path:
    """The program of csrc/tests, built by CMake with these settings."""
    options = [f"-D{name}={value}" for name, value in settings.items()]
    run("cmake", "-S", str(ROOT), "-B", str(folder), "-DLISSOM_CHECKS=ON", *options)
    run("cmake", "--build", str(folder), "--target", "check_kernels", "--parallel", "2")
    return folder / "check_kernels"


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def checked(*command: str) -> set[str]:
    """The instruction sets whose kernels the program has found right."""
    lines = [line.split() for line in run(*command).splitlines()]
    isas = {line[0] for line in lines}
    assert {(isa, kernel, "ok") for isa in isas for kernel in KERNELS} == {tuple(line) for line in lines}
    return isas


@needs("c++")
@pytest.mark.skipif(native.library() is None, reason="no native kernels")
def test_kernels_of_this_cpu(tmp_path):
    """Those of the library that is installed, which spares building them again."""
    library, program = Path(native.__file__).with_name("_native.so"), tmp_path / "check_kernels"
    source = str(ROOT / "csrc" / "tests" / "check_kernels.cpp")
    run(
        "c++",
        "-std=gnu++17",
        "-O2",
        "-pthread",
        source,
        str(library),
        f"-Wl,-rpath,{library.parent}",
        "-o",
        str(program),
    )
    assert "portable" in checked(str(program))


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Path:
    target = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_CXX_COMPILER": f"{ARM}-g++"}
    return built(tmp_path_factory.mktemp("arm"), **target, CMAKE_CXX_FLAGS="-Werror")


@needs("cmake", f"{ARM}-g++", "qemu-aarch64")
@pytest.mark.parametrize("cpu,isas", [("max", {"portable", "neon"}), ("cortex-a53", {"portable"})])
def test_kernels_of_arm(arm, cpu, isas):
    """The second CPU has no dot products of bytes, which the neon kernels need: it must not be given them."""
    assert checked("qemu-aarch64", "-L", f"/usr/{ARM}", "-cpu", cpu, str(arm)) == isas


@needs("cmake", "c++")
@pytest.mark.parametrize("sanitizers", [pytest.param("address,undefined", marks=pytest.mark.slow), "thread"])
def test_kernels_under_sanitizers(tmp_path, sanitizers):
    checked(str(built(tmp_path, CMAKE_CXX_FLAGS=f"-fsanitize={sanitizers} -fno-sanitize-recover=all -g1")))


@pytest.mark.slow
@needs("cmake", "clang++")
def test_kernels_by_another_compiler(tmp_path):
    checked(str(built(tmp_path, CMAKE_CXX_COMPILER="clang++", CMAKE_CXX_FLAGS="-Werror")))
