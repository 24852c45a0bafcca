"""What is evaluated, and how it is called: a run that trains, an export, foreign weights.

summary = evaluate_model(EvaluationRequest(model="outputs/demo/stage2/export", ...))
summaries = evaluate_suite(EvaluationRequest(suite="vqa_rad,pathvqa", data="prepared", ...))
evaluator = Evaluator(config, engine, chat, groups, log)     # inside training
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from biascare.checks.leaks import shared_with_training
from biascare.choices import unknown
from biascare.config import Config
from biascare.data.chat import ChatBuilder
from biascare.data.heldout import (
    SCORED_KINDS,
    HeldOutImages,
    HeldOutLabels,
    HeldOutQuestions,
    check_held_out,
    refuse_trained,
)
from biascare.data.labels import LabelSpace, trained_labels
from biascare.data.prevalence import drawn_counts, groups_of
from biascare.data.prompts import first_point
from biascare.durable import write_json
from biascare.evaluation.benchmarks import BENCHMARKS, Benchmark, benchmark_of, folders_of
from biascare.evaluation.cases import CASES, Cases, Header, read_cases
from biascare.evaluation.evaluate import EvaluationSettings, evaluate, summarise
from biascare.evaluation.invariance import Difference, check_invariance
from biascare.evaluation.metrics.segmentation import DiscBaseline, fit_disc
from biascare.inference.answerer import Answerer
from biascare.inference.labeller import Labeller
from biascare.inference.model import BiasCareVL
from biascare.inference.segmenter import Segmenter
from biascare.models.export_folder import build_network
from biascare.models.language.merge import fold_adapter
from biascare.records import Records, decode_mask
from biascare.reports.mask_files import import_nibabel, save_masks
from biascare.reports.sheets import contact_sheet, mask_panels, representative_cases
from biascare.reports.tables import (
    benchmark_table,
    corrections_table,
    evaluation_table,
    groups_table,
    invariance_table,
    variants_table,
)
from biascare.runs.origin import git_commit
from biascare.settings.keys import EvalConfig
from biascare.settings.strict_yaml import ConfigError, read_tree
from biascare.training.progress import RunLog
from biascare.training.ranks import (
    from_rank_zero,
    init_process_group,
    leave_process_group,
    local_device,
    rank,
)


class EvaluationRequest(NamedTuple):
    """What scripts/evaluate.py was asked for; its help describes the fields."""

    model: str
    segmentation: list[str]
    language: list[str]
    labelled: list[str]
    output: Path | None  # None where nothing is written
    train: list[str]
    prevalence: str | None
    vision: str | None
    image_size: int
    mllm: str | None
    prompt: str | None  # None, like `max_new_tokens`: the benchmark's, else the usual
    corrections: int
    batch_size: int
    num_workers: int
    max_new_tokens: int | None
    limit: int
    overwrite: bool
    allow_trained: bool
    check_invariance: int  # images and questions to compute in several ways instead
    suite: str | None = None  # benchmarks instead of folders: names, or a file that lists them
    data: Path | None = None  # where their folders are
    validation: Path | None = None  # cases that triage is fitted on
    save_masks: Path | None = None  # folder for predicted masks
    max_report_tokens: int = 256
    blind: bool | None = None  # None: the benchmark's, else not
    counterfactual: bool = False


def carry_out(request: EvaluationRequest) -> tuple[list[Table | str], bool]:
    """What was asked for: (what there is to show in the terminal, whether all is well).

    Raises ValueError as `evaluate_model` and `check_model` do.
    """
    if request.check_invariance:
        differences = check_model(request._replace(limit=request.check_invariance))
        return [invariance_table(differences)], all(found.passed for found in differences)
    if request.suite is not None:
        shown: list[Table | str] = []
        for name, summary in evaluate_suite(request).items():
            shown += [benchmark_table(summary["benchmark"], request.model), *_further(summary)]
            shown.append(f"cases and metrics are in {output_of(request, name)}")
        return shown, True
    summary = evaluate_model(request)
    sheet = " and a contact sheet" if "segmentation" in summary else ""
    shown = [evaluation_table(summary, request.model), *_further(summary)]
    return [*shown, f"cases, metrics{sheet} are in {request.output}"], True


def _further(summary: Mapping[str, Any]) -> list[Table | str]:
    """Tables below the first one, each where there is something in it."""
    corrected = summary.get("segmentation", {}).get("corrections", {})
    tables = (corrections_table(corrected), variants_table(summary.get("answers", {})))
    shown: list[Table | str] = [table for table in tables if table is not None]
    return [*shown, groups_table(summary["groups"])] if "groups" in summary else shown


class Job(NamedTuple):
    """One evaluation: record folders as such, or a benchmark."""

    name: str | None  # of the benchmark
    request: EvaluationRequest  # with the benchmark's choices in it
    segmentation: list[Records]
    language: list[Records]
    labelled: list[Records]

    @property
    def held_out(self) -> list[Records]:
        return [*self.segmentation, *self.language, *self.labelled]

    @property
    def benchmark(self) -> Benchmark | None:
        return None if self.name is None else BENCHMARKS[self.name]


class Prepared(NamedTuple):
    """Everything that `evaluate` needs but the file."""

    job: Job
    model: BiasCareVL
    train: list[Records]
    images: HeldOutImages
    questions: HeldOutQuestions | None
    labelled: HeldOutLabels | None
    labeller: Labeller | None
    header: Header
    settings: EvaluationSettings
    validation: Cases | None  # what triage is fitted on


SUITE_KEYS = ("name", "data", "limit")


def jobs_of(request: EvaluationRequest) -> list[Job]:
    """What is to be evaluated, with its folders opened and checked.

    Raises ValueError for unknown benchmarks, missing folders, and folders without anything to
    score.
    """
    if request.suite is None:
        usual = request._replace(
            prompt=request.prompt or "point", max_new_tokens=request.max_new_tokens or 32
        )
        named = (usual.segmentation, usual.language, usual.labelled)
        jobs = [Job(None, usual, *([Records(path) for path in paths] for paths in named))]
    else:
        jobs = [_benchmark_job(request, entry) for entry in suite_entries(request.suite)]
        names = [job.name for job in jobs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"the suite names {twice} twice; name each benchmark once")
    for job in jobs:
        kinds = job.benchmark.kinds if job.benchmark else SCORED_KINDS
        check_scored(job.segmentation, job.language, job.labelled, kinds)
    return jobs


def suite_entries(suite: str) -> list[dict[str, Any]]:
    """Of names with commas between, or of a YAML file: a list below `benchmarks` of names, or of
    mappings with the keys `SUITE_KEYS`. Raises ValueError for anything else."""
    if not Path(suite).is_file():
        return [{"name": name.strip()} for name in suite.split(",") if name.strip()]
    tree = read_tree(suite)
    if tree.problems:
        raise ConfigError(tree.problems)
    entries = tree.values.pop("benchmarks", None)
    if tree.values or not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{suite}: expected one key, benchmarks, with a list of names or of mappings with "
            f"{', '.join(SUITE_KEYS)}; got {', '.join([*tree.values, 'benchmarks'])}"
        )
    found = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
    for entry in found:
        wrong = [key for key in entry if key not in SUITE_KEYS]
        if wrong:
            raise ValueError(f"{suite}: {unknown('key', wrong[0], SUITE_KEYS)}")
        if "name" not in entry:
            raise ValueError(f"{suite}: a benchmark lacks its name: {entry}")
    return found


def _benchmark_job(request: EvaluationRequest, entry: Mapping[str, Any]) -> Job:
    name = entry["name"]
    benchmark = benchmark_of(name)
    data = Path(entry["data"]) if "data" in entry else request.data
    if data is None:
        raise ValueError(f"{name}: name the folder of its prepared data after --data")
    records = [Records(folder) for folder in folders_of(benchmark, data)]
    own = request._replace(
        output=output_of(request, name),
        limit=entry.get("limit", request.limit),
        prompt=request.prompt or "point",
        max_new_tokens=request.max_new_tokens or benchmark.max_new_tokens,
        blind=benchmark.blind if request.blind is None else request.blind,
    )
    return Job(
        name,
        own,
        segmentation=records if benchmark.task == "segmentation" else [],
        language=records if benchmark.kinds else [],
        labelled=records if benchmark.task == "labels" else [],
    )


def output_of(request: EvaluationRequest, name: str) -> Path | None:
    """Folder of a benchmark: --output itself where it is the only one."""
    if request.output is None or request.suite == name:
        return request.output
    return request.output / name


def prepare(request: EvaluationRequest) -> list[Prepared]:
    """Data and model, in the order of what could refuse the evaluation."""
    # Everything that could refuse the evaluation comes before the model, which takes minutes.
    train = [Records(path) for path in request.train]
    jobs = jobs_of(request)
    for job in jobs:
        check_held_out(train, job.held_out)
    if "RANK" in os.environ:
        init_process_group()
    model = open_model(request)
    facts = model.facts
    # The export knows what it was trained on, by content and not by path: a copied folder counts.
    if facts is not None and not request.allow_trained:
        trained = dict.fromkeys(facts.trained_on, "training data")
        for job in jobs:
            refuse_trained(trained, job.held_out)
    for job in jobs:
        _check_able(job, model)
    groups, discs = _trained_targets(request, train, model)
    digest = weights_hash(Path(request.model))
    validation = _validation(request, jobs, digest)
    return [_prepared(job, model, train, groups, discs, digest, validation) for job in jobs]


def _validation(request: EvaluationRequest, jobs: Sequence[Job], weights: str) -> Cases | None:
    """Cases of `request.validation`. Raises ValueError for those of another model, or of records
    or patients that are to be evaluated."""
    if request.validation is None:
        return None
    found = read_cases(request.validation)
    if found.header.weights != weights:
        raise ValueError(
            f"{request.validation} is of other weights ({found.header.model}), expected cases of "
            f"{request.model}: evaluate it on the validation split first"
        )
    known = {(case.facts.source, case.facts.image_id) for case in found.masks}
    known |= {(f.source, f.patient_id) for f in (c.facts for c in found.masks) if f.patient_id}
    for records in (records for job in jobs for records in job.segmentation):
        source = records.manifest["source"]
        patients = records.table["patient_id"].to_pylist()
        both = {(source, name) for name in (*records.ids(), *patients) if name} & known
        if both:
            raise ValueError(
                f"{request.validation} holds cases of {min(both)[1]!r}, which {records.folder} "
                "holds too, as an image or as a patient; expected cases of other patients"
            )
    return found


def _check_able(job: Job, model: BiasCareVL) -> None:
    """Raises ValueError where a model can do nothing of a job, or its head lacks a label; says what
    of it is left out."""
    name, head = job.request.model, model.network.label_head
    if job.language and model.answerer is None:
        if not job.segmentation and not (job.labelled and head):
            raise ValueError(f"{name} answers no questions; leave out {job.name or '--language'}")
        print(f"{name} answers no questions: they are left out", file=sys.stderr)
    if not job.labelled:
        return
    if head is None and model.answerer is None:
        raise ValueError(
            f"{name} has neither a label head nor a language side; train one with "
            "configs/probe_isic2018.yaml or configs/finetune_cxr_lt.yaml"
        )
    if head is not None:
        lacking = sorted(set(trained_labels(job.labelled)) - set(head.labels))
        # Left out in silence, the mean would be over the labels that the model happens to know.
        if lacking:
            raise ValueError(f"{name}: its label head does not know {', '.join(lacking[:5])}")


def _labelled(
    job: Job, model: BiasCareVL, groups: dict[str, str], common: dict[str, Any]
) -> tuple[HeldOutLabels | None, Labeller | None]:
    """Images and who labels them: the head; without one, questions, unless the benchmark has its
    own."""
    asks = model.labeller is None
    if not job.labelled or (asks and job.language):
        return None, None
    labeller = model.labeller or Labeller(
        LabelSpace(trained_labels(job.labelled), exclusive=False), model.network, model.answerer
    )
    space = labeller.space
    images = HeldOutLabels(job.labelled, model.chat, groups, space=space, asked=asks, **common)
    return images, labeller


def _prepared(
    job: Job,
    model: BiasCareVL,
    train: list[Records],
    groups: dict[str, str],
    discs: DiscBaseline | None,
    weights: str,
    validation: Cases | None,
) -> Prepared:
    request, segmentation = job.request, job.segmentation
    assert request.prompt is not None and request.max_new_tokens is not None
    common: dict[str, Any] = {"image_size": model.segmenter.image_size, "limit": request.limit}
    asked = job.language if model.answerer else []
    labelled, labeller = _labelled(job, model, groups, common)
    settings = EvaluationSettings(
        batch_size=request.batch_size,
        num_workers=request.num_workers,
        num_corrections=request.corrections,
        mask_prompt=model.mask_prompt,
        max_new_tokens=request.max_new_tokens,
        synced_generation=False,
        max_report_tokens=request.max_report_tokens,
    )
    header = Header(
        model=request.model,
        weights=weights,
        commit=git_commit(),
        data=[
            *about_data(segmentation, "segmentation"),
            *about_data(asked, "language"),
            *about_data(job.labelled if labeller else [], "labels"),
        ],
        settings=_choices(settings)
        | {"prompt": request.prompt, "limit": request.limit}
        # Rows that a finished case has or lacks: one asked otherwise is another evaluation.
        | {"blind": bool(request.blind), "counterfactual": request.counterfactual},
        beta_vl=model.segmenter.beta_vl,
        prevalence=groups,
        disc_share=None if discs is None else discs.share,
        disc_share_by_target={} if discs is None else discs.by_target,
        benchmark=job.name,
    )
    images = HeldOutImages(segmentation, model.chat, groups, prompt=request.prompt, **common)
    questions = None
    if asked:
        kinds = job.benchmark.kinds if job.benchmark else SCORED_KINDS
        ways = {"blind": bool(request.blind), "counterfactual": request.counterfactual}
        questions = HeldOutQuestions(asked, model.chat, groups, kinds=kinds, **ways, **common)
    if request.save_masks is not None and any(map(_has_volumes, segmentation)):
        import_nibabel()  # before the work, not after it
    return Prepared(
        job,
        model,
        train,
        images,
        questions,
        labelled,
        labeller,
        header,
        settings,
        validation,
    )


def _has_volumes(records: Records) -> bool:
    # A folder is written by one converter: its first record says whether places are recorded.
    return len(records) > 0 and "affine" in records[0]["extra"]


def evaluate_model(request: EvaluationRequest) -> dict[str, Any]:
    """Cases, metrics.json and a contact sheet in the output folder; returns the metrics.

    Under a launcher every rank takes a share.

    Raises ValueError for folders without anything to score, for records that were trained on, and
    where the output folder holds another evaluation.
    """
    (prepared,) = prepare(request)
    summary = _carried_out(prepared)
    leave_process_group()
    return summary


def evaluate_suite(request: EvaluationRequest) -> dict[str, dict[str, Any]]:
    """The same for several benchmarks, with the model loaded once: {benchmark: metrics}."""
    summaries = {str(p.job.name): _carried_out(p) for p in prepare(request)}
    leave_process_group()
    return summaries


def _carried_out(prepared: Prepared) -> dict[str, Any]:
    """One evaluation, its metrics and its pictures."""
    job, model, train, images, questions, labelled, labeller, header, settings, validation = (
        prepared
    )
    request = job.request
    assert request.output is not None
    cases = evaluate(
        model.segmenter,
        model.answerer,
        images,
        questions,
        request.output / CASES,
        header,
        settings,
        labelled=labelled,
        labeller=labeller,
        overwrite=request.overwrite,
        progress=True,
    )
    # Numbers of a large benchmark take minutes: one rank computes them.
    output = request.output
    return from_rank_zero(lambda: _numbers(cases, job, train, output, validation))


def _numbers(
    cases: Cases, job: Job, train: list[Records], output: Path, validation: Cases | None
) -> dict[str, Any]:
    """metrics.json, the contact sheet, and masks where they are asked for."""
    summary = {"model": job.request.model} | summarise(cases, validation)
    if job.request.save_masks is not None:
        save_masks(cases.masks, job.request.save_masks)
    if train:
        summary["also_in_training"] = shared_with_training(job.held_out, train)
    if job.benchmark is not None:
        summary["benchmark"]["also_in_training"] = summary.get("also_in_training")
    write_json(output / "metrics.json", summary)
    if cases.masks:
        panels = mask_panels(representative_cases(cases.masks), job.segmentation)
        title = f"{job.request.model}, held-out records"
        contact_sheet(panels, output / "contact_sheet.png", title)
    return summary


def check_model(request: EvaluationRequest) -> list[Difference]:
    """Compute the cases of `request` several times in different ways and compare them; nothing is
    kept. Raises ValueError as `evaluate_model` does."""
    found = [_check_prepared(prepared) for prepared in prepare(request)]
    leave_process_group()
    return [difference for differences in found for difference in differences]


def _check_prepared(prepared: Prepared) -> list[Difference]:
    _, model, _, images, questions, labelled, labeller, header, settings, _ = prepared

    def compute(path: Path, batch_size: int, backwards: bool) -> Cases:
        held_out = [held for held in (images, questions, labelled) if held is not None]
        for held in held_out if backwards else ():
            held.units.reverse()
        # So many questions, in all the ways they are asked: a batch of one would show nothing.
        ways = 1 if questions is None else questions.rows_per_unit
        changed = settings._replace(batch_size=batch_size * ways)
        cases = evaluate(
            model.segmenter,
            model.answerer,
            images,
            questions,
            path,
            header,
            changed,
            labelled=labelled,
            labeller=labeller,
        )
        for held in held_out if backwards else ():
            held.units.reverse()
        return cases

    # One folder for all ranks: each writes its share there.
    folder = Path(from_rank_zero(lambda: tempfile.mkdtemp(prefix="biascare-")))
    try:
        return check_invariance(compute, folder)
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def open_model(request: EvaluationRequest) -> BiasCareVL:
    """An export, or foreign vision weights without a language side."""
    if request.vision is None:
        model = BiasCareVL.from_pretrained(request.model, mllm=request.mllm, device=local_device())
        # In fp32 the folded weights answer alike, and an adapter costs three products for one.
        if model.network.mllm is not None:
            fold_adapter(model.network.mllm)
        return model
    network = build_network(
        vision=request.vision, image_size=request.image_size, vision_weights=request.model
    )
    return BiasCareVL(network.eval().to(local_device()), None)


def check_scored(
    segmentation: Sequence[Records],
    language: Sequence[Records],
    labelled: Sequence[Records] = (),
    kinds: Sequence[str] = SCORED_KINDS,
) -> None:
    """Raises ValueError for a folder without what it was named for: its table would be empty."""
    for source in segmentation:
        if not len(source.segmentation_units):
            raise ValueError(f"{source.folder} holds no masks; leave it out of --segmentation")
    for source in labelled:
        if not len(source.labelled_units):
            raise ValueError(f"{source.folder} holds no labels; leave it out of --labelled")
    for source in language:
        if not set(source.question_kinds()) & set(kinds):
            raise ValueError(
                f"{source.folder} holds no questions that are scored ({', '.join(kinds)}); leave "
                "it out"
            )


def _trained_targets(
    request: EvaluationRequest, train: list[Records], model: BiasCareVL
) -> tuple[dict[str, str], DiscBaseline | None]:
    """Prevalence groups and disc sizes: of the folders named, or as the export has them."""
    facts = model.facts
    if train or request.prevalence is not None or facts is None:
        shares = EvalConfig()
        # Of labels too: no name is both, and a benchmark of labels has its groups by them.
        counts = drawn_counts(train, labelled=False)
        groups = groups_of(request.prevalence, counts, shares.head_share, shares.tail_share)
        of_labels = drawn_counts(train, labelled=True)
        named = groups_of(None, of_labels, shares.head_share, shares.tail_share)
        return named | groups, fit_disc(training_masks(train))
    if facts.disc_share is None:
        return facts.prevalence, None
    return facts.prevalence, DiscBaseline(facts.disc_share, facts.disc_share_by_target)


def training_masks(
    sources: Sequence[Records], limit: int = 1000
) -> Iterator[tuple[str, np.ndarray, tuple[int, int]]]:
    """(target, mask, first click) of at most `limit` evenly spaced training images."""
    rows = [(records, int(i)) for records in sources for i in records.segmentation_units]
    step = max(1, -(-len(rows) // limit))
    for records, i in rows[::step]:
        row = records[i]
        for target in row["targets"]:
            mask = decode_mask(target["rle"], row["height"], row["width"])
            yield target["name"], mask, first_point(mask)


def weights_hash(model: Path) -> str:
    """sha256 of what was trained: a file, or config.json and safetensors of an export. The base
    language model, which config.json names, is left out: it may be large, and others keep it."""
    parts = [
        model / "config.json",
        *model.glob("*.safetensors"),
        *model.glob("adapter/*.safetensors"),
    ]
    files = [model] if model.is_file() else sorted(parts)
    digest = hashlib.sha256()
    for file in files:
        # Names too: two parts that swapped their files are another model.
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def about_data(sources: Sequence[Records], task: str) -> list[dict[str, Any]]:
    """What the header says of the record folders of one task."""
    names = ("source", "split", "version", "licence", "content_hash")
    return [{"task": task} | {name: s.manifest[name] for name in names} for s in sources]


def _choices(settings: EvaluationSettings) -> dict[str, Any]:
    """What cases depend on."""
    free = ("batch_size", "num_workers")
    return {name: value for name, value in settings._asdict().items() if name not in free}


class Evaluator:
    """Periodic evaluation of a run on its held-out records: cases, summary, table."""

    def __init__(
        self,
        config: Config,
        engine: Any,
        chat: ChatBuilder | None,
        groups: dict[str, str],
        log: RunLog,
    ):
        self.config = config
        self.groups = groups
        self.log = log
        network, size = engine.module.model, config.model.image_size
        beta_vl = config.objective.beta_vl
        self.segmenter = Segmenter(network, chat, image_size=size, beta_vl=beta_vl)
        self.answerer = None if chat is None else Answerer(network, chat, image_size=size)
        held_out = () if network.label_head else config.data.eval_segmentation
        self.segmentation = [Records(source.path) for source in held_out]
        self.language = [Records(s.path) for s in config.data.eval_language] if chat else []
        head = network.label_head
        self.labelled = [Records(s.path) for s in config.data.eval_labelled] if head else []
        options = config.eval
        self.images = HeldOutImages(
            self.segmentation, chat, groups, image_size=size, limit=options.max_images
        )
        self.questions = HeldOutQuestions(
            self.language, chat, groups, image_size=size, limit=options.max_questions
        )
        self.label_images = self.labeller = None
        if head is not None:
            space = LabelSpace(head.labels, head.exclusive)
            self.labeller = Labeller(space, network)
            self.label_images = HeldOutLabels(
                self.labelled,
                None,
                groups,
                image_size=size,
                limit=options.max_images,
                space=space,
                asked=False,
            )
        self.settings = EvaluationSettings(
            batch_size=options.batch_size,
            num_workers=config.data.num_workers,
            num_corrections=options.num_clicks,
            mask_prompt=config.hitl.mask_prompt,
            max_new_tokens=options.max_new_tokens,
            synced_generation=engine.zero_optimization_stage() == 3,
        )
        self.commit = git_commit()

    def __call__(self, step: int) -> dict[str, Any]:
        """Summary of the weights as they are; {} where nothing is held out."""
        if not any(map(len, (self.images, self.questions, self.label_images or ()))):
            return {}
        path = Path(self.config.train.output_dir) / "cases" / f"step_{step:08d}.jsonl"
        cases = evaluate(
            self.segmenter,
            self.answerer,
            self.images,
            self.questions,
            path,
            self.header(step),
            self.settings,
            labelled=self.label_images,
            labeller=self.labeller,
            # A resumed run reaches this step again; what stands there is of the same weights only
            # if nothing else changed, which nobody checks.
            overwrite=True,
        )
        summary = summarise(cases)
        from_rank_zero(lambda: self.log.record("eval", step, summary))
        self.log.say(evaluation_table(summary, f"Held-out records at step {step}"))
        return summary

    def header(self, step: int) -> Header:
        segmentation, language = self.segmentation, self.language
        return Header(
            model=self.config.train.output_dir,
            weights=f"step {step}",
            commit=self.commit,
            data=[
                *about_data(segmentation, "segmentation"),
                *about_data(language, "language"),
                *about_data(self.labelled, "labels"),
            ],
            settings=_choices(self.settings),
            beta_vl=self.segmenter.beta_vl,
            prevalence=self.groups,
            disc_share=None,
            disc_share_by_target={},
        )
