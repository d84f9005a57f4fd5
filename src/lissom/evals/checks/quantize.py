"""What low-bit weights cost, ours beside llama.cpp's own quantisers, on weights that lie on no grid beforehand.

The embedded model was stored in groups of 32 with 4 bits, so rounding it to such groups again would lose nothing. Here
the inputs of each matrix are permuted at random, or rotated by a random orthogonal matrix, and the activations with
them: the same function, in weights that no longer fit their old groups. A permutation keeps that some inputs are much
larger than others, a rotation does not. llama.cpp gets the turned matrices as a GGUF file, and what it makes of them is
measured in the same layers by the same code.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.evals.journal import Journal, scope
from lissom.evals.loading import Seconds, loading_times
from lissom.evals.peers.process import Failed, Worker
from lissom.evals.perplexity import window_nll
from lissom.evals.stats import Interval, paired_bootstrap, ratio_interval, verdict
from lissom.evals.texts import passages
from lissom.export.gguf import export_gguf
from lissom.kernels.packed_layers import PackedLinear
from lissom.models.assets import corpus
from lissom.models.calibration import calibration_windows
from lissom.models.gguf import GgufFile, load_model
from lissom.models.gguf.architecture import names, of_model_type
from lissom.models.layerwise import observing
from lissom.models.linear import linear_layers
from lissom.weights.quant import Quantize
from lissom.weights.quant.apply import Statistics

KINDS = ("permuted", "rotated")
STAGES = ("methods", "loading")
LOADED = THEIRS, MINE = "transformers fp32", "lissom 4-bit"
NEXT_TO_NOTHING = 0.01  # nats per token: one percent of the perplexity
LOAD_SHARE = 0.3
_CHARACTERS = 12  # more than a token of prose has, so that a document is long enough


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's own quantiser.

    Attributes:
        type: such as Q4_K_M, which has other types where 256 does not divide a matrix's inputs.
        calibration_tokens: of our calibration text; errors are weighed by the mean square of each input on it (the
            importance matrix). 0 weighs them without it.
    """

    type: str
    calibration_tokens: int = 0


@dataclass(frozen=True)
class AtBitsOf:
    """4 and 8 bits mixed, at no more bits per weight than another arm has taken."""

    arm: str
    method: Quantize


