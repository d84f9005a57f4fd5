"""Whether a tree search finds more than its tokens would otherwise, and whether a policy that learns of it gets better.

First the puzzle itself, without a language model: which share of problems has a solution that was seen, and that is
extracted, by variant of the search and for each known defect of the published code. Then a small policy that has
learned the format of Countdown: what searches extract before anything is learned, against as many tokens of samples;
and what is learned from their paths, against best-of-N through the same trainer and CISPO, all at as many generated
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lissom.evals.journal import Journal, digest, scope_of
from lissom.evals.policies import Arms, by_arm, first_policy, identity_facts, learn, loaded
from lissom.evals.stats import Interval, mean_interval, paired_bootstrap, signed, verdict
from lissom.rl.sampling import sample
from lissom.rl.tasks import Countdown, CountdownProblem
from lissom.rl.tree_search import (
    Node,
    PolicyWorld,
    SearchConfig,
    SymbolicCountdown,
    TransformersDraws,
    Tree,
    TreeSearch,
    extract,
    root_of,
    terminals,
)
from lissom.rl.tree_search.trainer import DistillConfig
from lissom.rl.world import task_world
from lissom.train.align import AlignConfig, Method
from lissom.train.config import TrainConfig
from lissom.train.warm_start import WarmStart

STAGES = ("puzzle", "policy", "lift", "learning")
OURS, PAPER_SOURCE = "lissom", "A. Tambde, 2026"
SEARCHED, VISITS, UCT, PLAYOUTS = "tree search", "tree search, visits", "tree search, UCT", "tree search, play-outs"
BEST_OF, CISPO = "best of 16", "CISPO, 16 rollouts"
ARMS = (SEARCHED, BEST_OF, CISPO, VISITS, UCT, PLAYOUTS)


class CountedTwice(Tree[Any]):
    """The value of a leaf is stored, and then added: after one visit Q is twice the value."""

    def come_back(self, node: Node[Any], found: float) -> None:
        """See `Tree`."""
        first = node.visits == 0 and node.reward is None
        super().come_back(node, found)
        if first:
            node.total += found


class VirtualVisits(Tree[Any]):
    """A path under way counts as a visit that found 0."""

    def score(self, node: Node[Any], child: Node[Any]) -> float:
        """See `Tree`: with the lowest reward taken back from paths under way."""
        tried = child.visits + child.flying
        lost = -self.config.low * child.flying / tried if tried else 0.0
        return super().score(node, child) + lost


# The published recipe, and what it becomes when one thing is otherwise.
_PUBLISHED = SearchConfig(prior="policy", exploration=0.5, merge=False, wave=16)
VARIANTS: Mapping[str, tuple[SearchConfig, str, type[Tree[Any]]]] = {
    "published recipe": (_PUBLISHED, "dense", VirtualVisits),
    "its leaf counted twice": (_PUBLISHED, "dense", CountedTwice),
    "paths under way as the worst": (_PUBLISHED, "dense", Tree),
    "and solved parts left alone": (replace(_PUBLISHED, close=True), "dense", Tree),
    "and c = 2": (replace(_PUBLISHED, close=True, exploration=2.0), "dense", Tree),
    "and the best for the mean": (replace(_PUBLISHED, close=True, backup="max"), "dense", Tree),
    "rewards of 1 and -1": (_PUBLISHED, "correct", Tree),
    "those, and left alone": (replace(_PUBLISHED, close=True), "correct", Tree),
    "UCT": (replace(_PUBLISHED, rule="uct"), "dense", Tree),
}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        config: of learning; its method, seed, learning rate, prompts and rollouts are the arm's.
        arms: that learn, of `ARMS`.
        seeds: of the order of prompts and of what is drawn, the units of all intervals.
        rate: learning rate of all arms.
        simulations: of a tree of a policy.
        task, policy: what is learned, and what learns.
        held_out: problems that are measured.
        puzzles, budgets: problems without a model, and simulations of each.
        lifted: problems that are searched before anything is learned.
    """

    config: AlignConfig
    arms: Sequence[str]
    seeds: Sequence[int]
    rate: float
    simulations: int = 32
    task: Countdown = Countdown()  # noqa: RUF009
    policy: WarmStart = field(default_factory=WarmStart)
    held_out: int = 200
    puzzles: int = 100
    budgets: Sequence[int] = (64, 256)
    lifted: int = 100


def _learning(tokens: int) -> AlignConfig:
    return AlignConfig(
        steps=10_000, token_budget=tokens, minibatches=2, max_completion_length=24, eval_steps=10_000, save_steps=10_000
    )


