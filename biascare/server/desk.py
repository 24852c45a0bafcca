"""What lies on the desk: the queue of cases, the sessions at work, the images that are encoded.

    desk = Desk(model, checkpoint=digest, cases=cases, log=log, limits=Limits())
    work = desk.open(case="scan-17")
    desk.step(work, {"kind": "click", "x": 120, "y": 88, "positive": True})

Nothing here knows HTTP; `app.py` brings requests in, in the order of their numbers.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from biascare.inference.embeddings import EmbeddingCache
from biascare.inference.images import as_pixels
from biascare.inference.model import Answer, BiasCareVL
from biascare.inference.session import Session
from biascare.records import encode_mask
from biascare.server.audit_log import AuditLog, mask_sha256, sha256_of

FORMATS = ("PNG", "JPEG", "TIFF")
log = logging.getLogger("biascare")


class RefusedError(ValueError):
    """A request that cannot be met, in words that the person who sent it may read."""

    def __init__(self, message: str, status: int = 422):
        super().__init__(message)
        self.status = status


class Limits(NamedTuple):
    """What one server takes on."""

    upload_bytes: int = 32 << 20
    pixels: int = 4096 * 4096  # of an image; the logits of its mask take four bytes each
    cache_bytes: int = 512 << 20
    sessions: int = 32  # the one that was not used for the longest time is forgotten
    wait_seconds: float = 10.0  # for a prompt that was sent earlier and has not arrived


class QueuedCase(NamedTuple):
    """An image that waits for a person."""

    id: str  # a pseudonym: it is shown and logged
    read: Callable[[], bytes]  # its encoded file
    target: str | None = None
    modality: str | None = None
    uncertainty: float | None = None  # label-free, of the mask that the words alone give


@dataclass
class Work:
    """A session and what the server keeps beside it."""

    id: str
    case: str | None = None
    image_sha256: str | None = None
    target: str | None = None
    modality: str | None = None
    session: Session | None = None
    mask_sha256: str | None = None  # of the mask on screen
    next_sequence: int = 0
    latency_ms: float | None = None
    changes: dict[str, float] = field(default_factory=dict)  # by the last step
    turn: asyncio.Condition = field(default_factory=asyncio.Condition)  # one request at a time

    @property
    def opened(self) -> Session:
        if self.session is None:
            raise RefusedError("this session has no image yet; send one to its /image", status=409)
        return self.session


class Desk:
    """Sessions of one model. Steps of one `Work` must not run at the same time; of two they may."""

    def __init__(
        self,
        model: BiasCareVL,
        *,
        checkpoint: str,
        cases: Sequence[QueuedCase],
        log: AuditLog,
        limits: Limits,
    ):
        self.model = model
        self.checkpoint = checkpoint
        # The most uncertain first; those of which nothing is known come last, in their order.
        ranked = sorted(cases, key=lambda c: (c.uncertainty is None, -(c.uncertainty or 0.0)))
        self.cases = {case.id: case for case in ranked}
        if len(self.cases) < len(cases):
            raise ValueError(f"cases: {len(cases) - len(self.cases)} have the id of another")
        self.log = log
        self.limits = limits
        self.cache = EmbeddingCache(model.segmenter, max_bytes=limits.cache_bytes)
        self.decisions: dict[str, str] = {}
        self._work: OrderedDict[str, Work] = OrderedDict()
        self._ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode-ahead")

    def work(self, key: str) -> Work:
        """A session by its id. Raises RefusedError where it is not there."""
        if key not in self._work:
            raise RefusedError(
                "no such session: it was forgotten, or the server was started again", 404
            )
        self._work.move_to_end(key)
        return self._work[key]

    def begin(self) -> Work:
        """A session without an image."""
        # An id that cannot be guessed: who has it sees the image.
        work = Work(id=secrets.token_urlsafe(16))
        self._work[work.id] = work
        while len(self._work) > self.limits.sessions:
            self._work.popitem(last=False)
        return work

    def open_case(self, work: Work, case_id: str) -> None:
        """Put a case of the queue into a session, and encode the next one meanwhile."""
        case = self._case(case_id)
        data = self._read(case)
        self.open_image(work, data, case=case.id, target=case.target, modality=case.modality)
        ids = list(self.cases)
        waiting = [n for n in ids[ids.index(case_id) + 1 :] if n not in self.decisions]
        if waiting:
            self._ahead.submit(self._encode_ahead, self.cases[waiting[0]])

    def open_image(
        self,
        work: Work,
        data: bytes,
        *,
        case: str | None = None,
        target: str | None = None,
        modality: str | None = None,
    ) -> None:
        """Put an image into a session. Its case id is by default the beginning of its sha256: the
        name of a file often is the name of a patient."""
        if target and self.model.chat is None:
            raise RefusedError("this model reads no text; leave the target empty and click")
        pixels = pixels_within(data, self.limits.pixels)
        work.image_sha256 = hashlib.sha256(data).hexdigest()
        work.case = case or work.image_sha256[:12]
        work.target, work.modality = target or None, modality or None
        work.session = self._session(work.image_sha256, pixels, work.target, work.modality)
        work.mask_sha256 = mask_sha256(work.session.current)
        work.latency_ms, work.changes = None, {}
        self._note(work, "open", target=work.target, modality=work.modality,
                   size=list(work.session.size), checkpoint_sha256=self.checkpoint,
                   after=work.mask_sha256)  # fmt: skip

    def step(self, work: Work, prompt: Mapping[str, Any]) -> None:
        """Apply a click, a box, an undo, a redo or a reset. Raises RefusedError for a wrong one."""
        session, before = work.opened, work.opened.current
        start = time.perf_counter()
        try:
            session.apply(prompt)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        after = session.current
        area = [0 if s is None else int(s.mask.sum()) for s in (before, after)]
        work.latency_ms = 1000 * (time.perf_counter() - start)
        work.changes = {"area": area[1] - area[0]}
        if before is not None and after is not None:
            work.changes["predicted_dice"] = after.predicted_dice - before.predicted_dice
        was, work.mask_sha256 = work.mask_sha256, mask_sha256(after)
        self._note(work, "prompt", prompt=dict(prompt), before=was,
                   after=work.mask_sha256, latency_ms=round(work.latency_ms, 3),
                   **self._doubts(session))  # fmt: skip
        # Kept for the log; a step that is not on screen holds its small prediction only.
        if before is not None and before is not after:
            vars(before).pop("logits", None)

    def decide(self, work: Work, decision: str) -> None:
        """Note what the person says of the mask. Raises RefusedError for a wrong word."""
        session = work.opened
        try:
            session.decide(decision)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        assert work.case is not None
        self.decisions[work.case] = decision
        rle = None
        if decision == "accept" and session.current is not None:
            rle = encode_mask(session.current.mask).decode("ascii")
        self._note(work, "decision", decision=decision, after=work.mask_sha256,
                   size=list(session.size), rle=rle, **self._doubts(session))  # fmt: skip

    def ask(self, work: Work, question: str, options: Sequence[str] | None) -> Answer:
        """Ask about the image. Raises RefusedError for a model that does not answer."""
        start = time.perf_counter()
        try:
            answer = self.model.ask(work.opened.pixels, question, options=options)
        except ValueError as error:
            raise RefusedError(str(error)) from error
        self._note(work, "ask", question_sha256=sha256_of(question),
                   answer_sha256=sha256_of(answer.text), confidence=answer.confidence,
                   latency_ms=round(1000 * (time.perf_counter() - start), 3))  # fmt: skip
        return answer

    def queue(self) -> list[dict[str, Any]]:
        """The cases in the order in which a person should look at them."""
        return [
            {
                "case": case.id,
                "target": case.target,
                "modality": case.modality,
                "uncertainty": case.uncertainty,
                "decision": self.decisions.get(case.id),
            }
            for case in self.cases.values()
        ]

    def close(self) -> None:
        self._ahead.shutdown(cancel_futures=True)
        self.log.close()

    def _session(
        self, digest: str, pixels: np.ndarray, target: str | None, modality: str | None
    ) -> Session:
        return self.model.session(
            pixels,
            target,
            modality=modality,
            encode=lambda shown, text: self.cache.encode(digest, shown, text),
        )

    def _case(self, case_id: str) -> QueuedCase:
        if case_id not in self.cases:
            raise RefusedError(f"no case {case_id!r} is in the queue", 404)
        return self.cases[case_id]

    def _read(self, case: QueuedCase) -> bytes:
        try:
            return case.read()
        except (OSError, ValueError) as error:
            # Its words name folders.
            log.error("case %s: %s", case.id, error)
            raise RefusedError(
                f"case {case.id!r} cannot be read; the server's log says why"
            ) from error

    def _encode_ahead(self, case: QueuedCase) -> None:
        try:
            data = self._read(case)
            pixels = pixels_within(data, self.limits.pixels)
            self._session(hashlib.sha256(data).hexdigest(), pixels, case.target, case.modality)
        except RefusedError:
            return  # said when the case is opened

    def _doubts(self, session: Session) -> dict[str, Any]:
        found = session.current
        if found is None:
            return {"uncertainty": None, "predicted_dice": None}
        return {"uncertainty": found.uncertainties, "predicted_dice": found.predicted_dice}

    def _note(self, work: Work, event: str, **what: Any) -> None:
        about = {"session": work.id, "case": work.case, "image_sha256": work.image_sha256}
        self.log.append({"event": event, "sequence": work.next_sequence, **about, **what})


def state_of(work: Work) -> dict[str, Any]:
    """What a page shows of a session."""
    state: dict[str, Any] = {
        "session": work.id,
        "case": work.case,
        "target": work.target,
        "next_sequence": work.next_sequence,
        "latency_ms": work.latency_ms,
        "changes": work.changes,
    }
    session = work.session
    if session is None:
        return state | {"size": None, "mask": False}
    found = session.current
    state |= {
        "size": list(session.size),
        "mask": found is not None,
        "can_undo": session.can_undo,
        "can_redo": session.can_redo,
        "decision": session.decision,
        "clicks": [] if found is None else [list(click) for click in found.clicks],
        "box": None if found is None or found.box is None else list(found.box),
    }
    if found is None:
        return state
    return state | {
        "area": int(found.mask.sum()),
        "predicted_dice": found.predicted_dice,
        "uncertainty": found.uncertainty,
    }


def pixels_within(data: bytes, max_pixels: int) -> np.ndarray:
    """The pixels of an encoded image. Raises RefusedError for other files and too many pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size  # of the header: nothing is decoded yet
        if width * height <= max_pixels:
            return as_pixels(data)
    except Exception as error:  # PIL raises whatever damaged bytes make it meet
        raise RefusedError(
            f"got {len(data)} bytes that are no whole image, expected one of {', '.join(FORMATS)}"
        ) from error
    raise RefusedError(
        f"got an image of {width} x {height} pixels, expected at most {max_pixels}; cut it", 413
    )


def png_of(pixels: np.ndarray) -> bytes:
    """[H, W] or [H, W, 3] uint8 as PNG, packed lightly: it travels a short way."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