Arm = Quantize | LlamaCpp | AtBitsOf | None
DENSE, FINE = "fp32", "8-bit rtn"
Q4_0, Q4_1, Q4_K_M = "llama.cpp Q4_0", "llama.cpp Q4_1", "llama.cpp Q4_K_M"
WEIGHED = ", importance matrix"
PUBLISHED = ", as published"  # without shrinkage
MIXED = "mixed gptq at Q4_K_M's bits"
ARMS: dict[str, Arm] = {
    DENSE: None,
    FINE: Quantize(bits=8, method="rtn"),
    "llama.cpp Q8_0": LlamaCpp("Q8_0"),
    "4-bit symmetric rtn": Quantize(method="rtn", symmetric=True),
    "4-bit symmetric search": Quantize(method="search", symmetric=True),
    "4-bit symmetric gptq": Quantize(method="gptq", symmetric=True),
    "4-bit symmetric gptq" + PUBLISHED: Quantize(method="gptq", symmetric=True, shrinkage=0.0),
    Q4_0: LlamaCpp("Q4_0"),
    Q4_0 + WEIGHED: LlamaCpp("Q4_0", Quantize.calibration_tokens),
    "4-bit rtn": Quantize(method="rtn"),
    "4-bit gptq": Quantize(method="gptq"),
    "4-bit gptq" + PUBLISHED: Quantize(method="gptq", shrinkage=0.0),
    Q4_1: LlamaCpp("Q4_1"),
    Q4_K_M: LlamaCpp("Q4_K_M"),
    Q4_K_M + WEIGHED: LlamaCpp("Q4_K_M", Quantize.calibration_tokens),
    MIXED: AtBitsOf(Q4_K_M, Quantize(method="gptq")),
    MIXED + PUBLISHED: AtBitsOf(Q4_K_M, Quantize(method="gptq", shrinkage=0.0)),
}
# What each of llama.cpp's types is compared with, at no more bits.
OURS = {Q4_0: "4-bit symmetric gptq", Q4_1: "4-bit gptq", Q4_K_M: MIXED}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        windows: of text, each of another document; the units of all intervals, with the seeds.
        loads: how often each checkpoint is loaded; 0 leaves loading out.
        arms: of `ARMS`, in its order.
        tokens: of a window.
        seeds: of the random permutations and rotations.
        calibration_tokens: of all arms that are calibrated.
        corpus: where the windows come from; "" is Python's manual, which needs no fetching but resembles the
            calibration text.
    """

    windows: int
    loads: int
    arms: Sequence[str] = tuple(ARMS)
    tokens: int = 512
    seeds: Sequence[int] = (0,)
    calibration_tokens: int = Quantize.calibration_tokens
    corpus: str = ""


QUICK = Size(2, 1, (DENSE, FINE, "4-bit symmetric rtn", "4-bit rtn"), tokens=128)
SMALL = Size(8, 3, (DENSE, FINE, "4-bit symmetric gptq", Q4_0, "4-bit gptq", Q4_K_M, MIXED))
DEFAULT = Size(16, 7, corpus="sotu")
PAPER = Size(128, 21, tokens=2048, seeds=(0, 1, 2), calibration_tokens=262_144, corpus="sotu")


@dataclass(frozen=True)
class Run:
    """What a check measured.

    Attributes:
        records: one per kind of weights, seed and arm: `nll` (nats per token, one per window) and `bits` (per weight
            of the layers' matrices, scales included).
        loads: what `time_loading` said, by checkpoint; empty where it was left out.
        left_out: why arms were not measured, by name.
    """

    size: Size
    records: list[dict[str, Any]]
    loads: dict[str, list[Seconds]]
    left_out: dict[str, str]

    @property
    def arms(self) -> list[str]:
        """What was measured, in the order of `ARMS`."""
        return [arm for arm in ARMS if any(record["arm"] == arm for record in self.records)]

    def of(self, kind: str, arm: str) -> list[dict[str, Any]]:
        """The records of an arm, one per seed."""
        return [record for record in self.records if (record["kind"], record["arm"]) == (kind, arm)]

    def nll(self, kind: str, arm: str) -> np.ndarray:
        """Nats per token, one number per seed and window."""
        return np.concatenate([record["nll"] for record in self.of(kind, arm)])

    def bits(self, kind: str, arm: str) -> float:
        """Per weight."""
        return float(np.mean([record["bits"] for record in self.of(kind, arm)]))

    def against(self, kind: str, ours: str, theirs: str) -> Interval:
        """NLL of `ours` minus that of `theirs`, paired by seed and window."""
        return paired_bootstrap(self.nll(kind, ours), self.nll(kind, theirs))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(ours, llama.cpp's) of equal bytes, as far as both were measured."""
        peers = [(ours, type + how) for type, ours in OURS.items() for how in ("", WEIGHED)]
        return [pair for pair in peers if set(pair) <= set(self.arms)]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    journal: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Run:
    """The whole check; a run that was stopped goes on behind the last arm in `journal`.

    Args:
        model: fp32 with dense weights; it stays as it is.
        progress: called with (stage, done, total); the stages are `STAGES`.

    Raises:
        UserError: the model has matrices that cannot be turned, or there is too little text.
    """
    known = Journal(journal)
    records, left_out = measure(model, tokenizer, size, known, partial(progress, STAGES[0]))
    loads = measure_loading(model, size, known, partial(progress, STAGES[1])) if size.loads else {}
    return Run(size, records, loads, left_out)


# ---- the weights


class Turned(nn.Module):
    """A layer whose inputs are turned before a matrix that was turned the same way."""

    def __init__(self, inner: nn.Module, turn: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.turn = inner, turn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` `[..., in_features]` to `[..., out_features]`."""
        return self.inner(turned(x, self.turn))


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """`x` `[..., n]` in the order `turn` `[n]`, or rotated by it `[n, n]`."""
    return x[..., turn] if turn.ndim == 1 else x @ turn


def turn_matrices(model: PreTrainedModel, kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Turn the inputs of every matrix of the layers, in place; how, by the layer's name.

    Args:
        kind: `permuted`, each matrix differently, or `rotated`, all of a width alike.

    Raises:
        UserError: a layer is no `nn.Linear`.
    """
    generator, rotations, turns = torch.Generator().manual_seed(seed), dict[int, torch.Tensor](), {}
    for name, module in (entry for layer in linear_layers(model) for entry in layer.items()):
        if not isinstance(module, nn.Linear):
            raise UserError(f"{name} is a {type(module).__name__}: this check needs layers of nn.Linear.")
        width = module.in_features
        if kind == "permuted":
            turn = torch.randperm(width, generator=generator)
        else:
            if width not in rotations:
                rotations[width] = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
            turn = rotations[width]
        module.weight = nn.Parameter(turned(module.weight.detach(), turn).contiguous(), requires_grad=False)
        turns[name] = turn
    return turns


def turn_inputs(model: PreTrainedModel, turns: dict[str, torch.Tensor]) -> None:
    """Make a model with turned matrices compute what it did before."""
    for name, turn in turns.items():
        model.set_submodule(name, Turned(model.get_submodule(name), turn))


# ---- an arm


def quantized(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: str, seed: int, arm: Quantize | LlamaCpp | None
) -> tuple[PreTrainedModel, float]:
    """A copy of `model` with its matrices turned and quantised, and their bits per weight."""
    model = copy.deepcopy(model)
    turns = turn_matrices(model, kind, seed)
    if isinstance(arm, LlamaCpp):
        return by_llama_cpp(model, tokenizer, turns, arm)
    turn_inputs(model, turns)
    if arm is None:
        return model, 32.0
    arm.convert(model, tokenizer)
    inner = [model.get_submodule(f"{name}.inner") for name in turns]
    packed = [module.packed for module in inner if isinstance(module, PackedLinear)]
    return model, 8 * sum(p.nbytes for p in packed) / sum(p.rows * p.columns for p in packed)


def by_llama_cpp(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: dict[str, torch.Tensor], arm: LlamaCpp
) -> tuple[PreTrainedModel, float]:
    """The same by llama.cpp of a model whose matrices are turned, in the blocks of the file that it writes.

    Raises:
        Failed: llama.cpp is missing, or could not do it.
        UserError: GGUF has no such architecture, or llama.cpp chose a type that lissom cannot compute with.
    """
    threads = torch.get_num_threads()
    stored = names(of_model_type(model.config.model_type), model, model.config.num_hidden_layers)
    stored = {name: f"{stored[name]}.weight" for name in turns}
    with tempfile.TemporaryDirectory() as folder, Worker("llama_cpp", threads) as worker:
        files = {name: str(Path(folder, name)) for name in ("gguf", "quantised")}
        settings: dict[str, Any] = files | {"type": arm.type, "threads": threads}
        if arm.calibration_tokens:
            squares = mean_squares(model, tokenizer, turns, arm.calibration_tokens)
            settings["importance"] = {stored[name]: values.tolist() for name, values in squares.items()}
        export_gguf(model, tokenizer, files["gguf"])
        worker.prepare(settings)
        file = GgufFile(files["quantised"])
        model = load_model(file)
        tensors = [file.tensors[name] for name in stored.values()]
        bits = 8 * sum(t.data.nbytes for t in tensors) / sum(math.prod(t.shape) for t in tensors)
    turn_inputs(model, turns)
    return model, bits


def mean_squares(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, turns: dict[str, torch.Tensor], tokens: int
) -> dict[str, torch.Tensor]:
    """Mean square `[in_features]` of each input of the turned matrices on our calibration text."""
    inner = {name: model.get_submodule(name) for name in turns}
    statistics = {name: Statistics(whole=False) for name in turns}
    turn_inputs(model, turns)
    with torch.no_grad(), observing(inner, lambda name: statistics[name].add):
        for window in calibration_windows(tokenizer, None, tokens, 512):
            model.base_model(input_ids=window[None], use_cache=False)
    for name, module in inner.items():
        model.set_submodule(name, module)
    return {name: known.mean for name, known in statistics.items()}


# ---- measuring


def windows_of(tokenizer: PreTrainedTokenizerBase, size: Size) -> list[torch.Tensor]:
    """int64 `[tokens]` each, from the middle of documents that are spread evenly over the source.

    Raises:
        UserError: it has too few documents of that length.
    """
    documents = [text for _, text in (corpus(size.corpus) if size.corpus else passages())]
    long = [text for text in documents if len(text) > _CHARACTERS * size.tokens]
    if len(long) < size.windows:
        raise UserError(f"{len(long)} documents have {size.tokens} tokens, but {size.windows} are asked for.")
    chosen = [long[i] for i in torch.linspace(0, len(long) - 1, size.windows).long().tolist()]
    middles = [text[len(text) // 2 - _CHARACTERS * size.tokens // 2 :][: _CHARACTERS * size.tokens] for text in chosen]
    return [tokenizer(text, return_tensors="pt")["input_ids"][0, : size.tokens] for text in middles]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    known: Journal,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Records and what was left out, see `Run`; what `known` holds of the same model, texts, machine and versions is
    not measured again."""
    key = scope(model, size.windows, size.tokens, size.corpus)
    windows = windows_of(tokenizer, size)
    plan = [(kind, seed, name) for kind in KINDS for seed in size.seeds for name in ARMS if name in size.arms]
    records, left_out, bits = [], dict[str, str](), dict[tuple[str, int, str], float]()
    for done, (kind, seed, name) in enumerate(plan):
        progress(done, len(plan))
        arm = ARMS[name]
        try:
            if isinstance(arm, AtBitsOf):
                if arm.arm not in size.arms or arm.arm in left_out:
                    raise Failed(f"{arm.arm} was not measured")
                arm = replace(arm.method, target_bits=bits[kind, seed, arm.arm])
            if arm and arm.calibration_tokens:
                arm = replace(arm, calibration_tokens=size.calibration_tokens)
            identity = f"{key}/{kind}/{seed}/{type(arm).__name__}/{json.dumps(arm and asdict(arm), sort_keys=True)}"
            if identity not in known:
                changed, taken = quantized(model, tokenizer, kind, seed, arm)
                nll = [float(window_nll(changed, ids, size.tokens, size.tokens - 1).mean()) for ids in windows]
                known.add(identity, {"nll": nll, "bits": taken})
        except Failed as error:
            left_out[name] = str(error)
            continue
        records.append({**known[identity], "kind": kind, "seed": seed, "arm": name})
        bits[kind, seed, name] = known[identity]["bits"]
    progress(len(plan), len(plan))
    return records, left_out


def measure_loading(
    model: PreTrainedModel, size: Size, known: Journal, progress: Callable[[int, int], None]
) -> dict[str, list[Seconds]]:
    """`Run.loads`: transformers' fp32 checkpoint of `model` and our 4-bit one, see `loading_times`."""
    identity = f"loading/{scope(model, size.loads)}"
    if identity not in known:
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: Path(folder, str(number)) for number, name in enumerate(LOADED)}
            model.save_pretrained(paths[THEIRS])
            # How the codes were found does not matter to the loading.
            Quantize(method="rtn").convert(copy.deepcopy(model)).save_pretrained(paths[MINE])
            known.add(identity, loading_times(paths, size.loads, progress))
    return {name: known[identity][name] for name in LOADED}


# ---- what it says


def verdicts(run: Run) -> list[tuple[str, str]]:
    """(claim, verdict), each for all kinds of weights together; see `lissom.evals.stats.verdict`."""
    claims = [
        (f"{ours} has no higher NLL than {theirs}", verdict([run.against(kind, ours, theirs) for kind in KINDS]))
        for ours, theirs in run.pairs
    ]
    fine = [run.against(kind, FINE, DENSE) for kind in KINDS]
    claims.append((f"8 bits lose at most {NEXT_TO_NOTHING} nats per token", verdict(fine, NEXT_TO_NOTHING)))
    if run.loads:
        share = loading_ratio(run, "load")
        claims.append((f"our 4-bit checkpoint loads in at most {LOAD_SHARE} of the time", verdict([share], LOAD_SHARE)))
    return claims


def loading_ratio(run: Run, what: str) -> Interval:
    """Our median seconds over transformers' fp32, of `load` or `use` (see `time_loading`)."""
    ours, theirs = ([seconds[what] for seconds in run.loads[name]] for name in (MINE, THEIRS))
    return ratio_interval(ours, theirs)
