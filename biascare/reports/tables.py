"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from biascare.evaluation.invariance import Difference


def evaluation_table(summary: Mapping[str, Any], title: str) -> Table:
    """Dice by prevalence group and modality, accuracy by kind beside constant answers."""
    table = Table(title=title)
    for column in ("what", "group", "n", "score", "reference"):
        table.add_column(column, justify="left" if column in ("what", "group") else "right")
    segmentation = summary.get("segmentation", {})
    # At the size of a protocol a Dice is for comparison with its tables; metrics.json has it.
    shown = (n for n in segmentation if n.startswith("dice") and not n.endswith("_256"))
    for metric in shown:
        scores = segmentation[metric]
        table.add_row(metric, "all masks", str(segmentation["num_masks"]), _f(scores["mean"]), "")
        table.add_row("", "mean over targets", "", _f(scores["mean_over_targets"]), "")
        # Groups of the first prediction alone: those of every correction would bury the rest.
        if metric == "dice":
            for axis in ("by_prevalence", "by_modality"):
                for name, cell in scores[axis].items():
                    table.add_row("", name, str(cell["num"]), _f(cell["mean"]), "")
    triage = summary.get("triage", {"signals": {}})
    aurocs = {name: cell["auroc"] for name, cell in triage["signals"].items()}
    # None without both failed and good masks: 0.5 would read as a measured chance level.
    ranked = sorted((auroc, name) for name, auroc in aurocs.items() if auroc is not None)
    if ranked:
        what = f"Dice below {triage['failure_dice']:g}"
        found = f"{triage['num_failed']} of {triage['num']}"
        # The range alone: a line for each of a dozen signals would bury the scores.
        for place, (auroc, name) in (("best", ranked[-1]), ("worst", ranked[0])):
            table.add_row(what, f"AUROC, {place}: {name}", found, _f(auroc), "0.500 by chance")
            what = found = ""
    for kind, cell in summary.get("answers", {}).items():
        constant = f"{_f(cell['best_constant'])} best constant"
        table.add_row(f"{kind} answers", "all", str(cell["num"]), _f(cell["accuracy"]), constant)
        if "accuracy_by_option" in cell:
            scored, accuracy = str(cell["num_scored"]), _f(cell["accuracy_by_option"])
            table.add_row("", "likeliest option", scored, accuracy, "")
    reports = summary.get("reports", {})
    sources = {"all": reports} | dict(reports["by_source"]) if reports else {}
    # One source is all there is.
    for name, cell in sources.items() if len(sources) > 2 else list(sources.items())[:1]:
        empty = f"{cell['num_empty']} empty" if cell["num_empty"] else ""
        table.add_row("reports, BLEU-1", name, str(cell["num"]), _f(cell["bleu1"]), empty)
        table.add_row("ROUGE-1", name, "", _f(cell["rouge1"]), "")
        found = cell["clinical_f1"]["macro"]
        table.add_row("clinical F1", name, "", "-" if found is None else _f(found), "")
    return table


