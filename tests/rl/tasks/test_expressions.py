from __future__ import annotations

import ast
import operator
import time
from contextlib import suppress
from fractions import Fraction

import pytest
from hostile import HOSTILE
from hypothesis import given
from hypothesis import strategies as st

from lissom.rl.tasks import NotArithmetic, evaluate

_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def oracle(text: str) -> Fraction:
    """By Python's own parser."""

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand)
        assert isinstance(node, ast.Constant)
        return Fraction(node.value)

    return value(ast.parse(text, mode="eval").body)


def texts() -> st.SearchStrategy[str]:
    return st.recursive(
        st.integers(0, 99).map(str),
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join),
            inner.map(lambda text: f"({text})"),
            inner.map(lambda text: f"-{text}"),
            inner.map(lambda text: f" {text} "),
        ),
        max_leaves=12,
    )


@given(texts())
def test_against_pythons_parser(text):
    if len(text) > 200 or text.count("(") > 20:
        return
    try:
        expected = oracle(text.strip())
    except ZeroDivisionError:
        with pytest.raises(NotArithmetic, match="divides by 0"):
            evaluate(text)
        return
    found = evaluate(text)
    assert found.value == expected
    written = [node.value for node in ast.walk(ast.parse(text.strip())) if isinstance(node, ast.Constant)]
    assert sorted(found.numbers) == sorted(written)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_arithmetic_is_refused_at_once(text):
    begin = time.process_time()
    with pytest.raises(NotArithmetic):
        evaluate(text)
    assert time.process_time() - begin < 1  # bounded, however long it is: a power or a recursion would take for ever


@given(st.text(max_size=250))
def test_any_text_ends(text):
    with suppress(NotArithmetic):
        evaluate(text)
