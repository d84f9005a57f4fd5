"""The one exception that stands for a user's mistake."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the caller gave is wrong: the message says what was given, what was expected, what to do.

    It is a `ValueError`, so that library users catch what they expect; the command line prints the sentence
    and exits with code 2.
    """
