"""The audit's comparisons on the embedded data's patients, without and with each planted bias.

The table in docs/EXPERIMENTS.md is printed by `python tests/evaluation/planted_rows.py`.
"""

from __future__ import annotations

import pytest

from biascare.evaluation.audit.rows import METRICS
from data_prep.embedded.tables import EFFECTS
from tests.evaluation.planted_rows import PLANTED, rows, study


def test_every_planted_effect_is_looked_for_and_the_family_is_that_of_an_audit() -> None:
    planted = {(effect.kind, effect.attribute) for effect in EFFECTS}
    assert planted == {(h.bias, h.attribute) for h in PLANTED.values()}
    names = [measured.name for measured in rows(0, "none")]
    assert names == [
        name for name, m in METRICS.items() if m.primary and m.unit in ("masks", "answers")
    ]


def test_noise_in_old_patients_is_found_and_nothing_where_nothing_is() -> None:
    counts = study(range(3), "small", 0.25, 499)
    assert counts["noise from 60 years on"] == 3
    assert counts["false alarm, p_case_mix_holm"] == 0


@pytest.mark.slow
def test_a_hundred_unbiased_data_sets_raise_an_alarm_as_often_as_was_allowed() -> None:
    counts = study(range(100), "small", 0.6, 499)
    print(counts)
    # The 99.9th percentile of a binomial of 100 at 0.05.
    assert max(counts[f"false alarm, {key}"] for key in ("p_holm", "p_case_mix_holm")) <= 12
    assert counts["noise from 60 years on"] >= 90
    assert counts["findings rarer in women's training images"] >= 90
    # Eleven patients of the demo's test split are of group C: a test that is told where to look
    # misses it too, and docs/EXPERIMENTS.md says so.
    group_c = "contrast of findings in group C"
    assert counts[group_c] <= counts[f"{group_c}, told in advance"] < 90
