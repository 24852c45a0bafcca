"""Analyse a reader study: readers without and with what a model suggests.

    python scripts/reader_study.py --analyse reader_a.jsonl reader_b.jsonl \\
        --cases outputs/isic --output outputs/reader_study

Logs are the readers' answers, one line of JSON each (docs/reader_study.md); cases are those of an
evaluation, whose categories the readers ticked. Writes reader_study.html (one file, opens without a
network), reader_study.md, reader_study.json and a CSV for every table.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    logs = "the readers' logs; of answers that a reader gave twice the last counts"
    add("--analyse", nargs="+", required=True, metavar="LOG", help=logs)
    cases = "output folder of an evaluation, or its cases.jsonl: truth, categories, patients"
    add("--cases", required=True, metavar="FILE", help=cases)
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--num-draws", type=int, default=1000, help="of bootstrap and permutation (%(default)s)")
    add("--seed", type=int, default=0, help="of these draws (%(default)s)")
    options = parser.parse_args(arguments)
    if options.num_draws < 100:
        parser.error("--num-draws: at least 100, or no p value can be small")
    if options.seed < 0:
        parser.error("--seed: 0 or larger")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    from biascare.runs.reader_study import ReaderStudyRequest, carry_out

    try:
        result = carry_out(ReaderStudyRequest(**vars(options)))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(*result.lines, f"the report is in {result.paths[0]}", sep="\n")


if __name__ == "__main__":
    main()
