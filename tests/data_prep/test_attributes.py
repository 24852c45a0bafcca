"""Sex and age as tables and headers spell them."""

from __future__ import annotations

import pytest

from data_prep.pipeline.attributes import UNREADABLE_AGE, UNREADABLE_SEX, age_of, person_of


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("61", 61.0), ("61.0", 61.0), (" 0.5 ", 0.5), ("0", 0.0), ("90+", 90.0), ("90.0+", 90.0),
        ("045Y", 45.0), ("6M", 0.5), ("018m", 1.5), ("052W", 0.9966), ("010D", 0.0274),
        ("", None), ("NaN", None), ("unknown", None), ("-", None),
    ],
)  # fmt: skip
def test_an_age_has_one_meaning_in_every_spelling(text: str, years: float | None) -> None:
    assert age_of(text) == (None if years is None else pytest.approx(years, abs=1e-3))


@pytest.mark.parametrize("text", ["1954", "forty", "-3", "45-50", "045YM", "1e1", "131Y", "aged"])
def test_what_cannot_be_an_age_is_unreadable_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="age unreadable") as caught:
        age_of(text)
    assert str(caught.value) == UNREADABLE_AGE


def test_a_person_keeps_the_attribute_that_can_be_read() -> None:
    assert person_of("Female", "045Y") == ("F", 45.0, ())
    assert person_of("Mrs Miller", "90+") == (None, 90.0, (UNREADABLE_SEX,))
    assert person_of("O", "x") == (None, None, (UNREADABLE_AGE,))
