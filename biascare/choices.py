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
    near = nearest(word, known)
    return "" if near is None else f"; did you mean {near!r}?"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a mistyped one most likely means, if any is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return close[0] if close else None
