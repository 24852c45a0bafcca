"""README.md of an export: where the model comes from, its data, what it can and what not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from biascare.durable import PARTIAL
from biascare.models.export_folder import MERGED_FOLDER

RESEARCH_ONLY = (
    "For research on bias-aware segmentation and question answering. Not a medical device: it must "
    "not be used for diagnosis or treatment, and it was not validated clinically. Licences of the "
    "base model and of the data apply to these weights too."
)


NUM_WEAKEST = 5
"""Targets of lowest Dice that the card names."""


class RunFacts(NamedTuple):
    """What a run's folder knows about the model of one step."""

    name: str
    step: int
    config: dict[str, Any]  # resolved
    config_file: Path  # the same, as the run wrote it
    about: dict[str, Any]  # run.json
    evaluation: dict[str, Any] | None  # the newest up to that step, with its "step"


def model_card(run: RunFacts, folder: Path) -> str:
    """README.md of an export: origin, data, results, use, limits. `folder` holds its files."""
    merged = (folder / "mllm").is_dir()
    sections = (
        _front_matter(run),
        f"# {run.name}, step {run.step}",
        "BiasCareVL (arXiv 2604.16884), trained with `biascare`, an independent implementation.",
        *_usage(folder),
        "## Origin",
        _table(("what", "value"), _origin(run, merged)),
        "## Training data",
        # The content hash identifies the data exactly, whatever a folder is called elsewhere.
        _table(
            _DATA_COLUMNS,
            (tuple(source[c] for c in _DATA_COLUMNS) for source in run.about.get("data", [])),
        ),
        "## Results on held-out records",
        *_results(run.evaluation),
        "## Intended use and limits",
        *_limits(run),
        "The configuration of the run is in `training_config.yaml`.",
    )
    return "\n\n".join(sections) + "\n"


def released_card(source: Path, report: str, folder: Path) -> str:
    """README.md of an authors' checkpoint in our format. `report` says what was loaded."""
    sections = (
        f"# {source.name}",
        "BiasCareVL (arXiv 2604.16884): weights of its authors, in the format of `biascare`, an "
        "independent implementation. Nothing was trained here, and nothing evaluated.",
        *_usage(folder),
        "## Origin",
        f"```\n{report}\n```",
        "## Intended use and limits",
        RESEARCH_ONLY,
    )
    return "\n\n".join(sections) + "\n"


def _front_matter(run: RunFacts) -> str:
    lines = ["library_name: biascare", "tags: [medical, segmentation, visual-question-answering]"]
    base = run.config["model"]["mllm"]
    # A path on the training machine is no model id.
    if base and re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).is_dir():
        lines.append(f"base_model: {base}")
    return "\n".join(["---", *lines, "---"])


def _usage(folder: Path) -> Iterator[str]:
    """How to open an export, whose files are in `folder`; a plain model's pixels come first."""
    # The card is written while the folder is still a partial one, and read when it is whole.
    name = folder.name.removesuffix(PARTIAL)
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vision"]["image_size"]
    merged = (folder / MERGED_FOLDER).is_dir()
    if merged:
        yield (
            f"**Outside `biascare`, resize every image to {size} x {size} pixels before the "
            "processor, whatever its shape**: training did, and the processor alone does not. "
            f"`{MERGED_FOLDER}/` is a plain Hugging Face folder of the language side:"
        )
        yield _PLAIN.format(folder=f"{name}/{MERGED_FOLDER}", size=size)
        yield "Both pathways, with everything that training did to an image:"
    yield _OWN.format(folder=name)


_OWN = """```python
from biascare import BiasCareVL

model = BiasCareVL.from_pretrained("{folder}")
segmentation = model.segment("image.png", "liver", points=[(120, 88)])
```"""

