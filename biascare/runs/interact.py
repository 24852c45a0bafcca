"""A model in the hands of a person: the page, clicks from a file, a log done again.

serve(InteractRequest(model="outputs/demo/stage2/export", inputs=["outputs/demo/data/test"], ...))
masks_of_clicks(request)        # without a server
replay_log(request)
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from biascare.choices import unknown
from biascare.durable import write_json
from biascare.inference.model import BiasCareVL
from biascare.records import MANIFEST, Records
from biascare.runs.evaluate import weights_hash
from biascare.server.audit_log import AuditLog, replay, sha256_of_mask
from biascare.server.desk import Desk, Limits, QueuedCase, RefusedError, png_of

TOKEN_VARIABLE = "BIASCARE_TOKEN"
ITEM_KEYS = ("image", "target", "modality", "prompts", "mask")


class InteractRequest(NamedTuple):
    """What scripts/interact.py was asked for; its help describes the fields."""

    model: str
    inputs: list[str]
    target: str | None
    modality: str | None
    mllm: str | None
    order: str
    limit: int
    host: str
    port: int
    allow_host: list[str]
    log: Path
    clicks: Path | None
    output: Path
    replay: Path | None


def serve(request: InteractRequest) -> None:
    """Serve the page until Ctrl-C. Raises ValueError for inputs that are none and a log that was
    altered, before the model is opened."""
    try:
        import uvicorn

        from biascare.server.app import create_app
        from biascare.server.guard import is_loopback
    except ImportError as error:
        raise ValueError(
            f"the page needs {error.name}, which is not installed: pip install 'biascare[ui]'"
        ) from error
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    cases = list(queue_of(request))
    left_out = max(0, len(cases) - request.limit)
    if left_out:
        console.print(
            f"{left_out} of {len(cases)} cases are left out; --limit sets how many are in"
        )
    cases = cases[: request.limit]
    with AuditLog(request.log) as log:
        model = BiasCareVL.from_pretrained(request.model, mllm=request.mllm)
        if request.order == "uncertainty":
            cases = with_uncertainty(model, cases, console)
        token = None
        if not is_loopback(request.host):
            # Not an argument: those are shown to everybody on the machine.
            token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
        app = create_app(
            model,
            checkpoint=weights_hash(Path(request.model)),
            cases=cases,
            log=log,
            host=request.host,
            hosts=request.allow_host,
            token=token,
        )
        address = f"http://{request.host}:{request.port}/"
        print(f"open {address}{'' if token is None else f'?token={token}'}", flush=True)
        # No log of accesses: the first address holds the token.
        uvicorn.run(
            app,
            host=request.host,
            port=request.port,
            access_log=False,
            log_level="warning",
            server_header=False,
        )
    print(f"the audit log {request.log} ends with {log.head}; note it to find lines cut off")


def masks_of_clicks(request: InteractRequest) -> list[dict[str, Any]]:
    """Masks of the prompts in a file, as PNG files in `request.output`; also what is known of each,
    which masks.json there holds.

    The file is a list of {"image": path beside the file, "prompts": [steps as `Session.apply` takes
    them], "target", "modality", "mask": name of the PNG}; the last three may be missing.

    Raises ValueError for a wrong file, before the model is opened, and for a refused prompt.
    """
    assert request.clicks is not None
    items = read_clicks(request.clicks)
    with AuditLog(request.log) as log:
        model = BiasCareVL.from_pretrained(request.model, mllm=request.mllm)
        digest = weights_hash(Path(request.model))
        # The desk of the page, so that the log is the same.
        desk = Desk(model, checkpoint=digest, cases=(), log=log, limits=Limits(sessions=1))
        request.output.mkdir(parents=True, exist_ok=True)
        made = []
        for number, item in enumerate(items, start=1):
            work, where = desk.begin(), f"{request.clicks}, item {number}"
            try:
                data = (request.clicks.parent / item["image"]).read_bytes()
                target = item.get("target", request.target)
                modality = item.get("modality", request.modality)
                desk.open_image(work, data, target=target, modality=modality)
                for prompt in item["prompts"]:
                    desk.step(work, prompt)
                    work.next_sequence += 1
            except RefusedError as error:
                raise ValueError(f"{where}: {error}") from error
            found = work.opened.current
            if found is None:
                raise ValueError(f"{where}: its prompts leave no mask; end with a click or a box")
            name = item.get("mask", f"{number:04d}.png")
            (request.output / name).write_bytes(png_of(found.mask.astype(np.uint8) * 255))
            made.append(
                {
                    "mask": name,
                    "case": work.case,
                    "area": int(found.mask.sum()),
                    "predicted_dice": found.predicted_dice,
                    "uncertainty": found.uncertainty,
                    "mask_sha256": sha256_of_mask(found.mask),
                }
            )
        write_json(request.output / "masks.json", {"checkpoint_sha256": digest, "masks": made})
    return made


def replay_log(request: InteractRequest) -> tuple[list[str], bool]:
    """Do a log again: (sentences to print, whether every mask was the same).

    Raises ValueError for an altered log, and for images or a model that are not its own.
    """
    assert request.replay is not None
    images = {}
    for case in queue_of(request):
        data = case.read()
        images[hashlib.sha256(data).hexdigest()] = data
    model = BiasCareVL.from_pretrained(request.model, mllm=request.mllm)
    digest = weights_hash(Path(request.model))
    found = replay(request.replay, model, images, checkpoint=digest)
    said = f"{found.num_masks} masks, {len(found.differences)} of them differ from the log"
    return [*found.differences, said], not found.differences


def read_clicks(path: Path) -> list[dict[str, Any]]:
    """The items of a file of clicks. Raises ValueError for a wrong one, with every problem."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}: expected a list of images with their prompts")
    problems, names = [], set()
    for number, item in enumerate(items, start=1):
        where = f"item {number}"
        if not isinstance(item, dict) or not isinstance(item.get("prompts"), list):
            problems.append(f"{where}: expected an object with a list of prompts")
            continue
        problems += [f"{where}: {unknown('key', k, ITEM_KEYS)}" for k in item if k not in ITEM_KEYS]
        if not all(isinstance(prompt, dict) for prompt in item["prompts"]):
            problems.append(f"{where}: a prompt is an object such as {{'kind': 'undo'}}")
        image = item.get("image")
        if not isinstance(image, str) or not (path.parent / image).is_file():
            problems.append(f"{where}: image {image!r} is no file beside {path.name}")
        name = item.get("mask", f"{number:04d}.png")
        # A path would write elsewhere, and an equal name over the mask before.
        if not isinstance(name, str) or Path(name).name != name or name in names:
            problems.append(f"{where}: mask {name!r} is no file name of its own")
        names.add(str(name))
    if problems:
        raise ValueError(f"{path}:\n  " + "\n  ".join(problems))
    return items


