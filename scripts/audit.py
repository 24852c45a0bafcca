"""Audit a finished evaluation: what a clinician reads in five minutes and a regulator can check.

    python scripts/audit.py outputs/evaluation --records outputs/demo/data/test \\
        --train outputs/demo/data/train --thresholds limits.yaml
    python scripts/audit.py outputs/new --baseline outputs/old

Reads cases.jsonl alone; no model is needed. Writes audit.html (one file, opens without a network),
audit.md, audit.json and a CSV for every table. Equal cases and an equal seed give equal bytes.

Exit code: 0 PASS, or no thresholds were given; 1 FAIL; 2 INSUFFICIENT DATA; 3 wrong arguments,
thresholds or files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

CODES = {None: 0, "PASS": 0, "FAIL": 1, "INSUFFICIENT DATA": 2}
WRONG = 3


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # argparse ends with 2, which is INSUFFICIENT DATA here.
    parser.exit = lambda status=0, message=None: _leave(status, message)  # type: ignore[method-assign]
    add = parser.add_argument
    add("run", metavar="RUN", help="output folder of an evaluation, or its cases.jsonl")
    add("--baseline", metavar="RUN", help="another run on the same cases: who gained, who paid")
    add("--thresholds", metavar="FILE", help="YAML or JSON, for example dice: {min: 0.6}")
    validation = "a run on validation data, which thresholds of triage are chosen on"
    add("--validation", metavar="RUN", help=validation)
    records = "record folders of the cases, for the pictures of the worst masks"
    add("--records", nargs="*", default=[], metavar="FOLDER", help=records)
    train = "training folders: composition, and overlap with the cases"
    add("--train", nargs="*", default=[], metavar="FOLDER", help=train)
    add("--output", type=Path, metavar="DIR", help="folder to write to (RUN/audit)")
    add("--num-draws", type=int, default=1000, help="of bootstrap and permutation (%(default)s)")
    add("--seed", type=int, default=0, help="of these draws (%(default)s)")
    options = parser.parse_args(arguments)
    if options.num_draws < 100:
        parser.error("--num-draws: at least 100, or no p value can be small")
    if options.seed < 0:
        parser.error("--seed: 0 or larger")
    return options


def _leave(status: int, message: str | None) -> NoReturn:
    if message:
        sys.stderr.write(message)
    sys.exit(WRONG if status else 0)


def main() -> None:
    options = parse(sys.argv[1:])
    from biascare.runs.audit import AuditRequest, carry_out

    try:
        result = carry_out(AuditRequest(**vars(options)))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(WRONG)
    print(result.verdict or "NO VERDICT", *result.lines, sep="\n")
    print(f"the audit is in {result.paths[0]}, with audit.md, audit.json and a CSV per table")
    sys.exit(CODES[result.verdict])


if __name__ == "__main__":
    main()
