"""Train BiasCareVL.

    deepspeed scripts/train.py --config configs/stage2.yaml [section.key=value ...]

Stage 1 (train.stage=vision) trains the vision pathway alone, stage 2 (joint) everything, starting
from stage 1's export. The same command continues an interrupted run. What a run needs:

    python scripts/train.py --plan --config configs/stage2.yaml [--world-size 4]
"""

from __future__ import annotations

import argparse
import sys

from biascare.config import describe_config, load_config
from biascare.runs.process import (
    end_with_launcher,
    fail,
    forget_failures,
    prepare_process,
    raise_interrupts,
    stop,
)


def parse(arguments: list[str]) -> argparse.Namespace:
    lines = [f"  {k.key} ({k.type}, default {k.default}): {k.help}" for k in describe_config()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="keys of the YAML file, each also as section.key=value:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    plan = parser.add_argument_group(
        "planning",
        "--plan says whether the run fits, what to change if not, and how long it takes; then "
        "memory, parameters, operations and tokens. It "
        "reads no weights: model.mllm may be a folder with only a config.json, or the name of a "
        "known architecture (unset: the paper's). Paths of data, weights and output may be unset "
        "or absent; everything else in the configuration must be right. The exit code is 1 if the "
        "run does not fit.",
    )
    plan.add_argument("--plan", action="store_true", help="plan the run instead of starting it")
    plan.add_argument("--world-size", type=int, metavar="N", help="GPUs (4 where the batch allows)")
    plan.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="of a GPU (80)")
    plan.add_argument("--tflops", type=float, default=100, help="of a GPU, in a second (100)")
    plan.add_argument("--prompt-tokens", type=int, default=64, help="text of a question (64)")
    plan.add_argument("--answer-tokens", type=int, default=64, help="of an answer (64)")
    return parser.parse_intermixed_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    interrupts, launcher_ended = raise_interrupts(), end_with_launcher()
    folder: str | None = None
    resume = "auto"
    explained: tuple[type[Exception], ...] = (ValueError,)
    try:
        if not options.plan:  # a mistake in the configuration is told before torch is imported
            config = load_config(options.config, options.overrides)
        prepare_process()
        if options.plan:
            from biascare.runs.plan import PlanOptions, load_planned, print_plan

            wanted = PlanOptions(**{name: getattr(options, name) for name in PlanOptions._fields})
            planned = load_planned(options.config, options.overrides)
            sys.exit(0 if print_plan(planned, wanted) else 1)
        from biascare.runs.train import RUN_ERRORS, run

        folder, explained = config.train.output_dir, RUN_ERRORS
        resume = config.train.resume
        run(config)
    except BaseException as error:
        # Whatever else failed since: processes end in any order.
        if interrupts or launcher_ended():
            stop(interrupts, folder, resume, launcher_ended())
        if not isinstance(error, explained):
            raise
        fail(error, folder)
    forget_failures(folder)


if __name__ == "__main__":
    main()
