"""Statistics of mixtures, prevalence files, and `scripts/data_bias.py`."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from biascare.checks.statistics import (
    MISSING,
    Distribution,
    SourceUse,
    expected_targets,
    imbalance,
    profile_folders,
    profile_sources,
)
from biascare.config import load_config
from biascare.data.prevalence import load_prevalence, prevalence_groups, save_prevalence
from biascare.records import Records
from biascare.reports import composition as bias_report
from scripts import data_bias
from tests.tiny import SETTINGS, rows_of, tiny_record_folder, tiny_stream

ROOT = Path(__file__).parents[2]
FEW = settings(max_examples=50, deadline=None)


# ---------------------------------------------------------------- numbers


def test_imbalance_computed_by_hand() -> None:
    numbers = imbalance({"ct": 6, "mri": 3, "xray": 3, MISSING: 4})
    entropy = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)  # 1.5 ln 2
    assert numbers.num_categories == 3 and numbers.ratio == 2
    assert numbers.entropy == pytest.approx(entropy) == pytest.approx(1.5 * math.log(2))
    assert numbers.evenness == pytest.approx(1.5 * math.log(2) / math.log(3))
    assert numbers.effective_number == pytest.approx(2**1.5)
    assert numbers.missing_share == 0.25


def test_one_or_no_category_is_no_division_by_zero() -> None:
    assert imbalance({"ct": 5})[1:] == (1.0, 0.0, 1.0, 1.0, 0.0)
    assert imbalance({MISSING: 5}) == (0, None, None, None, None, 1.0)
    assert imbalance({}) == (0, None, None, None, None, 0.0)


@FEW
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=12), st.integers(2, 50))
def test_imbalance_ignores_scale_and_is_bounded(counts: list[int], factor: int) -> None:
    numbers = imbalance({str(i): n for i, n in enumerate(counts)})
    scaled = imbalance({str(i): n * factor for i, n in enumerate(counts)})
    assert numbers == pytest.approx(scaled)
    assert 1 - 1e-9 <= numbers.effective_number <= len(counts) * (1 + 1e-9)
    assert 0 <= numbers.evenness <= 1 + 1e-9


def target_table(images: list[list[str]]) -> pa.Table:
    targets = [[{"name": name, "rle": b""} for name in names] for names in images]
    kind = pa.list_(pa.struct([("name", pa.string()), ("rle", pa.binary())]))
    return pa.table({"targets": pa.array(targets, kind)})


def test_expected_targets_computed_by_hand() -> None:
    table = target_table([["liver", "lesion"], [], ["liver"]])
    counts = {"liver": 9, "lesion": 1}
    # Weights 9**-0.5 = 1/3 and 1: the first image gives its liver a quarter of its row.
    assert expected_targets(table, counts, 1, 0.5) == pytest.approx({"liver": 1.25, "lesion": 0.75})
    # Two rows of two targets: each once; the image with one target repeats it.
    assert expected_targets(table, counts, 2, 0.5) == {"liver": 3.0, "lesion": 1.0}
    # Three rows: each once, and once more the one that was drawn first.
    rows = expected_targets(table, counts, 3, 0.5)
    assert rows == pytest.approx({"liver": 1.25 + 3, "lesion": 1.75})


def test_two_of_three_targets_are_drawn_as_often_as_counted_by_hand() -> None:
    table = target_table([["a", "b", "c"]] * 4000)
    found = expected_targets(table, {"a": 1, "b": 1, "c": 4}, 2, 0.5)
    # Weights 1, 1, 1/2. P(c first) = 0.2; P(c second) = 2 * 0.4 * (0.5 / 1.5) = 0.2667.
    assert found["c"] / 4000 == pytest.approx(0.2 + 0.8 / 3, abs=0.01)
    assert found["a"] == pytest.approx(found["b"], rel=0.03)
    assert sum(found.values()) == pytest.approx(8000)


@pytest.mark.parametrize("targets_per_image", [1, 2])
def test_expected_shares_agree_with_what_the_stream_draws(
    tiny_records: Path, targets_per_image: int
) -> None:
    stream = tiny_stream(
        tiny_records, None, SETTINGS._replace(targets_per_image=targets_per_image, augment=False)
    )
    drawn = Counter(f.target for position in range(320) for f in stream[position].facts)
    use = SourceUse(Records(tiny_records), "segmentation", 320)
    shares = profile_sources(
        [use],
        targets_per_image=targets_per_image,
        target_power=SETTINGS.target_sampling_power,
    )["target"].stream
    print(
        {name: (round(n / drawn.total(), 3), round(shares[name], 3)) for name, n in drawn.items()}
    )
    for name, share in shares.items():
        assert drawn[name] / drawn.total() == pytest.approx(share, abs=0.05)


def test_a_folder_counts_once_on_disk_and_as_often_as_drawn_in_the_run(tiny_records: Path) -> None:
    records = Records(tiny_records)
    uses = [SourceUse(records, "segmentation", 30), SourceUse(records, "language", 10)]
    profile = profile_sources(uses)
    rows = rows_of(records)
    assert sum(profile["modality"].raw.values()) == len(rows)
    assert profile["sex"].raw == Counter(row["sex"] or MISSING for row in rows)
    # Even rows are MR and have 5 questions, odd ones CT and 2: 20 and 8 of 28.
    mr = 0.75 * 0.5 + 0.25 * 20 / 28
    assert profile["modality"].stream == pytest.approx({"MR": mr, "CT": 1 - mr})
    for axis in ("modality", "anatomy", "target", "age", "sex", "race"):
        assert sum(profile[axis].stream.values()) == pytest.approx(1), axis
    assert profile["race"].raw == {MISSING: 8} and profile["race"].stream == {MISSING: 1.0}
    assert profile["label"].raw == {MISSING: 8}


def test_categories_are_sorted_by_count_ages_by_age_and_the_unknown_last(tmp_path: Path) -> None:
    profile = profile_folders([Records(tiny_record_folder(tmp_path / "train", 9))])
    assert list(profile["age"].raw)[-1] == MISSING
    assert list(profile["age"].raw)[:-1] == sorted(list(profile["age"].raw)[:-1])
    counts = [n for name, n in profile["target"].raw.items() if name != MISSING]
    assert counts == sorted(counts, reverse=True)


# ---------------------------------------------------------------- prevalence files


def test_prevalence_groups_survive_their_file(tmp_path: Path) -> None:
    counts = {"liver": 900, "spleen": 90, "insulinoma": 3}
    path = tmp_path / "prevalence.json"
    groups = save_prevalence(path, counts, 0.5, 0.1, folders=["a/train"])
    assert groups == prevalence_groups(counts, 0.5, 0.1) == load_prevalence(path)
    about = json.loads(path.read_text())
    assert about["targets"]["liver"] == {"masks": 900, "group": "head"}
    assert (about["head_share"], about["tail_share"], about["folders"]) == (0.5, 0.1, ["a/train"])


def test_a_prevalence_file_that_contradicts_itself_or_is_another_file_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "prevalence.json"
    save_prevalence(path, {"liver": 9, "cyst": 1}, 0.5, 0.1)
    path.write_text(path.read_text().replace('"tail"', '"head"'))
    with pytest.raises(ValueError, match="'cyst': got 'head', expected 'tail'"):
        load_prevalence(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="does not hold prevalence groups"):
        load_prevalence(path)
    with pytest.raises(ValueError, match=r"scripts/data_bias\.py"):
        load_prevalence(tmp_path / "absent.json")


# ---------------------------------------------------------------- figure


def many_targets(num: int) -> dict[str, Distribution]:
    empty = Distribution({}, {})
    names = {f"structure with a rather long name {i}": 10_000 // (i + 1) for i in range(num)}
    stream = {name: 1 / num for name in names}
    return {
        "modality": Distribution({"ct": 900, "mri": 3, MISSING: 1}, {"ct": 0.5, "mri": 0.5}),
        "target": Distribution(names, stream),
        "sex": Distribution({"F": 10, "M": 12, MISSING: 900}, {}),
        **dict.fromkeys(("anatomy", "label", "age", "race"), empty),
    }


@FEW
@given(st.integers(0, 200), st.integers(2, 70), st.booleans())
def test_no_category_is_left_out_of_a_panel(num: int, limit: int, unknown: bool) -> None:
    raw = {f"t{i}": float(num - i) for i in range(num)} | ({MISSING: 7.0} if unknown else {})
    bars = bias_report.bars_of(Distribution(raw, {}), limit)
    assert sum(count for _, count, _ in bars) == sum(raw.values())
    assert len(bars) <= limit + unknown
    assert not unknown or bars[-1][0] == MISSING


def test_sixty_target_names_do_not_touch_each_other() -> None:
    profile = many_targets(60)
    figure = bias_report.bias_figure(profile, {})
    figure.canvas.draw()
    texts = [text for axis in figure.axes for text in (*axis.get_yticklabels(), *axis.texts)]
    texts += figure.texts
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) > 120
    whole = figure.bbox
    for i, box in enumerate(boxes):
        assert box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0
        for other in boxes[i + 1 :]:
            assert not (
                box.x0 < other.x1 - 0.5
                and other.x0 < box.x1 - 0.5
                and box.y0 < other.y1 - 1.5
                and other.y0 < box.y1 - 1.5
            ), (box, other)


def panels_of(figure: Any) -> dict[str, Any]:
    """Panel by its title without the letter."""
    titles = {text.get_text()[3:]: axes for axes in figure.axes for text in axes.texts}
    return {name: titles[name] for name in bias_report.TITLES.values() if name in titles}


def test_colours_of_target_groups_are_for_targets_only() -> None:
    groups = dict.fromkeys((f"structure with a rather long name {i}" for i in range(3)), "head")
    panels = panels_of(bias_report.bias_figure(many_targets(3), groups))
    colors = {
        name: {to_hex(patch.get_facecolor()).upper() for patch in panel.patches}
        for name, panel in panels.items()
    }
    assert colors["Target"] == {bias_report.GROUP_COLORS["head"]}
    grey = {bias_report.BAR_COLOR, bias_report.MISSING_COLOR}
    assert colors["Modality"] == colors["Sex"] == grey
    assert not grey & set(bias_report.GROUP_COLORS.values())


def test_each_diamond_has_its_share_beside_it_and_lies_where_a_bar_of_that_share_ends() -> None:
    panel = panels_of(bias_report.bias_figure(many_targets(3), {}))["Modality"]
    shares = [t.get_text() for t in panel.texts if t.get_color() == bias_report.STREAM_COLOR]
    assert shares == ["50.0%", "50.0%", "0.0%"]
    (diamonds,) = panel.lines
    assert diamonds.get_xdata() == pytest.approx([0.5 * 904, 0.5 * 904])
    sex = panels_of(bias_report.bias_figure(many_targets(3), {}))["Sex"]
    assert not sex.lines  # the run is not known


# ---------------------------------------------------------------- the program


def run(*arguments: str) -> None:
    data_bias.run(data_bias.parse(list(arguments)))


def config_file(folder: Path, records: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(
        f"data: {{segmentation: [{{path: {records}}}], ratio: [1, 0], targets_per_image: 2}}\n"
        "model: {vision: tiny, image_size: 64}\n"
        "optim: {warmup_steps: 1}\n"
        "eval: {head_share: 0.4, tail_share: 0.2}\n"
        f"train: {{stage: vision, max_steps: 10, global_batch: 4, output_dir: {folder / 'out'}}}\n"
    )
    return path


def test_the_program_writes_figures_page_numbers_and_groups(
    tmp_path: Path, tiny_records: Path
) -> None:
    config = config_file(tmp_path, tiny_records)
    run("--config", str(config), "--output", str(tmp_path / "bias"), "train.max_steps=20")
    folder = tmp_path / "bias"
    assert {path.name for path in folder.iterdir()} == {
        *("bias.png", "bias.svg", "bias.html", "bias.json", "prevalence.json")
    }
    assert "left kidney" in (folder / "bias.svg").read_text()
    page = (folder / "bias.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")
    axes = json.loads((folder / "bias.json").read_text())["axes"]
    assert axes["race"]["on_disk"] == {MISSING: 8}
    assert axes["race"]["imbalance_on_disk"]["missing_share"] == 1
    assert axes["race"]["imbalance_on_disk"]["evenness"] is None
    assert axes["target"]["on_disk"] == Records(tiny_records).target_counts
    source = json.loads((folder / "bias.json").read_text())["sources"][0]
    assert (source["drawn"], source["passes"]) == ("80", "10.00")  # 20 steps of 4, of 8 images
    groups = load_prevalence(folder / "prevalence.json")
    assert groups == prevalence_groups(Records(tiny_records).target_counts, 0.4, 0.2)


def test_record_folders_do_without_a_configuration(tmp_path: Path, tiny_records: Path) -> None:
    run(str(tiny_records), "--output", str(tmp_path / "bias"))
    axes = json.loads((tmp_path / "bias" / "bias.json").read_text())["axes"]
    assert axes["modality"]["on_disk"] == {"CT": 4, "MR": 4} and axes["modality"]["run"] == {}


def test_an_axis_of_unknown_values_has_no_imbalance_in_the_table() -> None:
    nothing = Distribution({MISSING: 8}, {})
    table = bias_report.imbalance_table(
        {"race": nothing, "sex": Distribution({"F": 3, "M": 1}, {})}
    )
    cells = list(zip(*(list(column.cells) for column in table.columns), strict=True))
    assert cells[0] == ("race", "disk", "0", "-", "-", "-", "100.0%")
    assert cells[1][3:6] == ("3.0", "0.811", "1.8")


def test_the_title_says_how_many_folders_it_does_not_name(tmp_path: Path) -> None:
    folders = [tiny_record_folder(tmp_path / s, 4, s) for s in ("train", "val", "test", "extra")]
    run(*map(str, folders), "--output", str(tmp_path / "bias"))
    title = "tiny/train, tiny/val, tiny/test and 1 more"
    assert f"<h1>{title}</h1>" in (tmp_path / "bias" / "bias.html").read_text()
    assert title in (tmp_path / "bias" / "bias.svg").read_text()
    assert bias_report.title_of([{"source": "a", "split": "train"}] * 5) == "a/train"


def test_a_folder_that_is_not_there_ends_with_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/data_bias.py", str(tmp_path / "absent")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_enter_as_shares_of_the_run(tmp_path: Path, tiny_records: Path) -> None:
    other = tiny_record_folder(tmp_path / "other", 4)
    sources = f"[{{path: {tiny_records}, weight: 3}}, {{path: {other}, weight: 1}}]"
    config = load_config(config_file(tmp_path, tiny_records), [f"data.segmentation={sources}"])
    assert [use.num_drawn for use in data_bias.sources_of(config)] == [30, 10]
