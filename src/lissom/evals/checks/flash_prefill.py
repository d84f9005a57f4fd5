"""FlashPrefill beside dense attention and beside other ways to choose blocks: what it costs on text, whether what is
far away is still found, and what it saves.

Everything is compared with two baselines: PyTorch's SDPA, and our own kernel with all blocks, for most of the gain in
short prompts is the kernel's. All selections run on that kernel.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lissom.attention.flash_prefill import FlashPrefill, sparse_prefill
from lissom.attention.flash_prefill.crossover import planted
from lissom.decode import NativeDecode
from lissom.devices.meters import interleaved
from lissom.evals.journal import Journal, scope
from lissom.evals.retrieval import TASKS, judged, trials
from lissom.evals.texts import passages
from lissom.kernels import native
from lissom.kernels.blocks import Rules
from lissom.models import describe_decoder
from lissom.models.assets import corpus

STAGES = ("text", "tasks", "times", "synthetic")
MANUAL = "manual"
DENSE, FLASH, ROWS = "dense", "flashprefill", "row-normalised"
_STRETCH = 128  # tokens of a text that are one unit of the bootstrap
_SPARSE = FlashPrefill(min_tokens=0)
ARMS: dict[str, FlashPrefill | None] = {
    DENSE: None,
    FLASH: _SPARSE,
    f"{FLASH} α 0.05": replace(_SPARSE, alpha=0.05),
    f"{FLASH} α 0.2": replace(_SPARSE, alpha=0.2),
    f"{FLASH} shared": replace(_SPARSE, shared=True),
    f"{FLASH} corrected": replace(_SPARSE, corrected=True),
    f"{FLASH} blocks of 64": replace(_SPARSE, block_size=64, sink=4, window=8),
    ROWS: replace(_SPARSE, selection="row-normalised"),
    f"{ROWS} α 0.05": replace(_SPARSE, selection="row-normalised", alpha=0.05),
    f"{ROWS} α 0.2": replace(_SPARSE, selection="row-normalised", alpha=0.2),
    "top-k": replace(_SPARSE, selection="top-k"),
    "top-p": replace(_SPARSE, selection="top-p"),
    "flexprefill": replace(_SPARSE, selection="flexprefill"),
    "xattention": replace(_SPARSE, selection="xattention"),
    "random": replace(_SPARSE, selection="random"),
    "forced": replace(_SPARSE, selection="forced"),
}
# Whose thresholds are chosen on other text, so that each head leaves out at most a share of its attention there.
BUDGETS = {f"{arm}, {budget:.0%} by head": (arm, budget) for arm in (FLASH, ROWS) for budget in (0.05, 0.02)}
STRICT = ", nothing dense at the end"
SDPA, OWN, NATIVE = "SDPA", "all blocks", "native"
_TIMED: dict[str, tuple[Any, ...]] = {
    SDPA: (),
    OWN: (replace(_SPARSE, alpha=0.0),),
    FLASH: (_SPARSE,),
    ROWS: (ARMS[ROWS],),
    f"{NATIVE}, {OWN}": (NativeDecode(), replace(_SPARSE, alpha=0.0)),
    f"{NATIVE}, {FLASH}": (NativeDecode(), _SPARSE),
}
SYNTHETIC = (SDPA, OWN, FLASH, "forced")


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        texts: (`MANUAL` or the name of a corpus of `lissom assets`, tokens, number of texts).
        arms: of `ARMS` and `BUDGETS`, on the texts.
        tasks: (tokens, trials of each task); `copies` of the passage that comes twice, which has many items.
        task_arms: of `ARMS`, with nothing dense at the end.
        times: tokens of the prompts whose reading is timed, `rounds` times, in each of `dtypes`.
        synthetic: entries of one layer's attention with made-up queries and keys.
    """

    texts: tuple[tuple[str, int, int], ...]
    arms: tuple[str, ...]
    tasks: tuple[tuple[int, int], ...]
    copies: tuple[tuple[int, int], ...]
    task_arms: tuple[str, ...]
    times: tuple[int, ...]
    rounds: int
    dtypes: tuple[str, ...]
    synthetic: tuple[int, ...]


