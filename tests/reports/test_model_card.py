"""What a card tells a stranger to type gives what training saw."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from biascare.inference.answerer import Answerer, Case
from biascare.inference.images import as_pixels
from biascare.models.export_folder import save_network
from biascare.records import Turn
from biascare.reports.model_card import released_card
from tests.tiny import IMAGE_SIZE, encoded_png, tiny_chat, tiny_model
from tests.training.training_runs import environment

ALONE = """
import sys, torch
sys.modules["biascare"] = sys.modules["peft"] = None
for number, snippet in enumerate(sys.argv[1:]):
    scope = {}
    exec(snippet, scope)
    with torch.no_grad():
        states = scope["model"].model(**scope["inputs"]).last_hidden_state
    torch.save(states, f"{number}.pt")
"""
"""Runs snippets of a card in a process that knows neither this package nor peft."""


@pytest.fixture(scope="module")
def merged(
    mllm_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Answerer, str]:
    """(working folder with an export and image.png, the same model, its card)."""
    place = tmp_path_factory.mktemp("plain")
    chat = tiny_chat(mllm_folder)
    answerer = Answerer(tiny_model(mllm_folder, query_heads=4), chat, image_size=IMAGE_SIZE)
    save_network(tiny_model(mllm_folder, query_heads=4), place / "export", merge=True)
    chat.processor.save_pretrained(place / "export" / "mllm")
    # Not square, with structure: squashed or not makes a difference.
    y, x = np.mgrid[:40, :100]
    wave = 127 + 120 * np.sin(x / 9) * np.cos(y / 5)
    (place / "image.png").write_bytes(encoded_png(np.stack([wave] * 3, -1).astype(np.uint8)))
    return place, answerer, released_card(Path("weights"), "all loaded", place / "export")


def hidden_states(place: Path, *snippets: str) -> list[torch.Tensor]:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *snippets],
        cwd=place,
        env=environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(place / f"{n}.pt", weights_only=True) for n in range(len(snippets))]


def test_the_plain_snippet_of_a_card_gives_the_hidden_states_of_training(
    merged: tuple[Path, Answerer, str],
) -> None:
    place, answerer, card = merged
    head = card.split("```")[0]
    assert f"resize every image to {IMAGE_SIZE} x {IMAGE_SIZE} pixels" in head
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    # Also what a stranger would do unasked: hand the image to the processor as it is.
    unasked = re.sub(r"\.resize\(.*\)\n", "\n", snippet)
    theirs, untold = hidden_states(place, snippet, unasked)
    batch = answerer._prompt(
        Case(as_pixels(place / "image.png"), Turn("user", "Is the liver visible?", "closed"))
    )
    with torch.no_grad():
        ours = answerer.mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
    assert theirs.shape == ours.shape
    told = float((theirs - ours).abs().mean())
    if untold.shape == ours.shape:
        other = float((untold - ours).abs().mean())
        print(f"mean difference of hidden states: {told:.1e} as told, {other:.1e} untold")
        assert told < 0.1 * other
    assert told < 2e-3  # Pillow and torch round differently by one grey level


def test_the_card_opens_the_export_by_the_door_for_users(
    merged: tuple[Path, Answerer, str],
) -> None:
    place, _, card = merged
    shutil.copytree(place / "export" / "mllm", place / "export" / "processor", dirs_exist_ok=True)
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'BiasCareVL.from_pretrained("export")' in snippet
    code = snippet.replace("(120, 88)", "(20, 8)").replace("image.png", str(place / "image.png"))
    scope: dict[str, object] = {}
    exec(code.replace('"export"', f'"{place / "export"}"'), scope)
    assert scope["segmentation"].mask.shape == (40, 100)  # type: ignore[attr-defined]  # of exec
