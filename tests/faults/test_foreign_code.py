"""Folders of models that bring code along: refused, without a question, before anything opens."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from biascare import BiasCareVL
from biascare.models.export_folder import save_network
from biascare.models.language.assembly import open_language_model
from biascare.models.language.pathway import load_processor, open_mllm
from biascare.planning.blank import mllm_config
from tests.tiny import tiny_chat, tiny_model
from tests.training.training_runs import ROOT, Job, World, environment

CODE = """
from pathlib import Path
Path(__file__).with_name("was_run").touch()
Path({marker!r}).touch()
class Planted: pass
"""

AUTO_MAPS: dict[str, Any] = {
    "config.json": {"AutoConfig": "planted.Planted", "AutoModel": "planted.Planted"},
    "processor_config.json": {"AutoProcessor": "planted.Planted"},
    "tokenizer_config.json": {"AutoTokenizer": ["planted.Planted", None]},
}


def plant(folder: Path, file: str, marker: Path, *, inside: str | None = None) -> None:
    """Add `auto_map`, and the code it names, to a folder as its own author would; `inside`: below
    this key, where a processor describes one of its parts."""
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    (content if inside is None else content.setdefault(inside, {}))["auto_map"] = AUTO_MAPS[file]
    path.write_text(json.dumps(content))
    (folder / "planted.py").write_text(CODE.format(marker=str(marker)))


@pytest.fixture
def yes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Somebody who answers every question with yes; the questions."""
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    return asked


@pytest.fixture
def export(tmp_path: Path, tiny_mllm: Path) -> Path:
    folder = tmp_path / "export"
    base = tmp_path / "base"
    shutil.copytree(tiny_mllm, base)
    save_network(tiny_model(base), folder)
    tiny_chat(tiny_mllm).processor.save_pretrained(folder / "processor")
    return folder


def test_the_planted_code_would_run_where_a_person_says_yes(
    tmp_path: Path, tiny_mllm: Path, yes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests below refuse is a danger: transformers asks, and then runs it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    folder, marker = tmp_path / "mllm", tmp_path / "was_run"
    shutil.copytree(tiny_mllm, folder)
    plant(folder, "processor_config.json", marker)
    path = folder / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processor_class": "Planted"}))
    with pytest.raises(Exception):  # noqa: B017  # the planted class is no processor
        AutoProcessor.from_pretrained(folder)
    assert yes and marker.exists()


OPENERS: dict[str, Callable[[str], Any]] = {
    "the processor": load_processor,
    "the model": lambda path: open_mllm(path, torch.float32, "sdpa"),
    "the plan": mllm_config,
    "the language model of an assembly": open_language_model,
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("file", AUTO_MAPS)
def test_a_model_folder_with_code_is_refused_without_a_question(
    tmp_path: Path, tiny_mllm: Path, yes: list[str], file: str, opener: str
) -> None:
    folder, marker = tmp_path / "mllm", tmp_path / "was_run"
    shutil.copytree(tiny_mllm, folder)
    plant(folder, file, marker)
    with pytest.raises(ValueError, match=rf"{file} names code .*planted\.Planted.*never run here"):
        OPENERS[opener](str(folder))
    assert not yes and not marker.exists()


def test_code_of_a_part_of_a_processor_is_found_too(
    tmp_path: Path, tiny_mllm: Path, yes: list[str]
) -> None:
    folder, marker = tmp_path / "mllm", tmp_path / "was_run"
    shutil.copytree(tiny_mllm, folder)
    plant(folder, "processor_config.json", marker, inside="image_processor")
    with pytest.raises(ValueError, match="names code of its own"):
        load_processor(str(folder))
    assert not yes and not marker.exists()


@pytest.mark.parametrize(
    ("place", "file"),
    [
        ("export/processor", "processor_config.json"),
        ("export/processor", "tokenizer_config.json"),
        ("base", "config.json"),
    ],
)
def test_an_export_with_code_is_refused_without_a_question(
    tmp_path: Path, export: Path, yes: list[str], place: str, file: str
) -> None:
    marker = tmp_path / "was_run"
    plant(tmp_path / place, file, marker)
    with pytest.raises(ValueError, match=rf"{file} names code of its own"):
        BiasCareVL.from_pretrained(export)
    assert not yes and not marker.exists()


@pytest.mark.timeout(240)
def test_the_training_program_refuses_it_whatever_is_typed(
    tmp_path: Path, tiny_mllm: Path, tiny_records: Path
) -> None:
    folder, marker = tmp_path / "mllm", tmp_path / "was_run"
    shutil.copytree(tiny_mllm, folder)
    plant(folder, "processor_config.json", marker)
    config = World(tmp_path, folder, tiny_records).config(Job("planted"), 1)
    done = subprocess.run(
        [sys.executable, "scripts/train.py", "--config", str(config)],
        cwd=ROOT,
        env=environment(),
        input="y\ny\n",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1 and "[y/N]" not in done.stdout + done.stderr
    assert "processor_config.json names code of its own" in done.stderr
    assert "Traceback" not in done.stderr and not marker.exists()
