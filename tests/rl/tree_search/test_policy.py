"""The language model as a world: draws, log probabilities, ends, values; and a search over it."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, tiny_model

from lissom.errors import UserError
from lissom.rl.tasks import Countdown
from lissom.rl.tasks.characters import character_tokenizer
from lissom.rl.tree_search import (
    Drawn,
    PolicyWorld,
    SearchConfig,
    TransformersDraws,
    TreeSearch,
    ValueHead,
    VLLMDraws,
    Written,
    extract,
    values_of,
)

TOKENIZER = character_tokenizer()
NEWLINE = TOKENIZER("\n")["input_ids"][0]
END = TOKENIZER.eos_token_id
PREFIXES = [tuple(TOKENIZER(text)["input_ids"]) for text in ("3 5 7>22:", "1 2>3:", "9 9 9 9>81:9*9=81")]


def model_of(architecture):
    return tiny_model(architecture, vocab_size=len(TOKENIZER), initializer_range=0.05)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_are_the_models_own(architecture):
    model = model_of(architecture)
    drawn = TransformersDraws(model, TOKENIZER)(PREFIXES, [3, 1, 2], 9, seed=1)
    assert [len(own) for own in drawn] == [3, 1, 2]
    for prefix, own in zip(PREFIXES, drawn, strict=True):
        for draw in own:
            ids = torch.tensor([[*prefix, *draw.tokens]])
            logps = model(ids).logits[0].double().log_softmax(1)
            expected = sum(float(logps[len(prefix) - 1 + n, token]) for n, token in enumerate(draw.tokens))
            assert draw.logp == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_likeliest_is_what_generate_takes(architecture):
    model = model_of(architecture)
    drawn = TransformersDraws(model, TOKENIZER, boundary=None, temperature=0)(PREFIXES, [2, 1, 1], 8, seed=0)
    for prefix, own in zip(PREFIXES, drawn, strict=True):
        out = model.generate(
            torch.tensor([prefix]), max_new_tokens=8, do_sample=False, eos_token_id=END, pad_token_id=0
        )
        assert all(draw.tokens == tuple(out[0, len(prefix) :].tolist()) for draw in own)


def test_steps_end_at_boundaries_and_ends_and_are_cut():
    draws = TransformersDraws(model_of("llama"), TOKENIZER, temperature=1.5)
    drawn = [draw for own in draws([PREFIXES[0]] * 4, [60] * 4, 12, seed=3) for draw in own]
    kinds = {"boundary": 0, "end": 0, "cut": 0}
    for draw in drawn:
        assert 1 <= len(draw.tokens) <= 12
        assert not {NEWLINE, END} & set(draw.tokens[:-1])
        last = draw.tokens[-1]
        assert draw.ended == (last == END)
        assert draw.cut == (last not in (NEWLINE, END))
        assert not draw.cut or len(draw.tokens) == 12
        kinds["end" if draw.ended else "cut" if draw.cut else "boundary"] += 1
    assert all(kinds.values())


def test_the_seed_decides_and_padding_does_not():
    model = model_of("llama")
    draws = TransformersDraws(model, TOKENIZER)
    assert draws(PREFIXES, [4] * 3, 6, 5) == draws(PREFIXES, [4] * 3, 6, 5) != draws(PREFIXES, [4] * 3, 6, 6)
    greedy = TransformersDraws(model, TOKENIZER, temperature=0)
    together, alone = greedy(PREFIXES, [1] * 3, 6, 0), [greedy([prefix], [1], 6, 0)[0] for prefix in PREFIXES]
    assert [[d.tokens for d in own] for own in together] == [[d.tokens for d in own] for own in alone]
    small = TransformersDraws(model, TOKENIZER, temperature=0, batch_size=2)(PREFIXES, [3, 2, 1], 6, 0)
    assert [len(own) for own in small] == [3, 2, 1]
    assert [own[0].tokens for own in small] == [own[0].tokens for own in together]


def test_draws_are_as_likely_as_the_model_says():
    model = model_of("llama")
    drawn = TransformersDraws(model, TOKENIZER, boundary=None, temperature=0.8)([PREFIXES[1]], [20_000], 1, 0)[0]
    expected = (model(torch.tensor([PREFIXES[1]])).logits[0, -1] / 0.8).softmax(0)
    counts = np.bincount([draw.tokens[0] for draw in drawn], minlength=len(TOKENIZER)) / 20_000
    assert np.abs(counts - expected.detach().numpy()).max() < 0.015


def test_a_boundary_that_no_token_has():
    with pytest.raises(UserError, match="No token"):
        TransformersDraws(model_of("llama"), TOKENIZER, boundary="</step>")(PREFIXES, [1] * 3, 4, 0)


class Scripted:
    """Draws what it is told to, in turn."""

    def __init__(self, *texts):
        self.texts, self.calls = list(texts), []

    def __call__(self, prefixes, counts, most, seed):
        self.calls.append((list(prefixes), list(counts), most, seed))
        return [[self._next(most) for _ in range(count)] for count in counts]

    def _next(self, most):
        text = self.texts.pop(0)
        ids = TOKENIZER(text.removesuffix("$"))["input_ids"] + [END] * text.endswith("$")
        cut = len(ids) > most or not (text.endswith("$") or "\n" in text)
        return Drawn(tuple(ids[:most]), -1.0, text.endswith("$") and not cut, cut)


def world(*texts, **options):
    graded = []

    def grade(problem, text):
        graded.append((problem, text))
        return 1.0 if text == "3*5=15;7 15\n7+15=22" else -0.5

    return PolicyWorld(Scripted(*texts), TOKENIZER, grade, **options), graded


def test_ends_are_graded_once_with_the_whole_completion():
    made, graded = world("3*5=15;7 15\n", "7+15=22$", "7*15=105$")
    (root,) = made.roots(["3 5 7>22:"])
    ((first,),) = made.expand([root], [1], 0)
    assert first.reward is None and first.state.completion == first.tokens
    ((right, wrong),) = made.expand([first.state], [2], 0)
    assert (right.reward, wrong.reward) == (1.0, -0.5)
    assert graded == [(0, "3*5=15;7 15\n7+15=22"), (0, "3*5=15;7 15\n7*15=105")]
    assert made.generated == sum(map(len, (first.tokens, right.tokens, wrong.tokens)))


def test_a_step_that_is_cut_is_no_ordinary_step():
    """In the published code it is an edge like any other."""
    made, graded = world("1+1=2;22222222222222222222", "1+2=3;5 7\n", step_tokens=10, completion_tokens=12, low=-2.0)
    (root,) = made.roots(["3 5 7>22:"])
    ((cut, whole),) = made.expand([root], [2], 0)
    assert cut.reward == -2.0 and whole.reward is None and not graded
    long, _ = world("1+2=3;5 7\n", step_tokens=10, completion_tokens=10, low=-2.0)
    assert long.expand([root], [1], 0)[0][0].reward == -2.0  # it has no room left to end in


def test_values_by_play_outs():
    made, graded = world("3*5=15;7 15\n", "1$", "7+15=22$", playouts=2)
    (root,) = made.roots(["3 5 7>22:"])
    assert made.evaluate([root], 0) == [(1.0 - 0.5) / 2]
    assert len(graded) == 2 and made.generated == 12 + 2 + 8
    seeds = [call[3] for call in made.draws.calls]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_are_read_at_the_last_token(architecture):
    model = model_of(architecture)
    torch.manual_seed(0)
    head = ValueHead(64, -0.9, 1.0)
    found = values_of(model, head, PREFIXES, 0, batch_size=2)
    for prefix, value in zip(PREFIXES, found, strict=True):
        states = model(torch.tensor([prefix]), output_hidden_states=True).hidden_states[-1][0, -1]
        hidden = states.detach().double().numpy()
        for layer in (0, 2, 4):
            weight, bias = (head.layers[layer].get_parameter(n).detach().double().numpy() for n in ("weight", "bias"))
            hidden = weight @ hidden + bias
            hidden = np.maximum(hidden, 0) if layer < 4 else hidden
        assert value == pytest.approx(-0.9 + (np.tanh(hidden[0]) + 1) / 2 * 1.9, abs=1e-4)


def test_a_value_head_is_saved_with_the_policy(tmp_path):
    head = ValueHead(16, -3.0, 2.0)
    head.save(tmp_path)
    again = ValueHead.load(tmp_path)
    states = torch.randn(5, 16)
    assert torch.equal(head(states), again(states))
    assert (again.low, again.high) == (-3.0, 2.0)
    (tmp_path / "value_head.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        ValueHead.load(tmp_path)
    with pytest.raises(UserError, match="has no"):
        ValueHead.load(tmp_path / "elsewhere")


def test_a_search_over_a_policy_is_the_same_for_a_seed():
    model, task = model_of("llama"), Countdown()
    problems = task.problems("train", 3)
    found = []
    for _ in range(2):
        made = PolicyWorld(
            TransformersDraws(model, TOKENIZER), TOKENIZER, lambda n, text: task.dense(problems[n], text), 12, 30
        )
        trees = TreeSearch(made, SearchConfig(simulations=12, depth=3))(made.roots([task.prompt(p) for p in problems]))
        found.append([[node.state for node in extract(tree)] for tree in trees])
        assert made.generated >= sum(tree.generated for tree in trees) > 0
        assert all(node.flying == 0 for tree in trees for node in tree.root.below())
    assert found[0] == found[1]
    assert isinstance(found[0][0][0], Written)


def test_vllm_is_asked_for_what_is_needed(monkeypatch):
    """With a stand-in for the engine: what is asked, and what is made of its answers."""
    asked = {}

    class Parameters:
        def __init__(self, **options):
            self.__dict__.update(options)

    class Engine:
        def generate(self, prompts, settings, use_tqdm):
            asked.update(prompts=prompts, settings=settings)
            token = types.SimpleNamespace(logprob=-0.5)
            rows = [((5, NEWLINE), "stop"), ((5, END), "stop"), ((5, 6, 7), "length")]
            outputs = [
                types.SimpleNamespace(token_ids=ids, logprobs=[{i: token} for i in ids], finish_reason=why)
                for ids, why in rows
            ]
            return [types.SimpleNamespace(outputs=outputs) for _ in prompts]

    module = types.ModuleType("vllm")
    module.SamplingParams, module.TokensPrompt = Parameters, dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    drawn = VLLMDraws(Engine(), (END,))(PREFIXES[:2], [3, 3], 7, seed=11)
    assert drawn[0] == [
        Drawn((5, NEWLINE), -1.0, False, False),
        Drawn((5, END), -1.0, True, False),
        Drawn((5, 6, 7), -1.5, False, True),
    ]
    assert [own.seed for own in asked["settings"]] == [11, 12]
    assert all((own.n, own.max_tokens, own.stop) == (3, 7, ["\n"]) for own in asked["settings"])
    assert asked["prompts"][0]["prompt_token_ids"] == list(PREFIXES[0])
