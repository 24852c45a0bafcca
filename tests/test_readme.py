"""What README and docs say is what the code does: commands, snippets, names of files, the map."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from biascare.config import describe_config, load_config
from biascare.evaluation.cases import KINDS, AnswerCase, Header, MaskCase, MaskPrediction
from biascare.interfaces import Facts
from biascare.models.export_folder import TrainingFacts, save_network
from biascare.records import FEATURES, Turn
from biascare.version import __version__
from tests.test_architecture import FIRST, GROUND, KNOWN, SECOND, TABLE
from tests.tiny import encoded_png, tiny_chat, tiny_model

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
HOUSE = ROOT / "docs" / "house.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
MAX_README_BYTES = 9_500
PROGRAMS = ("python", "deepspeed", "make", "pytest", "pip")
NOT_LISTED = {"__init__.py", "py.typed"}
MAPPED = ("biascare", "scripts", "data_prep", "configs", "examples")
"""Folders whose files the map names one by one."""


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    """Fenced blocks in one of the languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)
    return [body for language, body in found if language in languages]


def code_spans(page: Path) -> list[str]:
    """What stands between backticks in running text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text_of(page), flags=re.S | re.M))


def commands(*pages: Path) -> list[list[str]]:
    """Every shell command of the pages, as words."""
    lines = [
        line
        for page in pages
        for block in (*blocks(page, "bash", ""), "\n".join(code_spans(page)))
        for line in block.replace("\\\n", " ").splitlines()
    ]
    begins = tuple(f"{program} " for program in (*PROGRAMS, ".venv/bin/pytest"))
    return [shlex.split(line, comments=True) for line in lines if line.startswith(begins)]


def script_of(words: list[str]) -> str | None:
    """The script that a command runs; pytest reads its arguments itself, and without any arguments
    a command is only mentioned."""
    scripts = (
        w for w in words if w.endswith(".py") and "pytest" not in words[0] and w != words[-1]
    )
    return next(scripts, None)


COMMANDS = commands(*PAGES)


def test_the_readme_is_short_and_has_commands_for_every_step() -> None:
    assert len(README.read_bytes()) <= MAX_README_BYTES, "move details to docs/"
    scripts = {script_of(words) for words in commands(README)}
    steps = {"scripts/lint_data.py", "scripts/train.py", "scripts/evaluate.py", "examples/click.py"}
    assert steps <= scripts
    assert ["make", "demo"] in COMMANDS and ["make", "test"] in COMMANDS


# ---------------------------------------------------------------- commands


class ParsedError(BaseException):
    """The arguments were read; no program may catch it."""


def parse_only(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script of a command until it has read its arguments. Raises SystemExit for wrong
    ones."""
    script = script_of(words)
    assert script is not None
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def read(
            parser: argparse.ArgumentParser, *arguments: Any, _original: Any = original
        ) -> None:
            parser.allow_abbrev = False
            _original(parser, *arguments)
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, name, read)
    monkeypatch.setattr(sys, "argv", words[words.index(script) :])
    with pytest.raises(ParsedError):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("script", sorted({s for s in map(script_of, COMMANDS) if s}))
def test_a_script_understands_every_command_that_the_pages_give(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (words for words in COMMANDS if script_of(words) == script):
        try:
            with monkeypatch.context() as patch:
                parse_only(words, patch)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")


PROGRAM_FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("scripts", "data_prep", "examples")
    for path in (ROOT / folder).glob("*.py")
    if path.name not in NOT_LISTED
)


@pytest.mark.parametrize("program", PROGRAM_FILES, ids=str)
def test_every_program_explains_itself(
    program: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(program), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")


def test_every_make_target_of_the_pages_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[1] for words in COMMANDS if words[0] == "make"} <= targets


def test_the_training_commands_of_the_readme_make_a_valid_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = ("weights/HuatuoGPT-Vision-7B-Qwen2.5VL", "outputs/stage1/export")
    for folder in ("outputs/data", *weights):
        (tmp_path / folder).mkdir(parents=True)
    runs = [words for words in commands(README) if script_of(words) == "scripts/train.py"]
    trained = [words for words in runs if "--plan" not in words]  # a plan needs no data
    for words in trained:
        for path in re.findall(r"path: ([^,}]+)", " ".join(words)):
            (tmp_path / path).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for words in trained:
        config = ROOT / words[words.index("--config") + 1]
        load_config(config, [word for word in words if re.match(r"\w+\.\w+=", word)])
    assert len(trained) == 2


