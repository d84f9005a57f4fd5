from __future__ import annotations

import sys

import pytest

from lissom import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process, which spares seconds of imports: exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lissom", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code or 0, *capsys.readouterr())

    return call