def corrections_table(table: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """What corrections do, by size of the mask and by modality; None with fewer than two."""
    if not table or len(table["all"]["dice"]) < 3:
        return None
    shown = Table(
        title="Dice after corrections",
        caption="fall: the greatest against the correction before, and after which\n"
        "inside, outside: positive clicks inside the last mask and negative ones outside it",
    )
    shown.add_column("group")
    # The first three say whether clicks help, the last where they lead to.
    last = len(table["all"]["dice"]) - 1
    numbers = [n for n in (0, 1, 2, 3) if n < last] + [last]
    for column in ("n", *map(str, numbers), "fall", "inside", "outside"):
        shown.add_column(column, justify="right")
    for name, cell in table.items():
        fall = f"{_f(cell['greatest_fall'])} ({cell['after']})" if cell["after"] else "-"
        kept = [cell[key][-1] for key in ("positive_inside", "negative_outside")]
        shown.add_row(
            name,
            str(cell["num"]),
            *(_f(cell["dice"][n]) for n in numbers),
            fall,
            *("-" if share is None else _f(share) for share in kept),
        )
    return shown


def variants_table(answers: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Answers to questions asked otherwise; None where none were."""
    table = Table(
        title="Questions asked otherwise",
        caption="control: with the image, or neutral words; image reliance: less the best without\n"
        "the image; flips: answers that words about the patient change; 95 %: patients drawn anew",
    )
    for column in ("answers", "asked"):
        table.add_column(column)
    for column in ("n", "control", "otherwise", "difference", "95 %"):
        table.add_column(column, justify="right")

    def add(what: str, name: str, found: Mapping[str, Any], numbers: Sequence[str]) -> None:
        interval = f"{_f(found['low'])} to {_f(found['high'])}"
        table.add_row(what, name, f"{found['num']:,}", *numbers, interval)

    for kind, cell in answers.items():
        blind = cell.get("blind", {"variants": {}, "image_reliance": {}})
        for measure, reliance in blind["image_reliance"].items():
            what = f"{kind}, {measure}"
            for name, by_measure in blind["variants"].items():
                if measure in by_measure:
                    found = by_measure[measure]
                    keys = ("with_image", "blind", "difference")
                    add(what, name, found, [_f(found[key]) for key in keys])
                    what = ""
            if measure == "text":
                numbers = [f"{cell['num']:,}", _f(cell["accuracy"]), _f(cell["best_constant"])]
                table.add_row(what, "best constant", *numbers)
            add(what, "image reliance", reliance, ["", "", _f(reliance["value"])])
        what = f"{kind}, flips"
        for attribute, changed in cell.get("counterfactual", {}).items():
            # How far probabilities move stands in metrics.json.
            if "flipped" in changed:
                found = changed["flipped"]
                keys = ("neutral", "words", "difference")
                add(what, attribute, found, [_f(found[key]) for key in keys])
                what = ""
    return table if table.row_count else None


def groups_table(groups: Mapping[str, Mapping[str, Any]]) -> Table:
    """The gap between the worst and the best group of patients, by metric and attribute."""
    table = Table(
        title="Groups of patients",
        caption="by chance: the mean gap of groups dealt anew; detectable: found 8 times of 10;\n"
        "p: of all rows together (Holm), below 0.05 in 5 of 100 evaluations without a difference;\n"
        "same mix: p of scores less the mean of their kind of case",
    )
    for column in ("metric by attribute", "worst to best"):
        table.add_column(column)
    for column in ("gap", "by chance", "detectable", "p", "same mix"):
        table.add_column(column, justify="right")
    for metric, by_name in groups.items():
        for name, found in by_name.items():
            if found["gap"] is None:
                table.add_row(f"{metric} by {name}", "fewer than two groups of 20", *"-----")
                continue
            keys = ("gap", "null_mean", "detectable", "p_holm", "p_case_mix_holm")
            groups_named = f"{found['worst']} to {found['best']}"
            table.add_row(f"{metric} by {name}", groups_named, *(_f(found[key]) for key in keys))
    return table


def benchmark_table(found: Mapping[str, Any], model: str) -> Table:
    """The numbers that a benchmark is known by, with their intervals, and by group."""
    official, num = found["num_official"], found["num"]
    part = "" if official in (None, num) else f" of {official:,} in the release"
    shared = found.get("also_in_training")
    notes = [found["note"]] if found["note"] else []
    if shared is not None:
        stated = ", ".join(f"{n:,} by {column}" for column, n in shared.items())
        notes.append(f"also in training: {stated}")
    table = Table(
        title=f"{found['title']}: {num:,} {found['item']}{part}\n{model}",
        caption="\n".join([*notes, "95 %: patients drawn anew, or images where none is known"]),
    )
    for column in ("score", "group"):
        table.add_column(column)
    for column in ("n", "value", "95 %"):
        table.add_column(column, justify="right")
    for name, score in found["scores"].items():
        table.add_row(name, "all", *_score_cells(score))
    for attribute, groups in found["groups"].items():
        # Chosen scores alone: all of them by all groups would bury the rest.
        for name in found["shown"]:
            for group, cell in groups.items():
                score = cell["scores"].get(name)
                # A group may have no question of the kind.
                if score is not None and score["num"]:
                    table.add_row(f"{name} by {attribute}", group, *_score_cells(score))
    return table


def _score_cells(score: Mapping[str, Any]) -> tuple[str, str, str]:
    interval = "" if score["low"] is None else f"{_f(score['low'])} to {_f(score['high'])}"
    value = "-" if score["value"] is None else _f(score["value"])
    return f"{score['num']:,}", value, interval


def invariance_table(differences: Sequence[Difference]) -> Table:
    """How far cases differ from those in batches of one."""
    table = Table(
        title="The same cases, computed in other ways",
        caption="text: answers that differ; log p, doubt: largest difference of a log-probability\n"
        "and of an uncertainty; Dice: smallest of a mask with its twin",
    )
    table.add_column("computed", no_wrap=True)
    for column in ("cases", "absent", "text", "log p", "doubt", "Dice", "same"):
        table.add_column(column, justify="right")
    for found in differences:
        counts = [str(n) for n in (found.num, found.num_absent, found.num_texts)]
        same = "yes" if found.passed else "NO"
        numbers = f"{found.log_prob:.0e}", f"{found.doubt:.0e}", f"{found.dice:.4f}"
        table.add_row(found.how, *counts, *numbers, same)
    return table


def _f(value: float) -> str:
    return f"{value:.3f}"
