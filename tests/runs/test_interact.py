"""scripts/interact.py without its server: clicks from a file, a log done again, the queue."""

from __future__ import annotations

import json
import runpy
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from biascare import BiasCareVL
from biascare.models.export_folder import TrainingFacts, save_network
from biascare.records import Records
from biascare.runs.interact import InteractRequest, queue_of, read_clicks, with_uncertainty
from biascare.server.audit_log import sha256_of_mask
from tests.tiny import encoded_png, tiny_chat, tiny_model

ROOT = Path(__file__).parents[2]
FACTS = TrainingFacts(
    beta_vl=0.25,
    mask_prompt=True,
    prevalence={},
    disc_share=None,
    disc_share_by_target={},
    trained_on=[],
)
PROMPTS = [
    {"kind": "click", "x": 20, "y": 30},
    {"kind": "box", "box": [5, 5, 60, 40]},
    {"kind": "click", "x": 70, "y": 10, "positive": False},
    {"kind": "undo"},
]


@pytest.fixture(scope="module")
def export(tiny_mllm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    save_network(tiny_model(tiny_mllm), folder, facts=FACTS)
    tiny_chat(tiny_mllm).processor.save_pretrained(folder / "processor")
    return folder


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    (tmp_path / "Jane_Doe.png").write_bytes(encoded_png(pixels))
    return tmp_path / "Jane_Doe.png"


def written(path: Path, items: Any) -> Path:
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def interact(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["interact.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "interact.py"), run_name="__main__")


def request_of(inputs: list[str], **changes: Any) -> InteractRequest:
    plain: dict[str, Any] = dict.fromkeys(InteractRequest._fields)
    return InteractRequest(**plain | {"inputs": inputs} | changes)


def test_clicks_in_a_file_become_masks_and_their_log_can_be_done_again(
    export: Path,
    scan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    items = [
        {"image": scan.name, "target": "liver", "prompts": PROMPTS, "mask": "liver.png"},
        {"image": scan.name, "prompts": PROMPTS[:1]},
    ]
    clicks, output, log = written(tmp_path / "clicks.json", items), tmp_path / "out", tmp_path / "l"
    interact(monkeypatch, export, "--clicks", clicks, "--output", output, "--log", log)
    model = BiasCareVL.from_pretrained(export)
    expected = model.segment(scan, "liver").click(20, 30).boxed((5, 5, 60, 40)).mask
    assert np.array_equal(np.array(Image.open(output / "liver.png")) > 0, expected)
    known = json.loads((output / "masks.json").read_text())["masks"]
    assert known[0]["mask_sha256"] == sha256_of_mask(expected) and known[1]["mask"] == "0002.png"
    assert "Jane" not in log.read_text()

    with pytest.raises(SystemExit) as ended:
        interact(monkeypatch, export, scan, "--replay", log)
    assert ended.value.code == 0 and "0 of them differ" in capsys.readouterr().out
    log.write_text(log.read_text().replace('"x":20.0', '"x":21.0').replace('"x":20', '"x":21'))
    with pytest.raises(SystemExit, match="line 2 was altered"):
        interact(monkeypatch, export, scan, "--replay", log)


def test_every_problem_of_a_file_of_clicks_is_named_at_once(scan: Path, tmp_path: Path) -> None:
    items: list[Any] = [
        {"image": "none.png", "prompts": []},
        {"image": scan.name, "prompts": [], "targt": "liver", "mask": "../m.png"},
        {"image": scan.name, "prompts": ["undo"], "mask": "a.png"},
        {"image": scan.name, "prompts": [], "mask": "a.png"},
        3,
    ]
    with pytest.raises(ValueError) as error:
        read_clicks(written(tmp_path / "clicks.json", items))
    text = str(error.value)
    for part in ("item 1: image 'none.png'", "targt", "item 2: mask '../m.png'", "item 3: a prompt",
                 "item 4: mask 'a.png'", "item 5: expected an object"):  # fmt: skip
        assert part in text
    for wrong in ({}, []):
        with pytest.raises(ValueError, match="expected a list"):
            read_clicks(written(tmp_path / "clicks.json", wrong))


def test_the_queue_holds_every_target_of_every_record_and_no_name_of_a_file(
    tiny_records: Path, scan: Path, tmp_path: Path, export: Path
) -> None:
    cases = list(queue_of(request_of([str(tiny_records), str(scan)])))
    records = Records(tiny_records)
    rows = [records[i] for i in range(len(records))]
    assert len(cases) == 1 + sum(max(1, len({t["name"] for t in row["targets"]})) for row in rows)
    assert cases[-1].read() == scan.read_bytes() and "Jane" not in cases[-1].id
    assert {case.id.split()[0] for case in cases[:-1]} == {row["id"] for row in rows}
    ranked = with_uncertainty(BiasCareVL.from_pretrained(export), cases[:2] + cases[-1:], None)
    assert [case.uncertainty is None for case in ranked] == [c.target is None for c in ranked]
    for wrong in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(ValueError, match="expected an image or a record folder"):
            list(queue_of(request_of([str(wrong)])))


def test_the_program_serves_the_page_until_it_is_interrupted(
    export: Path, tiny_records: Path, tmp_path: Path
) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra [ui]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "scripts/interact.py", str(export), str(tiny_records)]
    more = ["--port", str(port), "--limit", "2", "--log", str(tmp_path / "audit.jsonl")]
    with subprocess.Popen(
        [*command, *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        said = program.stdout.readline()
        assert f"open http://127.0.0.1:{port}/" in said
        address = said.split()[1]
        for _ in range(100):
            try:
                with urllib.request.urlopen(f"{address}api/queue") as answer:
                    queue = json.load(answer)
                break
            except OSError:
                time.sleep(0.1)
        program.send_signal(2)
        out, err = program.communicate(timeout=30)
    assert len(queue) == 2 and queue[0]["uncertainty"] >= queue[1]["uncertainty"]
    assert "cases are left out" in err and "the audit log" in out, err