_TINY = TrainConfig(steps=4, batch_size=2, context=64, warmup_steps=1, eval_steps=4, save_steps=4, logging_steps=2)
QUICK = Size(
    _learning(2000), (SEARCHED, BEST_OF, CISPO), (0, 1), 1e-4, 4,
    policy=WarmStart(hidden=32, layers=1, heads=2, traces=1000, config=_TINY),
    held_out=8, puzzles=4, budgets=(16,), lifted=4,
)  # fmt: skip
SMALL = Size(_learning(200_000), (SEARCHED, BEST_OF, CISPO), (0, 1, 2), 1e-4, 16, held_out=100, puzzles=40, lifted=50)
DEFAULT = Size(_learning(600_000), ARMS, (0, 1, 2), 1e-4, budgets=(64, 256, 1024))
PAPER = Size(
    replace(_learning(2_000_000_000), max_completion_length=64), ARMS, (0, 1, 2), 5e-6, 1600,
    Countdown(numbers=4, largest=13), WarmStart(hidden=768, layers=12, heads=12, traces=1_000_000), 820,
    budgets=(64, 256, 1600),
)  # fmt: skip


@dataclass(frozen=True)
class Run(Arms):
    """What a check measured.

    Attributes:
        puzzle: by variant and simulations, shares of problems: `seen`, `visits` and `best` (extracted); `sampled` of as
            many random games has `seen` alone.
        policy: `parameters` of the one that all begin with.
        lift: of searches before anything is learned, one record: by problem `searched` (the extracted path is right),
            `mean` and `best` of as many tokens of samples, and `tokens` of each.
        trained: by arm, one record per seed: see `_trained`.
    """

    size: Size
    puzzle: Mapping[str, Mapping[int, Mapping[str, float]]]
    policy: Mapping[str, float]
    lift: Mapping[str, Any]
    trained: Mapping[str, Sequence[Mapping[str, Any]]]

    def lifted(self, base: str) -> Interval:
        """By how much more problems searches solve than `mean`, a sample, or `best`, the best of as many tokens."""
        return paired_bootstrap(np.array(self.lift["searched"], float), np.array(self.lift[base], float))


