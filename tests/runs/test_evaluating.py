"""What scripts/evaluate.py evaluates and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from biascare.evaluation.cases import read_cases
from biascare.inference.answerer import Answerer
from biascare.inference.segmenter import Segmenter
from biascare.models.export_folder import TrainingFacts, save_network
from biascare.records import Records
from biascare.runs.evaluate import (
    EvaluationRequest,
    check_model,
    evaluate_model,
    evaluate_suite,
    weights_hash,
)
from biascare.runs.evaluation_door import parse
from scripts import evaluate as program
from tests.tiny import tiny_chat, tiny_model, tiny_record, tiny_record_folder, write_records
from tests.training.training_runs import environment, free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def test_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_record_folder(tmp_path_factory.mktemp("split") / "test", 5, "test")


@pytest.fixture(scope="module")
def export(tiny_mllm: Path, tiny_records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that was trained on `tiny_records`."""
    folder = tmp_path_factory.mktemp("evaluated") / "export"
    facts = TrainingFacts(
        beta_vl=0.25,
        mask_prompt=True,
        prevalence={"liver": "head", "spleen": "tail"},
        disc_share=0.1,
        disc_share_by_target={"liver": 0.15},
        trained_on=[Records(tiny_records).manifest["content_hash"]],
    )
    save_network(tiny_model(tiny_mllm), folder, facts=facts)
    tiny_chat(tiny_mllm).processor.save_pretrained(folder / "processor")
    return folder


def request(model: Path, output: Path | None, **changes: Any) -> EvaluationRequest:
    stated: dict[str, Any] = {
        "model": str(model),
        "segmentation": [],
        "language": [],
        "labelled": [],
        "output": output,
        "train": [],
        "prevalence": None,
        "vision": None,
        "image_size": 256,
        "mllm": None,
        "prompt": "point",
        "corrections": 1,
        "batch_size": 4,
        "num_workers": 0,
        "max_new_tokens": 3,
        "limit": 0,
        "overwrite": False,
        "allow_trained": False,
        "check_invariance": 0,
    }
    return EvaluationRequest(**stated | changes)


def test_an_export_brings_groups_discs_and_beta_of_its_training(
    export: Path, test_split: Path, tmp_path: Path
) -> None:
    both = [str(test_split)]
    summary = evaluate_model(request(export, tmp_path, segmentation=both, language=both))
    masks = summary["segmentation"]
    assert set(masks["dice"]["by_prevalence"]) == {"head", "tail", "unseen"}
    assert {"dice_disc", "dice_disc_by_target", "dice_click_1", "dice_text"} <= set(masks)
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    header, cases, answers, _ = read_cases(tmp_path / "cases.jsonl")
    assert header.beta_vl == 0.25 and header.weights == weights_hash(export)
    assert [row["task"] for row in header.data] == ["segmentation", "language"]
    u = cases[0].predictions[0].uncertainty
    joint = 0.25 * u["semantic"] + u["predicted_dice_loss"]
    assert u["joint_label_free"] == pytest.approx(joint, abs=1e-5)
    assert set(summary["answers"]) == {"closed", "choice", "open"}
    counted = sum(cell["num"] for cell in summary["answers"].values())
    assert len(answers) == counted + summary["reports"]["num"]
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png").convert("RGB"))
    assert sheet.std() > 20  # pictures, not an empty page


def test_records_that_were_trained_on_are_refused_unless_told(
    export: Path, tiny_records: Path, test_split: Path, tmp_path: Path
) -> None:
    trained = request(export, tmp_path, segmentation=[str(tiny_records)], limit=2)
    with pytest.raises(ValueError, match="is held out, but is trained on too"):
        evaluate_model(trained)
    assert not any(tmp_path.iterdir())
    assert evaluate_model(trained._replace(allow_trained=True))["segmentation"]["num_masks"] > 0
    named = request(
        export, tmp_path, segmentation=[str(test_split)], train=[str(test_split)], overwrite=True
    )
    with pytest.raises(ValueError, match="is held out, but is trained on too"):
        evaluate_model(named)


def test_folders_without_anything_to_score_are_refused(export: Path, tmp_path: Path) -> None:
    whole = tiny_record(0, "test")
    reports = [
        dataclasses.replace(whole, targets=[], conversations=whole.conversations[-2:], id="tiny/r")
    ]
    folder = str(write_records(tmp_path / "reports", reports))
    silent = str(write_records(tmp_path / "x", [dataclasses.replace(whole, conversations=[])]))
    with pytest.raises(ValueError, match="holds no masks; leave it out of --segmentation"):
        evaluate_model(request(export, tmp_path / "out", segmentation=[folder]))
    with pytest.raises(ValueError, match="holds no questions that are scored"):
        evaluate_model(request(export, tmp_path / "out", language=[silent]))
    put = tmp_path / "prepared" / "vqa_rad" / "test"
    write_records(put, reports)
    suite = request(export, tmp_path / "out", suite="vqa_rad", data=put.parents[1])
    with pytest.raises(ValueError, match=r"holds no questions that are scored \(closed, open\)"):
        evaluate_suite(suite)
    assert not (tmp_path / "out").exists()
    # Training folders without masks give no disc, and no error either.
    masks = str(tiny_record_folder(tmp_path / "test", 2, "test"))
    bare = request(export, tmp_path / "out", segmentation=[masks], train=[folder])
    assert "dice_disc" not in evaluate_model(bare)["segmentation"]


