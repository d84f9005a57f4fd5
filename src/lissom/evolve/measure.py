"""Measuring a recipe against the untouched model: one document is read, then many questions are asked of it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lissom.decode import weight_bytes
from lissom.devices.machine import describe
from lissom.devices.meters import Timing, peak_memory, time_generation
from lissom.errors import UserError
from lissom.evals.fidelity import Teacher, score, teach
from lissom.evals.journal import Journal
from lissom.evals.perplexity import nll_behind
from lissom.evals.stats import Interval, paired_bootstrap
from lissom.evals.texts import Document, planted_documents
from lissom.kernels import native
from lissom.kernels.packed_layers import weight_count
from lissom.kv.cache import cache_bytes
from lissom.kv.document import document_ids, question_ids
from lissom.models import describe_decoder, fingerprint
from lissom.models.load import locate
from lissom.models.method import SearchContext
from lissom.recipes import Recipe

logger = logging.getLogger(__name__)

_PART = 32  # tokens of following text that are one unit of the bootstrap


@dataclass(frozen=True)
class Workload:
    """How much is measured.

    Attributes:
        documents: documents that are read, each with its own questions.
        tokens: of each document.
        questions: per document; the first four ask for planted facts.
        answer_tokens: of the untouched model's answers, on which recipes are judged.
        new_tokens: generated in a timed run, after a document and one question.
        rounds: timed runs of each recipe.
    """

    documents: int = 2
    tokens: int = 1024
    questions: int = 8
    answer_tokens: int = 24
    new_tokens: int = 32
    rounds: int = 3


QUICK = Workload(documents=1, tokens=640, questions=6, answer_tokens=20, new_tokens=24, rounds=2)


@dataclass
class Measured:
    """What is known of one recipe. `quality` has one record per document, `timings` one per round.

    Attributes:
        loss: how much worse it predicts, with its interval, as a share: by how much the geometric mean of the
            probabilities that it gives to the right tokens is below the untouched model's, 1 - e^-ΔNLL; the worse of
            two: on the untouched model's answers to questions, and on the text that follows the document.
        peak_bytes: peak resident memory of a fresh process that ran it, None where it was not measured.
    """

    recipe: Recipe
    quality: list[dict[str, Any]] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    loss: Interval = field(default_factory=lambda: Interval(0.0, 0.0, 0.0))
    peak_bytes: int | None = None

    @property
    def label(self) -> str:
        return self.recipe.label

    @property
    def cache_bytes(self) -> float:
        """Bytes of the KV cache after a document, counted from storage, mean over documents."""
        return _mean(record["cache_bytes"] for record in self.quality)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory, with whatever is packed besides; see `lissom.decode.weight_bytes`."""
        return int(self.quality[0]["weight_bytes"])

    @property
    def memory(self) -> float:
        """Bytes of weights and KV cache together."""
        return self.weight_bytes + self.cache_bytes

    @property
    def first_token(self) -> float:
        """Seconds to the first token, median."""
        return float(np.median([timing.first_token for timing in self.timings]))

    @property
    def read(self) -> float:
        """Seconds of that in the model's own forward passes, median."""
        return float(np.median([timing.read for timing in self.timings]))

    @property
    def decode(self) -> float:
        """Seconds per further token, median."""
        return float(np.median([timing.decode for timing in self.timings]))

    @property
    def energy(self) -> float | None:
        """Joules of a timed run, median; None where the machine does not tell."""
        known = [timing.energy for timing in self.timings if timing.energy is not None]
        return float(np.median(known)) if known else None

    @property
    def recall(self) -> float:
        """Share of planted facts in the answers."""
        return _mean(s["recalled"] for record in self.quality for s in record["scores"] if s["recalled"] is not None)

    def over_questions(self, metric: str) -> float:
        """Mean of a metric of `evals.fidelity.Score` over all questions."""
        return _mean(s[metric] for record in self.quality for s in record["scores"])


