"""Record folders in which a byte has changed: noticed, named, never followed out of memory."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.tiny import QUESTIONS, tiny_record_folder
from tests.training.training_runs import ROOT, environment

pytestmark = pytest.mark.timeout(240)

READ = """
import sys
from pathlib import Path
from biascare.data.heldout import HeldOutImages, HeldOutQuestions
from biascare.records import Records
from tests.tiny import SETTINGS, tiny_chat, tiny_stream

folder, mllm, shards = (Path(argument) for argument in sys.argv[1:])
chat, shard = tiny_chat(mllm), next(folder.glob("*.arrow"))

def read_all():
    try:
        stream = tiny_stream(folder, chat)
        samples = [stream[position] for position in range(16)]
    except ValueError as error:
        assert str(folder) in str(error), error
        return "refused"
    reasons = [reason for sample in samples for reason in sample.replaced]
    assert all(str(folder) in reason for reason in reasons), reasons
    return "replaced" if reasons else "unseen"

def compare_hashes():
    try:
        Records(folder).verify()
    except ValueError as error:
        assert str(folder) in str(error), error
        return "found"
    return "equal"

def list_held_out():
    try:
        for items in (HeldOutImages, HeldOutQuestions):
            items([Records(folder)], chat, {}, image_size=64).case_keys()
    except ValueError as error:
        assert str(folder) in str(error), error

for altered in sorted(shards.iterdir()):
    shard.write_bytes(altered.read_bytes())
    list_held_out()
    print(read_all(), compare_hashes(), flush=True)
"""


def test_a_flipped_byte_of_texts_and_lengths_is_named_and_the_hashes_find_it(
    tmp_path: Path, tiny_mllm: Path
) -> None:
    """In a process of its own: a damaged length used to end it."""
    folder, shards = tiny_record_folder(tmp_path / "records"), tmp_path / "shards"
    whole = next(folder.glob("*.arrow")).read_bytes()
    shards.mkdir()
    first, last = (at(QUESTIONS[0][0].text.encode()) for at in (whole.index, whole.rindex))
    # Every 31st byte around the questions: their lengths, kinds and options come before and after.
    places = range(first - 1200, last + 800, 31)
    for number, place in enumerate(places):
        byte = whole[place] ^ (0x80 if number % 2 else 1 << number % 7)
        (shards / f"{place:06}").write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    done = subprocess.run(
        [sys.executable, "-c", READ, str(folder), str(tiny_mllm), str(shards)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = Counter(tuple(line.split()) for line in done.stdout.splitlines()[-len(places) :])
    assert sum(found.values()) == len(places)
    seen = sum(n for (training, _), n in found.items() if training != "unseen")
    assert seen > len(places) / 3
    # What is left lies between the columns, where nothing is stored.
    assert all(training == "unseen" for (training, hashes) in found if hashes == "equal")
    assert sum(n for (_, hashes), n in found.items() if hashes == "found") > len(places) / 2