def test_reports_are_scored_by_their_words_and_no_accuracy_counts_them(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("biascare.runs.evaluation_door.prepare_process", lambda: None)
    records = [dataclasses.replace(tiny_record(2 * i, "test"), targets=[]) for i in range(22)]
    alone = [dataclasses.replace(r, conversations=r.conversations[-2:]) for r in records]
    told: list[tuple[int, int]] = []
    honest = Answerer.answer_batch

    def watched(self: Answerer, batch: Any, *arguments: Any, **keywords: Any) -> Any:
        told.append((len(batch.facts), keywords["max_new_tokens"]))
        return honest(self, batch, *arguments, **keywords)

    monkeypatch.setattr(Answerer, "answer_batch", watched)
    found = {}
    for name, rows in (("both", records), ("alone", alone)):
        folder = write_records(tmp_path / name / "test", rows)
        command = ["evaluate.py", str(export), "--language", str(folder), "--max-report-tokens"]
        command += ["5", "--max-new-tokens", "2", "--output", str(tmp_path / name / "out")]
        monkeypatch.setattr(sys, "argv", command)
        program.main()
        found[name] = json.loads((tmp_path / name / "out" / "metrics.json").read_text())
    # 88 questions in batches of 16, then 22 reports in batches of their own.
    assert told == [(16, 2)] * 5 + [(8, 2), (16, 5), (6, 5), (16, 5), (6, 5)]
    both = found["both"]
    assert set(both["answers"]) == {"closed", "choice", "open"} and "answers" not in found["alone"]
    assert both["reports"] == found["alone"]["reports"] and both["reports"]["num"] == 22
    assert both["reports"]["by_source"]["tiny"]["num"] == 22
    assert {"bleu1", "rouge1", "num_empty", "clinical_f1"} <= set(both["reports"])
    sexes = both["groups"]["rouge1"]["sex"]["groups"]
    assert sum(group["num"] for group in sexes) == 22
    assert sum(group["num"] for group in both["groups"]["accuracy"]["sex"]["groups"]) == 88
    cases = read_cases(tmp_path / "both" / "out" / "cases.jsonl")
    reports = [case for case in cases.answers if case.facts.kind == "report"]
    assert all(len(case.token_log_probs) <= 5 and not case.options for case in reports)
    shown = capsys.readouterr().out
    assert "reports, BLEU-1" in shown and "ROUGE-1" in shown and "clinical F1" in shown


def test_foreign_weights_are_evaluated_from_boxes(test_split: Path, tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in tiny_model(None).vision.state_dict().items()}
    save_file(state, tmp_path / "weights.safetensors")
    summary = evaluate_model(
        request(
            tmp_path / "weights.safetensors",
            tmp_path / "out",
            vision="tiny",
            image_size=64,
            prompt="box",
            segmentation=[str(test_split)],
        )
    )
    assert "dice_text" not in summary["segmentation"] and "answers" not in summary


def test_the_program_says_what_it_wrote_and_refuses_another_evaluation(
    export: Path,
    test_split: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("biascare.runs.evaluation_door.prepare_process", lambda: None)
    monkeypatch.setattr("biascare.runs.evaluate.contact_sheet", lambda *_: None)  # drawn above
    command = ["evaluate.py", str(export), "--output", str(tmp_path), "--limit", "2"]
    command += ["--segmentation", str(test_split)]
    monkeypatch.setattr(sys, "argv", command)
    program.main()
    assert "cases, metrics and a contact sheet are in" in capsys.readouterr().out
    before = (tmp_path / "cases.jsonl").read_bytes()
    monkeypatch.setattr(sys, "argv", [*command, "--corrections", "2"])
    with pytest.raises(SystemExit, match="another evaluation, which differs in settings"):
        program.main()
    assert (tmp_path / "cases.jsonl").read_bytes() == before


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_named_whichever_process_reads_it(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    records = [tiny_record(index, "test") for index in range(3)]
    records[1] = dataclasses.replace(records[1], image=records[1].image[:-60])
    folder = write_records(tmp_path / "test", records)
    monkeypatch.setattr("biascare.runs.evaluation_door.prepare_process", lambda: None)
    command = ["evaluate.py", str(export), "--output", str(tmp_path / "out")]
    command += ["--segmentation", str(folder), "--num-workers", str(num_workers)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        program.main()
    message = str(caught.value)
    assert message.startswith(f"{folder}, record 'tiny/test/1' cannot be evaluated (image: got")
    assert "Traceback" not in message


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_write_the_cases_of_one(export: Path, test_split: Path, tmp_path: Path) -> None:
    """Under DeepSpeed's launcher, through the program."""
    launcher = Path(sys.executable).with_name("deepspeed")
    found = {}
    for name, start in (
        ("one", [sys.executable]),
        ("two", [str(launcher), "--num_accelerators", "2", f"--master_port={free_port()}"]),
    ):
        command = [*start, "scripts/evaluate.py", str(export), "--output", str(tmp_path / name)]
        folder = str(test_split)
        done = subprocess.run(
            [*command, "--segmentation", folder, "--language", folder, "--batch-size", "1"],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = read_cases(tmp_path / name / "cases.jsonl")
    one, two = found["one"], found["two"]
    assert one.header == two.header
    for mine, theirs in zip(one.masks + one.answers, two.masks + two.answers, strict=True):
        assert dataclasses.replace(mine, seconds=0) == dataclasses.replace(theirs, seconds=0)
    assert not list((tmp_path / "two").glob("*.rank*"))


def test_triage_is_fitted_on_validation_cases_and_masks_are_saved(
    export: Path, test_split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("biascare.runs.evaluation_door.prepare_process", lambda: None)
    monkeypatch.setattr("biascare.runs.evaluate.contact_sheet", lambda *_: None)  # drawn above
    others = [tiny_record(index, "val") for index in range(4)]
    others = [dataclasses.replace(r, patient_id=f"other {r.patient_id}") for r in others]
    val = write_records(tmp_path / "val", others)

    def run(split: Path, output: str, *more: str) -> dict[str, Any]:
        command = ["evaluate.py", str(export), "--segmentation", str(split)]
        command += ["--output", str(tmp_path / output), *more]
        monkeypatch.setattr(sys, "argv", command)
        program.main()
        return dict(json.loads((tmp_path / output / "metrics.json").read_text()))

    assert run(val, "known")["triage"]["why_no_mix"] == "no validation cases were given"
    known = str(tmp_path / "known" / "cases.jsonl")
    masks = tmp_path / "masks"
    found = run(test_split, "judged", "--validation", known, "--save-masks", str(masks))
    # Of an untrained model every mask fails: there is nothing to fit, and that is said.
    assert found["triage"]["why_no_mix"] == "every mask of the validation cases failed"
    assert all(p["threshold"] is None for p in found["triage"]["risk_control"].values())
    first = read_cases(tmp_path / "judged" / "cases.jsonl").masks[0].predictions[0]
    dear = {"click_disagreement", "text_disagreement", "size_surprise"}
    assert dear < set(first.uncertainty) == set(found["triage"]["signals"])
    assert len(list(masks.glob("*.png"))) == found["segmentation"]["num_masks"]
    # The patients of the test split, and another model.
    with pytest.raises(SystemExit, match=r"holds cases of .*expected cases of other patients"):
        run(test_split, "again", "--validation", str(tmp_path / "judged" / "cases.jsonl"))
    path = tmp_path / "known" / "cases.jsonl"
    header, *lines = path.read_text().splitlines()
    stated = json.loads(header) | {"weights": "of another"}
    path.write_text("\n".join([json.dumps(stated), *lines, ""]))
    with pytest.raises(SystemExit, match="is of other weights"):
        run(test_split, "again", "--validation", known)
    assert not (tmp_path / "again").exists()


def test_cases_are_shown_not_to_depend_on_how_they_are_computed(
    export: Path, test_split: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    both = ["--segmentation", str(test_split), "--language", str(test_split)]
    command = ["evaluate.py", str(export), *both, "--check-invariance", "4"]
    command += ["--blind", "--counterfactual"]
    monkeypatch.setattr(sys, "argv", command)
    program.main()  # exits with 1 where something differs
    shown = capsys.readouterr().out
    print(shown)
    assert shown.count("yes") == 4 and "backwards" in shown and "interrupted" in shown


def test_a_case_that_depends_on_its_batch_is_found(
    export: Path, test_split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that pads without a mask: an image's masks depend on those beside it."""
    honest = Segmenter.encode_batch

    def leaking(self: Segmenter, batch: Any) -> Any:
        return honest(self, batch._replace(images=batch.images + batch.images.max(0).values // 8))

    monkeypatch.setattr(Segmenter, "encode_batch", leaking)
    found = check_model(request(export, None, segmentation=[str(test_split)], limit=4))
    assert not found[1].passed and found[1].num_absent == 0 and found[1].dice < 0.99


def test_an_uncertainty_that_depends_on_its_batch_is_found(
    export: Path, test_split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Segmenter.click_disagreement

    def leaking(self: Segmenter, encoded: Any, *rest: Any) -> Any:
        return honest(self, encoded, *rest) + 0.02 * len(encoded.row_image)

    monkeypatch.setattr(Segmenter, "click_disagreement", leaking)
    found = check_model(request(export, None, segmentation=[str(test_split)], limit=4))
    assert not found[0].passed and found[0].doubt > 0.01 and found[0].dice == 1


def test_a_folder_to_write_and_a_check_that_writes_nothing_exclude_each_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments in ([], ["--output", "x", "--check-invariance", "4"]):
        with pytest.raises(SystemExit):
            parse(["model", "--segmentation", "data", *arguments], None)
        assert "either a folder after --output or a number" in capsys.readouterr().err
