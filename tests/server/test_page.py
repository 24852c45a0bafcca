"""The page in headless Chromium, as hands meet it: clicks, boxes, keys, bursts, reloads.

Screenshots stay in outputs/screenshots for people to look at.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from biascare import BiasCareVL
from biascare.server.audit_log import AuditLog, verify
from tests.tiny import encoded_png, tiny_chat, tiny_model

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra [ui]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

from biascare.server.app import create_app  # noqa: E402  after the skip
from biascare.server.desk import QueuedCase  # noqa: E402  after the skip

SHOTS = Path(__file__).parents[2] / "outputs" / "screenshots"
HEIGHT, WIDTH = 50, 90


def picture(seed: int) -> bytes:
    """Two bright discs on noise."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    discs = ((x - 30) ** 2 + (y - 25) ** 2 < 150) | ((x - 65) ** 2 + (y - 20) ** 2 < 60)
    noise = np.random.default_rng(seed).integers(0, 60, (HEIGHT, WIDTH))
    return encoded_png(np.repeat((discs * 150 + noise).astype(np.uint8)[..., None], 3, axis=2))


@pytest.fixture(scope="module")
def model(tiny_mllm: Path) -> BiasCareVL:
    return BiasCareVL(tiny_model(tiny_mllm), tiny_chat(tiny_mllm))


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def address(model: BiasCareVL, log_path: Path) -> Iterator[str]:
    """A real server on a free port of this machine."""
    cases = [
        QueuedCase("case-1", lambda: picture(1), "liver", "ct", 0.9),
        QueuedCase("case-2", lambda: picture(2), "spleen", "ct", 0.4),
    ]
    app = create_app(model, checkpoint="c" * 64, cases=cases, log=AuditLog(log_path))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(20)
    listening.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1200, "height": 760})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
    page.goto(address)
    settled(page, 0)
    yield page
    page.close()
    assert not wrong


def settled(page: Any, sequence: int) -> dict[str, Any]:
    """What the page knows once it sent so many prompts and shows the mask of the last."""
    done = "n => picture && work.next_sequence === n && !waiting.length && !sending && !fetching"
    try:
        page.wait_for_function(done, arg=sequence, timeout=15_000)
    except playwright.TimeoutError:
        known = "({sequence, waiting, sending, fetching, stale, view, work})"
        pytest.fail(f"expected {sequence} prompts, got {page.evaluate(known)}")
    state: dict[str, Any] = page.evaluate("work")
    return state


