"""What an audit found, as plain sentences with their counts.

    headlines(audit)[:3]        # the most important first

Each sentence is one number of the audit and says what it is of, beside what chance would show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]

SEXES = {"F": "female", "M": "male"}
BY = {"sex and age": "sex and age together"}


class Headline(NamedTuple):
    """A sentence and how much it matters; small numbers come first."""

    rank: int
    text: str


def headlines(audit: Row) -> list[str]:
    """All that the summary may say, the most important first."""
    found = [
        *_comparison_headlines(audit),
        *_group_headlines(audit),
        *_performance_headlines(audit),
        *_asked_otherwise_headlines(audit),
        *_label_and_volume_headlines(audit),
        *_overlap_headlines(audit),
        *_calibration_headlines(audit),
        *_slice_headlines(audit),
    ]
    # The order of writing decides among equals.
    return [line.text for line in sorted(found, key=lambda line: line.rank)]


def group_name(attribute: str, group: str) -> str:
    """A group as a reader calls it: "F, under 40" is female, under 40."""
    if group == "missing":
        return f"{attribute} missing"
    sex, _, rest = group.partition(", ")
    if attribute.startswith("sex") and sex in SEXES:
        return ", ".join(part for part in (SEXES[sex], rest) if part)
    return group


def chance(p: float) -> str:
    """A p value in words: "9 of 100 data sets"."""
    if p >= 0.995:
        return "nearly all data sets"
    if p >= 0.0095:
        return f"{p * 100:.0f} of 100 data sets"
    return f"{max(round(p * 1000), 1)} of 1,000 data sets"


def share(count: int | None, num: int) -> str:
    return f"{count:,} of {num:,}"


def _metric(audit: Row, name: str) -> Row:
    found: Row = audit["metrics"][name]
    return found


def level(audit: Row, metric: str, group: Row) -> str:
    """A group's number: k of n for shares, else the mean with its n."""
    unit = _metric(audit, metric)["unit"]
    if group.get("count") is not None:
        percent = f"{group['mean']:.0%}"
        return f"{share(group['count'], group['num'])} ({percent})"
    return f"{group['mean']:.2f} ({group['num']:,} {unit})"


# ---------------------------------------------------------------- groups


def _group_headlines(audit: Row) -> Iterator[Headline]:
    alpha = audit["settings"]["level"]
    primary = [
        row for row in audit["disparities"] if row["family"] == "primary" and row["p"] is not None
    ]
    found = [row for row in primary if is_found(row, alpha) or is_seen(row, alpha)]
    for row in sorted(found, key=lambda row: (not is_found(row, alpha), row["p_case_mix_holm"])):
        yield Headline(1 if is_found(row, alpha) else 2, group_sentence(audit, row))
    if not primary:
        yield Headline(
            2,
            "No groups of patients could be compared: for no attribute two groups of at least "
            f"{audit['settings']['min_group']} cases are known.",
        )
    elif not found:
        nearest = min(primary, key=lambda row: row["p_case_mix"])
        yield Headline(2, none_found(audit, primary))
        yield Headline(5, group_sentence(audit, nearest))


def is_found(row: Row, alpha: float) -> bool:
    """Whether a comparison is a finding: within the same kinds of case, and adjusted for how many
    comparisons there are."""
    return row["p_case_mix_holm"] is not None and row["p_case_mix_holm"] <= alpha


def is_seen(row: Row, alpha: float) -> bool:
    """A difference of the plain means that the kinds of case may explain."""
    return row["p_holm"] is not None and row["p_holm"] <= alpha


def none_found(audit: Row, primary: Sequence[Row]) -> str:
    """No finding, and what could have been found: without it silence would read as fairness."""
    parts = []
    for metric in dict.fromkeys(row["metric"] for row in primary):
        gaps = [row["detectable"] for row in primary if row["metric"] == metric]
        title = _metric(audit, metric)["title"]
        parts.append(f"{title} {min(gaps):.2f} to {max(gaps):.2f}")
    which = f"None of {len(primary)} comparisons" if len(primary) > 1 else "Not the one comparison"
    return (
        f"{which} between groups of patients shows a difference beyond "
        f"chance. Only gaps of this size would have been found reliably: {'; '.join(parts)}."
    )


