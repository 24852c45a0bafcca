"""What a mixture is made of, and how uneven it is, as in the paper's Fig. 1a-f but for any data.

    python scripts/data_bias.py --config configs/stage2.yaml [section.key=value ...]
    python scripts/data_bias.py prepared/btcv/train prepared/vqa_rad/train

Modality, anatomy, targets, findings, age, sex and race, one panel each, a to g, with imbalance
ratio, entropy and effective number of categories. With a configuration also as shares of what that
run draws: by source weights, the ratio of tasks and the choice of targets. Columns are read, never
images.

Writes to --output: bias.png, bias.svg, bias.html (self-contained), bias.json, and prevalence.json,
the head, medium and tail targets as training logs and evaluation use them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biascare.config import load_config
from biascare.settings.keys import Config, EvalConfig

if TYPE_CHECKING:
    from biascare.checks.statistics import Distribution, SourceUse
    from biascare.records import Records

MAX_NAMES = 3  # sources in the title


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("items", nargs="*", metavar="FOLDER | section.key=value")
    parser.add_argument("--config", help="YAML file of a run; without it, name record folders")
    parser.add_argument("--output", default="outputs/data_bias", help="folder to write to")
    parser.add_argument(
        "--title", default="", help="of the figure; default: the configuration, or the folders"
    )
    options = parser.parse_intermixed_args(arguments)
    if not (options.config or options.items):
        parser.error("name a configuration with --config, or record folders")
    return options


def sources_of(config: Config) -> list[SourceUse]:
    """The folders of a run with the number of samples it draws from each."""
    from biascare.checks.statistics import SourceUse
    from biascare.data.mixture import Mixture
    from biascare.records import Records

    data = config.data
    opened: dict[str, Records] = {}
    for source in (*data.segmentation, *data.language):
        opened[source.path] = opened.get(source.path) or Records(source.path)
    mixture = Mixture(
        segmentation=[
            (len(opened[s.path].segmentation_units), s.weight) for s in data.segmentation
        ],
        language=[(len(opened[s.path].language_units), s.weight) for s in data.language],
        ratio=data.ratio,
        seed=config.train.seed,
    )
    drawn = mixture.num_drawn(config.train.max_steps * config.train.global_batch)
    return [
        *(
            SourceUse(opened[s.path], "segmentation", n)
            for s, n in zip(data.segmentation, drawn["segmentation"], strict=False)
        ),
        *(
            SourceUse(opened[s.path], "language", n)
            for s, n in zip(data.language, drawn["language"], strict=False)
        ),
    ]


def describe_sources(uses: list[SourceUse]) -> list[dict[str, Any]]:
    """Rows of the table of sources: what there is and what the run draws."""
    total = sum(use.num_drawn for use in uses)
    rows = []
    for use in uses:
        records = use.records
        segments = use.task == "segmentation"
        units = len(records.segmentation_units if segments else records.language_units)
        rows.append(
            {
                "source": records.manifest["source"],
                "split": records.manifest["split"],
                "task": use.task,
                "images": f"{len(records):,}",
                "units": f"{units:,}",
                "drawn": f"{use.num_drawn:,}",
                "share": f"{use.num_drawn / max(total, 1):.2%}",
                "passes": f"{use.num_drawn / units:.2f}",
            }
        )
    return rows


def describe_folders(folders: list[Records]) -> list[dict[str, Any]]:
    return [
        {
            "source": records.manifest["source"],
            "split": records.manifest["split"],
            "images": f"{len(records):,}",
            "masks": f"{records.manifest['num_targets']:,}",
            "questions": f"{len(records.language_units):,}",
        }
        for records in folders
    ]


def as_json(profile: dict[str, Distribution], sources: list[dict[str, Any]]) -> dict[str, Any]:
    from biascare.checks.statistics import imbalance

    return {
        "sources": sources,
        "axes": {
            axis: {
                "on_disk": distribution.raw,
                "imbalance_on_disk": imbalance(distribution.raw)._asdict(),
                "run": distribution.stream,
                "imbalance_run": (
                    imbalance(distribution.stream)._asdict() if distribution.stream else None
                ),
            }
            for axis, distribution in profile.items()
        },
    }


def imbalance_table(profile: dict[str, Distribution]) -> Any:
    """One line per axis: on disk, and where there is a run, what it draws."""
    from rich.table import Table

    from biascare.checks.statistics import imbalance

    table = Table(title="How uneven")
    columns = ("axis", "of", "categories", "largest : smallest", "evenness", "effective", "unknown")
    for column in columns:
        table.add_column(column, justify="left" if column in ("axis", "of") else "right")
    for axis, distribution in profile.items():
        for kind, counts in (("disk", distribution.raw), ("run", distribution.stream)):
            if counts:
                numbers = imbalance(counts)
                table.add_row(
                    axis if kind == "disk" else "",
                    kind,
                    str(numbers.num_categories),
                    _cell(numbers.ratio, ",.1f"),
                    _cell(numbers.evenness, ".3f"),
                    _cell(numbers.effective_number, ".1f"),
                    f"{numbers.missing_share:.1%}",
                )
    return table


def _cell(number: float | None, style: str) -> str:
    return "-" if number is None else format(number, style)


def sources_table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="Sources")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("source", "split", "task") else "right")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    return table


def title_of(sources: list[dict[str, Any]]) -> str:
    """The first few sources, and how many more there are."""
    names = list(dict.fromkeys(f"{row['source']}/{row['split']}" for row in sources))
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def run(options: argparse.Namespace) -> None:
    from rich.console import Console

    from biascare.checks.statistics import profile_folders, profile_sources
    from biascare.data.prevalence import save_prevalence, total_counts
    from biascare.records import Records
    from biascare.reports.composition import figure_files, write_page

    if options.config:
        config = load_config(options.config, options.items)
        uses = sources_of(config)
        data, shares = config.data, config.eval
        profile = profile_sources(
            uses,
            targets_per_image=data.targets_per_image,
            target_power=data.target_sampling_power,
        )
        sources = describe_sources(uses)
        counted = [use.records for use in uses if use.task == "segmentation"]
    else:
        shares = EvalConfig()
        counted = [Records(folder) for folder in dict.fromkeys(options.items)]
        profile, sources = profile_folders(counted), describe_folders(counted)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    counts = total_counts(records.target_counts for records in counted)
    groups = save_prevalence(
        folder / "prevalence.json",
        counts,
        shares.head_share,
        shares.tail_share,
        folders=[str(records.folder) for records in counted],
    )
    title = options.title or options.config or title_of(sources)
    picture, _ = figure_files(profile, groups, folder, title)
    write_page(folder / "bias.html", profile, groups, sources, picture, title)
    text = json.dumps(as_json(profile, sources), indent=2, ensure_ascii=False)
    (folder / "bias.json").write_text(text + "\n", encoding="utf-8")
    console = Console()
    console.print(sources_table(sources))
    console.print(imbalance_table(profile))
    console.print(f"figures, page and prevalence.json are in {folder}", highlight=False)


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        run(options)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
