"""Registers lissom's quantiser with transformers as soon as that is imported, so that `import lissom` stays light.

transformers has no entry points for quantisers: whoever has one must register it before a model is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"


class _AfterRegistry(MetaPathFinder):
    """Finds the registry's module as Python does, and has the quantiser registered when it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    import lissom.plugin  # noqa: F401  which registers itself


def install() -> None:
    """Register now where transformers' registry is loaded, otherwise as soon as it is."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterRegistry())