def queue_of(request: InteractRequest) -> Iterator[QueuedCase]:
    """One case for each file, and for each target of each record. Files are known by the beginning
    of their sha256, because their names may name patients.

    Raises ValueError for what is neither an image file nor a record folder.
    """
    for given in request.inputs:
        path = Path(given)
        if (path / MANIFEST).is_file():
            yield from _cases_of(Records(path), request)
        elif path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield QueuedCase(digest[:12], path.read_bytes, request.target, request.modality)
        else:
            raise ValueError(
                f"{given}: got {'a folder without ' + MANIFEST if path.is_dir() else 'no file'}, "
                "expected an image or a record folder of one split, such as outputs/demo/data/test"
            )


def _cases_of(records: Records, request: InteractRequest) -> Iterator[QueuedCase]:
    for index in range(len(records)):
        row = records[index]
        names = [target["name"] for target in row["targets"]] or [None]
        if request.target is not None:
            names = [request.target]
        for name in dict.fromkeys(names):
            case = row["id"] if name is None else f"{row['id']} {name}"
            modality = request.modality or row["modality"]
            yield QueuedCase(case, partial(_image_of, records, index), name, modality)


def _image_of(records: Records, index: int) -> bytes:
    image: bytes = records[index]["image"]
    return image


def with_uncertainty(
    model: BiasCareVL, cases: list[QueuedCase], console: Console
) -> list[QueuedCase]:
    """The cases with the uncertainty of the mask that their words alone give. A case without words,
    or any for a model that reads none, stays without; one that cannot be read is said."""
    if model.chat is None:
        return cases
    ranked = []
    for case in track(cases, "triage", console=console, transient=True):
        try:
            first = None if case.target is None else model.session(
                case.read(), case.target, modality=case.modality
            ).current  # fmt: skip
            ranked.append(case._replace(uncertainty=None if first is None else first.uncertainty))
        except ValueError as error:
            console.print(f"case {case.id} cannot be read: {error}", markup=False)
            ranked.append(case)
    return ranked