@pytest.fixture(scope="module")
def demo_folder(
    tiny_mllm: Path, tiny_records: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder where the paths of the snippets lead to tiny models and records."""
    folder = tmp_path_factory.mktemp("demo")
    export = folder / "outputs" / "demo" / "stage2" / "export"
    facts = TrainingFacts(
        beta_vl=0.5,
        mask_prompt=True,
        prevalence={},
        disc_share=None,
        disc_share_by_target={},
        trained_on=[],
    )
    save_network(tiny_model(tiny_mllm), export, facts=facts)
    tiny_chat(tiny_mllm).processor.save_pretrained(export / "processor")
    (folder / "outputs" / "demo" / "data").mkdir()
    (folder / "outputs" / "demo" / "data" / "test").symlink_to(tiny_records)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8)
    (folder / "scan.png").write_bytes(encoded_png(pixels))
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_the_snippets_of_a_page_run(
    page: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo_folder)
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})


def test_the_readme_shows_what_a_segmentation_and_an_answer_hold() -> None:
    (snippet,) = blocks(README, "python")
    shown = {node.attr for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Attribute)}
    assert {"from_pretrained", "segment", "click", "undo", "mask", "uncertainty", "ask"} <= shown


# ---------------------------------------------------------------- names


def named_paths(page: Path) -> Iterator[str]:
    """Files and folders of the repository that a page names, from the root."""
    tops = "biascare|scripts|data_prep|configs|docs|tests|examples"
    words = [word.rstrip(",;:") for span in code_spans(page) for word in span.split()]
    yield from (word for word in words if re.fullmatch(rf"({tops})/[\w./-]*", word))
    here = page.parent.relative_to(ROOT)
    for target in re.findall(r"\]\(([^)#]+)", text_of(page)):
        if "://" not in target:
            yield str((ROOT / here / target).resolve().relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    missing = [path for path in named_paths(page) if not (ROOT / path).exists()]
    files = {path.name for path in (*KNOWN.values(), *ROOT.iterdir(), *ROOT.rglob("tests/**/*.py"))}
    bare = (span for span in code_spans(page) if re.fullmatch(r"[\w-]+\.(py|toml|cff)", span))
    missing += [name for name in bare if name not in files]
    assert not missing, f"{page.name} names what does not exist: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_key_and_constant_that_a_page_names_exists(page: Path) -> None:
    spans = sorted(set(code_spans(page)))
    modules = (span for span in spans if re.fullmatch(r"biascare(\.\w+)+", span))
    missing = [name for name in modules if pydoc.locate(name) is None]
    keys = {row.key for row in describe_config()}
    keys |= {key.rpartition(".")[0] for key in keys}
    section = "|".join(sorted({key.partition(".")[0] for key in keys if key}))
    named = (re.match(rf"({section})\.[\w.]+", span) for span in spans)
    missing += [found[0] for found in named if found and found[0] not in keys]
    source = "\n".join(path.read_text(encoding="utf-8") for path in KNOWN.values())
    source += (ROOT / "tests" / "tiny.py").read_text(encoding="utf-8")
    constants = (s for s in spans if re.fullmatch(r"[A-Z_]{5,}", s))
    missing += [name for name in constants if not re.search(rf"^{name}\b.*=", source, re.M)]
    assert not missing, f"{page.name} names what does not exist: {missing}"


def test_every_field_of_a_case_and_of_a_record_is_described() -> None:
    described = set(code_spans(ROOT / "docs" / "evaluation.md"))
    for kind in (Header, MaskCase, MaskPrediction, AnswerCase):
        assert {field.name for field in dataclasses.fields(kind)} <= described, kind.__name__
    assert {*Facts._fields, *KINDS} <= described
    assert {*FEATURES, *Turn._fields} <= set(code_spans(ROOT / "docs" / "data.md"))


def test_the_citation_states_this_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    (paper,) = citation["references"]
    assert paper["title"] in " ".join(text_of(README).split()).replace("*", "")


# ---------------------------------------------------------------- the map


def test_the_tree_of_the_map_is_the_tree_on_disk() -> None:
    (tree,) = blocks(HOUSE, "")
    listed, folder = set(), Path()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parent = Path(*folder.parts[:depth])
        if name.endswith("/"):
            folder = parent / name.rstrip("/")
        else:
            listed.add(str(parent / name))
            assert len(line.split()) > 1, f"docs/house.md says nothing of {name}"
    on_disk = {
        str(path.relative_to(ROOT))
        for top in MAPPED
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name not in NOT_LISTED
    }
    assert {name for name in listed if name.split("/")[0] in MAPPED} == on_disk


def test_the_import_table_of_the_map_is_the_one_that_is_tested() -> None:
    """Rows of packages that are still to come stand in the tested table alone."""
    groups = {"ground": GROUND, "first": FIRST, "second": SECOND}

    def there(name: str) -> bool:
        return name == "scripts" or any(m == name or m.startswith(f"{name}.") for m in KNOWN)

    page = text_of(HOUSE)
    for group, names in groups.items():
        (line,) = re.findall(rf"^- \*{group}\*: (.*)$", page, re.MULTILINE)
        assert names_in(line, groups) == {name for name in names if there(name)}
    drawn = {
        row: (names_in(allowed, groups), reason)
        for row, allowed, reason in re.findall(
            r"^\| `([\w.]+)` \| (.*?) \| (.*?) \|$", page, re.MULTILINE
        )
    }
    for row, (allowed, _) in drawn.items():
        drawn[row] = ({name for name in allowed if there(name)}, drawn[row][1])
    assert drawn == {
        row: ({name for name in allowed if there(name)}, reason)
        for row, (allowed, reason) in TABLE.items()
        if there(row)
    }


def names_in(cell: str, groups: dict[str, tuple[str, ...]]) -> set[str]:
    """Modules of a cell: those in backticks, and those of the groups in italics."""
    names = set(re.findall(r"`([\w.]+)`", cell))
    return names.union(*(groups[group] for group in re.findall(r"\*(\w+)\*", cell)))


# ---------------------------------------------------------------- the demo


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
