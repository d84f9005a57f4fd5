"""The recipe itself: validated, read and written as YAML, applied to a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lissom
from lissom.devices.meters import threads
from lissom.errors import UserError
from lissom.files import atomic_path
from lissom.models.load import DEFAULT_MODEL
from lissom.models.method import Trainable, changed
from lissom.models.registry import acts_on_pipelines, build, explained

FILE_NAME = "recipe.yaml"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Weights = Literal["dense", "packed"]


class Recipe(BaseModel):
    """What runs, and how.

    Attributes:
        model: asset, model folder, .gguf file or Hub id.
        dtype: of the weights; `auto` is the checkpoint's own.
        weights: `dense`, or `packed`: a GGUF file computes with its own blocks.
        threads: of PyTorch and the native kernels; None leaves them as they are.
        steps: of a diffusion model's sampler; None: what a command takes by itself.
        methods: in the order in which they are applied, each `{key: settings}`; in YAML a bare key is enough.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = DEFAULT_MODEL
    dtype: Dtype = "auto"
    weights: Weights = "dense"
    threads: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    methods: tuple[dict[str, dict[str, Any]], ...] = ()

    @field_validator("methods", mode="before")
    @classmethod
    def _steps(cls, given: Any) -> Any:
        if not isinstance(given, list | tuple):
            raise ValueError("expected a list of methods")
        steps = [{step: {}} if isinstance(step, str) else step for step in given]
        for step in steps:
            if not isinstance(step, dict) or len(step) != 1:
                raise ValueError("each method is written as one `key: {setting: value}`")
        steps = [{key: settings or {} for key, settings in step.items()} for step in steps]
        running = set[str]()
        for step in steps:
            for key, settings in step.items():
                if not isinstance(settings, dict):
                    raise ValueError(f"the settings of {key} are written as {{name: value}}")
                method = build(key, settings)
                if isinstance(method, Trainable):  # without training it ruins a model
                    raise ValueError(f"{key} is trained: use `lissom train --method {key}`, and name its model here")
                if key in running:  # the later one alone would count
                    raise ValueError(f"{key} is named twice")
                if not hasattr(method, "convert"):
                    running.add(key)
        return steps

    @classmethod
    def of(cls, *methods: Any, **facts: Any) -> Self:
        """A recipe of method objects; only settings that differ from their defaults are written down.

        Raises:
            UserError: a fact is not one, or none that a recipe has.
        """
        try:
            return cls(methods=tuple({method.name: _plain(changed(method))} for method in methods), **facts)
        except ValidationError as error:
            raise UserError(f"No valid recipe: {explained(error)}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a recipe from a YAML file, or from a folder that `lissom apply` wrote.

        Raises:
            UserError: the file is missing, no YAML, or no valid recipe.
        """
        path = Path(path)
        # A folder of `lissom apply` holds its model, wherever it was moved to.
        folder = path if (path / "config.json").is_file() else None
        path = path / FILE_NAME if path.is_dir() else path
        try:
            facts = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no YAML file.") from error
        if not isinstance(facts, dict):
            raise UserError(f"{path} is no recipe: expected the keys `model:` and `methods:`, a list of methods.")
        try:
            return cls(**{**facts, "model": str(folder)} if folder else facts)
        except ValidationError as error:
            raise UserError(f"{path} is no valid recipe: {explained(error)}") from error
        except UserError as error:
            raise UserError(f"{path} is no valid recipe: {error}") from error

    def to_yaml(self) -> str:
        """The recipe as YAML, without what is at its default."""
        facts = {"model": self.model, **self.model_dump(exclude_defaults=True, exclude={"model", "methods"})}
        return yaml.safe_dump(facts | {"methods": list(self.methods)}, sort_keys=False)

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.to_yaml())

    def build(self) -> list[Any]:
        """The methods as objects, in order."""
        return [build(key, settings) for step in self.methods for key, settings in step.items()]

    def halves(self) -> tuple[Self, Self]:
        """What is done once, to the weights (methods with `convert`), and what is done while the model runs."""
        converts = [hasattr(method, "convert") for method in self.build()]
        parts = (
            tuple(step for step, changes in zip(self.methods, converts, strict=True) if changes == wanted)
            for wanted in (True, False)
        )
        converting, running = (self.model_copy(update={"methods": part}) for part in parts)
        return converting, running

    def load_model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model in its dtype, with every method applied that changes weights.

        Raises:
            UserError: it is a recipe of a diffusion model, or a method cannot be applied.
        """
        if self.steps or any(acts_on_pipelines(key) for step in self.methods for key in step):
            raise UserError("That is a recipe of a diffusion model: use it with `lissom edit` or `lissom refine`.")
        model, tokenizer = lissom.load(self.model, self.dtype, weights=self.weights)
        for method in self.halves()[0].build():
            model = method.convert(model, tokenizer)
        return model, tokenizer

    @contextmanager
    def running(self, model: PreTrainedModel) -> Iterator[list[Any]]:
        """Inside the block `model` runs with the recipe's threads and methods; leaving it restores everything. Gives
        what the methods' own blocks give, reports among it."""
        with ExitStack() as stack:
            stack.enter_context(threads(self.threads))
            yield [stack.enter_context(method(model)) for method in self.halves()[1].build()]

    def pipeline_methods(self) -> list[Any]:
        """The methods of a diffusion model's recipe as objects, in order.

        Raises:
            UserError: one of them does not act on pipelines.
        """
        for step in self.methods:
            for key in step:
                if not acts_on_pipelines(key):
                    raise UserError(f"{key} acts on language models: a diffusion model's recipe cannot have it.")
        return self.build()

    @contextmanager
    def drawing(self, pipeline: Any, **inputs: Any) -> Iterator[list[Any]]:
        """Inside the block `pipeline` draws with the recipe's threads and methods, which are given what they take of
        `inputs`; leaving it restores everything. Gives what the methods' own blocks give.

        Raises:
            UserError: a method does not act on pipelines, or not on this one.
        """
        methods = self.pipeline_methods()
        with ExitStack() as stack:
            stack.enter_context(threads(self.threads))
            yield [
                stack.enter_context(method(pipeline, **{name: inputs.get(name) for name in method.inputs}))
                for method in methods
            ]

    @property
    def identity(self) -> str:
        """The whole recipe as text; two recipes are the same where theirs are."""
        return self.model_dump_json()

    @property
    def label(self) -> str:
        """The recipe in a few words, for tables and plots."""
        words: list[str] = [self.dtype] if self.dtype != "auto" else []
        words += ["packed"] if self.weights == "packed" else []
        words += [f"{self.threads} thread{'s' * (self.threads > 1)}"] if self.threads else []
        words += [f"{self.steps} steps"] if self.steps else []
        words += [str(method) for method in self.build()]
        return " + ".join(words) or "untouched"


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as YAML has them: a method inside a method is written as one is in a recipe."""
    return {
        key: {value.name: _plain(changed(value))} if hasattr(value, "name") else value
        for key, value in settings.items()
    }
