"""The methods that recipes and `lissom train` name: installed entry points of the group `lissom.methods`, and of
`lissom.pipeline_methods` for what acts on a pipeline of diffusers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import entry_points
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from lissom.errors import UserError

_DIFFUSION = ("diffusers", "peft", "PIL", "resvg_py", "torchmetrics")
GROUP, PIPELINES = "lissom.methods", "lissom.pipeline_methods"


def method_names() -> list[str]:
    """Every key that a recipe can use: not those of methods that a model is trained for (`Trainable`)."""
    return sorted(entry.name for entry in entry_points(group=GROUP) if not hasattr(entry.load(), "training"))


def method_class(key: str) -> Any:
    """The settings class registered as `key` (see `lissom.models.method.Method`).

    Raises:
        UserError: there is none.
    """
    return registered((GROUP, PIPELINES), key, "method")


def pipeline_methods() -> list[Any]:
    """The settings classes of all methods for pipelines (see `lissom.models.method.PipelineMethod`).

    Raises:
        UserError: a package that one needs is missing.
    """
    return [registered(PIPELINES, key, "method") for key in sorted(entry_points(group=PIPELINES).names)]


def acts_on_pipelines(key: str) -> bool:
    """Whether a method is for pipelines of diffusers, not for language models."""
    return key in entry_points(group=PIPELINES).names


def registered(groups: str | tuple[str, ...], key: str, what: str) -> Any:
    """What is installed as the entry point `key` of one of `groups`; `what` names it in the error.

    Raises:
        UserError: there is none, or a package that it needs is missing.
    """
    groups = (groups,) if isinstance(groups, str) else groups
    entries = {entry.name: entry for group in groups for entry in entry_points(group=group)}
    if key not in entries:
        raise UserError(f"There is no {what} {key!r}.{_nearest(key, sorted(entries))}")
    try:
        return entries[key].load()
    except ModuleNotFoundError as error:
        raise UserError(missing(error)) from error


def missing(error: ModuleNotFoundError) -> str:
    """Which package is not there, and how to get it."""
    extra = " Diffusion models need `pip install 'lissom[diffusion]'`." if error.name in _DIFFUSION else ""
    return f"{error.name} is not installed.{extra}"


def build(key: str, settings: Mapping[str, Any]) -> Any:
    """The method `key` with `settings`; names of several things may be one text, with commas between them.

    Raises:
        UserError: the method or a setting is unknown, or a value has the wrong type or range.
    """
    kind = method_class(key)
    known = [field.name for field in fields(kind)]
    for name in settings:
        if name not in known:
            raise UserError(f"{key} has no setting {name!r}.{_nearest(name, known)}")
    try:
        hints = get_type_hints(kind)
        values = {name: _listed(value, hints[name]) for name, value in settings.items()}
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(f"{key}: {explained(error)}") from error
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _listed(value: Any, hint: Any) -> Any:
    if isinstance(value, str) and tuple[str, ...] in (hint, *get_args(hint)):
        return tuple(part.strip() for part in value.split(","))
    return value


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."


def explained(error: ValidationError) -> str:
    """The first complaint of pydantic as one sentence: where, what was given, what was expected."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    complaint = first["msg"].removeprefix("Value error, ").removesuffix(".")
    end = "" if complaint.endswith("?") else "."
    return f"{place + '=' if place else ''}{first['input']!r}: {complaint}{end}"
