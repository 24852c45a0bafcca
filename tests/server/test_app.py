"""The server as a script meets it: sessions, order, what is kept, and who is turned away."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biascare import BiasCareVL
from biascare.records import decode_mask
from biascare.server.audit_log import AuditLog, replay, verify
from tests.tiny import encoded_png, tiny_chat, tiny_model

testing = pytest.importorskip("fastapi.testclient", reason="needs the extra [ui]")

from biascare.server.app import create_app  # noqa: E402  after the skip
from biascare.server.desk import Limits, QueuedCase  # noqa: E402  after the skip

URL = "http://127.0.0.1:8000"
HEIGHT, WIDTH = 50, 90


def picture(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return encoded_png(pixels)


CASES = [
    QueuedCase("sure", lambda: picture(1), "liver", "ct", 0.2),
    QueuedCase("unknown", lambda: picture(2), "spleen"),
    QueuedCase("doubtful", lambda: picture(3), "liver", "ct", 0.9),
]


@pytest.fixture(scope="module")
def model(tiny_mllm: Path) -> BiasCareVL:
    return BiasCareVL(tiny_model(tiny_mllm), tiny_chat(tiny_mllm))


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def client_of(model: BiasCareVL, log_path: Path, **keywords: Any) -> Any:
    keywords = {"cases": CASES, "checkpoint": "c" * 64} | keywords
    app = create_app(model, log=AuditLog(log_path), **keywords)
    return testing.TestClient(app, base_url=URL, raise_server_exceptions=False)


@pytest.fixture
def client(model: BiasCareVL, log_path: Path) -> Iterator[Any]:
    with client_of(model, log_path) as client:
        yield client


def opened(client: Any, case: str = "doubtful") -> str:
    answer = client.post("/api/sessions", json={"case": case})
    assert answer.status_code == 200, answer.text
    return f"/api/sessions/{answer.json()['session']}"


def click(n: int, **changes: Any) -> dict[str, Any]:
    said = {"sequence": n, "kind": "click", "x": 5 + 3 * n % 80, "y": 4 + 7 * n % 40}
    return said | {"positive": n % 3 != 2} | changes


def shown(client: Any, address: str) -> np.ndarray:
    answer = client.get(address)
    assert answer.status_code == 200, answer.text
    return np.array(Image.open(io.BytesIO(answer.content)))


# ---------------------------------------------------------------- work


def test_an_image_is_sent_clicked_and_accepted(
    client: Any, model: BiasCareVL, log_path: Path
) -> None:
    begun = client.post("/api/sessions", json={}).json()
    work = f"/api/sessions/{begun['session']}"
    assert client.get(f"{work}/mask").status_code == 409
    files = {"file": ("Jane_Doe_1950.png", picture(), "image/png")}
    state = client.post(f"{work}/image", files=files, data={"target": "liver"}).json()
    assert state["size"] == [HEIGHT, WIDTH] and state["mask"] and state["answers"]
    expected = model.segment(picture(), "liver")
    assert np.array_equal(shown(client, f"{work}/mask") > 0, expected.mask)

    state = client.post(f"{work}/prompts", json=click(0)).json()
    expected = expected.click(5, 4)
    assert state["area"] == expected.mask.sum() and state["next_sequence"] == 1
    assert state["predicted_dice"] == expected.predicted_dice
    assert state["uncertainty"] == expected.uncertainty and state["latency_ms"] > 0
    assert state["changes"]["area"] == expected.mask.sum() - expected.undo().mask.sum()
    assert np.array_equal(shown(client, f"{work}/mask") > 0, expected.mask)
    assert np.array_equal(
        shown(client, f"{work}/uncertainty"), np.rint(expected.pixel_uncertainty * 255)
    )
    box = {"sequence": 1, "kind": "box", "box": [3, 4, 60, 40]}
    assert client.post(f"{work}/prompts", json=box).json()["box"] == [3, 4, 60, 40]
    for n, kind in enumerate(("undo", "redo", "undo"), start=2):
        state = client.post(f"{work}/prompts", json={"sequence": n, "kind": kind}).json()
    assert state["box"] is None and state["clicks"] == [[5, 4, 1]] and state["can_redo"]
    assert np.array_equal(shown(client, f"{work}/mask") > 0, expected.mask)
    said = {"sequence": 5, "decision": "accept"}
    assert client.post(f"{work}/decision", json=said).json()["decision"] == "accept"

    text = log_path.read_text()
    last = json.loads(text.splitlines()[-1])
    rle = last["rle"].encode("ascii")
    assert np.array_equal(decode_mask(rle, *last["size"]).astype(bool), expected.mask)
    assert "Jane" not in text and last["case"] == hashlib.sha256(picture()).hexdigest()[:12]


def test_the_queue_begins_with_the_most_uncertain_case(client: Any) -> None:
    assert [row["case"] for row in client.get("/api/queue").json()] == [
        "doubtful",
        "sure",
        "unknown",  # nothing is known of it
    ]
    work = opened(client)
    client.post(f"{work}/decision", json={"sequence": 0, "decision": "unsure"})
    assert client.get("/api/queue").json()[0]["decision"] == "unsure"


def test_the_next_case_is_encoded_while_the_person_looks_at_this_one(
    client: Any, model: BiasCareVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_one = np.array(Image.open(io.BytesIO(picture(1))))
    encode, seen, was_encoded = model.segmenter.encode, [], threading.Event()

    def noted(pixels: np.ndarray, instructions: list[str | None]) -> Any:
        seen.append(bool(np.array_equal(pixels, next_one)))
        if seen[-1]:
            was_encoded.set()
        return encode(pixels, instructions)

    monkeypatch.setattr(model.segmenter, "encode", noted)
    opened(client, "doubtful")
    assert was_encoded.wait(60)  # nobody opened it
    opened(client, "sure")
    assert seen.count(True) == 1


def test_clicks_over_many_connections_are_all_applied_in_their_order(
    client: Any, model: BiasCareVL
) -> None:
    """Fifty at once, the last ones first."""
    work = opened(client)
    with ThreadPoolExecutor(50) as pool:
        answers = list(
            pool.map(lambda n: client.post(f"{work}/prompts", json=click(n)), reversed(range(50)))
        )
    assert {answer.status_code for answer in answers} == {200}
    expected = model.segment(picture(3), "liver", modality="ct")
    for n in range(50):
        said = click(n)
        expected = expected.click(said["x"], said["y"], positive=said["positive"])
    state = client.get(work).json()
    assert state["clicks"] == [list(c) for c in expected.clicks] and state["next_sequence"] == 50
    assert np.array_equal(shown(client, f"{work}/mask") > 0, expected.mask)


def test_a_prompt_that_is_sent_again_is_not_applied_again(client: Any) -> None:
    work = opened(client)
    first = client.post(f"{work}/prompts", json=click(0)).json()
    again = client.post(f"{work}/prompts", json=click(0)).json()
    assert first["applied"] and not again["applied"]
    assert again["clicks"] == first["clicks"] and again["next_sequence"] == 1


def test_a_refused_prompt_has_had_its_turn_and_changes_nothing(client: Any) -> None:
    work = opened(client)
    answer = client.post(f"{work}/prompts", json=click(0, x=WIDTH + 5))
    assert answer.status_code == 422 and "original image" in answer.json()["error"]
    for n, wrong in enumerate(({"kind": "redo"}, {"kind": "box"}, {"kind": "click", "x": 3}), 1):
        assert client.post(f"{work}/prompts", json={"sequence": n} | wrong).status_code == 422
    state = client.post(f"{work}/prompts", json=click(4)).json()
    assert len(state["clicks"]) == 1 and state["next_sequence"] == 5


def test_a_missing_prompt_is_named(model: BiasCareVL, log_path: Path) -> None:
    with client_of(model, log_path, limits=Limits(wait_seconds=0.05)) as client:
        work = opened(client)
        answer = client.post(f"{work}/prompts", json=click(2))
        assert answer.status_code == 409 and "number 0 did not" in answer.json()["error"]


def test_two_sessions_at_once_do_not_meet(client: Any, model: BiasCareVL) -> None:
    works = [opened(client, "doubtful"), opened(client, "sure")]
    with ThreadPoolExecutor(8) as pool:
        jobs = [(work, n) for n in range(8) for work in works]
        list(pool.map(lambda job: client.post(f"{job[0]}/prompts", json=click(job[1])), jobs))
    for work, seed in zip(works, (3, 1), strict=True):
        expected = model.segment(picture(seed), "liver", modality="ct")
        for n in range(8):
            expected = expected.click(click(n)["x"], click(n)["y"], positive=n % 3 != 2)
        assert np.array_equal(shown(client, f"{work}/mask") > 0, expected.mask)


def test_a_question_is_answered_with_a_confidence_that_nobody_calibrated(
    client: Any, model: BiasCareVL, log_path: Path
) -> None:
    work, said = opened(client), {"question": "Is Mr Smith well?", "options": ["yes", "no"]}
    answer = client.post(f"{work}/ask", json=said).json()
    expected = model.ask(picture(3), said["question"], options=["yes", "no"])
    assert answer["answer"] == expected.text and answer["confidence"] == expected.confidence
    assert answer["calibrated"] is False
    assert "Smith" not in log_path.read_text()
    wrong = client.post(f"{work}/ask", json=said | {"options": ["yes"]})
    assert wrong.status_code == 422 and "two or more" in wrong.json()["error"]


def test_the_oldest_session_is_forgotten(model: BiasCareVL, log_path: Path) -> None:
    with client_of(model, log_path, limits=Limits(sessions=2)) as client:
        works = [opened(client) for _ in range(3)]
        assert [client.get(work).status_code for work in works] == [404, 200, 200]


# ---------------------------------------------------------------- the log


def test_a_replay_gives_every_mask_again_bit_for_bit(
    client: Any, model: BiasCareVL, log_path: Path, tiny_mllm: Path
) -> None:
    works = [opened(client, case) for case in ("doubtful", "unknown")]
    for work in works:
        for n in range(4):
            client.post(f"{work}/prompts", json=click(n))
        for n, kind in enumerate(("undo", "undo", "redo", "reset", "undo"), start=4):
            client.post(f"{work}/prompts", json={"sequence": n, "kind": kind})
        client.post(f"{work}/prompts", json={"sequence": 9, "kind": "box", "box": [3, 3, 50, 40]})
        client.post(f"{work}/prompts", json=click(10, y=900))  # refused, and not in the log
        client.post(f"{work}/decision", json={"sequence": 11, "decision": "accept"})
    images = {hashlib.sha256(data).hexdigest(): data for data in (picture(2), picture(3))}
    replayed = replay(log_path, model, images, checkpoint="c" * 64)
    assert replayed.num_masks == 22 and replayed.differences == []
    with pytest.raises(ValueError, match="a model with sha256"):
        replay(log_path, model, images, checkpoint="d" * 64)
    with pytest.raises(ValueError, match="is not among the 0 given"):
        replay(log_path, model, {})
    other = BiasCareVL(tiny_model(tiny_mllm, seed=1), tiny_chat(tiny_mllm))
    differences = replay(log_path, other, images).differences
    assert differences and "line 1, case 'doubtful'" in differences[0]
    prompt = next(e for e in verify(log_path) if e["event"] == "prompt")
    assert prompt["prompt"] == {"kind": "click", "x": 5.0, "y": 4.0, "positive": True}
    assert {"before", "after", "uncertainty", "predicted_dice", "latency_ms", "time"} <= set(prompt)


# ---------------------------------------------------------------- who is let in


def test_an_address_that_others_reach_needs_a_token(model: BiasCareVL, log_path: Path) -> None:
    with AuditLog(log_path) as log:
        for host in ("0.0.0.0", "192.168.1.5", "::"):
            with pytest.raises(ValueError, match="needs a token"):
                create_app(model, checkpoint="c", log=log, host=host)
        create_app(model, checkpoint="c", log=log, host="::1")


def test_nothing_but_the_health_is_told_without_the_token(
    model: BiasCareVL, log_path: Path
) -> None:
    with client_of(model, log_path, host="192.168.1.5", token="se cret") as client:
        addresses = ("/", "/page.js", "/api/queue", "/api/sessions/x/mask")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Cookie": "biascare_token=wrong"}):
            found = [client.get(path, headers=headers).status_code for path in addresses]
            assert found == [401] * 4
        assert client.get("/healthz").json()["status"] == "ok"
        assert client.get("/?token=wrong").status_code == 401
        assert client.get("/api/queue?token=se%20cret").status_code == 401  # not in an address
        bearer = {"Authorization": "Bearer se cret"}
        assert client.get("/api/queue", headers=bearer).status_code == 200
        answer = client.get("/?token=se%20cret", follow_redirects=False)
        assert answer.status_code == 303 and answer.headers["location"] == "/"
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        assert client.get("/api/queue").status_code == 200  # with the cookie


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_name_that_is_not_ours_is_not_answered(client: Any, host: str) -> None:
    assert client.get("/api/queue", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "LOCALHOST"])
def test_the_names_of_this_machine_are_answered(client: Any, host: str) -> None:
    assert client.get("/api/queue", headers={"Host": host}).status_code == 200


def test_pages_of_other_servers_cannot_send_anything(client: Any) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8000"):
        answer = client.post("/api/sessions", json={}, headers={"Origin": origin})
        assert answer.status_code == 403, origin
    assert client.post("/api/sessions", json={}, headers={"Origin": URL}).status_code == 200


def test_uploads_are_bounded_in_bytes_and_pixels(model: BiasCareVL, log_path: Path) -> None:
    limits = Limits(upload_bytes=20_000, pixels=HEIGHT * WIDTH)
    with client_of(model, log_path, limits=limits) as client:
        work = f"/api/sessions/{client.post('/api/sessions', json={}).json()['session']}"

        def sent(data: bytes) -> Any:
            return client.post(f"{work}/image", files={"file": ("scan", data)})

        assert sent(picture()).status_code == 200
        assert sent(os.urandom(20_000)).status_code == 413
        large = encoded_png(np.zeros((HEIGHT, WIDTH + 1, 3), np.uint8))
        assert sent(large).status_code == 413 and "pixels" in sent(large).json()["error"]
        for data in (b"", b"no image", picture()[:500], b"GIF89a" + bytes(50)):
            assert sent(data).status_code == 422
        chunked = client.post(f"{work}/image", content=iter([bytes(10)] * 9999))
        assert chunked.status_code == 411


def test_every_answer_says_that_only_our_own_files_may_run(client: Any) -> None:
    for path in ("/", "/page.js", "/page.css", "/api/queue", "/nothing", "/healthz"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    assert client.get("/docs").status_code == 404 and client.get("/openapi.json").status_code == 404
    assert "<canvas" in client.get("/?name=../app.py").text


def test_errors_tell_no_paths(model: BiasCareVL, log_path: Path, tmp_path: Path) -> None:
    def missing() -> bytes:
        return (tmp_path / "Jane Doe.png").read_bytes()

    def broken() -> bytes:
        raise RuntimeError(f"bug in {tmp_path}")

    cases = [QueuedCase("missing", missing), QueuedCase("broken", broken)]
    with client_of(model, log_path, cases=cases) as client:
        found = [client.post("/api/sessions", json={"case": c}) for c in ("missing", "broken")]
        assert [answer.status_code for answer in found] == [422, 500]
        found += [client.post("/api/sessions", json={"case": "/etc/passwd", "more": 1})]
        found += [client.get("/api/sessions/..%2F..%2Fetc/mask"), client.get("/page/../app.py")]
        found += [client.post("/api/sessions", content="{", headers={"Content-Length": "1"})]
        for answer in found:
            assert answer.status_code >= 400 and set(answer.json()) == {"error"}
            assert str(tmp_path) not in answer.text and "Traceback" not in answer.text
            assert "Jane" not in answer.text and ".py" not in answer.text
