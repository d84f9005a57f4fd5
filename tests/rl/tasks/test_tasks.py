from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hostile import HOSTILE
from hypothesis import given
from hypothesis import strategies as st

from lissom.errors import UserError
from lissom.rl.rewards import TaskReward, Watched, load_reward, text_of
from lissom.rl.tasks import TASKS, Countdown, CountdownProblem, TwoDigitArithmetic
from lissom.rl.tasks.characters import CHARACTERS, character_tokenizer
from lissom.rl.tasks.countdown import moves, reachable

EVERY = [task(style=style) for task in TASKS.values() for style in ("steps", "chat")]


def brute_force(numbers: tuple[int, ...]) -> set[int]:
    """Every value by every order, operation and grouping from the left or of pairs, with the game's rules."""
    found: set[int] = set()

    def go(left: tuple[Fraction, ...]) -> None:
        for one, other, *rest in permutations(left):
            results = [one + other, one * other]
            if one >= other:
                results.append(one - other)
            if other and (one / other).denominator == 1:
                results.append(one / other)
            for result in results:
                found.add(int(result))
                if rest:
                    go((result, *rest))

    go(tuple(map(Fraction, numbers)))
    return found


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4).map(sorted).map(tuple))
def test_what_can_be_reached(numbers):
    assert reachable(numbers) == brute_force(numbers)


@pytest.mark.parametrize("numbers", [(1, 1), (2, 8), (3, 3, 9)])
def test_moves_are_the_legal_ones(numbers):
    for move, left in moves(numbers):
        assert Fraction(move.result) == {
            "+": Fraction(move.left + move.right), "-": Fraction(move.left - move.right),
            "*": Fraction(move.left * move.right), "/": Fraction(move.left, move.right or 1),
        }[move.operation]  # fmt: skip
        assert Counter(left) == Counter(numbers) - Counter([move.left, move.right]) + Counter([move.result])


@pytest.mark.parametrize("task", [Countdown(), Countdown(numbers=4), TwoDigitArithmetic()])
def test_no_multiset_is_trained_on_and_measured(task):
    def sets(split: str) -> set[tuple[int, ...]]:
        return {
            tuple(sorted(getattr(p, "numbers", None) or (p.left, p.right))) for p in task.problems(split, 3000, seed=3)
        }

    train, test = sets("train"), sets("test")
    assert train and test and not train & test
    assert 0.1 < len(test) / len(train | test) < 0.3


@pytest.mark.parametrize("task", EVERY, ids=lambda task: f"{task.name}-{task.style}")
def test_problems_are_the_same_for_a_seed_and_others_for_another(task):
    assert task.problems("test", 50, 1) == task.problems("test", 50, 1) != task.problems("test", 50, 2)


def test_countdown_problems_do_not_repeat_as_long_as_there_are_others():
    problems = Countdown().problems("train", 1500)
    assert len({(tuple(sorted(p.numbers)), p.target) for p in problems}) == 1500
    assert len(Countdown(numbers=2, largest=3).problems("test", 200)) == 200


@pytest.mark.parametrize(
    "task", [Countdown(right=1), Countdown(numbers=5, right=1), TwoDigitArithmetic("+-*", right=1)]
)
def test_right_traces_are_right(task):
    random = np.random.default_rng(0)
    for problem in task.problems("train", 200):
        trace = task.trace(problem, random)
        assert task.correct(problem, trace) == task.dense(problem, trace) == 1
        assert len(trace) <= task.longest or task != Countdown(right=1)


def test_random_traces_are_legal_and_seldom_right():
    random, task = np.random.default_rng(0), Countdown(right=0)
    problems = task.problems("train", 1000)
    traces = [task.trace(problem, random) for problem in problems]
    assert all(task.reached(problem, trace) is not None for problem, trace in zip(problems, traces, strict=True))
    assert 0.01 < np.mean([task.correct(p, t) for p, t in zip(problems, traces, strict=True)]) < 0.1


P = CountdownProblem((3, 7, 5), 22)


@pytest.mark.parametrize(
    ("completion", "dense"),
    [
        ("3*5=15;7 15\n7+15=22", 1),
        ("5*3=15;7 15\n15+7=22", 1),  # in another order
        ("3*5=15;7 15", 1 - 2 * 7 / 22),  # it may stop
        ("3*5=15;15 7\n7+15=22", -0.9),  # what is left, out of order
        ("3*5=16;7 16\n7+16=23", -0.9),  # a wrong product
        ("3*5=15;7 15\n7+16=23", -0.9),  # a number that is not there
        ("3*3=9;5 7 9", -0.9),  # twice
        ("7-3=4;4 5\n4/5=0", -0.9),  # it does not come out even
        ("3-7=-4;-4 5", -1),  # below 0
        ("3*5=15;7 15\n7+15=22\n", -0.9),  # a line too many
        ("3*5=15;7 15\n7+15=22;22", -0.9),
        ("22", -1),
        ("", -1),
        ("3*5=15", -0.9),  # without what is left
        ("3*7=21;5 21\n5+21=26", 1 - 2 * 4 / 22),
    ],
)
def test_grades_of_steps(completion, dense):
    assert Countdown().dense(P, completion) == pytest.approx(dense)
    assert Countdown().correct(P, completion) == (dense == 1)