def group_sentence(audit: Row, row: Row) -> str:
    """One comparison: who is served worse, by how much, beside chance."""
    alpha = audit["settings"]["level"]
    metric, attribute = row["metric"], row["attribute"]
    groups = {
        g["group"]: g
        for g in audit["groups"]
        if g["metric"] == metric and g["attribute"] == attribute
    }
    worst, best = groups[row["worst"]], groups[row["best"]]
    title = _metric(audit, metric)["title"]
    first = group_name(attribute, row["worst"])
    other = group_name(attribute, row["best"])
    missed = {
        g["group"]: g
        for g in audit["groups"]
        if g["metric"] == "missed" and g["attribute"] == attribute
    }
    if metric == "dice" and row["worst"] in missed and row["best"] in missed:
        a, b = missed[row["worst"]], missed[row["best"]]
        what = (
            f"Dice is {worst['mean']:.2f} for {first} and {best['mean']:.2f} for {other}; "
            f"{share(a['count'], a['num'])} masks are missed against {share(b['count'], b['num'])}"
        )
    elif worst["count"] is not None:
        what = (
            f"{title[0].upper()}{title[1:]}: {level(audit, metric, worst)} for {first}, "
            f"{level(audit, metric, best)} for {other}"
        )
    else:
        what = f"{title} is {worst['mean']:.2f} for {first} and {best['mean']:.2f} for {other}"
    num = sum(r["family"] == row["family"] and r["p"] is not None for r in audit["disparities"])
    often = f"appears by chance in {chance(row['p_case_mix'])} without any"
    if is_found(row, alpha):
        return (
            f"{what}. Within the same kinds of case a difference as large {often}: a finding, "
            f"also after {num} comparisons."
        )
    if is_seen(row, alpha):
        return (
            f"{what}. The kinds of case that each group has may explain it: within the same kinds "
            f"a difference as large {often}."
        )
    return (
        f"{what}. Within the same kinds of case a difference as large {often}; after {num} "
        "comparisons that is no finding."
    )


# ---------------------------------------------------------------- performance


def _performance_headlines(audit: Row) -> Iterator[Headline]:
    rows = {(r["metric"], r["by"], r["group"]): r for r in audit["performance"]}
    if ("missed", "all", "all") in rows:
        all_masks = rows["missed", "all", "all"]
        dice = rows["dice", "all", "all"]
        text = (
            f"{share(all_masks['count'], all_masks['num'])} masks are missed (Dice below "
            f"{audit['settings']['missed_dice']}); the mean Dice is {dice['mean']:.2f} "
            f"[{dice['low']:.2f}, {dice['high']:.2f}]"
        )
        tail = rows.get(("missed", "prevalence", "tail"))
        text += f". Of rare targets {share(tail['count'], tail['num'])} are." if tail else "."
        yield Headline(3, text)
    if ("accuracy", "all", "all") in rows:
        right = rows["accuracy", "all", "all"]
        kinds = [r for (m, by, _), r in rows.items() if m == "accuracy" and by == "kind"]
        text = f"{share(right['count'], right['num'])} answers are right ({right['mean']:.0%})"
        each = ", ".join(f"{r['group']} {r['mean']:.0%}" for r in kinds)
        yield Headline(4, f"{text}: {each}." if each else f"{text}.")
    if ("rouge1", "all", "all") in rows:
        row = rows["rouge1", "all", "all"]
        title = _metric(audit, "rouge1")["title"]
        yield Headline(4, f"{title}: {row['mean']:.2f} over {row['num']:,} reports.")


