from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

import lissom


@pytest.fixture(scope="session")
def smollm2():
    """The embedded model and its tokenizer: fetched and converted at the first use on a machine."""
    return lissom.load()


@pytest.fixture(scope="session")
def lissom_cli():
    """The command as a user calls it: arguments in, finished process out."""

    def call(*arguments: object, file_limit: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lissom", *map(str, arguments)]

        def limit() -> None:
            if file_limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        env = {**os.environ, **environment}
        return subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=limit)

    return call