@pytest.mark.parametrize(
    ("completion", "dense"),
    [
        ("<answer>3*5+7</answer>", 1),
        ("I think <answer>1</answer> no: <answer> 7 + (5*3) </answer>.", 1),
        ("<answer>22</answer>", -0.9),  # a number that is not there
        ("<answer>3*5+7+3-3</answer>", -0.9),
        ("<answer>7/3</answer>", -0.9),
        ("<answer>3*5</answer>", 1 - 2 * 7 / 22),
        ("3*5+7", -1),
        ("<answer>3*5+7", -1),
        ("<answer>three</answer>", -1),
    ],
)
def test_grades_of_expressions(completion, dense):
    assert Countdown(style="chat").dense(P, completion) == pytest.approx(dense)


def test_a_target_of_nothing():
    problem = CountdownProblem((2, 2), 0)
    assert Countdown().dense(problem, "2-2=0") == 1
    assert Countdown().dense(problem, "2+2=4") == -1


def test_grades_of_arithmetic():
    problem = TwoDigitArithmetic("-").problems("test", 1)[0]
    assert problem.left >= problem.right
    steps, chat = TwoDigitArithmetic(), TwoDigitArithmetic(style="chat")
    assert steps.correct(problem, str(problem.target)) == 1
    assert chat.correct(problem, f"<answer>{problem.target}</answer>") == 1
    assert steps.dense(problem, f"{problem.left}-{problem.right}") == -0.9  # the question is no answer
    assert steps.dense(problem, "a") == -1


@pytest.mark.parametrize("task", EVERY, ids=lambda task: f"{task.name}-{task.style}")
def test_hostile_completions_are_wrong_at_once(task):
    problem = task.problems("test", 1)[0]
    begin = time.process_time()
    for text in HOSTILE:
        for completion in (text, f"<answer>{text}</answer>", f"3+5={text}", "<answer>" * 1000 + text):
            assert task.correct(problem, completion) == 0
            assert -1 <= task.dense(problem, completion) < 1
    assert time.process_time() - begin < 5  # bounded: a power or a recursion would take for ever


@given(st.text(alphabet=CHARACTERS, max_size=60))
def test_the_tokenizer_keeps_every_character(text):
    tokenizer = character_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((Countdown, own) for own in ({"numbers": 1}, {"largest": 1}, {"right": 1.5}, {"style": "x"})),
        *((TwoDigitArithmetic, own) for own in ({"operations": "+^"}, {"operations": ""}, {"right": -1.0})),
    ],
)
def test_settings_out_of_range(kind, settings):
    with pytest.raises(UserError):
        kind(**settings)


def test_rewards_of_a_task():
    task = Countdown()
    problems = task.problems("train", 3)
    right = [Countdown(right=1).trace(problem, np.random.default_rng(0)) for problem in problems]
    assert TaskReward(task, problems)(right, index=[0, 1, 2]) == [1, 1, 1]
    messages = [[{"role": "assistant", "content": right[2]}]]
    assert TaskReward(task, problems, "correct")(messages, index=[2], other=[1]) == [1]
    assert text_of([]) == text_of([{"role": "assistant", "content": None}]) == ""


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda completions, **_: 1 / 0, "raised ZeroDivisionError"),
        (lambda completions, **_: [float("nan")] * 2, "returned nan"),
        (lambda completions, **_: [0.0], "returned 1 rewards for 2"),
        (lambda completions, **_: None, "returned NoneType"),
        (lambda completions, **_: ["good", "bad"], "returned list: expected"),
        (lambda completions, **_: [0.5, 3.0], "returned 3: expected 0 to 1"),
    ],
)
def test_a_reward_function_with_a_mistake(function, complaint):
    with pytest.raises(UserError, match=complaint):
        Watched(function, 0, 1)(["a", "b"], prompts=["", ""])


def test_a_reward_function_without():
    assert Watched(lambda completions, **_: [None, 2])(["a", "b"]) == [None, 2.0]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("json", "expected package.module:function"), ("no_such_module:f", "cannot be imported"),
        ("json:nothing", "has no function"), ("json:__name__", "no function"),
    ],
)  # fmt: skip
def test_names_of_reward_functions(name, complaint):
    with pytest.raises(UserError, match=complaint):
        load_reward(name)


def test_a_reward_function_by_name():
    assert load_reward("math:sqrt")(4) == 2
