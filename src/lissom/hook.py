"""Registers what lissom adds to transformers and diffusers as soon as they are imported, so that `import lissom` stays
light.

They have no entry points for quantisers and attention functions: whoever has one must register it before a
model is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Where they keep their registries, and the modules that register themselves there when they are imported.
_AFTER = {
    "transformers.quantizers.auto": ("lissom.plugin", "lissom.training_plugin"),
    "transformers.modeling_utils": ("lissom.attention.plugin",),
    "diffusers.quantizers.auto": ("lissom.diffusers_plugin",),
    "diffusers.pipelines.pipeline_utils": ("lissom.diffusion.plugin",),
}


class _AfterRegistry(MetaPathFinder):
    """Finds the registries' modules as Python does, and has ours imported when they have been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _AFTER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _import(name)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now where the registries are loaded, otherwise as soon as they are."""
    sys.meta_path.insert(0, _AfterRegistry())
    for registry in _AFTER:
        if registry in sys.modules:
            _import(registry)


def _import(registry: str) -> None:
    for name in _AFTER[registry]:
        import_module(name)
