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
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from biascare.config import load_config
from biascare.settings.keys import Config, EvalConfig

if TYPE_CHECKING:
    from biascare.checks.statistics import SourceUse


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
    # Folders and overrides may stand on both sides of the options.
    options = parser.parse_intermixed_args(arguments)
    if not (options.config or options.items):
        parser.error("name a configuration with --config, or record folders")
    return options


def sources_of(config: Config) -> list[SourceUse]:
    """The folders of a run with the number of samples it draws from each."""
    from biascare.checks.statistics import SourceUse
    from biascare.runs.build import build_mixture, open_sources

    segmentation = open_sources(config.data.segmentation)
    language = open_sources(config.data.language)
    # The mixture of the run itself: shares worked out here could differ from what is trained on.
    mixture = build_mixture(config, segmentation, language)
    drawn = mixture.num_drawn(config.train.max_steps * config.train.global_batch)
    segmented = zip(segmentation, drawn["segmentation"], strict=True)
    read = zip(language, drawn["language"], strict=True)
    return [
        *(SourceUse(records, "segmentation", number) for records, number in segmented),
        *(SourceUse(records, "language", number) for records, number in read),
    ]


def run(options: argparse.Namespace) -> None:
    from biascare.checks.statistics import profile_folders, profile_sources
    from biascare.data.prevalence import save_prevalence, total_counts
    from biascare.records import Records
    from biascare.reports import composition

    if options.config:
        config = load_config(options.config, options.items)
        uses = sources_of(config)
        data, shares = config.data, config.eval
        profile = profile_sources(
            uses,
            targets_per_image=data.targets_per_image,
            target_power=data.target_sampling_power,
        )
        sources = composition.describe_sources(uses)
        # A folder that is read for its questions alone trains no target.
        counted = [use.records for use in uses if use.task == "segmentation"]
    else:
        # Without a run its defaults: the groups are those that a run would make.
        shares = EvalConfig()
        # A folder that is named twice is still one folder.
        counted = [Records(folder) for folder in dict.fromkeys(options.items)]
        profile, sources = profile_folders(counted), composition.describe_folders(counted)
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
    title = options.title or options.config or composition.title_of(sources)
    composition.write_report(folder, profile, groups, sources, title)
    print(f"figures, page and prevalence.json are in {folder}")


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        run(options)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
