"""One way to say that a word is not among those that are known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, got: object, known: Iterable[str]) -> str:
    """The whole message of an error: "size: got 'smal', expected one of tiny, small; did you mean
    'small'?". `what` names the key, argument or field as the user writes it."""
    words = list(known)
    return f"{what}: got {got!r}, expected one of {', '.join(words)}{did_you_mean(str(got), words)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suffix for an error message: the nearest of the known words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
