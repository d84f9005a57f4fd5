"""A language model as a world to search: states are token prefixes, steps are what it writes up to a boundary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lissom.errors import UserError
from lissom.rl.sampling import prompt_ids
from lissom.rl.tasks.task import Prompt
from lissom.rl.tree_search.draws import Draws, Prefix
from lissom.rl.tree_search.tree import Step

Grade = Callable[[int, str], float]


class Written(NamedTuple):
    """A prompt and what was written so far.

    Attributes:
        problem: which one it is, for the grader.
        tokens: of both.
        begin: tokens of the prompt.
    """

    problem: int
    tokens: Prefix
    begin: int

    @property
    def completion(self) -> Prefix:
        """What was written."""
        return self.tokens[self.begin :]


@dataclass
class PolicyWorld:
    """See `World`.

    Attributes:
        draws: of continuations.
        tokenizer: that makes text of them for the grader.
        grade: called with a problem's number and a whole completion; once for each path.
        step_tokens: the longest step. A longer one is none: its path ends with the lowest reward.
        completion_tokens: the longest completion. A path that is not ended by then ends with the lowest reward.
        low: it.
        values: of prefixes; None: by `playouts`.
        playouts: completions whose mean reward is a state's value, where there are no `values`.
        generated: tokens that were drawn, play-outs too.
    """

    draws: Draws
    tokenizer: PreTrainedTokenizerBase
    grade: Grade
    step_tokens: int = 64
    completion_tokens: int = 512
    low: float = -1.0
    values: Callable[[Sequence[Prefix]], Sequence[float]] | None = None
    playouts: int = 1
    generated: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if min(self.step_tokens, self.completion_tokens, self.playouts) < 1:
            raise UserError("Expected steps and completions of at least one token, and at least one play-out.")

    def roots(self, prompts: Sequence[Prompt]) -> list[Written]:
        """States to begin with, one for each prompt; their numbers are the places in `prompts`."""
        read = [tuple(prompt_ids(self.tokenizer, prompt)) for prompt in prompts]
        return [Written(number, ids, len(ids)) for number, ids in enumerate(read)]

    def expand(self, states: Sequence[Written], counts: Sequence[int], seed: int) -> list[list[Step[Written]]]:
        """Steps that the policy writes."""
        drawn = self.draws([state.tokens for state in states], counts, self.step_tokens, seed)
        found = []
        for state, own in zip(states, drawn, strict=True):
            steps = []
            for draw in own:
                after = state._replace(tokens=state.tokens + draw.tokens)
                self.generated += len(draw.tokens)
                too_long = draw.cut or (not draw.ended and len(after.completion) >= self.completion_tokens)
                reward = self.low if too_long else self._graded(after) if draw.ended else None
                text = self.tokenizer.decode(draw.tokens, skip_special_tokens=True)
                steps.append(Step(draw.tokens, after, draw.logp, draw.tokens, reward, text))
            found.append(steps)
        return found

    def evaluate(self, states: Sequence[Written], seed: int) -> list[float]:
        """By `values`, or by completions to their end."""
        if self.values is not None:
            return [float(value) for value in self.values([state.tokens for state in states])]
        ended: list[list[float]] = [[] for _ in states]
        going = [(number, state) for number, state in enumerate(states) for _ in range(self.playouts)]
        while going:
            seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**63  # another one for each step
            drawn = self.draws([state.tokens for _, state in going], [1] * len(going), self.step_tokens, seed)
            left = []
            for (number, state), (draw,) in zip(going, drawn, strict=True):
                after = state._replace(tokens=state.tokens + draw.tokens)
                self.generated += len(draw.tokens)
                if draw.ended:
                    ended[number].append(self._graded(after))
                elif draw.cut or len(after.completion) >= self.completion_tokens:
                    ended[number].append(self.low)
                else:
                    left.append((number, after))
            going = left
        return [sum(rewards) / len(rewards) for rewards in ended]

    def _graded(self, state: Written) -> float:
        return float(self.grade(state.problem, self.tokenizer.decode(state.completion, skip_special_tokens=True)))
