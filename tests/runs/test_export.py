"""`scripts/export.py`: from a training checkpoint to a folder that travels."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors import safe_open

from biascare.config import load_config, to_dict
from biascare.data.loader import collate
from biascare.data.prevalence import prevalence_groups
from biascare.evaluation.metrics.segmentation import fit_disc
from biascare.interfaces import Batch
from biascare.models.export_folder import TrainingFacts, open_network, save_network
from biascare.models.network import DualPathNetwork
from biascare.records import Records
from biascare.reports.model_card import RunFacts
from biascare.runs.build import prevalence
from biascare.runs.evaluate import training_masks
from biascare.runs.export import training_facts
from biascare.runs.origin import code_history, read_run, save_run_files
from biascare.settings.keys import Config
from biascare.training.checkpoint import TAG, trained_weights
from scripts import export
from tests.tiny import (
    answers,
    language_sample,
    pad_token_id,
    segmentation_sample,
    tiny_chat,
    tiny_model,
    tiny_record_folder,
)
from tests.training.training_runs import ROOT, Job, Run, World, environment, equal

pytestmark = pytest.mark.timeout(240)

SHORT = ("train.global_batch=4", "train.max_steps=2", "train.save_every=1")
JOBS = (
    # A frozen part is not in the checkpoint, a trained embedding is.
    Job("zero2", 2, (*SHORT, "train.trainable.vision_encoder=false", "train.precision=bf16")),
    Job("zero3", 3, (*SHORT, "train.trainable.embeddings=true", "train.precision=bf16")),
)


@pytest.fixture(scope="session")  # of a module's, pytest would make it again for each MLLM family
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_mllm: Path, tiny_records: Path
) -> dict[str, Run]:
    """Finished runs of two ranks. Read only."""
    world = World(tmp_path_factory.mktemp("runs"), tiny_mllm, tiny_records)
    return world.run(2, list(JOBS))


def exported(source: Path, output: Path, *more: str) -> Run:
    """`Run` whose export is what the program made."""
    export.export(export.parse([str(source), "--output", str(output / "export"), *more]))
    return Run(output)


def probe(folder: Path, side: str = "right", answer: str | None = "the liver") -> Batch:
    chat = tiny_chat(folder)
    samples = [segmentation_sample(chat, 5, ("liver", "spleen"))] if answer else []
    samples += [language_sample(chat, 7, "Which organ is bright?", answer)]
    return collate(samples, 0, pad_token_id(chat), padding_side=side)


# ---------------------------------------------------------------- the same weights


@pytest.mark.parametrize("name", [job.name for job in JOBS])
def test_an_export_of_the_last_checkpoint_equals_the_one_at_the_end_of_training_bit_for_bit(
    runs: dict[str, Run], name: str, tmp_path: Path
) -> None:
    run = runs[name]
    made = exported(run.folder, tmp_path)
    assert equal(made.weights(), run.weights())
    theirs, ours = (
        sorted(str(p.relative_to(f)) for p in f.rglob("*"))
        for f in (run.folder / "export", tmp_path / "export")
    )
    assert ours == theirs
    for file in ("config.json", "README.md", "training_config.yaml"):
        assert (tmp_path / "export" / file).read_text() == (
            run.folder / "export" / file
        ).read_text()


def test_an_earlier_checkpoint_can_be_exported_too(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["zero3"]
    made = exported(run.folder / "checkpoints" / "step_00000001", tmp_path)
    assert made.weights().keys() == run.weights().keys()
    assert not equal(made.weights(), run.weights())
    card = (tmp_path / "export" / "README.md").read_text()
    assert "step 1" in card and "not evaluated up to this step" in card


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_partitions_are_put_together_as_deepspeed_puts_them(
    runs: dict[str, Run], name: str
) -> None:
    """Its own function unpickles anything, so it is a reference here and not the reader."""
    path = runs[name].folder / "checkpoints" / "step_00000002"
    ours = trained_weights(path)
    theirs = get_fp32_state_dict_from_zero_checkpoint(
        str(path), tag=TAG, exclude_frozen_parameters=True
    )
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for tensor_name, tensor in ours.items():
        assert torch.equal(tensor, theirs[tensor_name].to(tensor.dtype)), tensor_name


def test_precision_can_be_chosen(runs: dict[str, Run], tmp_path: Path) -> None:
    exported(runs["zero2"].folder, tmp_path, "--dtype", "fp32")
    wide = Run(tmp_path).weights()
    assert all(tensor.dtype == torch.float32 for tensor in wide.values())
    for name, tensor in runs["zero2"].weights().items():
        assert torch.equal(tensor.float(), wide[name])


# ---------------------------------------------------------------- merged


@pytest.fixture(scope="module")
def merged(
    tmp_path_factory: pytest.TempPathFactory, mllm_folder: Path
) -> tuple[DualPathNetwork, Path]:
    """A model whose adapter matters, and a merged export of an equal one."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    save_network(tiny_model(mllm_folder, query_heads=4), folder, merge=True, max_shard_size="300KB")
    return tiny_model(mllm_folder, query_heads=4), folder


