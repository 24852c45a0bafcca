"""What a card tells a stranger to type gives what training saw."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from biascare.inference.answerer import Answerer, Case
from biascare.inference.images import as_pixels
from biascare.models.export_folder import save_network
from biascare.records import Turn
from biascare.reports.model_card import released_card
from tests.tiny import IMAGE_SIZE, encoded_png, tiny_chat, tiny_model
from tests.training.training_runs import environment

ALONE = """
import os, sys, torch
sys.modules["biascare"] = sys.modules["peft"] = None
for folder, name, snippet in zip(*[iter(sys.argv[1:])] * 3):
    os.chdir(folder)
    scope = {}
    exec(snippet, scope)
    with torch.no_grad():
        states = scope["model"].model(**scope["inputs"]).last_hidden_state
    torch.save(states, name)
"""
"""Runs snippets of cards in a process that knows neither this package nor peft."""


def test_the_plain_snippet_of_a_card_gives_the_hidden_states_of_training(
    tiny_mllm: Path, tiny_llava: Path, tmp_path: Path
) -> None:
    # Not square, with structure: squashed or not makes a difference.
    y, x = np.mgrid[:40, :100]
    wave = (127 + 120 * np.sin(x / 9) * np.cos(y / 5)).astype(np.uint8)
    arguments: list[str] = []
    answerers = {}
    for base in (tiny_mllm, tiny_llava):
        place, chat = tmp_path / base.name, tiny_chat(base)
        save_network(tiny_model(base, query_heads=4), place / "export", merge=True)
        chat.processor.save_pretrained(place / "export" / "mllm")
        (place / "image.png").write_bytes(encoded_png(np.stack([wave] * 3, -1)))
        card = released_card(Path("weights"), "all loaded", place / "export")
        assert f"resize every image to {IMAGE_SIZE} x {IMAGE_SIZE} pixels" in card.split("```")[0]
        plain, own = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert 'BiasCareVL.from_pretrained("export")' in own
        # Also what a stranger would do unasked: hand the image to the processor as it is.
        untold = re.sub(r"\.resize\(.*\)\n", "\n", plain)
        arguments += [str(place), "told.pt", plain, str(place), "untold.pt", untold]
        answerers[place] = Answerer(tiny_model(base, query_heads=4), chat, image_size=IMAGE_SIZE)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *arguments],
        env=environment(PYTHONPATH=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for place, answerer in answerers.items():
        case = Case(as_pixels(place / "image.png"), Turn("user", "Is the liver visible?", "closed"))
        batch = answerer._prompt(case)
        with torch.no_grad():
            ours = answerer.mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
        theirs, other = (
            torch.load(place / f"{name}.pt", weights_only=True) for name in ("told", "untold")
        )
        told = float((theirs - ours).abs().mean())
        print(f"{place.name}: mean difference of hidden states {told:.1e}")
        assert told < 2e-3  # Pillow and torch round differently, by one grey level
        assert other.shape != ours.shape or float((other - ours).abs().mean()) > 50 * told
