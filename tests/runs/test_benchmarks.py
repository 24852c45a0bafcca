"""The benchmarks by their doors and as a suite: protocols, refusals, numbers of one model load."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from biascare.data.variants import BLIND
from biascare.evaluation.benchmarks import BENCHMARKS, benchmark_of, folders_of
from biascare.evaluation.cases import read_cases
from biascare.inference.model import BiasCareVL
from biascare.models.export_folder import save_network
from biascare.records import Record
from biascare.runs import evaluate as module
from biascare.runs.evaluate import evaluate_suite, suite_entries
from biascare.runs.evaluation_door import evaluate, parse
from tests.runs.test_evaluating import request
from tests.tiny import tiny_chat, tiny_model, tiny_record, write_records

ROOT = Path(__file__).parents[2]
FINDINGS = ("Hernia", "Mass", "Nodule")


def chest(index: int, split: str) -> Record:
    """A chest X-ray with judged findings; nobody has a hernia."""
    present = [name for k, name in enumerate(FINDINGS) if k and (index + k) % 2]
    return dataclasses.replace(
        tiny_record(index, split),
        id=f"cxr_lt_task2/{split}/{index}",
        source="cxr_lt_task2",
        labels=present or ["No finding"],
        extra={"judged_labels": list(FINDINGS)},
    )


def of_source(index: int, source: str, split: str = "test") -> Record:
    whole = tiny_record(index, split)
    return dataclasses.replace(whole, id=f"{source}/{index}", source=source, labels=["nevus"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All benchmarks, four images each, as the converters lay them out."""
    folder = tmp_path_factory.mktemp("prepared")
    for pattern in {p for b in BENCHMARKS.values() for p in b.folders}:
        source, split = pattern.replace("*", "btcv").rsplit("/", 1)
        name = Path(source).name
        rows = [
            chest(i, split) if name == "cxr_lt_task2" else of_source(i, name, split)
            for i in range(4)
        ]
        write_records(folder / source / split, rows)
    return folder


