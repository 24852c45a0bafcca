"""Rows of a model that was never trained: the embedded patients, with scores that a planted bias
would give. `python tests/evaluation/planted_rows.py --help` prints the table of EXPERIMENTS.md.

Who is imaged and what is shown come from `data_prep/embedded`, as do the factors of every effect.
How a factor acts on a score is assumed here, because nothing is trained:

- contrast of findings times f: the Dice of a finding times f;
- noise times f: the errors of masks (1 - Dice) and of answers times f, at most all;
- prevalence of findings in training times f: the log-odds of saying yes to a finding fall by
  -log(f), and the Dice of a finding is that of f times as many examples (times f ** 0.5).
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import ttest_ind  # type: ignore[import-untyped, unused-ignore]

from biascare.evaluation.audit.rows import of_hard_kinds
from biascare.evaluation.metrics.groups import ATTRIBUTES, Measured, summarise_groups
from biascare.interfaces import Facts
from data_prep.embedded.draws import Patient, active_effects, draw_truth, in_group, plan
from data_prep.embedded.tables import ANATOMY, is_finding

STRUCTURE, FINDING = 0.80, 0.25
"""Mean Dice of the demo's trained model on its test split."""

SPREAD, PATIENT_SPREAD = 0.12, 0.05
RIGHT = {"choice": 0.30, "closed": 0.73, "open": 0.86}
"""Share of right answers of the same model."""

NUM_CLOSED = 3
"""Closed questions of an image; the last one is about a finding."""


class Hypothesis(NamedTuple):
    """What an audit has to find."""

    bias: str
    attribute: str
    worst: tuple[str, ...]


PLANTED = {
    "findings rarer in women's training images": Hypothesis("prevalence", "sex", ("F",)),
    "contrast of findings in group C": Hypothesis("appearance", "race", ("group C",)),
    "noise from 60 years on": Hypothesis("appearance", "age", ("60 to 79", "80 and over")),
}


def rows(seed: int, bias: str, size: str = "small", finding: float = FINDING) -> list[Measured]:
    """The primary metrics of every target and question of a test split."""
    rng = np.random.default_rng(seed)
    masks: list[tuple[Facts, float]] = []
    answers: list[tuple[Facts, float]] = []
    shifts: dict[tuple[str, int], float] = {}
    for case in plan(size, seed, "test"):
        patient = case.patient
        key = patient.modality, patient.number
        shift = shifts.setdefault(key, rng.normal(0, PATIENT_SPREAD))
        contrast, noise, rare = (_factor(patient, bias, q) for q in QUANTITIES)
        name = f"{patient.modality}-{patient.number}"
        for target in draw_truth(seed, case, bias).present:
            mean = finding if is_finding(patient.modality, target) else STRUCTURE
            dice = float(np.clip(rng.normal(mean, SPREAD) + shift, 0, 1))
            if is_finding(patient.modality, target):
                dice *= contrast * rare**0.5
            dice = 1 - min((1 - dice) * noise, 1.0)
            masks.append((_facts(patient, name, case.image_number, target, "segmentation"), dice))
        for number, kind in enumerate(["choice", "open", *["closed"] * NUM_CLOSED]):
            chance = RIGHT[kind]
            if kind == "closed" and number == NUM_CLOSED + 1 and rng.random() < 0.5:
                # A finding that is there: no is wrong.
                chance = 1 / (1 + (1 - chance) / chance / rare)
            chance = 1 - min((1 - chance) * noise, 1.0)
            facts = _facts(patient, name, case.image_number, None, kind)
            answers.append((facts, float(rng.random() < chance)))
    dice = _measured("dice", masks)
    hard = of_hard_kinds(np.array(dice.values), dice.case_mix).tolist()
    # The family of an audit: what `METRICS` calls primary of masks and answers.
    return [dice, dice._replace(name="dice_hard", values=hard), _measured("accuracy", answers)]


QUANTITIES = ("contrast of findings", "noise", "prevalence of findings")


def _factor(patient: Patient, bias: str, quantity: str) -> float:
    # Whatever its split: what was planted in training is what the model has learned.
    effects = (effect for effect in active_effects(bias) if effect.quantity == quantity)
    return math.prod(effect.factor for effect in effects if in_group(patient, effect))