def _asked_otherwise_headlines(audit: Row) -> Iterator[Headline]:
    for kind in dict.fromkeys(row["kind"] for row in audit["image_reliance"]):
        rows = [row for row in audit["image_reliance"] if row["kind"] == kind]
        # By whatever measure the image is seen to help: a text that cannot be read as a choice
        # would else say of a model that looks that it does not.
        helped = next((row for row in rows if row["low"] > 0), None)
        yield Headline(3 if helped is None else 6, reliance_sentence(helped or rows[0]))
    for row in audit["counterfactual"]:
        if row["num"] and row["flipped_low"] > 0:
            yield Headline(2, flip_sentence(row))


def _label_and_volume_headlines(audit: Row) -> Iterator[Headline]:
    for row in audit["label_scores"]:
        yield Headline(4, label_sentences(audit, row)[0])
    if audit["volumes"]:
        yield Headline(4, volume_sentence(audit))


def _overlap_headlines(audit: Row) -> Iterator[Headline]:
    for row in (audit["training"] or {}).get("overlap", []):
        shared = max(row["num_image_in_training"], row["num_patient_in_training"])
        if shared:
            yield Headline(
                0,
                f"{share(shared, row['num'])} {row['unit']} are of patients or images that the "
                "model was trained on: their numbers say what it remembers.",
            )


def _calibration_headlines(audit: Row) -> Iterator[Headline]:
    alpha = audit["settings"]["level"]
    for row in audit["calibration"]:
        if row["attribute"] != "all" or not row["supports_statement"] or row["p"] > alpha:
            continue
        way = "too high" if row["signed"] > 0 else "too low"
        yield Headline(
            5,
            f"The {row['confidence']} is {way} by {abs(row['signed']):.2f} on average; its "
            f"calibration error is {row['ece']:.2f}, where a calibrated model would show "
            f"{row['null_mean']:.2f} on {row['num']:,} cases.",
        )


def _slice_headlines(audit: Row) -> Iterator[Headline]:
    for search in audit["slice_search"]:
        mine = [r for r in audit["slices"] if r["metric"] == search["metric"]]
        title = _metric(audit, search["metric"])["title"]
        worst = next((r for r in mine if r["confirmed"]), None)
        if worst is None:
            yield Headline(
                7,
                f"{title}: {search['num_searched']:,} combinations of facts were searched for a "
                f"weak spot; none of the {search['num_tested']} tested on other patients is "
                "confirmed.",
            )
        else:
            yield Headline(
                6,
                f"A weak spot in {title}, confirmed on other patients: {worst['slice']} "
                f"({worst['mean']:.2f} on {worst['num']} cases, {worst['others']:.2f} elsewhere).",
            )


# ---------------------------------------------------------------- questions asked otherwise

WAYS_TO_SCORE = {
    "text": "the text",
    "option": "the likeliest option",
    "recall": "recall of words",
}

BLINDLY = {
    "without image": "Without the image",
    "black image": "With a black image",
    "another image": "With the image of another case",
}


def reliance_sentence(row: Row) -> str:
    """What the image adds to the best blind answers to questions of one kind."""
    interval = f"{row['value']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
    if row["low"] > 0:
        effect = f"the image adds to it ({interval})"
    elif row["high"] < 0:
        effect = f"the image makes it worse ({interval})"
    else:
        effect = f"here the image adds nothing that these rows can show ({interval})"
    how = BLINDLY[row["best_blind"]]
    asked = f"{row['num']:,} {row['kind']} question{'' if row['num'] == 1 else 's'}"
    if row["num_right_blind"] is None:
        return (
            f"{how} its answers to {asked} hold {row['blind']:.2f} of the words that are true, "
            f"with the real one {row['with_image']:.2f}: {effect}."
        )
    by = " by its likeliest option" if row["measure"] == "option" else ""
    return (
        f"{how} it answers {row['num_right_blind']:,} of {asked} correctly{by}, with the real one "
        f"{row['num_right_with_image']:,}: {effect}."
    )


MANY_FLIPS = 0.1
"""Share of answers that neutral words flip from which on it is said in words."""


