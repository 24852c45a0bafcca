"""The audit log: chained, replayed, and what is altered in it is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from biascare.server.audit_log import START, AuditLog, sha256_of, verify


def written(path: Path, num: int = 4) -> list[str]:
    with AuditLog(path) as log:
        for n in range(num):
            log.append({"event": "prompt", "session": "s", "case": f"case-{n}"})
    return path.read_text().splitlines()


def test_each_line_carries_the_hash_of_the_line_before(tmp_path: Path) -> None:
    lines = written(tmp_path / "logs" / "audit.jsonl")
    entries = verify(tmp_path / "logs" / "audit.jsonl")
    assert [entry["number"] for entry in entries] == [1, 2, 3, 4]
    assert [entry["previous"] for entry in entries] == [START, *map(sha256_of, lines[:-1])]


def test_a_log_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    written(path)
    written(path, 2)
    assert [entry["number"] for entry in verify(path)] == [1, 2, 3, 4, 5, 6]


def rewritten(line: str, **changes: object) -> str:
    """The line of a forger who makes its own hash anew."""
    entry = json.loads(line) | changes
    del entry["sha256"]
    content = json.dumps(entry, sort_keys=True, separators=(",", ":"))
    entry["sha256"] = sha256_of(content)
    return json.dumps(entry, sort_keys=True, separators=(",", ":"))


def test_an_altered_line_is_found_and_named(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path)

    def with_lines(changed: list[str]) -> Path:
        path.write_text("".join(line + "\n" for line in changed))
        return path

    for n in range(4):
        altered = [*lines]
        altered[n] = altered[n].replace(f"case-{n}", "case-x")
        with pytest.raises(ValueError, match=f"line {n + 1} was altered"):
            verify(with_lines(altered))
    forged = [lines[0], rewritten(lines[1], case="case-x"), *lines[2:]]
    with pytest.raises(ValueError, match=r"line 3 does not follow the line before"):
        verify(with_lines(forged))
    for changed in ([lines[0], *lines[2:]], [lines[1], lines[0], *lines[2:]], lines[1:]):
        with pytest.raises(ValueError, match=r"line \d"):
            verify(with_lines(changed))
    with pytest.raises(ValueError, match="line 3 was altered"):
        verify(with_lines([*lines[:2], "not JSON", lines[3]]))


def test_lines_cut_off_are_missed_by_who_noted_the_head(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path)
    head = sha256_of(lines[-1])
    assert len(verify(path, head=head)) == 4
    path.write_text("".join(line + "\n" for line in lines[:3]))
    assert len(verify(path)) == 3
    with pytest.raises(ValueError, match="cut off or added"):
        verify(path, head=head)


def test_a_log_that_a_crash_tore_or_another_program_writes_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lines = written(path)
    with AuditLog(path), pytest.raises(ValueError, match="another process"):
        AuditLog(path)
    path.write_text("\n".join(lines)[:-5])
    with pytest.raises(ValueError, match="line 4 is not complete"):
        AuditLog(path)


def test_a_number_that_is_none_is_no_entry(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "audit.jsonl") as log:
        with pytest.raises(ValueError, match="JSON"):
            log.append({"event": "prompt", "latency_ms": float("nan")})
        log.append({"event": "prompt"})
    assert len(verify(tmp_path / "audit.jsonl")) == 1