_TASK_ARMS = (FLASH, ROWS, "xattention", "random", "forced")
QUICK = Size(
    ((MANUAL, 1536, 1),), (DENSE, FLASH, "forced"), ((1536, 1),), ((1536, 1),), (FLASH,), (1536,), 1, ("float32",),
    (2048, 4096),
)  # fmt: skip
SMALL = Size(
    ((MANUAL, 2048, 2), (MANUAL, 4096, 1)), (DENSE, FLASH, ROWS, "random", "forced"), ((2048, 8),), ((2048, 2),),
    _TASK_ARMS, (2048, 4096), 3, ("float32",), (2048, 4096, 8192, 16384),
)  # fmt: skip
DEFAULT = Size(
    texts=((MANUAL, 2048, 4), (MANUAL, 4096, 3), (MANUAL, 8192, 3), ("moby-dick", 8192, 3)),
    arms=(*ARMS, *BUDGETS),
    tasks=((2048, 30), (4096, 15), (8192, 5)),
    copies=((2048, 6), (4096, 3), (8192, 1)),
    task_arms=_TASK_ARMS,
    times=(2048, 4096, 8192),
    rounds=3,
    dtypes=("float32", "bfloat16"),
    synthetic=(2048, 4096, 8192, 16384, 32768, 65536),
)
PAPER = replace(
    DEFAULT, texts=((MANUAL, 8192, 20), (MANUAL, 32768, 10), (MANUAL, 131072, 5)), times=(4096, 8192, 32768, 131072)
)


@dataclass
class Run:
    """What was measured.

    Attributes:
        texts: by (source, tokens, arm): `nll` of stretches of text, and `density`.
        tasks: by (task, tokens, arm): `right` items, the mean `nll` of trials, and `density`.
        times: by (dtype, tokens, arm): for each round `whole`, `attention` and, where blocks are chosen, `choosing`
            seconds; and `density`.
        synthetic: by (entries, arm): `seconds` of each round, and `density`.
        layers: of the model.
    """

    size: Size
    layers: int
    texts: dict[tuple[str, int, str], dict[str, Any]] = field(default_factory=dict)
    tasks: dict[tuple[str, int, str], dict[str, Any]] = field(default_factory=dict)
    times: dict[tuple[str, int, str], dict[str, Any]] = field(default_factory=dict)
    synthetic: dict[tuple[int, str], dict[str, Any]] = field(default_factory=dict)