def flip_sentence(row: Row) -> str:
    """How often words about one attribute change answers, beside neutral words."""
    interval = (
        f"{row['flipped_difference']:+.1%} [{row['flipped_low']:+.1%}, {row['flipped_high']:+.1%}]"
    )
    if row["flipped_low"] > 0:
        effect = f"more than any words do ({interval})"
    else:
        effect = f"no more than these rows can tell from chance ({interval})"
    if row["flipped_neutral"] >= MANY_FLIPS:
        effect += "; any words before the question change many answers"
    return (
        f"Words about the patient's {row['attribute']} flip {row['flipped_words']:.1%} of the "
        f"answers to {row['num']:,} {row['kind']} questions, neutral words "
        f"{row['flipped_neutral']:.1%}: {effect}."
    )


# ---------------------------------------------------------------- labels and volumes


def label_sentences(audit: Row, row: Row) -> list[str]:
    """Of one set of labels: its main scores, then which labels have no AUROC, by name."""
    mine = [r for r in audit["labels"] if r["set"] == row["set"]]
    ranked = [r for r in mine if r["auroc"] is not None]
    if row["exclusive"]:
        low, high = row["balanced_accuracy_low"], row["balanced_accuracy_high"]
        first = (
            f"The likeliest of {row['num_labels']} classes is right for {row['accuracy']:.0%} of "
            f"{row['num']:,} images; the mean over classes is "
            f"{row['balanced_accuracy']:.2f}{_interval(low, high)}."
        )
    elif ranked:
        auroc = _interval(row["macro_auroc_low"], row["macro_auroc_high"])
        low, high = row["macro_average_precision_low"], row["macro_average_precision_high"]
        first = (
            f"Mean AUROC over {len(ranked)} of {row['num_labels']} labels: "
            f"{row['macro_auroc']:.2f}{auroc}; mean average precision "
            f"{row['macro_average_precision']:.2f}{_interval(low, high)}, where a ranking by "
            f"chance has {row['prevalence']:.2f} ({row['num']:,} images)."
        )
    else:
        first = f"None of {row['num_labels']} labels has images with and without it: no AUROC."
    without = [r["label"] for r in mine if not r["num_positive"]]
    always = [r["label"] for r in mine if r["num_positive"] and r["num_positive"] == r["num"]]
    lines = [first]
    if without:
        lines.append(
            f"Without a positive image, and so without AUROC, and in no mean: {', '.join(without)}."
        )
    if always:
        lines.append(
            f"Without a negative image, and so without AUROC, and in no mean: {', '.join(always)}."
        )
    return lines


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"


def volume_sentence(audit: Row) -> str:
    """The mean Dice of whole volumes, and the worst of them by name."""
    row = next(r for r in audit["volume_means"] if (r["metric"], r["by"]) == ("dice", "all"))
    worst = audit["volumes"][0]
    target = worst["target"] or "a mask"
    return (
        f"As whole volumes the mean Dice is {row['mean']:.2f}{_interval(row['low'], row['high'])} "
        f"over {row['num']:,} pairs of volume and target; the worst is {target} in "
        f"{worst['volume']} ({worst['dice']:.2f})."
    )


# ---------------------------------------------------------------- two runs


def _comparison_headlines(audit: Row) -> Iterator[Headline]:
    if audit["comparison"] is None:
        return
    for metric, row in audit["metrics"].items():
        if row["primary"]:
            judged = [r["who"] for r in audit["comparison"]["rows"] if r["metric"] == metric]
            changed = any(who != "no clear change" for who in judged)
            for text in changes(audit, metric):
                yield Headline(0 if changed else 6, text)


MOST_NAMED = 4
"""Groups of one sentence; the table holds all."""


