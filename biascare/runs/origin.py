"""What a run's folder says of where it comes from, and what decides that a checkpoint is of it.

save_run_files(config, groups, segmentation, language)    # config.yaml, prevalence.json, run.json
run = read_run(folder, step, config)                      # for the card of an export
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from biascare.config import dump_config, to_dict
from biascare.data.prevalence import drawn_counts, save_prevalence
from biascare.durable import replace_text
from biascare.records import Records
from biascare.reports.model_card import RunFacts
from biascare.settings.keys import Config
from biascare.settings.schema import build
from biascare.settings.strict_yaml import ConfigError, read_tree
from biascare.training.progress import complete_lines
from biascare.version import __version__

FREE_ON_RESUME = (
    "data.segmentation",  # their contents are compared instead
    "data.language",
    "data.labelled",
    "data.eval_segmentation",
    "data.eval_language",
    "data.eval_labelled",
    "data.max_tokens",
    "data.num_workers",
    "data.max_bad_samples",
    "data.verify",
    "model.mllm",
    "model.vision_weights",
    "model.activation_checkpointing",
    "eval.",
    "train.max_steps",
    "train.output_dir",
    "train.resume",
    "train.deepspeed",
    "train.log_every",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.nonfinite",
    "train.max_skipped_steps",
    "train.tensorboard",
)
"""Keys a resumed run may change; every other decides what the next step computes."""


def provenance(
    config: Config, sources: list[Records], deepspeed_config: dict[str, Any]
) -> dict[str, Any]:
    """What exact resume depends on; stands in every checkpoint."""
    settings = {
        key: value for key, value in _dotted(to_dict(config)) if not key.startswith(FREE_ON_RESUME)
    }
    weights = [s.weight for s in config.image_sources + config.data.language]
    # By content: a folder may move between two starts, its records may not change.
    hashes = [source.manifest["content_hash"] for source in sources]
    settings["data"] = [list(pair) for pair in zip(hashes, weights, strict=True)]
    # Decides how optimizer states are cut; the rest of the file may change.
    settings["zero_stage"] = deepspeed_config.get("zero_optimization", {}).get("stage", 0)
    return settings


def _dotted(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings with their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def git_commit() -> str:
    """Commit of the code, "-dirty" appended when files differ from it; "unknown" outside git."""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    # No git, or an installed package: unknown is better than a run that does not start.
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def code_history(earlier: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """What trained, and since which step: commit and library versions, an entry for each change.

    `earlier`: that of the checkpoint which this code continues after `step`.
    """
    libraries = {name: version(name) for name in ("torch", "deepspeed", "transformers", "peft")}
    versions = {"biascare": __version__, "python": platform.python_version()} | libraries
    now = {"git_commit": git_commit(), "versions": versions}
    if earlier and earlier[-1] | now == earlier[-1]:
        return earlier
    return [*earlier, {"from_step": step} | now]


# ---------------------------------------------------------------- written


def save_run_files(
    config: Config,
    groups: dict[str, str],
    images: list[Records],
    language: list[Records],
    *,
    code: list[dict[str, Any]],
) -> None:
    """The configuration, the groups, the origin of the data and the code that trains. Only when the
    folder is known to be this run's: an export takes what stands here for the truth about the
    weights beside it."""
    folder = Path(config.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    dump_config(config, folder / "config.yaml")
    save_prevalence_file(config, folder / "prevalence.json", images)
    copied = ("source", "split", "version", "licence")
    weights = [source.weight for source in config.image_sources + config.data.language]
    task = "labels" if config.train.stage == "labels" else "segmentation"
    tasks = [task] * len(images) + ["language"] * len(language)
    about = {
        "code": code,
        "prevalence_groups": groups,
        # What the card of the model says: the records themselves may be gone when it is written.
        "data": [
            {name: records.manifest[name] for name in copied}
            | {
                "task": task,
                "images": records.manifest["num_rows"],
                "weight": weight,
                "content": records.manifest["content_hash"],
            }
            for task, records, weight in zip(tasks, images + language, weights, strict=True)
        ],
    }
    # At once: exported from half a file, the card would lack where its data comes from.
    replace_text(folder / "run.json", json.dumps(about, indent=2) + "\n")


def save_prevalence_file(config: Config, path: Path, images: list[Records]) -> None:
    """The groups of this run, for `scripts/evaluate.py --prevalence` and for later runs."""
    given = config.eval.prevalence
    if given is None:
        counts = drawn_counts(images, labelled=config.train.stage == "labels")
        folders = [str(source.folder) for source in images]
        shares = config.eval.head_share, config.eval.tail_share
        save_prevalence(path, counts, *shares, folders=folders)
    # A resumed run may name its own file, which cannot be copied onto itself.
    elif Path(given).resolve() != path.resolve():
        shutil.copyfile(given, path)


# ---------------------------------------------------------------- read


def read_config(folder: Path, overrides: list[str]) -> Config:
    """The resolved configuration of a run. Its data need not be on this machine."""
    # Not `load_config`, which asks for the folders of the data too.
    tree = read_tree(folder / "config.yaml", overrides)
    result = build(Config, tree)
    problems = [*tree.problems, *result.problems]
    if problems or result.value is None:
        raise ConfigError(problems)
    return result.value


def read_run(
    folder: Path, step: int, config: dict[str, Any], code: list[dict[str, Any]] | None = None
) -> RunFacts:
    """Collect run.json and the newest evaluation up to `step` from metrics.jsonl.

    `code`: of the checkpoint, where the run may have trained on with other code since. Raises
    ValueError when run.json is missing or damaged.
    """
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / 'run.json'} cannot be read ({error}); it stands in train.output_dir beside "
            "checkpoints/, copy it with them"
        ) from error
    log = folder / "metrics.jsonl"
    entries = complete_lines(log) if log.is_file() else ()
    # What was evaluated after this step is of other weights.
    done = [entry for entry in entries if entry["event"] == "eval" and entry["step"] <= step]
    return RunFacts(
        name=folder.resolve().name,
        step=step,
        config=config,
        config_file=folder / "config.yaml",
        about=about if code is None else about | {"code": code},
        evaluation=done[-1] if done else None,
    )
