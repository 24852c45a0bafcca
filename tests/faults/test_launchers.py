"""Launchers that are ended: their ranks notice, and end too."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.training.training_runs import ROOT, Job, World, environment, free_port

pytestmark = pytest.mark.timeout(240)

RANK = """
import ctypes, os, sys, time
from pathlib import Path
from biascare.runs import process

lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
process.LOOK_EVERY, process.GRACE = 0.2, 3.0
interrupts = process.raise_interrupts()
process.end_with_launcher()
Path(sys.argv[-1], os.environ["RANK"]).write_text(str(os.getpid()))
try:
    while True:
        {wait}
except KeyboardInterrupt:
    Path(sys.argv[-1], os.environ["RANK"] + ".interrupted").touch()
    process.stop(interrupts, None)
"""

AT_WORK = "time.sleep(0.1)"
IN_A_COLLECTIVE = "lock(mutex); lock(mutex)"
"""As one whose other ranks are gone: it never comes back to where Python looks for signals."""


def launcher(*program: str) -> subprocess.Popen[str]:
    """DeepSpeed's launcher with two ranks."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), *program]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.1)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def below(runner: subprocess.Popen[str], name: str) -> psutil.Process:
    """The first process that the launcher has started of this program."""
    found = psutil.Process(runner.pid).children(recursive=True)
    return next(p for p in found if name in " ".join(p.cmdline()))


@pytest.mark.parametrize(
    ("whom", "number", "wait"),
    [
        ("runner", signal.SIGTERM, AT_WORK),
        ("runner", signal.SIGKILL, AT_WORK),
        ("launcher of a machine", signal.SIGKILL, AT_WORK),
        ("runner", signal.SIGKILL, IN_A_COLLECTIVE),
    ],
)
def test_ranks_end_with_their_launcher(
    tmp_path: Path, whom: str, number: signal.Signals, wait: str
) -> None:
    program = tmp_path / "rank.py"
    program.write_text(RANK.format(wait=wait))
    runner = launcher(str(program), str(tmp_path))
    started: list[psutil.Process] = []
    try:
        until(lambda: all((tmp_path / name).exists() for name in "01"), 120)
        started = psutil.Process(runner.pid).children(recursive=True)
        assert len(started) >= 3
        victim = runner if whom == "runner" else below(runner, "deepspeed.launcher.launch")
        victim.send_signal(number)
        until(lambda: not alive(started), 60)
        interrupted = sorted(path.name for path in tmp_path.glob("*.interrupted"))
        assert interrupted == (["0.interrupted", "1.interrupted"] if wait == AT_WORK else [])
    finally:
        for process in (psutil.Process(runner.pid), *alive(started)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        runner.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_run_ends_with_its_launcher_and_gives_its_folder_back(
    tmp_path: Path, tiny_mllm: Path, tiny_records: Path, number: signal.Signals
) -> None:
    world = World(tmp_path, tiny_mllm, tiny_records)
    config = world.config(Job("abandoned"), 2)
    more = ("train.max_steps=9999", "train.save_every=2", "data.num_workers=1")
    runner = launcher("scripts/train.py", "--config", str(config), *more)
    assert runner.stdout is not None
    assert any(line.startswith("step 3/") for line in iter(runner.stdout.readline, ""))
    started = psutil.Process(runner.pid).children(recursive=True)
    lock = tmp_path / "world2" / "abandoned" / "run.lock"
    assert lock.exists()
    runner.send_signal(number)
    said, _ = runner.communicate(timeout=100)
    until(lambda: not alive(started), 60)
    assert "the launcher has ended; the same command continues from" in said
    assert not list(lock.parent.glob("traceback*")), "a rank that ends is no fault of another"
