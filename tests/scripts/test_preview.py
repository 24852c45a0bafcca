"""`scripts/preview.py`: what it shows is what the training loader gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from biascare.config import load_config
from biascare.interfaces import IGNORE_INDEX
from biascare.reports.preview import (
    conversation,
    overlays_of,
    prompts_of,
    token_counts,
    watch_images,
)
from biascare.reports.sheets import Overlay, overlay_sheet
from biascare.runs.build import build_loader, training_stream
from scripts import preview
from tests.tiny import tiny_chat

ROOT = Path(__file__).parents[2]


def config_file(folder: Path, records: Path, mllm: Path | None) -> Path:
    path = folder / "run.yaml"
    source = f"[{{path: {records}}}]"
    tasks = f"segmentation: {source}, targets_per_image: 2, num_workers: 0"
    tasks += f", language: {source}" if mllm else ", ratio: [1, 0]"
    path.write_text(
        f"data: {{{tasks}}}\n"
        f"model: {{vision: tiny, image_size: 64{f', mllm: {mllm}' if mllm else ''}}}\n"
        "optim: {warmup_steps: 1}\n"
        f"train: {{stage: {'joint' if mllm else 'vision'}, max_steps: 4, global_batch: 4,\n"
        f"  micro_batch: 2, output_dir: {folder / 'out'}}}\n"
    )
    return path


def run_program(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(preview, "prepare_process", lambda: None)
    monkeypatch.setattr(sys, "argv", ["preview.py", *arguments])
    preview.main()


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        width, height = image.size
    return width, height


def test_pictures_are_the_tensors_of_the_training_loader(
    tmp_path: Path, tiny_records: Path, tiny_mllm: Path
) -> None:
    config = load_config(config_file(tmp_path, tiny_records, tiny_mllm))
    stream, chat = training_stream(config)
    assert chat is not None
    loader = build_loader(config, stream, 0)
    batch = next(iter(loader))  # positions 0 and 1: an image with two targets, and a question
    overlays = overlays_of(stream, 0, stream[0])
    assert len(overlays) == 2
    for row, overlay in enumerate(overlays):
        np.testing.assert_array_equal(overlay.image, batch.images[0].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(overlay.masks[0][1], batch.masks[row].numpy())
        clicks, boxes = prompts_of(*(field[row] for field in batch.prompts))
        assert (overlay.clicks, overlay.boxes) == (clicks, boxes)
        assert batch.facts[row].target in overlay.title
        assert batch.facts[row].prevalence in overlay.title
    assert overlays_of(stream, 1, stream[1]) == []
    seen = watch_images(chat)
    stream[1]
    assert len(seen) == 1 and seen[0].shape == (64, 64, 3) and seen[0].dtype == np.uint8


def test_prompts_are_told_apart_by_their_labels() -> None:
    coords = torch.tensor([[1.0, 2], [3, 4], [9, 8], [5, 6], [0, 0]])
    labels = torch.tensor([1, 2, 3, 0, -1])
    clicks, boxes = prompts_of(coords, labels)
    assert clicks == [(1, 2, 1), (5, 6, 0)]
    assert boxes == [(3, 4, 9, 8)]


def test_trained_tokens_are_marked_and_image_tokens_counted(mllm_folder: Path) -> None:
    from tests.tiny import language_sample

    chat = tiny_chat(mllm_folder)
    sequence = language_sample(chat).sequences[0]
    text = conversation(sequence, chat)
    plain = text.plain
    num_image = int((sequence["input_ids"] == chat.image_token_id).sum())
    assert f"[{num_image} image tokens]" in plain and chat.image_token not in plain
    assert plain.count("«") == 1
    answer = plain[plain.index("«") + 1 : plain.index("»")]
    trained = sequence["labels"][sequence["labels"] != IGNORE_INDEX]
    assert answer == chat.tokenizer.decode(trained) and "the liver" in answer
    green = [plain[s.start : s.end] for s in text.spans if s.style == "bold green"]
    assert green == [f"«{answer}»"]
    counts = token_counts(sequence, chat)
    assert counts.endswith(f"{num_image} of the image, {len(trained)} trained")


def test_the_vision_stage_needs_no_language_model(
    tmp_path: Path, tiny_records: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_file(tmp_path, tiny_records, None)
    picture = tmp_path / "sheets" / "preview.png"
    arguments = ["--config", str(config), "--samples", "3", "--start", "5"]
    run_program(monkeypatch, *arguments, "--output", str(picture), "data.augment=false")
    shown = capsys.readouterr().out
    assert "position 5" in shown and "position 7" in shown and "position 8" not in shown
    assert min(size_of(picture)) > 300


def test_questions_are_shown_with_their_conversation(
    tmp_path: Path,
    tiny_records: Path,
    tiny_mllm: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_file(tmp_path, tiny_records, tiny_mllm)
    arguments = ["--config", str(config), "--samples", "2"]
    run_program(monkeypatch, *arguments, "--output", str(tmp_path / "preview.png"))
    shown = capsys.readouterr().out
    assert "image tokens]" in shown and "«" in shown and "3 pictures are in" in shown


def test_a_wrong_key_is_explained_before_anything_is_loaded(
    tmp_path: Path, tiny_records: Path
) -> None:
    config = config_file(tmp_path, tiny_records, None)
    program = [sys.executable, "scripts/preview.py", "--config", str(config)]
    wrong = subprocess.run(
        [*program, "data.augmnt=false"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1
    assert "did you mean" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.slow
def test_the_program_runs_from_the_command_line(tmp_path: Path, tiny_records: Path) -> None:
    config = config_file(tmp_path, tiny_records, None)
    picture = tmp_path / "preview.png"
    program = [sys.executable, "scripts/preview.py", "--config", str(config)]
    done = subprocess.run(
        [*program, "--output", str(picture)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert picture.exists()


def test_a_sheet_keeps_room_for_every_mask_name(tmp_path: Path) -> None:
    image = np.zeros((30, 50, 3), np.uint8)
    mask = np.zeros((30, 50), np.uint8)
    mask[4:9, 6:20] = 1
    heights = []
    for num in (1, 13):
        masks = [(f"structure with a long name {i}", mask) for i in range(num)]
        overlay_sheet([Overlay("one\ntwo", image, masks)] * 3, tmp_path / "sheet.png", columns=2)
        heights.append(size_of(tmp_path / "sheet.png")[1])
    # Two lines of cells; 13 names need 7 lines of text instead of 1, at 0.14 inch and 150 dpi.
    assert heights[1] - heights[0] == pytest.approx(2 * 6 * 0.14 * 150, abs=2)