def place(page: Any, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the image is in the window."""
    found = page.evaluate(
        "([x, y]) => { const r = canvas.getBoundingClientRect(), p = toCanvas(x, y);"
        " return [p[0] + r.left, p[1] + r.top]; }",
        [x, y],
    )
    return found[0], found[1]


def click(page: Any, x: float, y: float, button: str = "left") -> None:
    page.mouse.click(*place(page, x, y), button=button)


def near(found: Any, expected: Any) -> bool:
    return bool(np.allclose(found, expected, atol=0.2))


def test_clicks_boxes_zoom_undo_and_accept(page: Any, log_path: Path) -> None:
    click(page, 30, 25)
    click(page, 60, 10, button="right")
    state = settled(page, 2)
    assert near(state["clicks"], [[30, 25, 1], [60, 10, 0]])
    assert page.locator("#area").inner_text().startswith(f"{state['area']} px")
    assert "ms" in page.locator("#latency").inner_text()

    page.mouse.move(*place(page, 10, 8))
    page.mouse.down()
    page.mouse.move(*place(page, 50, 40), steps=5)
    page.mouse.up()
    assert near(settled(page, 3)["box"], [10, 8, 50, 40])

    before = place(page, 30, 25)
    page.mouse.move(*before)
    page.mouse.wheel(0, -600)
    page.wait_for_function("() => view.scale > 20")
    # It zooms at the pointer, whose place a wheel event tells in whole pixels.
    assert np.allclose(place(page, 30, 25), before, atol=2)
    click(page, 33, 27)
    assert near(settled(page, 4)["clicks"][-1], [33, 27, 1])
    page.keyboard.down("Space")
    page.mouse.down()
    page.mouse.move(before[0] + 80, before[1] + 40, steps=3)
    page.mouse.up()
    page.keyboard.up("Space")
    settled(page, 4)  # moving is no prompt
    click(page, 34, 28)
    assert near(settled(page, 5)["clicks"][-1], [34, 28, 1])

    page.click("#undo")
    page.keyboard.press("Control+z")
    state = settled(page, 7)
    assert len(state["clicks"]) == 2 and state["can_redo"]
    page.keyboard.press("Control+y")
    assert len(settled(page, 8)["clicks"]) == 3
    page.click("#reset")
    assert settled(page, 9)["clicks"] == []
    page.keyboard.press("Control+z")
    assert len(settled(page, 10)["clicks"]) == 3
    page.click("#accept")
    assert settled(page, 11)["decision"] == "accept"
    last = verify(log_path)[-1]
    assert last["decision"] == "accept" and last["case"] == "case-1" and last["rle"]
    page.click("#next")
    page.wait_for_function("() => work.case === 'case-2'")
    settled(page, 0)


def test_fifty_clicks_in_two_seconds_are_all_applied_in_order(page: Any, log_path: Path) -> None:
    targets = [(5 + 7 * n % 80, 4 + 11 * n % 42) for n in range(50)]
    places = [place(page, x, y) for x, y in targets]
    began = time.perf_counter()
    for n, (x, y) in enumerate(places):
        page.mouse.click(x, y, button="right" if n % 4 == 3 else "left")
        time.sleep(max(0.0, began + (n + 1) * 0.04 - time.perf_counter()))
    print(f"50 clicks were made in {time.perf_counter() - began:.2f} s")
    state = settled(page, 50)
    expected = [[x, y, 0 if n % 4 == 3 else 1] for n, (x, y) in enumerate(targets)]
    assert near(state["clicks"], expected)
    prompts = [entry for entry in verify(log_path) if entry["event"] == "prompt"]
    assert [entry["sequence"] for entry in prompts] == list(range(50))
    took = sorted(entry["latency_ms"] for entry in prompts)
    print(f"model and mask per click: median {took[25]:.1f} ms, p95 {took[47]:.1f} ms")


def test_a_person_needs_no_mouse(page: Any) -> None:
    page.keyboard.press("ArrowRight")  # from the middle
    for _ in range(2):
        page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Enter")
    assert settled(page, 1)["clicks"] == [[26, 25, 1]]
    page.keyboard.press("t")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert settled(page, 2)["clicks"][-1] == [26, 26, 0]
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Enter")
    assert settled(page, 3)["box"] == [26, 26, 36, 36]
    page.keyboard.press("r")
    assert settled(page, 4)["clicks"] == []
    page.keyboard.press("v")
    assert page.evaluate("visible") is False
    page.keyboard.press("u")
    assert settled(page, 5)["decision"] == "unsure"
    page.keyboard.press("e")
    page.wait_for_function("() => work.case === 'case-2'")


def test_a_question_is_answered_beside_the_image(page: Any) -> None:
    page.fill("#question", "Is the liver visible?")
    page.fill("#options", "yes, no")
    page.press("#question", "Enter")
    page.wait_for_function(
        "() => document.getElementById('answer').textContent.includes('confidence')"
    )
    said = page.locator("#answer").inner_text()
    assert said.split()[0] in ("yes", "no") and "uncalibrated" in said
    assert page.evaluate("sequence") == 0  # letters of a question are no shortcuts


def test_a_reload_goes_on_where_it_was_and_two_windows_do_not_meet(
    page: Any, browser: Any, address: str
) -> None:
    click(page, 30, 25)
    first = settled(page, 1)
    other = browser.new_page()
    other.goto(address)
    settled(other, 0)
    click(other, 65, 20)
    assert near(settled(other, 1)["clicks"], [[65, 20, 1]])
    other.close()
    page.reload()
    again = settled(page, 1)
    assert (again["session"], again["clicks"]) == (first["session"], first["clicks"])
    click(page, 40, 25)
    assert len(settled(page, 2)["clicks"]) == 2


def test_a_file_is_opened_from_the_page(page: Any, log_path: Path, tmp_path: Path) -> None:
    (tmp_path / "Jane_Doe.png").write_bytes(picture(9))
    page.set_input_files("#file", tmp_path / "Jane_Doe.png")
    page.fill("#target", "lesion")
    page.click("#upload button")
    page.wait_for_function("() => work.target === 'lesion'")
    settled(page, 0)
    assert "Jane" not in log_path.read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1200, 760), (420, 800)], ids=["wide", "small"])
def test_how_it_looks(page: Any, scheme: str, size: tuple[int, int]) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": size[0], "height": size[1]})
    # The image moves with the window; a click before that would miss it.
    page.wait_for_function(
        "width => innerWidth === width && 1e-6 > Math.abs(view.scale - 0.96 * Math.min("
        "canvas.clientWidth / picture.width, canvas.clientHeight / picture.height))",
        arg=size[0],
    )
    click(page, 30, 25)
    click(page, 60, 10, button="right")
    page.evaluate(
        "$('doubt-opacity').value = 50; $('doubt-opacity').dispatchEvent(new Event('input'))"
    )
    page.wait_for_function("() => doubt !== null")
    settled(page, 2)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"page_{scheme}_{'small' if size[0] < 500 else 'wide'}.png")
    # Nothing runs out of a small window to the side.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
