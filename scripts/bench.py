"""Ratios that should stay small (or large), measured on this machine.

    python scripts/bench.py [--repeats 7] [--only encoder]

encoder     the image encoder (ViT-B, 256 pixels, batch 1 and 4, fp32) against segment_anything's
            and transformers' with the same weights: time and peak memory, forward and backward
joint_step  a joint training step against the sum of its two bare backbones
packing     the adapted LLM on padded sequences against the same in one packed row
loader      segmentation samples a second against a bare Pillow decode and resize

Runs alternate between the sides and medians are compared, because machines are noisy; absolute
times are printed for orientation only. On one thread unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from biascare.interfaces import Batch
    from biascare.models.language.pathway import LoraSettings
    from biascare.models.network import DualPathNetwork

Run = Callable[[], Any]

SIZES: dict[str, dict[str, Any]] = {
    "of the demo": {"vision": "tiny", "image_size": 128, "hidden_size": 128, "num_layers": 4},
    "small": {"vision": "tiny", "image_size": 256, "hidden_size": 256, "num_layers": 8},
    "ViT-B": {"vision": "sam_vit_b", "image_size": 256, "hidden_size": 512, "num_layers": 12},
}
TEXTS = ["Segment the liver in this image. Is there a lesion? yes no"] * 8


def alternate(runs: Sequence[Run], repeats: int) -> list[list[float]]:
    """Seconds of each run in each of `repeats` rounds, one round per row."""
    rounds = []
    for repeat in range(repeats + 1):
        seconds = []
        for run in runs:
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        if repeat:  # the first round warms caches up
            rounds.append(seconds)
    return rounds


def compare(first: Run, second: Run, repeats: int) -> tuple[float, float, float]:
    """(median seconds of each, median of the paired ratios first / second), alternating."""
    rounds = alternate((first, second), repeats)
    first_seconds, second_seconds = (
        statistics.median(column) for column in zip(*rounds, strict=True)
    )
    # Of the ratios in pairs, not of the medians: what slows the machine slows both of a pair.
    return first_seconds, second_seconds, statistics.median(a / b for a, b in rounds)


ENCODER_SIZES: dict[str, Any] = {
    "embed_dim": 768,
    "depth": 12,
    "num_heads": 12,
    "window_size": 14,
    "global_attn_indexes": (2, 5, 8, 11),
}
TRANSFORMERS_NAMES = (
    ("patch_embed.proj", "patch_embed.projection"),
    ("blocks.", "layers."),
    (".norm", ".layer_norm"),
    ("neck.0", "neck.conv1"),
    ("neck.1", "neck.layer_norm1"),
    ("neck.2", "neck.conv2"),
    ("neck.3", "neck.layer_norm2"),
)


def build_encoder(library: str, image_size: int) -> nn.Module:
    """SAM's ViT-B with random weights by one of `ENCODERS`; returns [S, C, h, w] or an output."""
    from torch import nn

    if library == "ours":
        from biascare.models.vision.encoder import ImageEncoder

        return ImageEncoder(img_size=image_size, **ENCODER_SIZES)
    if library == "segment_anything":
        from segment_anything.modeling import ImageEncoderViT

        norm = partial(nn.LayerNorm, eps=1e-6)
        return ImageEncoderViT(image_size, norm_layer=norm, use_rel_pos=True, **ENCODER_SIZES)
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    return SamVisionEncoder(SamVisionConfig(image_size=image_size))


ENCODERS = ("ours", "segment_anything", "transformers")


def share_weights(encoders: dict[str, nn.Module]) -> None:
    """Give all encoders the weights of the first, every relative position random."""
    import torch

    state = encoders["ours"].state_dict()
    for name, value in state.items():
        # They start at zero, and a wrong order of axes would not be seen.
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(value, std=0.1)
    encoders["segment_anything"].load_state_dict(state)
    renamed = {}
    for name, value in state.items():
        for ours, theirs in TRANSFORMERS_NAMES:
            name = name.replace(ours, theirs)
        renamed[name] = value
    encoders["transformers"].load_state_dict(renamed)


def run_encoder(encoder: nn.Module, images: Tensor, train: bool) -> Tensor:
    """The embedding; in training also all gradients."""
    import torch

    encoder.train(train).zero_grad()
    with torch.set_grad_enabled(train):
        output = encoder(images)
        # transformers wraps its output; it is the same tensor.
        embedding: Tensor = getattr(output, "last_hidden_state", output)
        if train:
            # Squared, because the gradient of a plain mean is the same for every input.
            embedding.square().mean().backward()
    return embedding.detach()


