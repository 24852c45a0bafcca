"""The configuration boundary: what is accepted, and how every mistake is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from biascare.config import ConfigError, describe_config, dump_config, load_config, to_dict
from biascare.settings.keys import (
    Config,
    DataConfig,
    HITLConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
)
from biascare.settings.strict_yaml import dump, read_tree

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with record folders `a` and `b` and an MLLM folder."""
    for name in ("a", "b", "mllm"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


MINIMAL: dict[str, Any] = {
    "data": {"segmentation": [{"path": "a"}], "language": [{"path": "b"}]},
    "model": {"mllm": "mllm"},
    "train": {"max_steps": 1000, "output_dir": "out"},
}
VISION = ["train.stage=vision", "data.ratio=[1, 0]", "data.language=[]", "model.mllm=null"]


def write(folder: Path, text: str | None = None, name: str = "run.yaml") -> str:
    (folder / name).write_text(yaml.safe_dump(MINIMAL) if text is None else text, encoding="utf-8")
    return name


def problems(path: str, *overrides: str) -> str:
    """The complete error message, one problem per line."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).count("\n") == len(caught.value.problems)
    return str(caught.value)


def only(path: str, *overrides: str) -> str:
    """The message, where exactly one problem is expected."""
    message = problems(path, *overrides)
    assert message.startswith("1 problem in the configuration:"), message
    return message


# ---------------------------------------------------------------- reading


def test_a_minimal_file_gets_every_default_and_keeps_its_types(folder: Path) -> None:
    config = load_config(write(folder))
    assert config.optim == OptimConfig()
    assert config.data.segmentation == (SourceConfig(path="a"),)
    assert config.data.ratio == (1, 1) and isinstance(config.optim.betas, tuple)
    assert config.train.max_steps == 1000


def test_the_defaults_are_the_recipe_of_the_paper() -> None:
    optim, data, model = OptimConfig(), DataConfig(), ModelConfig()
    assert (optim.lr, optim.mllm_lr, optim.betas) == (1e-5, 5e-6, (0.9, 0.98))
    assert (optim.weight_decay, optim.grad_clip) == (0.01, 1.0)
    assert (optim.warmup_steps, optim.final_lr_ratio) == (500, 0.05)
    assert (model.lora_rank, model.lora_alpha, model.lora_dropout) == (8, 16, 0.01)
    assert (model.image_size, data.ratio) == (256, (1, 1))
    objective, hitl = ObjectiveConfig(), HITLConfig()
    assert (objective.uncertainty_weighting, hitl.enabled, hitl.ratio) == (True, True, 0.3)
    assert (objective.beta_vl, objective.lambda_u, objective.reduction) == (0.5, 1.0, "sum")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("2", 2.0), (".5", 0.5), ("1.", 1.0), ("1_0.5", 10.5)],
)
def test_numbers_are_read_as_a_scientist_writes_them(folder: Path, text: str, value: float) -> None:
    config = load_config(write(folder), [f"optim.lr={text}"])
    assert config.optim.lr == value and isinstance(config.optim.lr, float)


def test_underscores_group_digits_and_a_leading_zero_is_not_octal(folder: Path) -> None:
    path = write(folder)
    assert load_config(path, ["train.max_steps=107_500"]).train.max_steps == 107_500
    assert load_config(path, ["train.seed=010"]).train.seed == 10


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("data.augment=yes", '"yes" (text), allowed: true | false'),
        ("data.augment='true'", '"true" (text), allowed: true | false'),
        ("data.augment=1", "1 (integer), allowed: true | false"),
        ("train.seed=true", "true (true/false), allowed: int >= 0"),
        ("train.seed=1.0", "1.0 (float), allowed: int >= 0"),
        ("optim.lr='1e-5'", '"1e-5" (text), allowed: float > 0'),
        ("optim.lr=.nan", "NaN (float), allowed: float > 0"),
        ("optim.lr=1e999", "Infinity (float), allowed: float > 0"),
        ("train.output_dir=2024", "2024 (integer), allowed: text"),
        ("train.precision=bf-16", "\"bf-16\" (text), allowed: bf16 | fp32; did you mean 'bf16'?"),
        ("data.ratio=[1]", "[1] (list), allowed: [int, int], each >= 0"),
        ("data.ratio=[1, -1]", "[1, -1] (list), allowed: [int, int], each >= 0"),
        ("optim.betas=[0.9, 1.0]", "[0.9, 1.0] (list), allowed: [float, float], each >= 0, < 1"),
        ("hitl.ratio=0", "0 (integer), allowed: float > 0, <= 1"),
        ("hitl.ratio=1.01", "1.01 (float), allowed: float > 0, <= 1"),
        ("model.lora_rank=0", "0 (integer), allowed: int >= 1"),
        ("data.segmentation=a", '"a" (text), allowed: list of {path, weight}'),
        ("data.segmentation=[a]", '["a"] (list), allowed: list of {path, weight}'),
        ("data.segmentation=[{path: a, weight: 0}]", "0 (integer), allowed: float > 0 | null"),
        ("hitl=null", "null, allowed: {enabled, ratio"),
        ("train=3", "3 (integer), allowed: {stage, max_steps"),
    ],
)
def test_nothing_is_converted_in_silence_and_bounds_hold(
    folder: Path, override: str, shown: str
) -> None:
    assert f"got {shown}" in only(write(folder), override)


def test_a_wrong_value_is_named_with_file_and_line(folder: Path) -> None:
    text = "train:\n  max_steps: 10\n  output_dir: out\n\noptim:\n  lr: fast\n"
    assert "run.yaml:6: optim.lr: got" in problems(write(folder, text))


def test_a_key_of_a_list_item_is_named_with_its_index_and_line(folder: Path) -> None:
    text = dump(MINIMAL) + "optim: {warmup_steps: 0}\n"
    text = text.replace("  - path: a\n", "  - path: a\n  - path: b\n    wieght: 2\n")
    line = text.splitlines().index("    wieght: 2") + 1
    message = only(write(folder, text))
    assert f"run.yaml:{line}: data.segmentation[1].wieght: unknown key" in message
    assert "did you mean 'data.segmentation[1].weight'" in message


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.max_stpes", "'train.max_steps'"),
        ("objective.num_rounds", "'hitl.num_rounds'"),
        ("optimizer.lr", "'optim'"),
        ("lr", "'optim.lr'"),
        ("train.batch_size", "'eval.batch_size'"),
        ("model.learn_rank", "'model.lora_rank'"),
        ("train.vision_encodr", "'train.trainable.vision_encoder'"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_one_also_of_another_section(
    folder: Path, key: str, meant: str
) -> None:
    message = only(write(folder), f"{key}=1")
    assert "command line" in message and "unknown key; did you mean" in message
    assert meant in message


def test_an_unknown_key_like_no_other_lists_what_the_section_knows(folder: Path) -> None:
    assert "known here: enabled, ratio," in only(write(folder), "hitl.zzzzzz=1")


def test_missing_required_keys_are_named_with_their_help(folder: Path) -> None:
    message = problems(write(folder, "data: {ratio: [0, 0]}\n"))
    assert "train.max_steps: required, and not set: optimizer steps; allowed: int >= 1" in message
    assert "train.output_dir: required, and not set: folder of checkpoints" in message


def test_question_marks_mean_that_the_reader_must_set_the_key(folder: Path) -> None:
    text = dump(MINIMAL).replace("mllm: mllm", "mllm: ???")
    path = write(folder, text.replace("- path: a", "- path: ???"))
    message = problems(path)
    assert "model.mllm: required, and not set: HF folder or Hub id" in message
    assert "data.segmentation[0].path: required, and not set" in message
    assert message.startswith("2 problems")
    fixed = ["model.mllm=mllm", "data.segmentation=[{path: a}]"]
    assert load_config(path, fixed).model.mllm == "mllm"


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(folder: Path) -> None:
    text = """\
train: {max_steps: ten, output_dir: out, stage: joynt}
data:
  segmentation: [{path: nowhere}]
  language: [{path: b}]
  ratio: [1, 2]
optim: {lr: -1}
optim: {lr: 1e-5}
hitl: {rounds: 2}
eval: {head_share: 0.8, tail_share: 0.3}
model: {mllm: mllm, image_size: 250}
"""
    lines = problems(write(folder, text), "train.seeds=1").splitlines()[1:]
    places = [line.split(": ")[0].strip() for line in lines]
    numbered = [int(place.rpartition(":")[2]) for place in places if ":" in place]
    assert numbered == [1, 1, 3, 5, 6, 7, 8, 9, 10]
    assert places.count("command line") == 1


def test_a_check_across_keys_is_left_out_where_one_of_its_keys_is_already_wrong(
    folder: Path,
) -> None:
    message = only(write(folder), "train.micro_batch=none")
    assert "global_batch" not in message


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "got an empty file, expected a mapping of sections"),
        ("# only a comment\n", "got an empty file"),
        ("- a\n- b\n", 'got ["a", "b"] (list), expected a mapping'),
        ("train:\n  seed: [1, 2\nhitl: {}\n", "run.yaml:3: bad YAML: "),
        ("train:\n\tseed: 1\n", "run.yaml:2: bad YAML: "),
        ("train: &x {seed: 1}\nhitl: *x\n", "run.yaml:2: bad YAML: aliases"),
        ("train: !!python/object:os.system {}\n", "run.yaml:1: train: only plain values"),
        ("train: {seed: !!python/name:os.system 1}\n", "train.seed: only plain values"),
        ("train: {seed: !!map 1}\n", "train.seed: only plain values"),
        ("train: {seed: 1}\n---\ntrain: {seed: 2}\n", "bad YAML: but found another document"),
        ('train: {output_dir: "\\ud800"}\n', "only plain values and Unicode text"),
        ("train: {seed: " + "9" * 5000 + "}\n", "train.seed: got"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("train: {1: 2}\n", "got the key '1', expected a name in plain text"),
    ],
)
def test_a_bad_file_is_an_error_of_one_kind_that_names_the_place(
    folder: Path, text: str, expected: str
) -> None:
    message = problems(write(folder, text))
    assert expected in message and "run.yaml" in message


def test_a_key_written_twice_names_both_lines(folder: Path) -> None:
    text = dump(MINIMAL) + "hitl:\n  ratio: 0.1\n  ratio: 0.2\n"
    line = text.splitlines().index("  ratio: 0.2") + 1
    message = only(write(folder, text))
    assert f"run.yaml:{line}: hitl.ratio: written twice, first at run.yaml:{line - 1}" in message


def test_an_unreadable_file_is_an_error_with_its_reason(folder: Path) -> None:
    assert "nothere.yaml: cannot be read: No such file" in problems("nothere.yaml")
    assert "a: cannot be read: Is a directory" in problems("a")
    (folder / "bytes.yaml").write_bytes(b"train: \xff\xfe")
    assert "cannot be read: not UTF-8 text" in problems("bytes.yaml")


def test_a_file_extends_another_and_replaces_lists_but_merges_mappings(folder: Path) -> None:
    (folder / "sub").mkdir()
    write(folder, dump({**MINIMAL, "hitl": {"ratio": 0.5, "num_rounds": 3}}))
    child = "_extends: ../run.yaml\nhitl: {ratio: 0.2}\ndata: {segmentation: [{path: b}]}\n"
    config = load_config(write(folder, child, "sub/child.yaml"))
    assert (config.hitl.ratio, config.hitl.num_rounds) == (0.2, 3)
    assert config.data.segmentation == (SourceConfig(path="b"),)
    assert config.data.language == (SourceConfig(path="b"),)


def test_an_error_in_an_extended_file_names_the_file_it_stands_in(folder: Path) -> None:
    text = dump({**MINIMAL, "hitl": {"ratio": 5}})
    line = text.splitlines().index("  ratio: 5") + 1
    write(folder, text)
    child = write(folder, "_extends: run.yaml\n", "child.yaml")
    assert f"run.yaml:{line}: hitl.ratio" in only(child)
    assert load_config(child, ["hitl.ratio=0.5"]).hitl.ratio == 0.5


def test_a_circle_of_extended_files_is_an_error_and_not_a_hang(folder: Path) -> None:
    write(folder, "_extends: two.yaml\n" + dump(MINIMAL), "one.yaml")
    write(folder, "_extends: one.yaml\n", "two.yaml")
    message = only("one.yaml")
    assert "two.yaml:1: _extends: a circle: one.yaml extends two.yaml extends one.yaml" in message


def test_an_extended_file_that_is_missing_is_answered_with_its_neighbour(folder: Path) -> None:
    write(folder)
    path = write(folder, "_extends: rnu.yaml\n" + dump(MINIMAL), "child.yaml")
    assert "child.yaml:1: _extends: no file rnu.yaml; did you mean 'run.yaml'?" in only(path)
    path = write(folder, "_extends: [run.yaml]\n" + dump(MINIMAL), "child.yaml")
    assert "expected one path" in only(path)


def test_only_yaml_is_extended_so_that_no_message_quotes_another_file(folder: Path) -> None:
    secret = write(folder, "root:x:0:0:the secret\n", "passwd")
    (folder / "link.yaml").symlink_to(secret)
    for name in ("/etc/passwd", str(secret), "link.yaml"):
        path = write(folder, f"_extends: {name}\n" + dump(MINIMAL), "child.yaml")
        message = only(path)
        assert "expected a file that ends in .yaml or .yml" in message
        assert "root" not in message and "secret" not in message


# ---------------------------------------------------------------- overrides


def test_a_later_override_wins_and_values_are_yaml(folder: Path) -> None:
    config = load_config(
        write(folder),
        [
            "train.seed=1",
            "train.seed=2",
            "data.segmentation=[{path: a, weight: 2}, {path: b}]",
            "data.prompts={box: 1}",
            "train.trainable.lora=false",
            "train.output_dir=x=y",
        ],
    )
    assert config.train.seed == 2 and config.train.output_dir == "x=y"
    first, second = config.data.segmentation
    assert (first, second) == (SourceConfig(path="a", weight=2.0), SourceConfig(path="b"))
    assert (config.data.prompts.box, config.data.prompts.point) == (1.0, 0.5)
    assert not config.train.trainable.lora


@pytest.mark.parametrize(
    "override", ["train.seed", "train.seed=", "=1", ".seed=1", "train.=1", "train.seed=  "]
)
def test_half_an_override_is_an_error_that_shows_the_form(folder: Path, override: str) -> None:
    assert f"got {override!r}, expected section.key=value" in only(write(folder), override)


def test_an_override_with_bad_yaml_or_a_doubled_key_names_itself(folder: Path) -> None:
    path = write(folder)
    assert "command line: train.seed: bad YAML" in only(path, "train.seed=[1")
    assert "box: written twice" in only(path, "data.prompts={box: 1, box: 2}")


# ---------------------------------------------------------------- checks across keys


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.ratio=[1, 2]"], "cannot be split 1 : 2 (data.ratio); set train.micro_batch=6"),
        (["train.micro_batch=3", "data.ratio=[1, 2]"], "train.global_batch = 32 is not a multiple"),
        (["train.micro_batch=6"], "train.micro_batch = 6; set train.global_batch=36"),
        (["data.ratio=[0, 0]"], "data.ratio: got [0, 0]"),
        (["data.language=[]"], "data.language: empty, but data.ratio = [1, 1]"),
        (["data.segmentation=[]"], "data.segmentation: empty, but"),
        (["model.mllm=null"], "model.mllm: not set, but train.stage = joint"),
        (["model.image_size=250"], "not divisible by 32"),
        (["train.max_steps=100"], "optim.warmup_steps = 500 is more than train.max_steps = 100"),
        (["data.prompts={point: 0, box: 0, point_and_box: 0, text: 0}"], "all four frequencies"),
        (["eval.head_share=0.7", "eval.tail_share=0.4"], "1.1 is more than the whole"),
        ([*VISION, "data.ratio=[1, 1]"], "data.ratio = [1, 1], but the vision stage"),
        ([*VISION, "data.language=[{path: b}]"], "data.language: the vision stage has no language"),
        (
            [*VISION, "data.prompts={point: 0, box: 0, point_and_box: 0, text: 1}"],
            "text alone cannot prompt the vision stage",
        ),
        (
            [
                "train.trainable={lora: false, vision_encoder: false, prompt_encoder: false, "
                "mask_decoder: false, query_attention: false}"
            ],
            "train.trainable: nothing is trained",
        ),
    ],
)
def test_a_combination_that_cannot_run_is_named_with_its_repair(
    folder: Path, overrides: list[str], expected: str
) -> None:
    assert expected in only(write(folder), *overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.language=[{path: b}, {path: bb}]", "data.language[1].path: no folder 'bb'"),
        ("data.eval_segmentation=[{path: aa}]", "did you mean 'a'?"),
        ("data.language=[{path: b}, {path: ./b}]", "data.language[1].path: './b' is listed twice"),
        ("model.mllm=./mlm", "no folder './mlm'"),
        ("model.mllm=one/two/three", "no Hub id (owner/name) either"),
        ("model.vision_weights=w.pth", "model.vision_weights: no file or folder 'w.pth'"),
        ("eval.prevalence=p.json", "eval.prevalence: no file 'p.json'"),
        ("train.deepspeed=nothere.json", "train.deepspeed: no file 'nothere.json'"),
        ("train.deepspeed=run.yaml", "run.yaml is not JSON"),
        ("train.resume=Auto", "allowed: auto | never | a checkpoint folder; did you mean 'auto'?"),
        ("train.output_dir=run.yaml/out", "run.yaml is a file"),
    ],
)
def test_every_path_is_checked_before_anything_is_loaded(
    folder: Path, override: str, expected: str
) -> None:
    assert expected in only(write(folder), override)


def test_a_hub_id_is_taken_on_trust_and_the_vision_stage_needs_no_mllm(folder: Path) -> None:
    path = write(folder)
    assert load_config(path, ["model.mllm=Qwen/Qwen2.5-VL-3B-Instruct"]).model.mllm
    assert load_config(path, VISION).train.stage == "vision"


def test_the_deepspeed_file_is_found_in_the_repository_from_any_directory(folder: Path) -> None:
    config = load_config(write(folder))
    assert config.train.deepspeed == "ds_config.json"
    assert not (folder / "ds_config.json").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.ratio=[0, 1]", "data.segmentation=[]"], "hitl.enabled has no effect"),
        (["data.ratio=[1, 0]"], "data.language is not used"),
        ([*VISION, "model.mllm=mllm"], "model.mllm is not loaded"),
        ([*VISION, "data.eval_language=[{path: b}]"], "data.eval_language is not used"),
    ],
)
def test_a_setting_that_a_run_skips_is_warned_of(
    folder: Path, overrides: list[str], expected: str
) -> None:
    with pytest.warns(UserWarning, match=expected):
        load_config(write(folder), overrides)


# ---------------------------------------------------------------- round trips


def test_a_dumped_run_reads_back_equal_and_holds_every_key(folder: Path) -> None:
    config = load_config(
        write(folder), ["optim.lr=3e-7", "data.segmentation=[{path: a, weight: 0.5}]"]
    )
    dump_config(config, "dumped.yaml")
    assert load_config("dumped.yaml") == config
    tree = read_tree("dumped.yaml")
    assert tree.values == to_dict(config)
    for row in describe_config():
        value: Any = tree.values
        for part in row.key.split("."):
            value = value[part]


@settings(deadline=None, max_examples=40)
@example({"\x85": "a\u2028b"})
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_what_is_dumped_reads_back_as_the_same_value(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    path = tmp_path_factory.mktemp("dump") / "value.yaml"
    path.write_text(dump({"value": value}), encoding="utf-8")
    tree = read_tree(path)
    assert not tree.problems
    assert tree.values == {"value": value}


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=60))
def test_any_text_as_a_file_either_fails_as_a_config_error_or_loads(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):  # no short text names a whole run
        load_config(path)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([row.key for row in describe_config()]), st.text(max_size=20))
def test_any_override_either_loads_or_fails_as_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "run.yaml"
    path.write_text(dump(MINIMAL), encoding="utf-8")
    with pytest.raises(ConfigError):  # the record folders are absent from the working directory
        load_config(path, [f"{key}={value}"])


# ---------------------------------------------------------------- the keys themselves


def test_every_key_is_described_with_type_default_and_help() -> None:
    rows = {row.key: row for row in describe_config()}
    assert len(rows) > 60
    assert all(row.help and row.type for row in rows.values())
    assert rows["train.max_steps"].default == "required"
    assert rows["optim.betas"].default == "[0.9, 0.98]"
    assert rows["train.precision"].type == "bf16 | fp32"
    assert rows["model.mllm"].type == "text | null"
    assert rows["hitl.ratio"].type == "float > 0, <= 1"


def test_every_default_keeps_its_own_bounds_and_type(folder: Path) -> None:
    plain = to_dict(Config(train=TrainConfig(max_steps=1000, output_dir="out")))
    plain["data"] |= MINIMAL["data"]
    plain["model"] |= MINIMAL["model"]
    assert load_config(write(folder, dump(plain))) == load_config(write(folder))


def test_loading_is_quick_and_imports_nothing_heavy(folder: Path) -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from biascare.config import load_config\n"
        f"load_config({write(folder)!r})\n"
        "print(time.perf_counter() - start, sorted({'torch', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    seconds, heavy = run.stdout.split(maxsplit=1)
    print(f"load_config: {float(seconds):.2f} s")
    assert heavy.strip() == "[]"
    assert float(seconds) < 2.0  # the promise to users, with pydantic's import inside


# ---------------------------------------------------------------- what folders say of themselves


@pytest.mark.parametrize(
    ("key", "unit", "contents"),
    [
        ("data.segmentation", "segmentation", "masks"),
        ("data.language", "language", "questions or reports"),
        ("data.eval_segmentation", "segmentation", "masks"),
        ("data.eval_language", "language", "questions or reports"),
    ],
)
def test_a_record_folder_without_what_it_is_named_for_is_refused(
    folder: Path, key: str, unit: str, contents: str
) -> None:
    (folder / "c").mkdir()
    counts = {"num_segmentation_units": 3, "num_language_units": 3}
    (folder / "c" / "manifest.json").write_text(json.dumps(counts | {f"num_{unit}_units": 0}))
    message = problems(write(folder), f"{key}=[{{path: c}}]")
    assert f"{key}[0].path: 'c' holds no {contents}; remove it from {key}" in message
    (folder / "c" / "manifest.json").write_text(json.dumps(counts))
    load_config(write(folder), [f"{key}=[{{path: c}}]"])


def test_a_base_model_of_another_family_is_refused_before_it_is_loaded(folder: Path) -> None:
    about = folder / "mllm" / "config.json"
    about.write_text('{"model_type": "qwen2_5"}')
    message = problems(write(folder))
    assert "model.mllm: model_type in mllm/config.json: got 'qwen2_5'" in message
    assert "did you mean 'qwen2_5_vl'" in message
    for good in ({"model_type": "llava"}, {"model_type": "llava_mistral", "mm_vision_tower": "x"}):
        about.write_text(json.dumps(good))
        load_config(write(folder))
    about.write_text('{"model_type": "bert"}')
    load_config(write(folder), VISION)
