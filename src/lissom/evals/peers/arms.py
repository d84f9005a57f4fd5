"""What is compared: lissom in the ways it can run, and what a user would pick instead."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig

from lissom.errors import UserError
from lissom.evals.peers.process import Worker
from lissom.models.load import load, locate

Files = Literal["model", "folder", "gguf"]


@dataclass(frozen=True)
class Arm:
    """One runtime in one setting.

    Attributes:
        name: of this setting, unique.
        runtime: its module in `runtimes`.
        needs: which files of the model it reads: `model` (lissom's own name), a `folder` of transformers, or a `gguf`
            file.
        settings: besides those files and `threads`.
        shown: what it is called in the results. Of arms of one name the faster one counts, figure by figure: a user
            would choose that setting.
        prepared: whether it makes a file of its own from the folder first.
        packages: that must be installed where it runs, and whose versions its figures depend on.
        slow: whether a round behind a long prompt takes minutes.
    """

    name: str
    runtime: str
    needs: Files
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    shown: str = ""
    prepared: bool = False
    packages: tuple[str, ...] = ()
    slow: bool = False

    @property
    def label(self) -> str:
        return self.shown or self.name


OURS = "lissom"
RECOMMENDED = f"{OURS} recommended"

_NATIVE = {"weights": "auto", "kv": "bf16", "activations": "int16"}
_TORCH = ("torch", "transformers")
_LLAMA_CPP = ("llama-cpp-python",)
_OPENVINO = ("openvino", "optimum-intel", "nncf")
_ONNXRUNTIME = ("onnxruntime-genai", "onnxruntime", "onnx", "onnx-ir", *_TORCH)


def _ours(name: str, **settings: Any) -> Arm:
    return Arm(name, "lissom", "model", {"through": "loop", **settings}, packages=("lissom", *_TORCH))


def _lissom(name: str, **changes: Any) -> Arm:
    return _ours(name, **{"ratio": 1.0, **_NATIVE, **changes})


def _torch_compile(name: str, dtype: str) -> Arm:
    return Arm(name, "torch_compile", "folder", {"dtype": dtype}, "torch.compile", packages=_TORCH, slow=True)


ARMS: tuple[Arm, ...] = (
    _lissom(OURS),
    _lissom("lissom generate()", through="generate"),
    _lissom("lissom int8 activations", activations="int8"),
    _lissom("lissom cache ÷ 10", ratio=0.1),
    Arm("llama.cpp, plain", "llama_cpp", "gguf", {"flash": False}, "llama.cpp", packages=_LLAMA_CPP),
    Arm("llama.cpp, flash attention", "llama_cpp", "gguf", {"flash": True}, "llama.cpp", packages=_LLAMA_CPP),
    Arm("transformers fp32", "transformers", "folder", {"dtype": "float32"}, packages=_TORCH, slow=True),
    Arm("transformers bf16", "transformers", "folder", {"dtype": "bfloat16"}, packages=_TORCH),
    _torch_compile("torch.compile fp32", "float32"),
    _torch_compile("torch.compile bf16", "bfloat16"),
    Arm("openvino int8", "openvino", "folder", {"bits": 8}, prepared=True, packages=_OPENVINO),
    Arm("openvino int4", "openvino", "folder", {"bits": 4}, prepared=True, packages=_OPENVINO),
    Arm("onnxruntime int4", "onnxruntime", "folder", prepared=True, packages=_ONNXRUNTIME),
)


def recommended(recipe: Mapping[str, Any]) -> Arm:
    """lissom as a recipe has it, given as the plain values of its fields."""
    return _ours(RECOMMENDED, recipe=dict(recipe))


def _words(arm: Arm) -> set[str]:
    """What an arm, with others, may be called in a choice."""
    return {arm.name, arm.label, arm.label.split()[0]}


def choose(only: Sequence[str] = (), **native: str) -> tuple[Arm, ...]:
    """The arms that `only` names, by runtime (`lissom`, `llama.cpp`) or one by one; all of them where it is empty.

    Args:
        native: settings of `NativeDecode` that all of lissom's arms have instead of their own; weights="auto" is the
            layers' own where the model is packed, else int4.

    Raises:
        UserError: a name is unknown.
    """
    for name in only:
        if not any(name in _words(arm) for arm in ARMS):
            known = dict.fromkeys(arm.label.split()[0] for arm in ARMS)
            raise UserError(f"There is no runtime {name!r} to compare with. Known: {', '.join(known)}.")
    chosen = [arm for arm in ARMS if not only or _words(arm) & set(only)]
    return tuple(
        replace(arm, settings={**arm.settings, **native}) if arm.runtime == "lissom" else arm for arm in chosen
    )


class Material:
    """The files of one model in the forms that runtimes read, made when they are first asked for.

    Attributes:
        notes: what was made, for the reader of the results.
    """

    def __init__(self, model: str, scratch: Path) -> None:
        """
        Args:
            model: as for `lissom.load`.
            scratch: folder for what has to be made.

        Raises:
            UserError: there is no such model.
        """
        self.model, self.notes = model, list[str]()
        self._scratch, self._made = scratch, dict[str, str]()
        source, file = locate(model, packed=True)
        self._gguf = None if file is None else str(Path(source) / file)
        self.config = self._read_config(source)

    def _read_config(self, source: str) -> PreTrainedConfig:
        if self._gguf is not None:
            from lissom.models.gguf.architecture import config_of
            from lissom.models.gguf.file import GgufFile

            return config_of(GgufFile(self._gguf)).get_text_config(decoder=True)
        try:
            return AutoConfig.from_pretrained(source).get_text_config(decoder=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(f"{self.model} cannot be loaded as a causal language model: {reason}") from error

    def settings(self, arm: Arm, threads: int, deadline: float = float("inf")) -> dict[str, Any]:
        """Everything that the arm's runtime is opened with.

        Args:
            deadline: time of `time.monotonic` at which the making of files is given up.

        Raises:
            UserError, Failed: the files cannot be made.
        """
        found = {**arm.settings, arm.needs: self._file(arm.needs), "threads": threads, "scratch": str(self._scratch)}
        if found.get("weights") == "auto":
            found["weights"] = "native" if self._gguf else "int4"
        if arm.prepared:
            found["export"] = self._once(arm.name, lambda path: _prepare(arm, found | {"export": str(path)}, deadline))
        return found

    def _file(self, needs: Files) -> str:
        if needs == "model":
            return self.model
        if needs == "gguf":
            return self._gguf or self._once("model.gguf", self._write_gguf)
        source, file = locate(self.model, packed=False)
        return source if file is None else self._once("dense", self._write_dense)

    def _once(self, name: str, make: Callable[[Path], None]) -> str:
        path = self._scratch / name
        if name not in self._made:
            make(path)
            self._made[name] = str(path)
        return self._made[name]

    def _write_gguf(self, path: Path) -> None:
        from lissom.export.gguf import export_gguf

        model, tokenizer = load(self.model, "auto")
        kinds = export_gguf(model, tokenizer, path, "q4_0")
        words = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        self.notes.append(f"llama.cpp reads lissom's own export of the model ({words}).")

    def _write_dense(self, path: Path) -> None:
        model, tokenizer = load(self.model)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)


def _prepare(arm: Arm, settings: dict[str, Any], deadline: float) -> None:
    with Worker(arm.runtime, settings["threads"], deadline) as worker:
        worker.prepare(settings)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for `Material` that goes away with its block."""
    return tempfile.TemporaryDirectory(prefix="lissom-peers-")
