"""A training run from its configuration to its export.

    run(load_config("configs/stage2.yaml"))

Every rank calls it. Nothing in the run's folder changes before the run is known to be this one:
what could refuse it (data, weights, a checkpoint of another run) comes first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from biascare.data.loader import to_device
from biascare.runs.build import (
    build_chat,
    build_engine,
    build_loader,
    build_network,
    build_stream,
    deepspeed_settings,
    open_training,
    prevalence,
)
from biascare.runs.evaluate import Evaluator
from biascare.runs.export import export_run
from biascare.runs.origin import provenance, save_run_files
from biascare.settings.keys import Config
from biascare.training.checkpoint import CheckpointStore
from biascare.training.hooks import BadDataError, CheckpointHook, EvalHook, LedgerHook, LogHook
from biascare.training.progress import RunLog
from biascare.training.ranks import from_rank_zero, init_process_group, leave_process_group
from biascare.training.trainer import NonFiniteError, Trainer

RUN_ERRORS = (ValueError, OSError, NonFiniteError, BadDataError)
"""What `run` raises with a message that explains itself."""


def run(config: Config) -> None:
    train = config.train
    folder = Path(train.output_dir)
    init_process_group()
    # Cheap refusals first: a wrong batch, then the data, then minutes of loading weights.
    deepspeed_config = deepspeed_settings(config)
    segmentation, language, mixture = open_training(config)
    groups = prevalence(config, segmentation)
    chat = build_chat(config)
    stream = build_stream(config, segmentation, language, mixture, chat, groups)
    log = RunLog(folder)  # says, but writes nothing yet
    engine = build_engine(config, build_network(config), deepspeed_config, log.say)
    evaluator = Evaluator(config, engine, chat, groups, log)
    store = CheckpointStore(folder / "checkpoints", train.keep_checkpoints)
    fingerprint = provenance(config, segmentation + language, deepspeed_config)
    start_step = resume(train.resume, store, engine, fingerprint, log)
    # After resume: the stream begins where the checkpoint ended.
    loader = build_loader(config, stream, start_step)

    # From here on the folder is this run's.
    if train.resume == "never":
        from_rank_zero(store.set_aside)
    from_rank_zero(lambda: save_run_files(config, groups, segmentation, language))
    # A run that was killed between its last checkpoint and its export is finished here.
    finished = start_step >= train.max_steps
    log.open(start_step, tensorboard=train.tensorboard, evaluates_again=finished)
    if finished or (config.eval.at_start and start_step == 0):
        evaluator(start_step)
    Trainer(
        engine,
        loader,
        to_device,
        [
            LogHook(
                log,
                engine,
                train.log_every,
                train.max_steps,
                summed=config.objective.reduction == "sum",
            ),
            LedgerHook(folder, config.data.max_bad_samples),
            # Before the checkpoint of its step: killed between the two, both come again.
            EvalHook(evaluator, train.eval_every, train.max_steps),
            CheckpointHook(store, engine, train.save_every, train.max_steps, fingerprint),
        ],
        max_steps=train.max_steps,
        start_step=start_step,
        nonfinite=train.nonfinite,
        max_skipped_steps=train.max_skipped_steps,
    ).run()
    export_run(config, engine, chat)
    log.say(f"exported to {folder / 'export'}")
    log.close()
    leave_process_group()


def resume(
    choice: str, store: CheckpointStore, engine: Any, fingerprint: dict[str, Any], log: RunLog
) -> int:
    """Optimizer steps already done; loads the checkpoint `train.resume` asks for.

    Raises ValueError when that is of another run, or damaged."""
    path = {"auto": store.newest, "never": lambda: None}.get(choice, lambda: Path(choice))()
    if path is None:
        return 0
    step, _ = store.load(engine, path, fingerprint)
    log.say(f"continuing after step {step} from {path}")
    return step
