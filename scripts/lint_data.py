"""Check prepared record folders before anything is trained on them.

    python scripts/lint_data.py prepared/*/train prepared/*/test --num-workers 8

Reads every row: content hash against the manifest, every image decoded, masks against images,
texts, attributes, names; then all folders together: duplicates by pixels and by perceptual hash,
different answers to one question about the same pixels, and leaks between splits by image, study
and patient, within a dataset and between datasets that share images.
Name the folders of all splits in one call, or leaks cannot be seen.

Writes to --output: lint.json, lint.html (self-contained), orientation_N.png (a few images per
source with their masks, to check by eye), near_N.png (near duplicates side by side).

Exit code: 0 no errors, 1 errors (with --strict also warnings), 2 wrong arguments. A finding that is
known and accepted is acknowledged with --allow CODE: it is shown, but does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from biascare.checks.lint import Report


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="prepared record folders")
    parser.add_argument("--output", default="outputs/lint", help="folder of the report")
    parser.add_argument(
        "--image-size", type=int, default=256, help="training size in pixels, for mask areas"
    )
    parser.add_argument("--num-workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--examples", type=int, default=5, help="ids shown per finding")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="CODE", help="a finding that is accepted"
    )
    parser.add_argument("--strict", action="store_true", help="warnings fail too")
    parser.add_argument("--no-sheets", action="store_true", help="no PNG, no pictures in the page")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> Report:
    """Run all checks behind a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from biascare.checks.lint import LintSettings, Vocabulary, check_codes, lint
    from biascare.records.vocabulary import canonical_modality, canonical_target
    from data_prep.formats.orientation import sides_agree

    check_codes(options.allow)  # before the bar, which would write over the message
    # Spellings and sides are handed in: checks may not import what prepares the data.
    settings = LintSettings(
        vocabulary=Vocabulary(canonical_target, canonical_modality, sides_agree),
        image_size=options.image_size,
        num_examples=options.examples,
        num_workers=options.num_workers,
    )
    columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=None)
        return lint(
            options.folders,
            settings,
            allowed=options.allow,
            begin=lambda total: progress.update(task, total=total),
            advance=lambda rows: progress.update(task, advance=rows),
        )


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        report = check(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        # 2, as argparse: a pipeline can tell a wrong call from data that are wrong.
        raise SystemExit(2) from None
    from biascare.reports.lint import as_json, print_report, write_page, write_sheets

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    # Before the page, which holds the sheets.
    sheets = [] if options.no_sheets else write_sheets(report, folder)
    text = json.dumps(as_json(report), indent=2, ensure_ascii=False)
    (folder / "lint.json").write_text(text + "\n", encoding="utf-8")
    write_page(report, folder / "lint.html", sheets)
    print_report(report)
    errors, warnings = report.num_findings("error"), report.num_findings("warning")
    counts = [f"{n} kind{'' if n == 1 else 's'}" for n in (errors, warnings)]
    print(f"{counts[0]} of error, {counts[1]} of warning; the report is in {folder}/lint.html")
    raise SystemExit(1 if errors or (options.strict and warnings) else 0)


if __name__ == "__main__":
    main()