Progress = Callable[[str, int, int], None]


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    size: Size,
    journal: Path,
    progress: Progress = lambda stage, done, total: None,
) -> Run:
    """Measure what `journal` does not hold yet; `progress` is called with (stage, done, total)."""
    known, key = Journal(journal), scope(model, _STRETCH)
    found = Run(size, describe_decoder(model).num_hidden_layers)

    def once(what: Sequence[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        identity = f"{key}/{json.dumps(what)}"
        return known[identity] if identity in known else known.add(identity, measure())

    _texts(found, model, tokenizer, once, progress)
    _tasks(found, model, tokenizer, once, progress)
    _times(found, model, tokenizer, once, progress)
    info = describe_decoder(model)
    shape = info.num_attention_heads, info.num_key_value_heads, info.head_dim
    for done, entries in enumerate(size.synthetic):
        progress("synthetic", done, len(size.synthetic))
        what = ["synthetic", entries, shape, size.rounds, SYNTHETIC, native.status().isa]
        parts = once(what, partial(_synthetic, entries, shape, size.rounds))
        found.synthetic |= {(entries, arm): parts[arm] for arm in SYNTHETIC}
    progress("synthetic", len(size.synthetic), len(size.synthetic))
    return found


def _settings(method: FlashPrefill | None) -> Any:
    return None if method is None else asdict(method)


@contextmanager
def _inside(model: PreTrainedModel, *methods: Any) -> Iterator[Any]:
    """The methods' blocks; gives the report of FlashPrefill, if it is one of them."""
    with ExitStack() as stack:
        given = [stack.enter_context(method(model)) for method in methods if method is not None]
        yield next((report for report in given if report is not None), None)


# ---- text


def texts(tokenizer: PreTrainedTokenizerBase, source: str, tokens: int, count: int) -> list[torch.Tensor]:
    """int64 `[tokens]` each, from different places of Python's manual or of a corpus."""
    parts = passages() if source == MANUAL else corpus(source)
    whole = tokenizer("\n\n".join(text for _, text in parts), add_special_tokens=False)["input_ids"]
    starts = torch.linspace(0, len(whole) - tokens, count + 2).long().tolist()[1:-1]
    return [torch.tensor(whole[start : start + tokens]) for start in starts]


def _texts(
    found: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, once: Callable[..., Any], progress: Progress
) -> None:
    @cache  # what is chosen is the same for all texts, and takes a minute
    def method(arm: str) -> FlashPrefill | None:
        if arm in ARMS:
            return ARMS[arm]
        base, budget = BUDGETS[arm]
        settings = ARMS[base]
        assert settings is not None
        return settings.calibrated(model, tokenizer, budget)

    plan = [(*part, arm) for part in found.size.texts for arm in found.size.arms]
    for done, (source, tokens, count, arm) in enumerate(plan):
        progress("text", done, len(plan))

        def measure(source: str = source, tokens: int = tokens, count: int = count, arm: str = arm) -> dict[str, Any]:
            return _text(model, tokenizer, source, tokens, count, method(arm))

        settings = _settings(ARMS[arm]) if arm in ARMS else [_settings(ARMS[BUDGETS[arm][0]]), BUDGETS[arm][1]]
        found.texts[source, tokens, arm] = once(["text", source, tokens, count, settings], measure)
    progress("text", len(plan), len(plan))


@torch.no_grad()
def _text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    tokens: int,
    count: int,
    method: FlashPrefill | None,
) -> dict[str, Any]:
    """NLL of the last three quarters of each text."""
    stretches: list[float] = []
    with _inside(model, method) as report:
        for ids in texts(tokenizer, source, tokens, count):
            first = len(ids) // 4
            logits = model(ids[None], use_cache=False, logits_to_keep=len(ids) - first).logits[0, :-1].float()
            losses = F.cross_entropy(logits, ids[first + 1 :], reduction="none")
            stretches += [float(part.mean()) for part in losses.split(_STRETCH)]
    return {"nll": stretches, "density": 1.0 if report is None else report.density}


# ---- tasks


def _tasks(
    found: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, once: Callable[..., Any], progress: Progress
) -> None:
    """The paper's rule as it is used, and every selection with `last=0`: so even the last tokens are read sparsely."""
    arms = {DENSE: replace(_SPARSE, alpha=0.0), FLASH: _SPARSE}  # on the same kernel
    arms |= {name + STRICT: replace(ARMS[name] or _SPARSE, last=0) for name in found.size.task_arms}
    plan = [
        (task, *part, name)
        for task in TASKS
        for part in (found.size.copies if task == "copy" else found.size.tasks)
        for name in arms
    ]
    halves = cache(lambda: copy.deepcopy(model).to(torch.bfloat16))  # type: ignore[arg-type]  # when it is needed
    for done, (task, tokens, count, name) in enumerate(plan):
        progress("tasks", done, len(plan))

        def measure(task: str = task, tokens: int = tokens, count: int = count, name: str = name) -> dict[str, Any]:
            right, losses = list[bool](), list[float]()
            with _inside(halves(), arms[name]) as report:
                for trial in trials(tokenizer, task, [tokens], [count]):
                    items, nll = judged(halves(), trial)
                    right += items
                    losses.append(nll)
            return {"right": right, "nll": losses, "density": report.density}

        found.tasks[task, tokens, name] = once(["task", task, tokens, count, _settings(arms[name])], measure)
    progress("tasks", len(plan), len(plan))


# ---- times


_spent = [0.0]  # seconds in SDPA


def _timed_sdpa(*args: Any, **kwargs: Any) -> Any:
    begun = time.perf_counter()
    output = sdpa_attention_forward(*args, **kwargs)
    _spent[0] += time.perf_counter() - begun
    return output


AttentionInterface.register("lissom_timed_sdpa", _timed_sdpa)
AttentionMaskInterface.register("lissom_timed_sdpa", sdpa_mask)


@torch.no_grad()
def _read(model: PreTrainedModel, ids: torch.Tensor, methods: Sequence[Any]) -> dict[str, float]:
    """Seconds of one prompt."""
    own = model.config._attn_implementation
    if not methods:
        model.set_attn_implementation("lissom_timed_sdpa")
    _spent[0] = 0.0
    try:
        with _inside(model, *methods) as report:
            begun = time.perf_counter()
            model(ids[None], use_cache=False, logits_to_keep=1)
            whole = time.perf_counter() - begun
    finally:
        if not methods:
            model.set_attn_implementation(own)
    if report is None:
        return {"whole": whole, "attention": _spent[0], "choosing": 0.0, "density": 1.0}
    return {"whole": whole, "attention": report.seconds, "choosing": report.choosing, "density": report.density}


def _times(
    found: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, once: Callable[..., Any], progress: Progress
) -> None:
    size = found.size
    plan = [(dtype, tokens) for dtype in size.dtypes for tokens in size.times]
    for done, (dtype, tokens) in enumerate(plan):
        progress("times", done, len(plan))

        def measure(dtype: str = dtype, tokens: int = tokens) -> dict[str, Any]:
            network = copy.deepcopy(model).to(getattr(torch, dtype))
            (ids,) = texts(tokenizer, MANUAL, tokens, 1)
            arms = {name: partial(_read, network, ids, methods) for name, methods in _TIMED.items()}
            for methods in _TIMED.values():  # first calls allocate and choose kernels
                _read(network, ids[: min(1024, tokens)], methods)
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
            for name, seconds in interleaved(arms, size.rounds):
                rounds[name].append(seconds)
            return {name: {what: [one[what] for one in many] for what in many[0]} for name, many in rounds.items()}

        parts = once(["time", dtype, tokens, size.rounds, list(_TIMED), native.status().isa], measure)
        found.times |= {(dtype, tokens, name): parts[name] for name in _TIMED}
    progress("times", len(plan), len(plan))


# ---- one layer, made up


@torch.no_grad()
def _synthetic(entries: int, shape: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    query, key, value = planted(entries, *shape)
    sparse = partial(sparse_prefill, query, key, value, precision="bf16")
    density = {SDPA: 1.0}

    def attend(name: str) -> float:
        begun = time.perf_counter()
        if name == SDPA:
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            return time.perf_counter() - begun
        rules = Rules(last=0) if name == "forced" else Rules()
        found = sparse(alpha={OWN: 0.0, FLASH: 0.1, "forced": 2.0}[name], rules=rules)
        seconds = time.perf_counter() - begun
        density[name] = rules.layout(entries, entries, shape[0] // shape[1]).density(found.selected[0])
        return seconds

    arms = {name: partial(attend, name) for name in SYNTHETIC}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    if entries <= 8192:
        attend(FLASH), attend(SDPA)
    for name, spent in interleaved(arms, rounds if entries <= 16384 else 1):
        seconds[name].append(spent)
    return {name: {"seconds": seconds[name], "density": density[name]} for name in arms}
