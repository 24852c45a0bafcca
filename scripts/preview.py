"""Look at training samples exactly as the model gets them.

    python scripts/preview.py --config configs/demo_stage2.yaml --samples 8 [section.key=value ...]

The samples come from the loader that scripts/train.py builds from the same configuration: the same
stream position gives the same tensors. The PNG shows images after augmentation with masks, clicks
(+) and boxes; the terminal shows conversations, with what the language model is trained to say in
green between guillemets and what it only reads in grey. Needs the processor of the MLLM, none of
its weights.
"""

from __future__ import annotations

import argparse
import sys

from biascare.config import load_config
from biascare.runs.process import prepare_process


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--samples", type=int, default=8, help="stream positions shown")
    parser.add_argument("--start", type=int, default=0, help="first stream position")
    parser.add_argument("--output", default="preview.png", help="PNG to write")
    options = parser.parse_intermixed_args(arguments)
    if options.samples < 1 or options.start < 0:
        parser.error("--samples must be at least 1 and --start at least 0")
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    try:
        config = load_config(options.config, options.overrides)  # before anything heavy
        prepare_process()
        from biascare.reports.preview import show_samples
        from biascare.runs.build import training_stream

        stream, chat = training_stream(config)
        positions = range(options.start, options.start + options.samples)
        title = f"{options.config}, positions {positions[0]} to {positions[-1]}"
        show_samples(stream, chat, positions, options.output, title=title)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
