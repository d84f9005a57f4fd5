"""Arithmetic that a model wrote, read without ever running it, in bounded time whatever it is."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

LONGEST = 200  # characters of an expression
_DIGITS = 9  # of a number
_DEPTH = 20  # of brackets
_TOKEN = re.compile(r"\s*(?:(\d+)|([-+*/()]))", re.ASCII)


class NotArithmetic(ValueError):
    """The text is no expression of whole numbers, `+ - * /` and brackets, or one beyond the limits."""


class Value(NamedTuple):
    """What an expression comes to.

    Attributes:
        value: exact.
        numbers: that are written in it, in order.
    """

    value: Fraction
    numbers: tuple[int, ...]


def evaluate(text: str) -> Value:
    """The value of an expression such as `3*(5-2)/4`: whole numbers, the four operations, unary minus and brackets.

    Raises:
        NotArithmetic: it is something else, longer than 200 characters, has numbers of more than 9 digits or brackets
            more than 20 deep, or divides by 0.
    """
    if len(text) > LONGEST:
        raise NotArithmetic(f"it is longer than {LONGEST} characters")
    reader = _Reader(_tokens(text))
    value = reader.sum(0)
    if reader.next is not None:
        raise NotArithmetic(f"{reader.next} is one too many")
    return Value(value, tuple(reader.numbers))


def _tokens(text: str) -> list[str]:
    found, place, text = [], 0, text.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise NotArithmetic(f"{text[place]!r} is no part of arithmetic")
        if match[1] and len(match[1]) > _DIGITS:
            raise NotArithmetic(f"a number has more than {_DIGITS} digits")
        found.append(match[1] or match[2])
        place = match.end()
    return found


class _Reader:
    """Recursive descent; how deep it goes is limited by the brackets that are."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place = tokens, 0
        self.numbers: list[int] = []

    @property
    def next(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self, *wanted: str) -> str | None:
        token = self.next
        if token is None or token not in wanted:
            return None
        self.place += 1
        return token

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while (operation := self.take("+", "-")) is not None:
            other = self.product(depth)
            value = value + other if operation == "+" else value - other
        return value

    def product(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while (operation := self.take("*", "/")) is not None:
            other = self.factor(depth)
            if operation == "/" and other == 0:
                raise NotArithmetic("it divides by 0")
            value = value * other if operation == "*" else value / other
        return value

    def factor(self, depth: int) -> Fraction:
        sign = 1
        while self.take("-") is not None:
            sign = -sign
        if self.take("(") is not None:
            if depth >= _DEPTH:
                raise NotArithmetic(f"brackets are more than {_DEPTH} deep")
            value = self.sum(depth + 1)
            if self.take(")") is None:
                raise NotArithmetic("a bracket is not closed")
            return sign * value
        token = self.next
        if token is None or not token.isdigit():
            raise NotArithmetic(f"{'its end' if token is None else token} stands where a number should be")
        self.place += 1
        self.numbers.append(int(token))
        return Fraction(sign * int(token))
