"""What a run's folder says of where it comes from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from biascare.reports.model_card import RunFacts


def read_run(folder: Path, step: int, config: dict[str, Any]) -> RunFacts:
    """Collect run.json and the newest evaluation up to `step` from metrics.jsonl.

    Raises ValueError when run.json is missing or damaged.
    """
    try:
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / 'run.json'} cannot be read ({error}); it stands in train.output_dir beside "
            "checkpoints/, copy it with them"
        ) from error
    log = folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    # A line that a crash cut short is never of an evaluation that had finished.
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    done = [entry for entry in entries if entry["event"] == "eval" and entry["step"] <= step]
    return RunFacts(
        name=folder.resolve().name,
        step=step,
        config=config,
        config_file=folder / "config.yaml",
        about=about,
        evaluation=done[-1] if done else None,
    )


def git_commit() -> str:
    """Commit of the code, "-dirty" appended when files differ from it; "unknown" outside git."""
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"