def changes(audit: Row, metric: str) -> list[str]:
    """Who gained and who paid in one metric: of all cases, then by attribute."""
    rows = [r for r in audit["comparison"]["rows"] if r["metric"] == metric]
    title = _metric(audit, metric)["title"]
    lines = []
    everyone = next((r for r in rows if r["by"] == "all"), None)
    if everyone is None:
        return []
    sign = {"gained": "is better", "paid": "is worse"}.get(everyone["who"], "shows no clear change")
    paid = [r for r in rows if r["who"] == "paid" and r["by"] not in ("all", "target")]
    paid.sort(key=lambda r: -abs(r["difference"]))
    more = f" and {len(paid) - MOST_NAMED} more" if len(paid) > MOST_NAMED else ""
    text = (
        f"{title[0].upper()}{title[1:]} {sign}: {everyone['baseline']:.2f} in the baseline, "
        f"{everyone['run']:.2f} now "
        f"({everyone['difference']:+.2f} [{everyone['low']:+.2f}, {everyone['high']:+.2f}]; "
        f"{everyone['num_better']:,} of {everyone['num']:,} cases better, "
        f"{everyone['num_worse']:,} worse)"
    )
    names = "; ".join(
        f"{group_name(r['by'], r['group'])} ({r['difference']:+.3f})" for r in paid[:MOST_NAMED]
    )
    text += f". Who paid: {names}{more}." if paid else ". No group is clearly worse."
    lines.append(text)
    return lines


def verdict_sentence(audit: Row) -> str:
    """Why the verdict is what it is."""
    verdict = audit["verdict"]
    if verdict is None:
        return "No thresholds were given, so there is no verdict: the numbers below are described."
    counts = verdict["counts"]
    total = sum(counts.values())
    parts = [
        f"{counts['PASS']} of {total} limits are met by the bad end of their 95 % interval",
        f"{counts['FAIL']} are missed even by the good end",
        f"{counts['INSUFFICIENT DATA']} cannot be decided with these data",
    ]
    text = ", ".join(parts[:2]) + f", and {parts[2]}."
    failed = [r for r in verdict["rows"] if r["verdict"] == "FAIL"]
    if failed:
        first = failed[0]
        text += (
            f" For one, {metric_title(audit, first['metric'])} "
            f"{_who(first)} is {first['mean']:.2f} [{first['low']:.2f}, {first['high']:.2f}] where "
            f"{ASKED[first['limit']]} {first['threshold']:g} is asked."
        )
    return text


ASKED = {"min": "at least", "max": "at most", "max_gap": "a gap of at most"}


def _who(row: Row) -> str:
    if row["attribute"] == "all":
        return "of all cases"
    groups = (group_name(row["attribute"], group) for group in row["group"].split(" against "))
    return f"by {row['attribute']} ({' against '.join(groups)})"


def metric_title(audit: Row, name: str) -> str:
    """Its name for readers; what is no metric of these cases keeps its own."""
    return str(audit["metrics"][name]["title"]) if name in audit["metrics"] else name


THREATS = (
    "Noise of the reference: a wrong true mask or answer counts as the model's error. Rows hold "
    "one reference per case, so agreement between annotators is unknown.",
    "Who is in the data: groups are as the source states them. A group that is absent here was "
    "not audited, and equal numbers in these data say nothing of other hospitals, scanners or "
    "years.",
    "Readings: answers are read by fixed rules and compared as whole texts; a right answer in "
    "other words counts as wrong. No language model judges anything here.",
    "Prompts: masks start from a simulated click or the true box, which a hurried person may not "
    "give as well.",
    "Many looks: findings come from the primary family alone. Everything else in this page is for "
    "orientation, and a p value that was not announced beforehand proves little.",
    "Not measured: the effect on patients, time saved or lost, how a clinician and the model work "
    "together, robustness to other scanners and to attacks.",
)


def threats(audit: Row) -> list[str]:
    """Threats to validity: those of these data first, then those of every such audit."""
    found = []
    training = audit["training"]
    if training is None:
        found.append(
            "Overlap with the training data is not checked: name its folders after --train."
        )
    else:
        for row in training["overlap"]:
            found.append(
                f"Overlap with the training folders named: {row['num_image_in_training']} of "
                f"{row['num']} {row['unit']} by image id, {row['num_patient_in_training']} by "
                f"patient id; {row['num_without_patient']} name no patient. Equal pixels under "
                "other names are what scripts/lint_data.py finds."
            )
    return [*found, *THREATS]
