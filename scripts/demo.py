"""The whole pipeline on the embedded data, on a CPU: `make demo`.

Prepares the data, makes a tiny base MLLM, trains stage 1 and stage 2 through the DeepSpeed launcher
with two ranks, evaluates on the test split, and writes a contact sheet and a results table to
outputs/demo. Every command is printed before it runs and can be run by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path("outputs/demo")
DATA = FOLDER / "data"
TEST = [
    *("--segmentation", f"{DATA}/test", "--language", f"{DATA}/test", "--train", f"{DATA}/train"),
    *("--max-new-tokens", "12"),
]


def run(*command: str) -> None:
    """Print a command and run it; stop the demo where it fails."""
    print(f"\n$ {' '.join(command)}", flush=True)
    program = [sys.executable] if command[0] == "python" else [find_launcher()]
    # One process may use every core; two ranks share them (one thread each, see the Makefile).
    alone = {"OMP_NUM_THREADS": str(os.cpu_count())} if command[0] == "python" else {}
    result = subprocess.run([*program, *command[1:]], cwd=ROOT, env=os.environ | alone, check=False)
    if result.returncode:
        sys.exit(f"the demo stopped: {' '.join(command)} failed with code {result.returncode}")


def find_launcher() -> str:
    """DeepSpeed's launcher beside this interpreter."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    return found or sys.exit("the deepspeed launcher is missing; run make demo, which installs it")


def train(config: str) -> None:
    run(*f"deepspeed --num_accelerators 2 scripts/train.py --config {config}".split())


def save_references() -> None:
    """Two models to compare with: random weights everywhere, and what stage 2 starts from."""
    import torch

    from biascare.models.biascarevl import build_model
    from biascare.models.mllm import load_processor

    starts: dict[str, dict[str, Any]] = {
        "untrained": {"mllm": f"{FOLDER}/random_base"},
        "before": {"mllm": f"{FOLDER}/base", "vision_weights": f"{FOLDER}/stage1/export"},
    }
    for name, weights in starts.items():
        torch.manual_seed(0)
        model = build_model(vision="tiny", image_size=128, query_heads=4, **weights)
        model.save_pretrained(FOLDER / name)
        load_processor(weights["mllm"]).save_pretrained(FOLDER / name / "processor")


def results_table(metrics: dict[str, dict[str, Any]]) -> str:
    """Markdown: what was learned, beside the untrained model and trivial answers."""
    trained = metrics["stage2"]
    masks, answers = trained["segmentation"], trained["answers"]
    lines = [
        "| test split | n | untrained | before stage 2 | after stage 2 | trivial baseline |",
        "|---|---|---|---|---|---|",
    ]

    def dice(name: str, metric: str, group: str | None = None, baseline: str = "") -> None:
        row = [_dice(metrics[m], metric, group) for m in ("untrained", "before", "stage2")]
        count = masks["num_masks"] if group is None else masks["dice"]["by_group"][group]["num"]
        lines.append(f"| {name} | {count} | {' | '.join(row)} | {baseline} |")

    disc, informed = masks["dice_disc"], masks["dice_disc_by_target"]
    discs = f"{disc['mean']:.3f} (disc at the click), {informed['mean']:.3f} (of the target's size)"
    dice("Dice, one click", "dice", None, discs)
    for group in (g for g in ("head", "medium", "tail") if g in masks["dice"]["by_group"]):
        dice(f"Dice, {group} targets", "dice", group, f"{disc['by_group'][group]['mean']:.3f}")
    dice("Dice, after one correction", "dice_click_1")
    dice("Dice, text prompt alone", "dice_text")
    for kind, cell in answers.items():
        before = [metrics[m]["answers"][kind]["accuracy"] for m in ("untrained", "before")]
        constant = f"{cell['best_constant']:.3f} (best constant answer)"
        if "always_yes" in cell:
            constant = f"{cell['always_yes']:.3f} (always yes), {constant}"
        lines.append(
            f"| accuracy, {kind} questions | {cell['num']} | {before[0]:.3f} | {before[1]:.3f} | "
            f"{cell['accuracy']:.3f} | {constant} |"
        )
    return "\n".join(lines)


def _dice(summary: dict[str, Any], metric: str, group: str | None) -> str:
    scores = summary["segmentation"].get(metric)
    if scores is None:
        return "-"
    return f"{scores['mean'] if group is None else scores['by_group'][group]['mean']:.3f}"


def main() -> None:
    began = time.time()
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    run("python", *f"data_prep/demo.py --output {DATA} --size small --seed 0 --bias both".split())
    make_base = f"scripts/make_base_mllm.py --records {DATA}/train --output {FOLDER}/base"
    run("python", *make_base.split())
    run("python", *make_base.split()[:-1], f"{FOLDER}/random_base", "--steps", "0")
    train("configs/demo_stage1.yaml")
    train("configs/demo_stage2.yaml")
    save_references()
    models = {
        "untrained": FOLDER / "untrained",
        "before": FOLDER / "before",
        "stage2": FOLDER / "stage2/export",
    }
    metrics = {}
    for name, model in models.items():
        output = FOLDER / "test" / name
        run("python", "scripts/evaluate.py", str(model), *TEST, "--output", str(output))
        metrics[name] = json.loads((output / "metrics.json").read_text())
    table = results_table(metrics)
    (FOLDER / "results.md").write_text(table + "\n")
    print(f"\n{table}\n\ntable: {FOLDER}/results.md")
    print(f"contact sheet: {FOLDER}/test/stage2/contact_sheet.png")
    print(f"the demo took {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
