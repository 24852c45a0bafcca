"""One run at a time in a folder, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from biascare.runs import lock
from biascare.runs.lock import LOCK, locked
from tests.training.training_runs import ROOT, Job, World, environment

pytestmark = pytest.mark.timeout(240)

HOLD = """
import os, sys, time
from pathlib import Path
from biascare.runs.lock import locked
with locked(Path(sys.argv[1])):
    # A reading process, which is forked and may outlive this one.
    if os.fork() == 0:
        time.sleep(600)
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another run in `tmp_path / "run"`, with a process that it has forked."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_folder_in_use_is_refused_with_the_name_of_its_user(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    before = (tmp_path / "run" / LOCK).read_text()
    expected = rf"run is in use by the run of process {holder.pid} on {socket.gethostname()}; "
    for _ in range(2):  # a refusal takes nothing away from the one who holds it
        with pytest.raises(ValueError, match=expected), locked(tmp_path / "run"):
            pass
    assert (tmp_path / "run" / LOCK).read_text() == before


def test_a_killed_run_holds_nothing_and_an_ended_one_leaves_nothing(
    tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Although a process that it had forked lives on."""
    holder.kill()
    holder.wait()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert f"the run of process {holder.pid}" in capsys.readouterr().out
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_refused_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of another kind"), locked(tmp_path / "new"):
        raise OSError("of another kind")
    assert not (tmp_path / "new").exists()


def test_where_a_file_system_keeps_no_locks_the_file_decides(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    no_locks = OSError(lock._NO_LOCKS[0], "No locks available")
    with mock.patch.object(lock.fcntl, "lockf", side_effect=no_locks):
        with locked(tmp_path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
        host = socket.gethostname()
        path.write_text(json.dumps({"host": host, "pid": int(ended.stdout)}))
        with locked(tmp_path):
            pass
        for user in ({"host": host, "pid": os.getppid()}, {"host": "elsewhere", "pid": 1}):
            path.write_text(json.dumps(user))
            with pytest.raises(ValueError, match=rf"{user['host']}; .*remove .*{LOCK}"):
                with locked(tmp_path):
                    pass


def test_a_port_in_use_is_told_in_plain_words(tmp_path: Path) -> None:
    """Two runs of one machine, started by the same command."""
    program = (
        "import sys; from pathlib import Path; from biascare.runs.faults import explained; "
        "from biascare.training.ranks import init_process_group\n"
        "with explained(Path(sys.argv[1])): init_process_group()"
    )
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            cwd=ROOT,
            env=environment(**world, MASTER_PORT=port),
            capture_output=True,
            text=True,
            check=False,
        )
    assert f"MachineError: port {port} of this machine is in use" in done.stderr


def test_both_ranks_of_a_second_run_are_refused_and_touch_nothing(
    tmp_path: Path, holder: subprocess.Popen[str], tiny_mllm: Path, tiny_records: Path
) -> None:
    world = World(tmp_path, tiny_mllm, tiny_records)
    place = tmp_path / "run"
    (run,) = world.run(2, [Job("second", 2, (f"train.output_dir={place}",))]).values()
    for error in run.errors:
        assert error is not None and f"in use by the run of process {holder.pid}" in error
    assert [path.name for path in place.iterdir()] == [LOCK]