@torch.no_grad()
def test_a_merged_model_gives_the_same_states_masks_and_answers(
    merged: tuple[DualPathNetwork, Path], mllm_folder: Path, tmp_path: Path
) -> None:
    model, folder = merged
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    restored = open_network(moved)[0]
    batch = probe(mllm_folder)
    (ours, mask), (theirs, other) = restored(batch), model(batch)
    assert ours.hidden_states is not None and mask is not None and other is not None
    differences = (
        float((ours.hidden_states - theirs.hidden_states).abs().max()),
        float((mask.mask_logits - other.mask_logits).abs().max()),
    )
    print(f"hidden states {differences[0]:.1e}, mask logits {differences[1]:.1e}")
    assert max(differences) <= 1e-5
    asked = probe(mllm_folder, "left", None)
    assert torch.equal(answers(restored, asked), answers(model, asked))
    without = tiny_model(mllm_folder, query_heads=4)
    assert without.mllm is not None
    with without.mllm.model.disable_adapter():  # type: ignore[operator]
        bare = without(batch)[0].hidden_states
    assert (bare - theirs.hidden_states).abs().max() > 1e-3, "the adapter has no effect to keep"


PLAIN = """
import json, sys, torch
sys.modules["biascare"] = sys.modules["peft"] = None
from transformers import AutoModelForImageTextToText
for folder in sys.argv[1:]:
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder + "/export/mllm", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    inputs = torch.load(folder + "/inputs.pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    print(json.dumps(tokens[:, inputs["input_ids"].shape[1] :].tolist()))
"""
"""Generates with merged models in a process that knows neither this package nor peft."""


