"""The labels stage: a linear head on an image encoder that is frozen or trained, from records to
the scores of a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from biascare import BiasCareVL
from biascare.data.labels import LabelSpace, presence, trained_labels
from biascare.evaluation.cases import read_cases
from biascare.losses import label_loss
from biascare.models.export_folder import open_network
from biascare.models.label_head import LabelHead
from biascare.records import Record, Records
from data_prep.wording.conversations import DIAGNOSES, DIAGNOSIS_QUESTIONS, choice_turns, draw_for
from tests.tiny import encoded_png, write_records
from tests.training.training_runs import ROOT, environment, free_port

CODES = ("nv", "mel", "df")


def lesion(index: int, split: str) -> Record:
    """A lesion whose colour is its diagnosis."""
    rng = np.random.default_rng(index)
    code = CODES[index % 3]
    image = rng.integers(0, 40, (48, 48, 3), dtype=np.uint8)
    image[..., CODES.index(code)] += 180
    name = f"isic2018/{split}/{index}"
    diagnosis, draw = DIAGNOSES[code], draw_for(name)
    return Record(
        id=name,
        image=encoded_png(image),
        height=48,
        width=48,
        conversations=choice_turns(DIAGNOSIS_QUESTIONS[0], DIAGNOSES.values(), diagnosis, draw),
        task="classification",
        modality="dermoscopy",
        anatomy="skin",
        labels=[diagnosis],
        source="isic2018",
        split=split,
        patient_id=None,
        study_id=None,
        sex=None,
        age=None,
        race=None,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    for split, num in (("train", 24), ("test", 9)):
        write_records(folder / "isic2018" / split, [lesion(i, split) for i in range(num)])
    return folder


@pytest.fixture(scope="module")
def probe(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the probe's own configuration on two ranks, made small."""
    output = tmp_path_factory.mktemp("probe") / "run"
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    train, test = prepared / "isic2018/train", prepared / "isic2018/test"
    changes = [
        f"data.labelled=[{{path: {train}}}]",
        f"data.eval_labelled=[{{path: {test}}}]",
        "data.num_workers=0",
        "model.vision=tiny",
        "model.image_size=64",
        "model.vision_weights=null",
        "optim.lr=0.05",
        "optim.warmup_steps=2",
        "train.max_steps=30",
        f"train.output_dir={output}",
        "train.global_batch=12",
        "train.micro_batch=6",
        "train.precision=fp32",
        "train.eval_every=0",
        "train.log_every=10",
        "train.save_every=30",
        "train.tensorboard=false",
    ]
    command = [launcher, "--num_accelerators", "2", f"--master_port={free_port()}"]
    command += ["scripts/train.py", "--config", "configs/probe_isic2018.yaml", *changes]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return output


def test_a_probe_learns_on_a_frozen_encoder_and_its_export_knows_the_labels(probe: Path) -> None:
    entries = [json.loads(line) for line in (probe / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"]["labels"] for entry in entries if entry["event"] == "train"]
    assert losses[-1] < losses[0]
    before, after = (e["labels"] for e in entries if e["event"] == "eval")
    # The head starts at 0: every diagnosis equally likely.
    assert before["macro_auroc"] == pytest.approx(0.5)
    assert after["accuracy"] == 1.0
    network, facts = open_network(probe / "export")
    assert facts is not None and network.label_head is not None
    assert network.label_head.labels == tuple(sorted(DIAGNOSES[code] for code in CODES))
    assert network.label_head.linear.weight.abs().sum() > 0
    assert set(facts.prevalence) == set(network.label_head.labels)
    trained = json.loads((probe / "run.json").read_text())["data"]
    assert [row["task"] for row in trained] == ["labels"]


def test_a_person_gets_probabilities_that_add_up(probe: Path, prepared: Path) -> None:
    model = BiasCareVL.from_pretrained(probe / "export", device="cpu")
    row = Records(prepared / "isic2018/test")[1]
    path = probe / "image.png"
    path.write_bytes(row["image"])
    found = model.classify(path)
    assert next(iter(found)) == DIAGNOSES["mel"]
    assert sum(found.values()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="answers no questions"):
        model.ask(path, "What is it?")


def test_the_benchmark_scores_the_head(probe: Path, prepared: Path, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/eval_isic2018.py", str(probe / "export")]
    done = subprocess.run(
        [*command, "--data", str(prepared), "--output", str(tmp_path / "out")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "answers no questions: they are left out" in done.stderr
    cases = read_cases(tmp_path / "out" / "cases.jsonl")
    assert cases.header.benchmark == "isic2018" and len(cases.labels) == 9
    assert all(sum(case.probabilities) == pytest.approx(1.0, abs=1e-5) for case in cases.labels)
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["benchmark"]
    assert found["scores"]["balanced accuracy by head"]["value"] == 1.0
    assert (found["num"], found["num_official"]) == (9, 1512)


def test_labels_that_were_not_judged_do_not_train_and_are_not_absent() -> None:
    row = {"labels": ["Mass", "No finding"], "extra": {"judged_labels": ["Mass", "Nodule"]}}
    space = LabelSpace(("Hernia", "Mass", "Nodule"), exclusive=False)
    assert presence(row, space) == [None, True, False]
    logits = torch.tensor([[9.0, 0.0, 0.0]], requires_grad=True)
    loss = label_loss(logits, torch.tensor([[float("nan"), 1.0, 0.0]]), exclusive=False)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.log(2))
    assert logits.grad is not None and logits.grad[0, 0] == 0
    nobody = label_loss(logits, torch.full((1, 3), float("nan")), exclusive=False)
    assert float(nobody.detach()) == 0 and nobody.requires_grad


def test_exclusive_labels_are_exactly_one() -> None:
    space = LabelSpace(("a", "b"), exclusive=True)
    assert presence({"labels": ["b", "c"], "extra": {}}, space) == [False, True]
    for labels in (["c"], ["a", "b"]):
        with pytest.raises(ValueError, match="expected exactly one of a, b"):
            presence({"labels": labels, "extra": {}}, space)


def test_a_head_needs_labels_that_differ(prepared: Path) -> None:
    assert len(trained_labels([Records(prepared / "isic2018/train")])) == 3
    for labels in (("a",), ("a", "a")):
        with pytest.raises(ValueError, match="expected different names"):
            LabelHead(4, labels, exclusive=True)
