"""Ratios that should stay small (or large), measured on this machine.

    python scripts/bench.py [--repeats 7] [--only joint_step]

Runs alternate between the two sides and medians are compared, because machines are noisy; absolute
times are printed for orientation only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biascare.interfaces import Batch
    from biascare.models import BiasCareVL

Run = Callable[[], Any]

SIZES: dict[str, dict[str, Any]] = {
    "small": {"vision": "tiny", "image_size": 128, "hidden_size": 128, "num_layers": 4},
    "ViT-B": {"vision": "sam_vit_b", "image_size": 256, "hidden_size": 512, "num_layers": 12},
}
TEXTS = ["Segment the liver in this image. Is there a lesion? yes no"] * 8


def compare(first: Run, second: Run, repeats: int) -> tuple[float, float, float]:
    """(median seconds of each, median of the paired ratios first / second), alternating."""
    pairs = []
    for repeat in range(repeats + 1):
        seconds = []
        for run in (first, second):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        if repeat:  # the first pair warms caches up
            pairs.append(seconds)
    first_seconds, second_seconds = (
        statistics.median(column) for column in zip(*pairs, strict=True)
    )
    return first_seconds, second_seconds, statistics.median(a / b for a, b in pairs)


def make_batch(mllm_folder: str, image_size: int, num_images: int) -> Batch:
    """`num_images` segmentation samples with two targets each and as many questions."""
    import torch

    from biascare.data.chat import ChatBuilder
    from biascare.data.loader import collate
    from biascare.data.records import Turn
    from biascare.interfaces import Sample
    from biascare.models.mllm import load_processor

    chat = ChatBuilder(load_processor(mllm_folder), image_size=image_size, max_tokens=4096)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(num_images):
        image = torch.randint(
            0, 256, (3, image_size, image_size), dtype=torch.uint8, generator=generator
        )
        pixels = chat.image_inputs(image.permute(1, 2, 0).numpy())
        masks = torch.zeros(2, image_size, image_size, dtype=torch.uint8)
        masks[0, 20:60, 20:60] = masks[1, 50:70, 50:90] = 1
        ask = chat.sequence([Turn("user", "Segment the liver.", "segmentation")])
        question = [
            Turn("user", "Is there a lesion?", "closed"),
            Turn("assistant", "yes", "closed"),
        ]
        meta: dict[str, Any] = {"target": "liver"}
        samples.append(
            Sample(
                sequences=[ask | {"image": pixels}] * 2,
                image=image,
                masks=masks,
                point_coords=torch.tensor([[[30.0, 30.0]], [[60.0, 60.0]]]),
                point_labels=torch.ones(2, 1, dtype=torch.int64),
                meta=[meta, meta | {"target": "spleen"}],
            )
        )
        samples.append(
            Sample([chat.sequence(question) | {"image": pixels}], None, None, None, None, [meta])
        )
    return collate(samples, seed=0, pad_token_id=chat.tokenizer.pad_token_id)


def bare_backbones(model: BiasCareVL, batch: Batch) -> None:
    """Forward and backward of both pathways, without coupling, uncertainty or refinement."""
    assert model.mllm is not None and batch.images is not None and batch.prompts is not None
    assert batch.row_image is not None and batch.answer_positions is not None
    embedding = model.vision.encode_images(batch.images)
    masks = model.vision.decode(embedding, batch.row_image, batch.prompts).mask_logits
    hidden = model.mllm.hidden_states(batch.mllm_inputs, batch.image_slots)
    logits = model.mllm.answer_logits(hidden, batch.answer_positions)
    # The hidden states of segmentation rows carry gradient in both cases.
    (masks.mean() + logits.float().logsumexp(-1).mean() + hidden.mean()).backward()


def joint_step(repeats: int) -> None:
    """A joint training step against the sum of its two bare backbones, on the same tensors."""
    from biascare.models.biascarevl import TRAINABLE_PARTS, build_model
    from biascare.models.tiny import build_tiny_mllm
    from biascare.training.step import HITLSettings, ObjectiveSettings, TrainStep

    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            build_tiny_mllm(
                folder,
                TEXTS,
                hidden_size=size["hidden_size"],
                num_layers=size["num_layers"],
                image_size=size["image_size"],
            )
            batch = make_batch(folder, size["image_size"], num_images=2)
            model = build_model(vision=size["vision"], image_size=size["image_size"], mllm=folder)
        frozen = ("mllm_vision_tower", "embeddings")
        model.set_trainable({part: part not in frozen for part in TRAINABLE_PARTS})
        objective = ObjectiveSettings(
            alignment="contrastive", alignment_weight=0.1, quality_weight=0.1
        )
        step = TrainStep(model, objective, HITLSettings())
        num_tokens = len(batch.answer_tokens) if batch.answer_tokens is not None else 0

        def run_joint(step: TrainStep = step, batch: Batch = batch, n: int = num_tokens) -> None:
            step(batch, n, 1)["loss"].backward()

        def run_bare(model: BiasCareVL = model, batch: Batch = batch) -> None:
            bare_backbones(model, batch)

        joint, bare, ratio = compare(run_joint, run_bare, repeats)
        print(
            f"joint_step {name}: {ratio:.3f} x the bare backbones "
            f"({joint * 1e3:.0f} ms against {bare * 1e3:.0f} ms)"
        )


BENCHMARKS: dict[str, Callable[[int], None]] = {"joint_step": joint_step}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="counted pairs of runs")
    parser.add_argument("--only", choices=sorted(BENCHMARKS), help="one benchmark")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name, benchmark in BENCHMARKS.items():
        if options.only in (None, name):
            benchmark(options.repeats)


if __name__ == "__main__":
    main()