def test_the_language_side_opens_in_plain_transformers(
    tiny_mllm: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    expected, folders = [], [tmp_path / "qwen", tmp_path / "llava"]
    for base, folder in zip((tiny_mllm, tiny_llava), folders, strict=True):
        batch = probe(base, "left", None)
        expected.append(answers(tiny_model(base, query_heads=4), batch).tolist())
        save_network(tiny_model(base, query_heads=4), folder / "export", merge=True)
        torch.save(dict(batch.mllm_inputs), folder / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *map(str, folders)],
        cwd=tmp_path,
        env=environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected


def test_merged_weights_are_sharded_and_complete(merged: tuple[DualPathNetwork, Path]) -> None:
    folder = merged[1]
    files = sorted((folder / "mllm").glob("*.safetensors"))
    index = json.loads((folder / "mllm" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {file.name for file in files} == set(index["weight_map"].values())
    names = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    assert names == set(index["weight_map"]) and not any("lora" in name for name in names)
    assert "packed" not in (folder / "mllm" / "config.json").read_text()
    assert not (folder / "adapter").exists()


def test_a_layer_is_folded_in_fp32_and_rounded_once(tiny_mllm: Path, tmp_path: Path) -> None:
    model = tiny_model(tiny_mllm, query_heads=4, dtype=torch.bfloat16)
    assert model.mllm is not None
    place = "language_model.layers.0.mlp.up_proj"
    layer = model.mllm.base.model.get_submodule(place)
    weight, (a,), (b,) = (
        layer.base_layer.weight.float(),
        [p.weight.float() for p in layer.lora_A.values()],
        [p.weight.float() for p in layer.lora_B.values()],
    )
    expected = (weight + b @ a * 2.0).bfloat16()  # alpha 4 over rank 2
    assert not torch.equal(expected, weight.bfloat16())
    save_network(model, tmp_path, merge=True)
    assert torch.equal(model.mllm.base.model.get_submodule(place).weight, expected)
    with pytest.raises(ValueError, match="save with merge=True"):
        save_network(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_merged_run_has_its_processor_in_both_places_and_one_place_for_its_base(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    exported(runs["zero2"].folder, tmp_path, "--merge")
    folder = tmp_path / "export"
    for place in ("processor", "mllm"):
        assert (folder / place / "tokenizer.json").is_file()
    assert json.loads((folder / "mllm" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "adapter folded in" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"holds its own language model .* leave out mllm='x/y'"):
        open_network(folder, mllm="x/y")[0]
    open_network(folder)[0]


# ---------------------------------------------------------------- the card


def test_the_card_says_where_the_model_comes_from_and_what_it_cannot_do(
    runs: dict[str, Run], tiny_records: Path
) -> None:
    run = runs["zero3"]
    card = (run.folder / "export" / "README.md").read_text()
    manifest = json.loads((tiny_records / "manifest.json").read_text())
    about = json.loads((run.folder / "run.json").read_text())
    data = f"| tiny | train | 1 | 8 | - | test | {manifest['content_hash']} |"
    assert f"| segmentation {data}" in card and f"| language {data}" in card
    (code,) = about["code"]
    assert f"commit {code['git_commit']}" in card and f"torch {code['versions']['torch']}" in card
    (evaluation,) = run.records("eval")
    dice = evaluation["segmentation"]["dice"]["mean"]
    assert "At step 2" in card
    assert f"| dice | all | {evaluation['segmentation']['num_masks']} | {dice:.3f} |" in card
    assert "best constant answer" in card and "| closed |" in card
    assert "Not a medical device" in card and "Weakest targets" in card
    assert "base_model" not in card.split("---")[1], "a path on this machine is no model id"


def test_an_evaluation_after_the_checkpoint_is_not_credited_to_it(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    lines = [{"event": "eval", "step": step, "n": step} for step in (0, 10, 20)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"event": "ev')
    for step, seen in ((9, 0), (10, 10), (15, 10), (99, 20)):
        evaluation = read_run(tmp_path, step, {}).evaluation
        assert evaluation is not None and evaluation["n"] == seen


# ---------------------------------------------------------------- when things go wrong


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file of this process can grow beyond 100 kB, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    runs: dict[str, Run], tmp_path: Path, small_disk: None
) -> None:
    with pytest.raises(OSError, match=r"could not be written to .*export .*free space"):
        exported(runs["zero2"].folder, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(runs: dict[str, Run], tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="exists already"):
        exported(runs["zero2"].folder, tmp_path)
    assert [p.name for p in (tmp_path / "export").iterdir()] == ["mine.txt"]


def test_what_a_killed_export_left_is_swept_away(runs: dict[str, Run], tmp_path: Path) -> None:
    (tmp_path / "export.tmp").mkdir()
    (tmp_path / "export.tmp" / "half.safetensors").write_text("half")
    exported(runs["zero2"].folder, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    assert not (tmp_path / "export" / "half.safetensors").exists()


@pytest.fixture
def copied(runs: dict[str, Run], tmp_path: Path) -> Path:
    """A run that may be damaged."""
    return Path(shutil.copytree(runs["zero2"].folder, tmp_path / "run"))


def test_a_missing_base_model_is_named_with_the_way_out(
    copied: Path, tmp_path: Path, tiny_mllm: Path
) -> None:
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_mllm), "/nowhere/base"))
    with pytest.raises(ValueError, match=r"'/nowhere/base'.*add model\.mllm=PLACE"):
        exported(copied, tmp_path)
    exported(copied, tmp_path, f"model.mllm={tiny_mllm}")
    saved = json.loads((tmp_path / "export" / "config.json").read_text())
    assert saved["mllm"]["path"] == str(tiny_mllm)


def test_the_data_need_not_be_there(copied: Path, tmp_path: Path, tiny_records: Path) -> None:
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_records), "/nowhere/records"))
    exported(copied, tmp_path)
    assert facts_in(tmp_path / "export") == facts_in(copied / "export")


# ---------------------------------------------------------------- what inference needs


def facts_in(export: Path) -> TrainingFacts:
    return TrainingFacts(**json.loads((export / "config.json").read_text())["training"])


def test_an_export_carries_what_inference_and_evaluation_need_of_training(
    runs: dict[str, Run], tiny_records: Path
) -> None:
    facts, records = facts_in(runs["zero2"].folder / "export"), Records(tiny_records)
    assert (facts.beta_vl, facts.mask_prompt) == (0.5, True)
    assert facts.trained_on == [records.manifest["content_hash"]]
    assert facts.prevalence == prevalence_groups(records.target_counts, 0.5, 0.1)
    discs = fit_disc(training_masks([records]))
    assert discs is not None and facts.disc_share == discs.share
    assert facts.disc_share_by_target == discs.by_target


def vision_run(folder: Path, records: Path) -> tuple[Config, RunFacts]:
    """Configuration and origin of a run of the vision stage that was never exported."""
    path = folder / "run.yaml"
    path.write_text(
        f"data: {{segmentation: [{{path: {records}}}], ratio: [1, 0]}}\n"
        "model: {vision: tiny, image_size: 64}\n"
        "objective: {beta_vl: 0.25}\n"
        "optim: {warmup_steps: 0}\n"
        f"train: {{stage: vision, max_steps: 1, output_dir: {folder}}}\n"
    )
    config, sources = load_config(path), [Records(records)]
    groups, code = prevalence(config, sources), code_history([], 0)
    save_run_files(config, groups, sources, [], code=code)
    return config, read_run(folder, 1, to_dict(config))


def test_the_vision_stage_carries_them_too(tmp_path: Path, tiny_records: Path) -> None:
    config, origin = vision_run(tmp_path, tiny_records)
    facts = training_facts(tmp_path, config, origin)
    assert facts.beta_vl == 0.25 and facts.disc_share is not None and facts.prevalence
    save_network(tiny_model(None), tmp_path / "export", facts=facts)
    assert open_network(tmp_path / "export")[1] == facts


def test_without_the_training_masks_a_first_export_says_what_it_lacks(
    tmp_path: Path, tiny_records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = Path(shutil.copytree(tiny_records, tmp_path / "records"))
    config, origin = vision_run(tmp_path, records)
    records.rename(tmp_path / "moved")
    facts = training_facts(tmp_path, config, origin)
    assert facts.disc_share is None and facts.disc_share_by_target == {}
    assert "WARNING the export has no disc baseline" in capsys.readouterr().out
    tiny_record_folder(records, split="train", num_images=3)
    assert training_facts(tmp_path, config, origin).disc_share is None
    assert "holds other records than were trained on" in capsys.readouterr().out


def test_damaged_disc_sizes_are_an_error_and_not_measured_anew(
    tmp_path: Path, tiny_records: Path
) -> None:
    config, origin = vision_run(tmp_path, tiny_records)
    (tmp_path / "disc_baseline.json").write_text("[]")
    with pytest.raises(ValueError, match=r"disc_baseline\.json is damaged .* remove it"):
        training_facts(tmp_path, config, origin)


def test_a_damaged_checkpoint_is_refused_and_of_a_run_an_older_one_is_taken_loudly(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = copied / "checkpoints" / "step_00000002"
    (newest / TAG / "mp_rank_00_model_states.pt").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        exported(newest, tmp_path)
    exported(copied, tmp_path)
    assert "WARNING" in capsys.readouterr().out
    assert "step 1\n" in (tmp_path / "export" / "README.md").read_text()


def test_a_checkpoint_of_other_parts_than_the_configuration_says_is_refused(
    copied: Path, tmp_path: Path
) -> None:
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("vision_encoder: false", "vision_encoder: true"))
    with pytest.raises(ValueError, match=r"differ in \d+ tensors, such as 'vision\.image_encoder"):
        exported(copied, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-shard-size", "big"], "expected a size such as 500MB or 4GB"),
        (["train.seed=3"], "expected model.mllm=PLACE or model.vision_weights=PLACE"),
        (["--dtype", "fp8"], "invalid choice"),
    ],
)
def test_a_wrong_argument_says_what_is_expected(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        export.parse(["run", "--output", "out", *arguments])
    assert message in capsys.readouterr().err


def test_the_program_says_what_it_did_and_what_went_wrong(
    runs: dict[str, Run],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "prepare_process", lambda: None)
    arguments = [str(runs["zero2"].folder), "--output", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
    export.main()
    assert capsys.readouterr().out == f"exported to {tmp_path / 'made'}\n"
    with pytest.raises(SystemExit, match="exists already"):
        export.main()


@pytest.mark.slow
def test_the_program_shows_its_own_words_and_not_those_of_its_libraries(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    arguments = [str(runs["zero2"].folder), "--output", str(tmp_path / "made")]
    done = subprocess.run(
        [sys.executable, "scripts/export.py", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"exported to {tmp_path / 'made'}\n")
    assert done.stderr == ""


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"neither a run .* nor a checkpoint .* name train\.output"
    ):
        exported(tmp_path, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint"):
        exported(tmp_path, tmp_path)
