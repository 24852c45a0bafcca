"""The house plan, held by tests: who imports whom, what stays light, what is written only once."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from biascare.config import DATA_SOURCES, describe_config, load_config
from biascare.settings.strict_yaml import read_tree

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

# Module or package -> what else of the project it may import, and why no more. A module may always
# import its own row's neighbours; the longest matching name decides. docs/house.md draws the same.
GROUND = (
    "biascare.interfaces",
    "biascare.choices",
    "biascare.durable",
    "biascare.settings",
    "biascare.records",
    "biascare.uncertainty",
    "biascare.version",
)
FIRST = (*GROUND, "biascare.data", "biascare.models", "biascare.losses", "biascare.hitl")
SECOND = (
    *FIRST,
    "biascare.inference",
    "biascare.checks",
    "biascare.robustness",
    "biascare.training",
    "biascare.planning",
)
PREPARED = ("biascare.records", "biascare.choices", "biascare.durable", "biascare.version")
TABLE: dict[str, tuple[tuple[str, ...], str]] = {
    "biascare": (
        ("biascare.inference", "biascare.version"),
        "importing biascare must stay free; the door for users is loaded when it is used",
    ),
    "biascare.version": ((), "everything may say which version it is"),
    "biascare.interfaces": ((), "every package imports the nouns, so they import none"),
    "biascare.choices": ((), "a message about words knows no words"),
    "biascare.durable": ((), "files are flushed the same whatever they hold"),
    "biascare.settings": (("biascare.choices",), "reading YAML knows nothing of what is run"),
    "biascare.config": (
        ("biascare.settings", "biascare.choices"),
        "what a run may say is checked before anything of it is loaded",
    ),
    "biascare.records": (
        ("biascare.choices", "biascare.durable", "biascare.version"),
        "the format on disk outlives every reader",
    ),
    "biascare.uncertainty": (("biascare.interfaces",), "equations are pure functions of tensors"),
    "biascare.losses": (GROUND, "the objective is a pure function of tensors"),
    "biascare.data": (GROUND, "samples know nothing of the model that reads them"),
    "biascare.models": (GROUND, "a model runs without the training data and objective"),
    "biascare.hitl": (GROUND, "training, evaluation and sessions share the simulated expert"),
    "biascare.inference": (FIRST, "the door for users needs no training"),
    "biascare.robustness": (FIRST, "noise and defence wrap any predictor"),
    "biascare.checks": ((*GROUND, "biascare.data"), "checks read what training reads, no model"),
    "biascare.training": (
        (*GROUND, "biascare.losses", "biascare.hitl"),
        "model, loader and evaluator arrive as arguments",
    ),
    "biascare.planning": (
        (*GROUND, "biascare.models", "biascare.losses", "biascare.training"),
        "a plan follows the code that trains",
    ),
    "biascare.evaluation": (SECOND, "evaluation takes a predictor, never a run"),
    "biascare.calibration": ((*SECOND, "biascare.evaluation"), "calibration reads cases"),
    "biascare.reports": ((*SECOND, "biascare.evaluation"), "a report computes no metric"),
    "biascare.server": (
        (*PREPARED, "biascare.interfaces", "biascare.inference"),
        "a page is a shell around the session",
    ),
    "biascare.runs": (
        (
            *SECOND,
            *("biascare.config", "biascare.evaluation", "biascare.reports", "biascare.server"),
        ),
        "the composition root: here a configuration becomes objects",
    ),
    "scripts": (("biascare", "data_prep"), "a script is a door; it opens on no other script"),
    "data_prep": (PREPARED, "a new dataset touches the record format only"),
}


def modules(*folders: str) -> dict[str, Path]:
    """Dotted name -> file of every module below the folders."""
    found = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of `known` imported anywhere in the file, inside functions too."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            full = {f"{base}.{alias.name}" for alias in node.names}
            found |= {module if module in known else base for module in full}
    return (found & set(known)) - {name}


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def row_of(name: str) -> str:
    """The longest row of the table that holds the module; only `biascare` itself has that row."""
    rows = [row for row in TABLE if inside(name, row) and (row != "biascare" or name == row)]
    assert rows, f"{name} has no row in the import table: decide what it may import, and why"
    return max(rows, key=len)


KNOWN = modules("biascare", "data_prep", "scripts")


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_module_imports_only_what_its_row_of_the_table_allows(name: str) -> None:
    row = row_of(name)
    allowed, reason = TABLE[row]
    wrong = {
        target
        for target in imports(name, KNOWN[name], KNOWN)
        if target != "biascare"
        and ((row == "scripts" and inside(target, row)) or row_of(target) != row)
        and not any(inside(target, permitted) for permitted in allowed)
    }
    assert not wrong, f"{name} imports {sorted(wrong)}; {reason}. Allowed: {list(allowed)}"


def test_no_imports_go_in_a_circle_not_even_inside_functions() -> None:
    graph = {name: imports(name, path, KNOWN) for name, path in KNOWN.items()}
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*trail, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_the_import_walk_sees_relative_and_function_level_imports(tmp_path: Path) -> None:
    source = tmp_path / "clicks.py"
    source.write_text(
        "from . import session\nfrom ..records import Records\n"
        "def f():\n    from biascare import losses\n    import biascare.config\n"
    )
    known = dict.fromkeys(
        ["biascare.hitl.session", "biascare.records", "biascare.losses", "biascare.config"],
        source,
    )
    assert imports("biascare.hitl.clicks", source, known) == set(known)


DOORS = ("train", "export", "preview", "evaluate", "audit", "interact")
DOOR_LINES = 90


@pytest.mark.parametrize("name", DOORS)
def test_a_door_is_short(name: str) -> None:
    lines = (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= DOOR_LINES, "a script parses, calls and exits; what it does is in runs/"


def test_no_script_imports_the_script_beside_it() -> None:
    """A script that is started finds its neighbours by their bare names."""
    scripts = {path.stem: path for path in (ROOT / "scripts").glob("*.py")}
    for name, path in scripts.items():
        beside = {stem: file for stem, file in scripts.items() if stem != name}
        assert not imports(name, path, beside), f"scripts/{name}.py imports a script as a library"


FLOORS = ("scripts", "biascare.runs", "biascare.training")
MOST_MODULES = 8


def test_the_configuration_reaches_the_step_in_few_modules_and_never_climbs() -> None:
    """Who follows a key from scripts/train.py to TrainStep.forward reads the modules that carry the
    configuration, and those that read it from YAML."""
    start, end = "scripts.train", "biascare.training.step"
    source = {name: path.read_text(encoding="utf-8") for name, path in KNOWN.items()}
    carries = {n for n, text in source.items() if re.search(r"\bconfig: Config\b", text)} | {start}

    def paths(name: str, trail: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for target in imports(name, KNOWN[name], KNOWN) & (carries | {end}):
            if target == end:
                yield (*trail, target)
            elif not inside(target, "biascare.config"):
                yield from paths(target, (*trail, target))

    found = list(paths(start, (start,)))
    reading = {"biascare.config", "biascare.settings.keys"}
    crossed = reading.union(*found)
    print("\n".join(" -> ".join(path) for path in found))
    assert found and len(crossed) <= MOST_MODULES, sorted(crossed)
    for path in found:
        floors = [max(i for i, row in enumerate(FLOORS) if inside(name, row)) for name in path]
        assert floors == sorted(floors), f"the configuration climbs: {' -> '.join(path)}"


def test_the_language_pathway_needs_no_vision_pathway() -> None:
    reached, left = set(), ["biascare.models.language.pathway"]
    while left:
        name = left.pop()
        reached.add(name)
        left += imports(name, KNOWN[name], KNOWN) - reached
    assert "biascare.models.weights.report" in reached  # what it once loaded the vision for
    assert not [name for name in reached if inside(name, "biascare.models.vision")]


def test_importing_biascare_loads_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import biascare\n"
        "print(time.perf_counter() - start, *({'torch', 'numpy', 'yaml', 'pydantic'} "
        "& set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, *heavy = run.stdout.split()
    print(f"import biascare: {float(seconds):.3f} s")
    assert not heavy, f"importing biascare loads {heavy}; import them in the module that needs them"


# ---------------------------------------------------------------- configuration


def local_paths(path: Path, folder: Path) -> list[str]:
    """Overrides that point every path of a YAML, left open or not, at an existing folder."""
    values = read_tree(path).values
    data, model = values.get("data", {}), values.get("model", {})
    sources = [key for key in DATA_SOURCES if data.get(key)]
    paths = [key for key in ("mllm", "vision_weights") if model.get(key)]
    return [
        *(f"data.{key}=[{{path: {folder}}}]" for key in sources),
        *(f"model.{key}={folder}" for key in paths),
        f"train.output_dir={folder / 'out'}",
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_in_configs_loads_without_a_warning(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    load_config(path, local_paths(path, tmp_path))


def test_stage_2_is_the_recipe_of_the_paper_and_an_ablation_changes_one_key(tmp_path: Path) -> None:
    stage2 = ROOT / "configs" / "stage2.yaml"
    run = load_config(stage2, local_paths(stage2, tmp_path))
    assert (run.optim.lr, run.optim.mllm_lr, run.optim.betas) == (1e-5, 5e-6, (0.9, 0.98))
    assert (run.optim.warmup_steps, run.optim.final_lr_ratio) == (500, 0.05)
    assert run.train.global_batch == 4 * run.train.micro_batch * 2  # GPUs x items x accumulation
    assert run.train.max_steps == 3_440_000 // run.train.global_batch
    assert (run.data.ratio, run.model.image_size, run.train.precision) == ((1, 1), 256, "bf16")
    assert run.objective.uncertainty_weighting and run.hitl.enabled
    folder = ROOT / "configs" / "ablations"
    for name, key in (("no_uncertainty", "objective"), ("no_hitl", "hitl")):
        path = folder / f"{name}.yaml"
        ablated = load_config(path, local_paths(path, tmp_path))
        changed = [field for field in vars(run) if getattr(run, field) != getattr(ablated, field)]
        assert changed == [key]


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_no_number_of_a_run_stands_in_the_deepspeed_file_too() -> None:
    entries = dict(leaves(json.loads((ROOT / "ds_config.json").read_text(encoding="utf-8"))))
    numeric = [row.key for row in describe_config() if row.type.startswith(("int", "float"))]
    ours = {key.rpartition(".")[2] for key in numeric}
    for key, value in entries.items():
        if value == "auto":
            continue  # filled in from the run's YAML by the trainer
        assert key.startswith("zero_optimization."), f"{key} belongs in the YAML; write 'auto' here"
        assert key.rpartition(".")[2] not in ours, f"{key} stands in the YAML already"
    from_yaml = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")
    assert {entries[key] for key in (*from_yaml, "gradient_accumulation_steps")} == {"auto"}
    assert entries["bf16.enabled"] == "auto"


# ---------------------------------------------------------------- packaging


DISTRIBUTIONS = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
}
"""Imported name -> package, where they differ by more than a dash."""

LOADED_BY_OTHERS = ("torchvision", "accelerate", "ninja", "python-multipart")
"""Declared without an import here; setup.py says beside each who loads it."""


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """Arguments of `setup` in setup.py."""
    setuptools = pytest.importorskip("setuptools", reason="setup.py is read with setuptools")
    arguments: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", arguments.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def imported_packages(path: Path) -> set[str]:
    """First parts of all absolute imports of a file, those by name included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_medical":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name.partition(".")[0] for name in found}