_PLAIN = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{folder}")
model = AutoModelForImageTextToText.from_pretrained("{folder}")
image = Image.open("image.png").convert("RGB").resize(({size}, {size}), Image.Resampling.BILINEAR)
question = [{{"type": "image"}}, {{"type": "text", "text": "Is the liver visible?"}}]
prompt = processor.apply_chat_template(
    [{{"role": "user", "content": question}}], add_generation_prompt=True
)
inputs = processor(text=[prompt], images=[image], return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=32)
```"""


def _origin(run: RunFacts, merged: bool) -> Iterator[tuple[Any, ...]]:
    model, train = run.config["model"], run.config["train"]
    # Switched on by default, but not every stage has them.
    absent = {
        "joint": ("label_head",),
        "vision": ("label_head", "lora", "query_attention"),
        "labels": ("lora", "query_attention", "prompt_encoder", "mask_decoder"),
    }[train["stage"]]
    trained = [part for part, on in train["trainable"].items() if on and part not in absent]
    yield "stage", train["stage"]
    if model["mllm"]:
        yield "base MLLM", f"{model['mllm']}{' (adapter folded in)' if merged else ''}"
        yield "LoRA", f"rank {model['lora_rank']}, alpha {model['lora_alpha']}"
    yield "vision pathway", f"{model['vision']} at {model['image_size']} px"
    yield "its initial weights", model["vision_weights"] or "random"
    yield "trained parts", ", ".join(trained)
    yield "steps x global batch", f"{run.step} of {train['max_steps']} x {train['global_batch']}"
    yield "precision, seed", f"{train['precision']}, {train['seed']}"
    # Each by the step it began with: a run that went on after an update is of both.
    code = run.about.get("code", [])
    commits = [f"commit {entry['git_commit']}" for entry in code]
    later = [f"from step {e['from_step']} {c}" for e, c in zip(code, commits, strict=True)][1:]
    yield "trained by", "; ".join([*commits[:1], *later])
    if code:
        versions = code[-1]["versions"].items()
        yield "versions", ", ".join(f"{name} {number}" for name, number in versions)


_DATA_COLUMNS = ("task", "source", "split", "version", "images", "weight", "licence", "content")


def _results(evaluation: dict[str, Any] | None) -> Iterator[str]:
    if evaluation is None:
        yield "This run was not evaluated up to this step."
        return
    yield (
        f"At step {evaluation['step']}, on the folders of `data.eval_segmentation` and "
        "`data.eval_language`, none of which was trained on. Whether they share patients or images "
        "with the training data is what `scripts/lint_data.py` checks."
    )
    masks = evaluation.get("segmentation", {})
    if masks.get("num_masks"):
        rows = []
        for metric in (name for name in masks if name.startswith("dice")):
            scores = masks[metric]
            rows.append((metric, "all", masks["num_masks"], scores["mean"]))
            for axis in ("by_prevalence", "by_modality"):
                for name, cell in scores[axis].items():
                    rows.append((metric, name, cell["num"], cell["mean"]))
        yield _table(("metric", "group", "masks", "mean"), iter(rows))
    answers = evaluation.get("answers", {})
    if answers:
        kinds = ((k, c["num"], c["accuracy"], c["best_constant"]) for k, c in answers.items())
        yield _table(("questions", "n", "accuracy", "best constant answer"), kinds)


def _limits(run: RunFacts) -> Iterator[str]:
    yield (
        f"{RESEARCH_ONLY} It knows the modalities, targets and phrasings of the data above and "
        "nothing else; its errors on other scanners, populations and questions are unknown."
    )
    masks = (run.evaluation or {}).get("segmentation", {})
    targets = masks.get("dice", {}).get("by_target", {})
    weakest = sorted(targets.items(), key=lambda item: item[1]["mean"])[:NUM_WEAKEST]
    # By name: whoever uses the model should meet them here and not in a patient.
    if weakest:
        named = ", ".join(f"{name} {c['mean']:.2f} (n = {c['num']})" for name, c in weakest)
        yield f"Weakest targets by Dice on the held-out records: {named}."


def _table(columns: tuple[str, ...], rows: Iterator[tuple[Any, ...]]) -> str:
    """Markdown; numbers that are no counts to three digits."""
    cells = [
        [f"{v:.3f}" if isinstance(v, float) else "-" if v is None else str(v) for v in row]
        for row in rows
    ]
    lines = [columns, ["---"] * len(columns), *cells] if cells else []
    # A bar inside a name would end its cell.
    text = ["| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines]
    return "\n".join(text) or "Not recorded."
