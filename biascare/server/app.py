"""The addresses of the server.

    app = create_app(model, checkpoint=digest, cases=cases, log=AuditLog(path))
    uvicorn.run(app, host="127.0.0.1", port=8000)

    GET  /healthz
    GET  /api/queue                        cases, the most uncertain first
    POST /api/sessions                     {"case": id} of the queue, or {} before an upload
    GET  /api/sessions/ID                  what is on screen
    POST /api/sessions/ID/image            multipart: file, target, modality
    GET  /api/sessions/ID/image            PNG as the model sees it, at native size
    POST /api/sessions/ID/prompts          {"sequence": 0, "kind": "click", "x": 3, "y": 4, ...}
    GET  /api/sessions/ID/mask             PNG, 0 and 255
    GET  /api/sessions/ID/uncertainty      PNG, 255 where the model cannot say
    POST /api/sessions/ID/ask              {"question": "...", "options": [...]}
    POST /api/sessions/ID/decision         {"sequence": 1, "decision": "accept"}

Prompts and decisions of a session carry the numbers 0, 1, 2, ... A request that overtook another
waits for it; one that is sent again is not done again. So a burst of clicks over several
connections is applied whole and in order.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from biascare.inference.model import BiasCareVL
from biascare.server.audit_log import AuditLog
from biascare.server.desk import Desk, Limits, QueuedCase, RefusedError, Work, png_of, state_of
from biascare.server.guard import Guard, is_loopback
from biascare.version import __version__

PAGE = Path(__file__).parent / "page"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_TEXT = 2000
log = logging.getLogger("biascare")

Words = Annotated[str, Field(max_length=200)]


class Body(BaseModel):
    # A misspelt key must not be a prompt without it.
    model_config = ConfigDict(extra="forbid")


class Begin(Body):
    case: Words | None = None


class Prompt(Body):
    sequence: int = Field(ge=0)
    kind: Literal["click", "box", "undo", "redo", "reset"]
    x: float | None = Field(None, allow_inf_nan=False)
    y: float | None = Field(None, allow_inf_nan=False)
    positive: bool = True
    box: tuple[float, float, float, float] | None = None


class Decision(Body):
    sequence: int = Field(ge=0)
    decision: Words


class Question(Body):
    question: str = Field(min_length=1, max_length=MAX_TEXT)
    options: list[Words] | None = Field(None, max_length=26)


def create_app(
    model: BiasCareVL,
    *,
    checkpoint: str,
    log: AuditLog,
    cases: Sequence[QueuedCase] = (),
    host: str = "127.0.0.1",
    hosts: Sequence[str] = (),
    token: str | None = None,
    limits: Limits | None = None,
) -> FastAPI:
    """The application of one model.

    Args:
        checkpoint: sha256 of the model's files; stands in the log.
        host: the address that it will listen at.
        hosts: further names by which it is reached.
        token: who knows it may come in.

    Raises ValueError where others than this machine could reach the server without a token.
    """
    if token is None and not is_loopback(host):
        raise ValueError(
            f"host: got {host} without a token, expected 127.0.0.1; others can reach this address, "
            "so it needs a token"
        )
    limits = limits or Limits()
    desk = Desk(model, checkpoint=checkpoint, cases=cases, log=log, limits=limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.close()

    # Its pages of documentation load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        Guard, hosts=(*LOOPBACK, host, *hosts), token=token, max_bytes=limits.upload_bytes
    )
    _answer_errors(app)

    async def in_turn(work: Work, sequence: int, step: Callable[[], None]) -> dict[str, Any]:
        """Do a step when all before it are done, once. A step that is refused has had its turn."""
        async with work.turn:
            arrived = work.turn.wait_for(lambda: sequence <= work.next_sequence)
            try:
                await asyncio.wait_for(arrived, limits.wait_seconds)
            except asyncio.TimeoutError:
                raise RefusedError(
                    f"number {sequence} came and number {work.next_sequence} did not; send it",
                    status=409,
                ) from None
            if sequence < work.next_sequence:
                return state_of(work) | {"applied": False}
            try:
                await run_in_threadpool(step)
            finally:
                work.next_sequence += 1
                work.turn.notify_all()
            return state_of(work) | {"applied": True}

    async def alone(work: Work, make: Callable[[], Any]) -> Any:
        async with work.turn:
            return await run_in_threadpool(make)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "version": __version__}

    @app.get("/api/queue")
    async def queue() -> list[dict[str, Any]]:
        return desk.queue()

    @app.post("/api/sessions")
    async def begin(body: Begin) -> dict[str, Any]:
        work, case = desk.begin(), body.case
        if case is not None:
            await alone(work, lambda: desk.open_case(work, case))
        return state_of(work) | {"answers": model.answerer is not None}

    @app.get("/api/sessions/{key}")
    async def state(key: str) -> dict[str, Any]:
        found: dict[str, Any] = await alone(desk.work(key), lambda: state_of(desk.work(key)))
        return found | {"answers": model.answerer is not None}

    @app.post("/api/sessions/{key}/image")
    async def upload(
        key: str,
        file: UploadFile,
        target: Annotated[Words | None, Form()] = None,
        modality: Annotated[Words | None, Form()] = None,
    ) -> dict[str, Any]:
        work, data = desk.work(key), await file.read()
        await alone(work, lambda: desk.open_image(work, data, target=target, modality=modality))
        return state_of(work) | {"answers": model.answerer is not None}

    @app.get("/api/sessions/{key}/image")
    async def image(key: str) -> Response:
        work = desk.work(key)
        return _png(await alone(work, lambda: png_of(work.opened.pixels)))

    @app.post("/api/sessions/{key}/prompts")
    async def prompt(key: str, body: Prompt) -> dict[str, Any]:
        work = desk.work(key)
        said = body.model_dump(exclude={"sequence"}, exclude_none=True)
        if body.kind != "click":
            del said["positive"]
        return await in_turn(work, body.sequence, lambda: desk.step(work, said))

    @app.post("/api/sessions/{key}/decision")
    async def decision(key: str, body: Decision) -> dict[str, Any]:
        work = desk.work(key)
        return await in_turn(work, body.sequence, lambda: desk.decide(work, body.decision))

    @app.get("/api/sessions/{key}/mask")
    async def mask(key: str) -> Response:
        work = desk.work(key)
        return _png(await alone(work, lambda: png_of(_on_screen(work).mask.astype(np.uint8) * 255)))

    @app.get("/api/sessions/{key}/uncertainty")
    async def uncertainty(key: str) -> Response:
        work = desk.work(key)

        def drawn() -> bytes:
            return png_of(np.rint(_on_screen(work).pixel_uncertainty * 255).astype(np.uint8))

        return _png(await alone(work, drawn))

    @app.post("/api/sessions/{key}/ask")
    async def ask(key: str, body: Question) -> dict[str, Any]:
        work, start = desk.work(key), time.perf_counter()
        # Not in turn: an answer may take many seconds, and clicks need not wait for it.
        answer = await run_in_threadpool(desk.ask, work, body.question, body.options)
        return {
            "answer": answer.text,
            "confidence": answer.confidence,
            "calibrated": False,
            "probabilities": answer.probabilities,
            "latency_ms": 1000 * (time.perf_counter() - start),
        }

    app.add_api_route("/", _file("index.html"), methods=["GET"])
    for name in ("page.js", "page.css", "icon.svg"):
        app.add_api_route(f"/{name}", _file(name), methods=["GET"])
    return app


def _on_screen(work: Work) -> Any:
    found = work.opened.current
    if found is None:
        raise RefusedError("there is no mask yet; click into the target first", status=409)
    return found


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    # A function of its own: a default argument would be a parameter that the address can set.
    async def serve() -> Response:
        return FileResponse(PAGE / name)

    return serve


def _png(data: bytes) -> Response:
    return Response(data, media_type="image/png")


def _answer_errors(app: FastAPI) -> None:
    """Errors as {"error": sentence}, without paths and without what was sent."""

    @app.exception_handler(RefusedError)
    async def on_refused(_: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=error.status)

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, status_code=error.status_code)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        wrong = "; ".join(
            f"{'.'.join(map(str, found['loc'][1:])) or 'body'}: {found['msg']}"
            for found in error.errors()[:5]
        )
        return JSONResponse({"error": wrong}, status_code=422)

    @app.exception_handler(Exception)
    async def on_bug(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed: %s", type(error).__name__, exc_info=error)
        said = "the server failed at this; its own log says how"
        return JSONResponse({"error": said}, status_code=500)