def test_every_declared_dependency_is_imported_or_says_who_loads_it(
    declared: dict[str, Any],
) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    used = set().union(*(imported_packages(path) for path in KNOWN.values()))
    used = {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in used}
    extras = {name: needs for name, needs in declared["extras_require"].items() if name != "dev"}
    for text in (*declared["install_requires"], *(n for needs in extras.values() for n in needs)):
        name = canonicalize_name(Requirement(text).name)
        assert (name in used) != (name in LOADED_BY_OTHERS), (
            f"setup.py declares {name}: what nothing imports goes out and returns with its first "
            "use, and what is imported needs no excuse"
        )


def test_the_package_says_that_it_is_typed_and_holds_every_module(
    declared: dict[str, Any], tmp_path: Path
) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert (tmp_path / "biascare" / "py.typed").is_file(), "mypy ignores our types without it"
    packaged = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")}
    ours = modules("biascare", "data_prep").values()
    assert packaged == {path.relative_to(ROOT) for path in ours}


def test_the_tested_set_pins_every_dependency_inside_its_declared_range(
    declared: dict[str, Any],
) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    extras = declared["extras_require"]
    # Ray is left to the cluster that has it; its test runs there only.
    for text in (*declared["install_requires"], *extras["medical"], *extras["ui"], *extras["dev"]):
        wanted = Requirement(text)
        ours = [p for p in pins if canonicalize_name(p.name) == canonicalize_name(wanted.name)]
        assert ours, f"constraints.txt does not pin {wanted.name}"
        for pin in ours:
            version = str(pin.specifier).removeprefix("==")
            assert wanted.specifier.contains(version), f"{pin} is outside {wanted}"
    found = re.search(r'"(.+)"', (ROOT / "biascare" / "version.py").read_text().split("=")[1])
    assert found and declared["version"] == found.group(1)
