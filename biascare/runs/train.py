"""A training run from its configuration to its export.

    run(load_config("configs/stage2.yaml"))

Every rank calls it. Nothing in the run's folder changes before the run is known to be this one:
what could refuse it (data, another run, weights, a checkpoint of another run) comes first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from biascare.data.loader import to_device
from biascare.runs.build import (
    build_chat,
    build_engine,
    build_loader,
    build_network,
    build_stream,
    deepspeed_settings,
    open_training,
    optimizer_settings,
    prevalence,
)
from biascare.runs.evaluate import Evaluator
from biascare.runs.export import export_run
from biascare.runs.faults import MachineError, explained
from biascare.runs.lock import locked
from biascare.runs.origin import code_history, provenance, save_run_files
from biascare.settings.keys import Config
from biascare.training.checkpoint import CheckpointStore
from biascare.training.engine import follow_schedule
from biascare.training.hooks import BadDataError, CheckpointHook, EvalHook, LedgerHook, LogHook
from biascare.training.optimizer import learning_rate_factor
from biascare.training.progress import RunLog
from biascare.training.ranks import (
    from_rank_zero,
    init_process_group,
    leave_process_group,
    world_size,
)
from biascare.training.trainer import NonFiniteError, Trainer

RUN_ERRORS = (ValueError, OSError, NonFiniteError, BadDataError, MachineError)
"""What `run` raises with a message that explains itself."""


def run(config: Config) -> None:
    folder = Path(config.train.output_dir)
    with explained(folder):
        _run(config, folder)


def _run(config: Config, folder: Path) -> None:
    init_process_group()
    # Cheap refusals first: a wrong batch, then the data, then minutes of loading weights.
    deepspeed_config = deepspeed_settings(config)
    segmentation, language, mixture = open_training(config)
    groups = prevalence(config, segmentation)
    chat = build_chat(config)
    stream = build_stream(config, segmentation, language, mixture, chat, groups)
    with locked(folder):
        log = RunLog(folder)  # says, but writes nothing yet
        engine = build_engine(config, build_network(config), deepspeed_config, log.say)
        evaluator = Evaluator(config, engine, chat, groups, log)
        store = CheckpointStore(folder / "checkpoints", config.train.keep_checkpoints)
        fingerprint = provenance(config, segmentation + language, deepspeed_config)
        done = resume(config, store, engine, fingerprint, log)
        # After resume: the stream begins where the checkpoint ended.
        loader = build_loader(config, stream, done.step)

        # From here on the folder is this run's.
        branches = from_rank_zero(lambda: store.set_aside(done.path))
        notes = {"max_steps": config.train.max_steps, "code": done.code}
        from_rank_zero(
            lambda: save_run_files(config, groups, segmentation, language, code=done.code)
        )
        unevaluated = from_rank_zero(lambda: lacks_evaluation(config, done.step, log))
        from_rank_zero(
            lambda: log.open(
                done.step,
                tensorboard=config.train.tensorboard,
                evaluates_again=unevaluated,
                branches=branches,
            )
        )
        if unevaluated:
            evaluator(done.step)
        train = config.train
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
                LedgerHook(
                    folder,
                    config.data.max_bad_samples,
                    done.step,
                    train.global_batch // world_size(),
                ),
                # Before the evaluation of its step, which damaged held-out data may end: it is
                # made up for when the run goes on.
                CheckpointHook(
                    store, engine, train.save_every, train.max_steps, fingerprint, notes
                ),
                EvalHook(evaluator, train.eval_every, train.max_steps),
            ],
            max_steps=train.max_steps,
            start_step=done.step,
            nonfinite=train.nonfinite,
            max_skipped_steps=train.max_skipped_steps,
        ).run()
        export_run(config, engine, chat)
        log.say(f"exported to {folder / 'export'}")
        log.close()
    leave_process_group()


class Resumed(NamedTuple):
    """Where a run goes on; at step 0 without a checkpoint."""

    step: int  # optimizer steps already done
    path: Path | None
    code: list[dict[str, Any]]  # `code_history` up to and including this start


def resume(
    config: Config,
    store: CheckpointStore,
    engine: Any,
    fingerprint: dict[str, Any],
    log: RunLog,
) -> Resumed:
    """Load the checkpoint that `train.resume` asks for.

    Raises ValueError when that is of another run, damaged, or further than this run shall go."""
    choice = config.train.resume
    path = {"auto": store.newest, "never": lambda: None}.get(choice, lambda: Path(choice))()
    if path is None:
        return Resumed(0, None, code_history([], 0))
    manifest = store.load(engine, path, fingerprint)
    step, wanted = manifest["step"], config.train.max_steps
    if step > wanted:
        raise ValueError(
            f"train.max_steps is {wanted}, but {path} has done {step} steps; raise it to go on, "
            f"export what is there (scripts/export.py {path}), or name an earlier checkpoint in "
            "train.resume"
        )
    log.say(f"continuing after step {step} from {path}")
    if manifest["max_steps"] != wanted and step < wanted:
        follow_schedule(engine)
        warn_of_schedule(config, step, manifest["max_steps"], log)
    # Where nothing is left to train, whoever exports has not trained.
    code = manifest["code"] if step == wanted else code_history(manifest["code"], step)
    if code[-1]["from_step"] == step and code != manifest["code"]:
        log.say(f"code or libraries have changed: {code[-2]['git_commit']} trained until here")
    return Resumed(step, path, code)


def warn_of_schedule(config: Config, step: int, planned: int, log: RunLog) -> None:
    """Say what another `train.max_steps` does to the learning rate of the steps that come."""
    settings = optimizer_settings(config)
    before = learning_rate_factor(step, settings._replace(max_steps=planned))
    log.say(
        f"WARNING train.max_steps was {planned} and is {settings.max_steps}: the learning rate now "
        f"decays until there and goes on at {learning_rate_factor(step, settings):.1%} of its "
        f"peak, where it would have been at {before:.1%}. A run of {settings.max_steps} steps from "
        "the start differs from both"
    )


def lacks_evaluation(config: Config, step: int, log: RunLog) -> bool:
    """Whether the weights of `step` are to be evaluated before the first step of training: at the
    start, at the end, and where a run was ended between a checkpoint and its evaluation."""
    if step == 0:
        return config.eval.at_start
    # A run that was killed between its last checkpoint and its export is finished here.
    if step == config.train.max_steps:
        return True
    due = config.train.eval_every and step % config.train.eval_every == 0
    return bool(due) and not log.holds("eval", step)