def peak_memory(run: Run) -> int:
    """Most bytes that the tensors made during one run hold at once."""
    from torch.profiler import ProfilerActivity, profile

    # The allocator's own events: the process's size counts what Python and torch keep for later.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def encoder(repeats: int) -> None:
    """The image encoder against the two that people use."""
    import torch

    torch.manual_seed(0)
    encoders = {library: build_encoder(library, 256) for library in ENCODERS}
    share_weights(encoders)
    image = torch.randn(1, 3, 256, 256)
    expected = run_encoder(encoders["segment_anything"], image, False)
    difference = (run_encoder(encoders["ours"], image, False) - expected).abs().max()
    print(f"encoder: largest difference to segment_anything {difference:.1e}")
    for batch, train in ((1, False), (1, True), (4, False), (4, True)):
        images = image.repeat(batch, 1, 1, 1)
        runs = [partial(run_encoder, e, images, train) for e in encoders.values()]
        # Half as many for the larger batch, which takes about four times as long.
        rounds = alternate(runs, repeats if batch == 1 else (repeats + 1) // 2)
        memory = [peak_memory(run) for run in runs]
        what = "forward and backward" if train else "forward"
        seconds = statistics.median(row[0] for row in rounds)
        print(f"encoder {what}, batch {batch}: {seconds * 1e3:.0f} ms")
        for index, library in enumerate(ENCODERS[1:], 1):
            faster = statistics.median(row[index] / row[0] for row in rounds)
            lighter = memory[0] / memory[index]
            print(f"    {faster:.2f} x as fast as {library}, {lighter:.2f} x its peak memory")


def make_batch(mllm_folder: str, image_size: int, num_images: int) -> Batch:
    """`num_images` segmentation samples with two targets each and as many questions."""
    import torch

    from biascare.data.chat import ChatBuilder
    from biascare.data.loader import collate
    from biascare.interfaces import Facts, Sample
    from biascare.models.language.pathway import load_processor
    from biascare.records import Turn

    chat = ChatBuilder(load_processor(mllm_folder), image_size=image_size, max_tokens=4096)
    generator = torch.Generator().manual_seed(0)
    samples = []
    unknown = dict.fromkeys(("prevalence", "patient_id", "sex", "age", "race"))
    facts = Facts(
        image_id="",
        task="segmentation",
        kind="segmentation",
        target="liver",
        source="",
        split="",
        modality="",
        anatomy="",
        **unknown,
    )
    for _ in range(num_images):
        image = torch.randint(
            0, 256, (3, image_size, image_size), dtype=torch.uint8, generator=generator
        )
        pixels = chat.image_inputs(image.permute(1, 2, 0).numpy())
        masks = torch.zeros(2, image_size, image_size, dtype=torch.uint8)
        masks[0, 20:60, 20:60] = masks[1, 50:70, 50:90] = 1
        ask = chat.sequence([Turn("user", "Segment the liver.", "segmentation")])
        # As many questions as images, as `data.ratio` has it by default.
        question = [
            Turn("user", "Is there a lesion?", "closed"),
            Turn("assistant", "yes", "closed"),
        ]
        samples.append(
            Sample(
                sequences=[ask | {"image": pixels}] * 2,
                image=image,
                masks=masks,
                point_coords=torch.tensor([[[30.0, 30.0]], [[60.0, 60.0]]]),
                point_labels=torch.ones(2, 1, dtype=torch.int64),
                facts=[facts, facts._replace(target="spleen")],
            )
        )
        samples.append(
            Sample([chat.sequence(question) | {"image": pixels}], None, None, None, None, [facts])
        )
    return collate(samples, seed=0, pad_token_id=chat.tokenizer.pad_token_id)


def bare_backbones(model: DualPathNetwork, batch: Batch) -> None:
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
    from biascare.models.export_folder import build_network
    from biascare.models.language.tiny import build_tiny_mllm
    from biascare.models.network import PARTS
    from biascare.settings.keys import HITLConfig, ObjectiveConfig
    from biascare.training.step import TrainStep
    from biascare.training.terms import HITLSettings, ObjectiveSettings

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
            model = build_network(
                vision=size["vision"],
                image_size=size["image_size"],
                mllm=folder,
                lora=paper_adapter(),
            )
        # Frozen is what `train.trainable` leaves out by default.
        frozen = ("mllm_vision_tower", "embeddings")
        model.set_trainable({part.name: part.name not in frozen for part in PARTS})
        step = TrainStep(
            model,
            ObjectiveSettings(**vars(ObjectiveConfig())),
            HITLSettings(**vars(HITLConfig())),
        )
        num_tokens = len(batch.answer_tokens) if batch.answer_tokens is not None else 0

        # Bound as defaults: a closure would see the next round's model.
        def run_joint(step: TrainStep = step, batch: Batch = batch, n: int = num_tokens) -> None:
            step(batch, n, 1)["loss"].backward()

        def run_bare(model: DualPathNetwork = model, batch: Batch = batch) -> None:
            bare_backbones(model, batch)

        joint, bare, ratio = compare(run_joint, run_bare, repeats)
        print(
            f"joint_step {name}: {ratio:.3f} x the bare backbones "
            f"({joint * 1e3:.0f} ms against {bare * 1e3:.0f} ms)"
        )


def paper_adapter() -> LoraSettings:
    from biascare.models.language.pathway import LoraSettings
    from biascare.settings.keys import ModelConfig

    model = ModelConfig()
    return LoraSettings(model.lora_rank, model.lora_alpha, model.lora_dropout)


LENGTHS = {
    "short answers": (95, 90, 98, 92, 110, 130, 160, 120),
    "with reports": (95, 90, 98, 92, 400, 120, 350, 130),
}
"""Tokens of a micro-batch's sequences: four instructions of segmentation, four questions."""


def packing(repeats: int) -> None:
    """Forward and backward of the adapted LLM, padded against packed, on the same tokens."""
    import torch

    from biascare.models.language.pathway import MLLMPathway
    from biascare.models.language.tiny import build_tiny_mllm

    for hidden_size, num_layers in ((128, 4), (512, 12)):
        with tempfile.TemporaryDirectory() as folder:
            build_tiny_mllm(folder, TEXTS, hidden_size=hidden_size, num_layers=num_layers)
            mllm = MLLMPathway.load(folder, lora=paper_adapter()).train()
        for name, lengths in LENGTHS.items():
            # Padded at the right to the longest, as the loader does without packing.
            mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
            inputs = {
                "input_ids": 20 * mask,
                "attention_mask": mask,
                "mm_token_type_ids": torch.zeros_like(mask),
            }

            def run(
                packed: bool, mllm: MLLMPathway = mllm, inputs: dict[str, Tensor] = inputs
            ) -> None:
                mllm.packing = packed
                mllm.hidden_states(inputs, []).mean().backward()

            padded, packed, ratio = compare(partial(run, False), partial(run, True), repeats)
            print(
                f"packing, LLM of {hidden_size} x {num_layers}, {name}: {ratio:.2f} x faster, "
                f"{1 - float(mask.float().mean()):.0%} padding "
                f"({packed * 1e3:.0f} ms against {padded * 1e3:.0f} ms)"
            )


def write_photographs(folder: str, side: int, num_images: int) -> None:
    """JPEG images of `side` pixels with one square target each."""
    import io

    import numpy as np
    from PIL import Image

    from biascare.records import Record, RecordWriter

    rng = np.random.default_rng(0)
    mask = np.zeros((side, side), np.bool_)
    mask[side // 4 : side // 2, side // 4 : side // 2] = True
    about: dict[str, Any] = {"task": "segmentation", "modality": "ct", "source": "bench"}
    nobody: dict[str, Any] = dict.fromkeys(("patient_id", "study_id", "sex", "age", "race"))
    with RecordWriter(folder, source="bench", split="train", version="1", licence="-") as writer:
        for number in range(num_images):
            # Smooth, as photographs are: JPEG spends its time on noise otherwise.
            coarse = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            writer.write(
                Record(
                    id=str(number),
                    image=buffer.getvalue(),
                    height=side,
                    width=side,
                    targets=[("liver", mask)],
                    split="train",
                    **about,
                    **nobody,
                )
            )


def loader(repeats: int) -> None:
    """The loader's segmentation samples against decoding and resizing the same images alone."""
    import io

    import numpy as np
    from PIL import Image

    from biascare.data.loader import StreamSettings, TrainingStream
    from biascare.data.mixture import Mixture
    from biascare.records import Records
    from biascare.runs.process import keep_freed_memory

    keep_freed_memory()  # as in every program on a CPU; both sides gain
    # Decoding grows with the image and what we add does not: each size has a ratio of its own.
    for side in (512, 1024, 2048):
        with tempfile.TemporaryDirectory() as folder:
            write_photographs(f"{folder}/train", side, 16)
            records = Records(f"{folder}/train")
            settings = StreamSettings(256, 1, 0.5, {"point": 1.0}, True, "safe", 0)
            mixture = Mixture([(len(records), None)], [], (1, 0), seed=0)
            stream = TrainingStream([records], [], mixture, None, {}, settings)

            def bare(records: Records = records) -> None:
                for number in range(len(records)):
                    image = Image.open(io.BytesIO(records[number]["image"])).convert("RGB")
                    np.array(image.resize((256, 256), Image.Resampling.BILINEAR))

            def ours(stream: TrainingStream = stream, num_images: int = len(records)) -> None:
                stream.__getitems__(list(range(num_images)))

            plain, made, ratio = compare(bare, ours, repeats)
            print(
                f"loader, JPEG of {side} pixels: {ratio:.2f} of a bare decode and resize "
                f"({made * 1e3 / 16:.1f} ms against {plain * 1e3 / 16:.1f} ms per image)"
            )


BENCHMARKS: dict[str, Callable[[int], None]] = {
    "encoder": encoder,
    "joint_step": joint_step,
    "packing": packing,
    "loader": loader,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="counted pairs of runs")
    parser.add_argument("--only", choices=sorted(BENCHMARKS), help="one benchmark")
    options = parser.parse_args()
    # Before torch is imported, which reads it once; threads of a shared machine make noise.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from biascare.runs.process import prepare_process

    prepare_process()
    for name, benchmark in BENCHMARKS.items():
        if options.only in (None, name):
            benchmark(options.repeats)


if __name__ == "__main__":
    main()
