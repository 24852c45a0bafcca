"""What the README says is what the code does: its commands, its file tree, its demo."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from biascare.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_LISTED = {"__init__.py", "py.typed"}


def commands() -> list[list[str]]:
    """Every shell command of the README, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(r"\| `(python [^`]+)` \|", README)
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def script_of(words: list[str]) -> str | None:
    return next((word for word in words if word.endswith(".py")), None)


def test_the_readme_has_commands_for_every_step() -> None:
    scripts = {script_of(words) for words in commands()}
    assert {"scripts/train.py", "scripts/evaluate.py", "data_prep/demo.py"} <= scripts
    assert ["make", "demo"] in commands() and ["make", "test"] in commands()


@pytest.mark.parametrize("script", sorted({s for s in map(script_of, commands()) if s}))
def test_every_option_of_a_readme_command_is_one_the_script_knows(script: str) -> None:
    run = subprocess.run(
        [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for words in (w for w in commands() if script_of(w) == script):
        arguments = words[words.index(script) + 1 :]
        unknown = [w for w in arguments if w.startswith("--") and w not in run.stdout]
        assert not unknown, f"README uses {unknown}, which {script} --help does not list"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[1] for words in commands() if words[0] == "make"} <= targets


def test_the_training_commands_of_the_readme_make_a_valid_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (
        "outputs/data",
        "weights/HuatuoGPT-Vision-7B-Qwen2.5VL",
        "outputs/stage1/export",
    ):
        (tmp_path / folder).mkdir(parents=True)
    runs = [words for words in commands() if script_of(words) == "scripts/train.py"]
    trained = [words for words in runs if "--plan" not in words]  # a plan needs no data
    for words in trained:
        for path in re.findall(r"path: ([^,}]+)", " ".join(words)):
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for words in trained:
        config = ROOT / words[words.index("--config") + 1]
        load_config(config, [word for word in words if re.match(r"\w+\.\w+=", word)])
    assert len(trained) == 2


def test_the_file_tree_of_the_readme_is_the_tree_on_disk() -> None:
    match = re.search(r"```\n(biascare/\n.*?)```", README, re.DOTALL)
    assert match, "README has no file tree that begins with biascare/"
    listed, folder = set(), Path()
    for line in match.group(1).splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parent = Path(*folder.parts[:depth])
        if name.endswith("/"):
            folder = parent / name.rstrip("/")
        else:
            listed.add(str(parent / name))
    on_disk = {
        str(path.relative_to(ROOT))
        for top in ("biascare", "scripts", "data_prep", "configs")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name not in NOT_LISTED
    }
    assert on_disk == {
        name
        for name in listed
        if name.split("/")[0] in ("biascare", "scripts", "data_prep", "configs")
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_demo_learns_more_than_trivial_answers(tmp_path: Path) -> None:
    """The README's demo, through its own script; compare its table with the baselines it prints."""
    import json

    subprocess.run([sys.executable, "scripts/demo.py"], cwd=ROOT, check=True)
    folder = ROOT / "outputs" / "demo"
    untrained, trained = (
        json.loads((folder / "test" / name / "metrics.json").read_text())
        for name in ("untrained", "stage2")
    )
    dice, closed = trained["segmentation"]["dice"]["mean"], trained["answers"]["closed"]
    assert dice > untrained["segmentation"]["dice"]["mean"] + 0.2
    assert dice > trained["segmentation"]["dice_disc"]["mean"] + 0.05
    assert closed["accuracy"] > untrained["answers"]["closed"]["accuracy"] + 0.05
    assert closed["accuracy"] > max(closed["always_yes"], closed["best_constant"]) + 0.05
    assert (folder / "test" / "stage2" / "contact_sheet.png").stat().st_size > 10_000