@pytest.fixture(scope="module")
def export(tiny_mllm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks") / "export"
    save_network(tiny_model(tiny_mllm), folder)
    tiny_chat(tiny_mllm).processor.save_pretrained(folder / "processor")
    return folder


@pytest.fixture(scope="module")
def suite(export: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, {benchmark: metrics}, number of times a model was opened)."""
    output, opened = tmp_path_factory.mktemp("suite"), []
    honest = BiasCareVL.from_pretrained

    def counted(*arguments: Any, **keywords: Any) -> BiasCareVL:
        opened.append(arguments)
        return honest(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BiasCareVL, "from_pretrained", counted)
        patch.setattr(module, "contact_sheet", lambda *_: None)
        names = ",".join(BENCHMARKS)
        summaries = evaluate_suite(request(export, output, suite=names, data=prepared))
    return output, summaries, len(opened)


def test_a_suite_runs_all_benchmarks_with_one_model(suite: Any) -> None:
    output, summaries, num_opened = suite
    assert num_opened == 1 and set(summaries) == set(BENCHMARKS)
    for name, benchmark in BENCHMARKS.items():
        found = json.loads((output / name / "metrics.json").read_text())["benchmark"]
        assert found["title"] == benchmark.title and found["num_official"] == benchmark.official
        assert found["num"] > 0 and found["scores"]
        assert set(found["groups"]) == set(benchmark.groups)
        assert read_cases(output / name / "cases.jsonl").header.benchmark == name


def test_a_benchmark_scores_the_questions_of_its_kinds_alone(suite: Any) -> None:
    output, summaries, _ = suite
    kinds = {
        name: {case.facts.kind for case in read_cases(output / name / "cases.jsonl").answers}
        for name in BENCHMARKS
    }
    assert kinds["vqa_rad"] == {"closed", "open"} and kinds["pmc_vqa"] == {"choice"}
    assert kinds["imed361m"] == set()
    assert summaries["imed361m"]["benchmark"]["item"] == "masks"


def test_findings_are_asked_for_one_by_one_where_there_is_no_head(suite: Any) -> None:
    output, summaries, _ = suite
    cases = read_cases(output / "cxr_lt" / "cases.jsonl")
    assert not cases.answers and len(cases.labels) == 8
    assert {case.facts.split for case in cases.labels} == {"val", "test"}
    assert all(case.labels == list(FINDINGS) and not case.exclusive for case in cases.labels)
    assert all(0 < p < 1 for case in cases.labels for p in case.probabilities)
    found = summaries["cxr_lt"]
    assert found["benchmark"]["num"] == 4 and found["labels"]["num"] == 4
    assert found["labels"]["by_label"]["Hernia"]["average_precision"] is None
    assert found["labels"]["macro_f1"] is not None  # thresholds of the development split
    assert "1 - brier" in found["groups"]


def test_label_probabilities_do_not_depend_on_the_batch(
    export: Path, prepared: Path, tmp_path: Path
) -> None:
    found = []
    for size in (1, 24):
        wanted = request(
            export, tmp_path / str(size), suite="cxr_lt", data=prepared, batch_size=size
        )
        evaluate_suite(wanted)
        cases = read_cases(tmp_path / str(size) / "cases.jsonl").labels
        found.append([p for case in cases for p in case.probabilities])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_a_missing_folder_or_an_unknown_name_is_an_error_before_the_model(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "open_model", lambda _: pytest.fail("opened"))
    model = tmp_path / "none"
    with pytest.raises(ValueError, match="did you mean 'pathvqa'"):
        evaluate_suite(request(model, tmp_path, suite="patvqa", data=prepared))
    with pytest.raises(ValueError, match="has no folder vqa_rad/test; prepare it"):
        evaluate_suite(request(model, tmp_path, suite="vqa_rad", data=tmp_path))
    with pytest.raises(ValueError, match="names vqa_rad twice"):
        evaluate_suite(request(model, tmp_path, suite="vqa_rad,vqa_rad", data=prepared))


def test_a_file_lists_a_suite(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("benchmarks:\n  - vqa_rad\n  - {name: isic2018, data: other, limit: 3}\n")
    assert suite_entries(str(path)) == [
        {"name": "vqa_rad"},
        {"name": "isic2018", "data": "other", "limit": 3},
    ]
    path.write_text("benchmarks: [{name: isic2018, limt: 3}]\n")
    with pytest.raises(ValueError, match="did you mean 'limit'"):
        suite_entries(str(path))
    path.write_text("benchmark: [vqa_rad]\n")
    with pytest.raises(ValueError, match="expected one key, benchmarks"):
        suite_entries(str(path))


def test_a_model_that_can_do_nothing_of_a_benchmark_is_refused(
    prepared: Path, tmp_path: Path
) -> None:
    save_network(tiny_model(None), tmp_path / "export")
    for name, message in (("vqa_rad", "answers no questions"), ("cxr_lt", "neither a label head")):
        wanted = request(tmp_path / "export", tmp_path / "out", suite=name, data=prepared)
        with pytest.raises(ValueError, match=message):
            evaluate_suite(wanted)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_its_door(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "scripts" / f"eval_{name}.py").read_text()
    assert f'benchmark="{name}"' in text
    options = parse(["model", "--data", "d", "--output", "o"], None, name)
    assert options.suite == name and options.max_new_tokens is None
    with pytest.raises(SystemExit):
        parse(["model", "--output", "o"], None, name)
    assert "--data" in capsys.readouterr().err


def test_folders_may_be_named_by_a_pattern(prepared: Path) -> None:
    assert folders_of(benchmark_of("imed361m"), prepared) == [prepared / "imed361m/btcv/test"]


def test_questions_of_a_vqa_benchmark_are_also_asked_blindly_unless_told(
    export: Path,
    prepared: Path,
    tmp_path: Path,
    suite: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, summaries, _ = suite
    for name, benchmark in BENCHMARKS.items():
        found = read_cases(output / name / "cases.jsonl")
        assert found.header.settings["blind"] == benchmark.blind
        variants = {frozenset(case.variants) for case in found.answers}
        assert variants <= {frozenset(BLIND) if benchmark.blind else frozenset()}
    assert set(summaries["pmc_vqa"]["answers"]["choice"]["blind"]["image_reliance"]) == {
        "text",
        "option",
    }
    monkeypatch.setattr("biascare.runs.evaluation_door.prepare_process", lambda: None)
    command = ["eval_vqa_rad.py", str(export), "--data", str(prepared), "--max-new-tokens", "3"]
    for more, blind, others in (
        ([], True, 3),
        (["--no-blind"], False, 0),
        (["--no-blind", "--counterfactual"], False, 8),
    ):
        folder = tmp_path / f"{blind}{others}"
        monkeypatch.setattr("sys.argv", [*command, "--output", str(folder), *more])
        evaluate(None, benchmark="vqa_rad")
        shown = capsys.readouterr().out
        assert ("Questions asked otherwise" in shown) == (others > 0)
        closed = json.loads((folder / "metrics.json").read_text())["answers"]["closed"]
        assert ("blind" in closed, "counterfactual" in closed) == (blind, others == 8)
        found = read_cases(folder / "cases.jsonl")
        assert found.header.settings["blind"] == blind
        assert {len(case.variants) for case in found.answers} == {others}
    # Rows with and without do not mix.
    monkeypatch.setattr("sys.argv", [*command, "--output", str(folder)])
    with pytest.raises(SystemExit, match="holds another evaluation, which differs in settings"):
        evaluate(None, benchmark="vqa_rad")