def _facts(patient: Patient, name: str, image: int, target: str | None, kind: str) -> Facts:
    return Facts(
        image_id=f"{name}-{image}",
        task="segmentation" if target else "language",
        kind=kind,
        target=target,
        prevalence=None,
        source="demo",
        split="test",
        modality=patient.modality,
        anatomy=ANATOMY[patient.modality],
        patient_id=name,
        sex=patient.sex,
        age=patient.age,
        race=patient.race,
    )


def _measured(name: str, cases: list[tuple[Facts, float]]) -> Measured:
    facts = [f for f, _ in cases]
    mix = [f"{f.modality}, {f.target or f.kind}" for f in facts]
    return Measured(name, facts, [value for _, value in cases], mix)


def found_by(groups: dict, hypothesis: Hypothesis, level: float = 0.05) -> bool:
    """Whether any metric says so of the planted attribute and names the planted group."""
    cells = (by_name[hypothesis.attribute] for by_name in groups.values())
    return any(
        cell["p_case_mix_holm"] is not None
        and cell["p_case_mix_holm"] <= level
        and cell["adjusted_worst"] in hypothesis.worst
        for cell in cells
    )


def known_in_advance(dice: Measured, hypothesis: Hypothesis) -> float:
    """p of one test that is told the attribute, the group, the direction and that findings are hit:
    what no audit can beat, because it has to look at everything.

    Welch's t-test of patients' mean Dice of findings, less the mean of their kind of case; one for
    fewer than two patients.
    """
    finding = np.array([is_finding(str(f.modality), str(f.target)) for f in dice.facts])
    values, mix = np.array(dice.values)[finding], np.array(dice.case_mix)[finding]
    for kind in set(mix):
        values[mix == kind] -= values[mix == kind].mean()
    facts = [f for f, hit in zip(dice.facts, finding, strict=True) if hit]
    patients = np.array([f.patient_id for f in facts])
    inside = np.array([ATTRIBUTES[hypothesis.attribute](f) in hypothesis.worst for f in facts])
    means = {
        side: [values[patients == patient].mean() for patient in set(patients[inside == side])]
        for side in (True, False)
    }
    if min(map(len, means.values())) < 2:
        return 1.0
    test = ttest_ind(means[True], means[False], equal_var=False, alternative="less")
    return float(test.pvalue)


def study(seeds: Sequence[int], size: str, finding: float, num_draws: int) -> Counter[str]:
    """How many of the seeds raise an alarm without a bias, and find each planted one."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        nothing = summarise_groups(rows(seed, "none", size, finding), num_draws, seed)
        cells = [cell for by_name in nothing.values() for cell in by_name.values()]
        for key in ("p_holm", "p_case_mix_holm"):
            counts[f"false alarm, {key}"] += any((cell[key] or 1) <= 0.05 for cell in cells)
        for bias in ("prevalence", "appearance"):
            measured = rows(seed, bias, size, finding)
            groups = summarise_groups(measured, num_draws, seed)
            family = sum(len(by_name) for by_name in groups.values())
            for name, hypothesis in PLANTED.items():
                if hypothesis.bias == bias:
                    counts[name] += found_by(groups, hypothesis)
                    p = known_in_advance(measured[0], hypothesis)
                    counts[f"{name}, told in advance"] += p <= 0.05
                    counts[f"{name}, told in advance, one of the family"] += p <= 0.05 / family
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="small", help="of the embedded data")
    parser.add_argument("--finding", type=float, default=FINDING, help="mean Dice of findings")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--num-draws", type=int, default=999)
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.seeds)
    counts = study(seeds, options.size, options.finding, options.num_draws)
    told = ("", ", told in advance", ", told in advance, one of the family")
    keys = ["false alarm, p_holm", "false alarm, p_case_mix_holm"]
    for name in [*keys, *(f"{name}{how}" for name in PLANTED for how in told)]:
        print(f"{name}: {counts[name]} of {options.seeds}")


if __name__ == "__main__":
    main()