def run(
    model: str | None,
    size: Size,
    journal: Path,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Run:
    """The whole check; a run that was stopped goes on behind the last arm and seed in `journal`.

    Args:
        model: folder of a policy in characters that all arms begin with; None: one is trained.
    """
    known = Journal(journal)
    puzzle = _puzzles(size, known, partial(progress, STAGES[0]))
    folder, facts = first_policy(model, size.task, size.policy, journal, partial(progress, STAGES[1]))
    policy = identity_facts(folder, size.task, size.policy)
    identity = f"lift/{scope_of(policy, size.lifted, size.simulations)}"
    lift = known[identity] if identity in known else known.add(identity, _lift(size, folder))
    progress(STAGES[2], 1, 1)

    def learning(arm: str, seed: int) -> tuple[str, tuple[Any, ...]]:
        own = asdict(config_of(size, arm, seed)), str(settings_of(size, arm)), policy, size.held_out
        return f"{arm}/{seed}/{scope_of(own)}", (arm, seed, size, folder)

    trained = by_arm(size.arms, size.seeds, learning, _trained, known, partial(progress, STAGES[3]))
    return Run(size, puzzle, facts, lift, trained)


def _puzzles(
    size: Size, known: Journal, progress: Callable[[int, int], None]
) -> dict[str, dict[int, dict[str, float]]]:
    problems = Countdown(numbers=4).problems("train", size.puzzles)
    found: dict[str, dict[int, dict[str, float]]] = {}
    total, done = (len(VARIANTS) + 1) * len(size.budgets), 0
    for name in ("sampled", *VARIANTS):
        found[name] = {}
        for budget in size.budgets:
            identity = f"puzzle/{name}/{budget}/{digest(size.puzzles, VARIANTS.get(name))}"
            if identity not in known:
                own = _sampled(problems, budget) if name == "sampled" else searched(problems, budget, *VARIANTS[name])
                known.add(identity, own)
            found[name][budget] = {what: share for what, share in known[identity].items() if what != "identity"}
            done += 1
            progress(done, total)
    return found


def searched(
    problems: Sequence[CountdownProblem], simulations: int, config: SearchConfig, reward: Any, kind: type[Tree[Any]]
) -> dict[str, float]:
    """Shares of problems whose solution a search has seen, and extracts."""
    search = TreeSearch(SymbolicCountdown(reward), replace(config, simulations=simulations), kind)
    trees = search([root_of(problem) for problem in problems])

    def right(node: Node[Any]) -> bool:
        return node.state.last == node.state.target

    seen = [any(right(node) and node.visits for node in tree.root.below()) for tree in trees]
    ends = {how: [right(extract(tree, how)[-1]) for tree in trees] for how in ("visits", "best")}  # type: ignore[arg-type]
    return {"seen": float(np.mean(seen))} | {how: float(np.mean(own)) for how, own in ends.items()}


def _sampled(problems: Sequence[CountdownProblem], games: int) -> dict[str, float]:
    world, random = SymbolicCountdown("correct"), np.random.default_rng(0)
    seen = [any(world._play(root_of(problem), random) == 1 for _ in range(games)) for problem in problems]
    return {"seen": float(np.mean(seen))}


def _lift(size: Size, folder: str) -> dict[str, Any]:
    """Searches by the policy as it is, with play-outs as values, and samples of as many tokens."""
    model, tokenizer = loaded(folder)
    task, problems = size.task, size.task.problems("test", size.lifted, seed=0)
    prompts = [task.prompt(problem) for problem in problems]
    world = PolicyWorld(
        TransformersDraws(model, tokenizer), tokenizer, lambda n, text: task.correct(problems[n], text), 16, 24, 0.0
    )
    config = SearchConfig(simulations=size.simulations, prior="uniform", close=True, low=0.0, high=1.0)
    trees = TreeSearch(world, config)(world.roots(prompts))
    found = [bool(ends) and ends[0].reward == 1 for ends in (terminals(tree, 1) for tree in trees)]
    each = world.generated / len(trees)
    few = sample(model, tokenizer, prompts, 16, 24)
    length = float(np.mean([len(own) for rows in few for own in rows]))
    count = max(1, round(each / length))
    written = sample(model, tokenizer, prompts, count, 24, seed=1)
    right = [
        [task.correct(problem, text) for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
        for problem, rows in zip(problems, written, strict=True)
    ]
    return {
        "searched": [float(own) for own in found], "mean": [float(np.mean(own)) for own in right],
        "best": [float(max(own)) for own in right], "tokens": each, "samples": count,
    }  # fmt: skip


def settings_of(size: Size, arm: str) -> DistillConfig | None:
    """What an arm searches and learns; None: nothing, it is TRL's own."""
    search = SearchConfig(simulations=size.simulations, prior="uniform", close=True)
    known = {
        SEARCHED: DistillConfig(search, step_tokens=16),
        VISITS: DistillConfig(search, "visits", step_tokens=16),
        UCT: DistillConfig(replace(search, rule="uct"), step_tokens=16),
        PLAYOUTS: DistillConfig(search, value="playouts", step_tokens=16),
        BEST_OF: DistillConfig(
            SearchConfig(simulations=1, children=16, prior="uniform"), boundary=None, step_tokens=24, temperature=1.0
        ),
    }
    return known.get(arm)


def config_of(size: Size, arm: str, seed: int) -> AlignConfig:
    """An arm's steps: prompts of trees, or of groups, so that each has some dozens of completions to learn from."""
    method: Method = "grpo" if arm == CISPO else "tree-distill"
    few = 2 if size is QUICK else 16
    prompts, group = (few, 16) if arm == CISPO else (2 * few, 2)
    return replace(
        size.config, method=method, prompts=prompts, num_generations=group, seed=seed, learning_rate=size.rate,
        loss_type="cispo",
    )  # fmt: skip


def _trained(arm: str, seed: int, size: Size, folder: str) -> dict[str, Any]:
    """One run.

    Returns:
        `seed`, `mean` and `best` at the end, `before` and `best before`, `tokens`, `steps`, and `reward` of the found
        completions in order.
    """
    config = config_of(size, arm, seed)
    world = task_world(size.task, 4000, size.held_out, "dense", seed)
    learned = learn(folder, config, world, settings_of(size, arm))
    first, last = learned.curve[0], learned.curve[-1]
    return {
        "seed": seed, "mean": last[1], "best": last[2], "before": first[1], "best before": first[2], "tokens": last[0],
        "steps": learned.steps[-1]["step"],
        "reward": [entry["reward"] for entry in learned.steps if "reward" in entry],
    }  # fmt: skip


def verdicts(run: Run) -> list[tuple[str, str, str]]:
    """Each claim in words, with its source and what it comes to."""
    budget = max(run.size.budgets)
    published, games = run.puzzle["published recipe"][budget]["visits"], run.puzzle["sampled"][budget]["seen"]
    found = [
        (
            f"puzzle: the published recipe extracts more ({published:.0%}) than {budget} games see ({games:.0%})",
            PAPER_SOURCE,
            "holds" if published > games else "does not hold",
        )
    ]
    for base, words in (("mean", "a sample"), ("best", "the best of as many tokens of samples")):
        gap = run.lifted(base)
        sentence = f"before learning a search solves more than {words}: {signed(gap)}"
        found.append((sentence, PAPER_SOURCE, verdict([-gap], strict=True)))
    gain = mean_interval(run.final(SEARCHED, "mean") - run.final(SEARCHED, "before"))
    found.append((f"learned from trees: mean@K rises: {signed(gain)}", PAPER_SOURCE, verdict([-gain], strict=True)))
    for base in (BEST_OF, CISPO):
        if base in run.trained:
            gap = run.gap(SEARCHED, base, "mean")
            sentence = f"learned from trees, at as many tokens: mean@K is above that of {base}: {signed(gap)}"
            found.append((sentence, PAPER_SOURCE, verdict([-gap], strict=True)))
    return found