def _mean(numbers: Any) -> float:
    return float(np.mean([float(number) for number in numbers]))


class Bench:
    """Measures recipes of one model on one workload. What the journal already has is not measured again.

    Attributes:
        base: the untouched model's recipe.
        packed: whether the model has blocks of its own (a GGUF file) that can be computed with.
        own_dtype: of the checkpoint.
        tokens: of a document.
    """

    def __init__(self, model: str, workload: Workload, journal: Journal) -> None:
        self.base, self.workload, self.journal = Recipe(model=model), workload, journal
        self._held: dict[str, PreTrainedModel] = {}
        self._teachers: dict[int, list[Teacher]] = {}
        own = self._own_blocks()
        network, self.tokenizer = self._load(self.base)
        self.packed, self.own_dtype, self.architecture = own is not None, network.dtype, network.config.model_type
        self.weight_bits = 8 * weight_bytes(own or network) / weight_count(own or network)
        info = describe_decoder(network)
        self.tokens = self._fitting(info.max_position_embeddings)
        facts = describe()
        self._key = _digest(
            [fingerprint(network), asdict(workload), facts["machine"]["cpu"], native.status().isa, facts["versions"]]
        )
        self.documents = planted_documents(self.tokenizer, workload.documents, self.tokens)

    def _fitting(self, limit: int) -> int:
        room = limit - self.workload.new_tokens - 160
        if room < 128:
            raise UserError(f"The model reads at most {limit} tokens; measuring a recipe needs about 350.")
        return min(self.workload.tokens, room)

    def _own_blocks(self) -> PreTrainedModel | None:
        """The model with the blocks of its GGUF file, where it has one whose types are known."""
        if locate(self.base.model, packed=True)[1] is None:
            return None
        try:
            return self._load(self.base.model_copy(update={"weights": "packed"}))[0]
        except UserError as error:
            logger.warning("The file's own blocks are not used: %s", error)
            return None

    def context(self, cache_bytes: float, quick: bool) -> SearchContext:
        """The job, as methods are told of it."""
        return SearchContext(self.tokens, int(cache_bytes), quick, self.architecture, self.weight_bits)

    def _load(self, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = recipe.load_model()
        self._held[self.weights(recipe)] = model
        return model, tokenizer

    @staticmethod
    def weights(recipe: Recipe) -> str:
        """What decides which weights lie in memory."""
        facts = [recipe.model, recipe.dtype, recipe.weights, recipe.halves()[0].methods]
        return json.dumps(facts, sort_keys=True, default=str)

    def model(self, recipe: Recipe) -> PreTrainedModel:
        """The model with the recipe's weights. Several are held, so that runs can be interleaved without loading again,
        as long as they and a further one take a quarter of the machine's memory; otherwise one."""
        key = self.weights(recipe)
        if key in self._held:
            self._held[key] = self._held.pop(key)  # the latest one used comes last
        else:
            sizes = [weight_bytes(model) for model in self._held.values()]
            room = psutil.virtual_memory().total // 4 - max(sizes, default=0)
            while self._held and sum(sizes) > room:
                del self._held[next(iter(self._held))], sizes[0]
            self._load(recipe)
        return self._held[key]

    def identity(self, kind: str, number: int, recipe: Recipe, circumstances: Any = None) -> str:
        """Key of one measurement in the journal. Threads do not change what a model says, only how fast."""
        facts = recipe.model_dump(exclude={"model", "threads", "methods"})
        # Every setting, so that a default that changes is measured again.
        facts["methods"] = [[method.name, asdict(method)] for method in recipe.build()]
        if kind != "quality":
            facts["threads"] = recipe.threads or torch.get_num_threads()
        if circumstances is not None:
            facts["circumstances"] = circumstances
        return f"{kind}/{number}/{self._key}/{_digest(facts)}"

    def quality(self, recipe: Recipe, number: int) -> dict[str, Any]:
        """Document `number` read with the recipe: scores of its questions, NLL of what follows, bytes of the cache."""
        identity = self.identity("quality", number, recipe)
        if identity in self.journal:
            return self.journal[identity]
        document = self.documents[number]
        teachers = self._teach(number)
        model = self.model(recipe)
        with recipe.running(model):
            ids, cache = self._read(model, document)
            following = _ids(self.tokenizer, document.following)
            record = {
                "label": recipe.label,
                # One by one: the rows of a batch would share a budget in bytes.
                "scores": [asdict(score(model, self.tokenizer, ids, cache, [teacher])[0]) for teacher in teachers],
                "following": [float(part.mean()) for part in nll_behind(model, cache, following).split(_PART)],
                "cache_bytes": cache_bytes(cache),
                "weight_bytes": weight_bytes(model),
            }
        return self.journal.add(identity, record)

    def _read(self, model: PreTrainedModel, document: Document) -> tuple[torch.Tensor, Cache]:
        ids = document_ids(self.tokenizer, document.text).to(model.device)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return ids, output.past_key_values

    def _teach(self, number: int) -> list[Teacher]:
        if number not in self._teachers:
            model, document = self.model(self.base), self.documents[number]
            ids, full = self._read(model, document)
            questions = document.questions[: self.workload.questions]
            self._teachers[number] = teach(model, self.tokenizer, ids, full, questions, self.workload.answer_tokens)
        return self._teachers[number]

    def timing(self, recipe: Recipe, number: int) -> Timing:
        """Round `number` of the timed runs: `generate` on a document and one question."""
        identity = self.identity("timing", number, recipe)
        if identity not in self.journal:
            model, document = self.model(recipe), self.documents[number % len(self.documents)]
            ids = document_ids(self.tokenizer, document.text)
            ids = torch.cat([ids, question_ids(self.tokenizer, document.questions[0].text)], 1).to(model.device)
            with recipe.running(model):
                time_generation(model, ids[:, -128:], 2)  # first calls allocate and choose kernels
                timing = time_generation(model, ids, self.workload.new_tokens)
            self.journal.add(identity, {"label": recipe.label, **asdict(timing)})
        record = self.journal[identity]
        return Timing(**{key: record[key] for key in Timing.__dataclass_fields__})

    def peak(self, recipe: Recipe) -> int:
        """Peak resident bytes of a fresh process that loads the model and does one timed run."""
        identity = self.identity("peak", 0, recipe)
        if identity not in self.journal:
            ids = document_ids(self.tokenizer, self.documents[0].text)[0].tolist()
            facts = recipe.model_dump()
            peak = peak_memory("lissom.evolve.measure:run_once", facts, ids, self.workload.new_tokens)
            self.journal.add(identity, {"label": recipe.label, "bytes": peak})
        return int(self.journal[identity]["bytes"])

    def loss(self, ours: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> Interval:
        """See `Measured.loss`; bootstrap over questions, and over stretches of the text that follows."""
        pairs = list(zip(ours, base, strict=False))
        answers = paired_bootstrap(
            np.array([s["nll"] for record, _ in pairs for s in record["scores"]]),
            np.array([s["nll"] for _, record in pairs for s in record["scores"]]),
        )
        following = paired_bootstrap(
            np.array([nll for record, _ in pairs for nll in record["following"]]),
            np.array([nll for _, record in pairs for nll in record["following"]]),
        )
        worse = max((answers, following), key=lambda interval: interval.estimate)
        return Interval(*(-math.expm1(-value) for value in (worse.estimate, worse.low, worse.high)))


def run_once(facts: dict[str, Any], ids: list[int], new_tokens: int) -> None:
    """Load a recipe's model and generate once: the work of the process whose memory is measured."""
    recipe = Recipe(**facts)
    model, _ = recipe.load_model()
    with recipe.running(model):
        time_generation(model, torch.tensor([ids]), new_tokens)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"].long()


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]
