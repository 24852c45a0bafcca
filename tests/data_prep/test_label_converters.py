"""Label datasets (ISIC 2018, HAM10000, PAPILA), and what all converters share: words and files."""

from __future__ import annotations

import argparse
import importlib
import io
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import ham10000, isic2018, papila
from data_prep.formats.spreadsheets import read_sheet
from data_prep.formats.zip_images import ImageFinder, Place
from data_prep.pipeline.attributes import UNREADABLE_AGE, UNREADABLE_SEX
from data_prep.pipeline.program import run_program
from data_prep.pipeline.release_files import file_inside, find_table, read_image, read_table
from data_prep.pipeline.shards import UnusableItemError
from data_prep.wording import conversations
from data_prep.wording.conversations import choice_of, closed_answer, drawn_split, question_of
from tests.data_prep.raw_releases import (
    masks_of,
    options_of,
    picture,
    put,
    put_sheet,
    put_table,
    put_zip,
    rows_of,
    run,
    said,
    skipped,
)

CONVERTERS = (
    "cxr_lt", "ham10000", "isic2018", "mimic_cxr", "papila", "pathvqa", "pmc_vqa", "pubmedvision",
    "slake", "vqa_rad",
)  # fmt: skip

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    path.stem for path in (ROOT / "data_prep").glob("*.py") if path.stem != "__init__"
)


# --- ISIC 2018


def isic_row(image: str, *hot: str) -> dict[str, str]:
    return {"image": image} | {code: "1.0" if code in hot else "0.0" for code in isic2018.CODES}


@pytest.fixture
def isic(tmp_path: Path) -> Path:
    source = tmp_path / "ISIC2018"
    rows = {
        "Training": [
            isic_row("ISIC_0024306", "NV"),
            isic_row("ISIC_0024307", "NV", "MEL"),
            isic_row("ISIC_0024308"),
            isic_row("ISIC_0024309", "DF"),
        ],
        "Validation": [isic_row("ISIC_0034321", "MEL")],
        "Test": [isic_row("ISIC_0034524", "VASC")],
    }
    for word, table in rows.items():
        name = f"ISIC2018_Task3_{word}"
        put_table(source / f"{name}_GroundTruth" / f"{name}_GroundTruth.csv", table)
        put(source / f"{name}_Input" / f"{table[0]['image']}.jpg", picture(7))
    groups = [{"image": "ISIC_0024306", "lesion_id": "HAM_0000550", "diagnosis_confirm_type": "x"}]
    put_table(source / isic2018.GROUPINGS, groups)
    return source


def test_isic2018_has_one_diagnosis_per_image_or_the_ledger_says_why(
    isic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(isic2018, isic, tmp_path / "out", "--max-skipped", "0.8")
    out = tmp_path / "out" / "isic2018"
    (row,) = rows_of(out / "train").values()
    ((_, answer, kind),) = said(row)
    (options,) = options_of(row)
    assert (row["id"], row["labels"], kind) == (
        "isic2018/ISIC_0024306", ["melanocytic nevus"], "choice",
    )  # fmt: skip
    assert (len(set(options)), answer in options, answer) == (7, True, "melanocytic nevus")
    assert (row["study_id"], row["patient_id"]) == ("ham10000/HAM_0000550", None)
    assert skipped(out / "train") == [
        ("ISIC_0024307", "several diagnoses"),
        ("ISIC_0024308", "no diagnosis"),
        ("ISIC_0024309", "file missing"),
    ]
    (val,) = rows_of(out / "val").values()
    (test,) = rows_of(out / "test").values()
    assert (val["labels"], test["labels"]) == (["melanoma"], ["vascular lesion"])
    assert "expected 10,015 ISIC 2018 train images, found 4" in capsys.readouterr().out


# --- HAM10000


def ham_row(number: int, lesion: int, **changes: str) -> dict[str, str]:
    base = {
        "lesion_id": f"HAM_{lesion:07d}", "image_id": f"ISIC_{number:07d}", "dx": "bkl",
        "dx_type": "histo", "age": "80.0", "sex": "male", "localization": "scalp",
    }  # fmt: skip
    return base | changes


def test_ham10000_keeps_a_lesion_on_one_side_and_unknown_unknown(tmp_path: Path) -> None:
    source = tmp_path / "HAM10000"
    unknown = {"age": "", "sex": "unknown", "localization": "unknown"}
    rows = [ham_row(number, number // 2) for number in range(38)]
    rows += [ham_row(38, 99, dx="mel", **unknown), ham_row(39, 99, dx="scc", sex="female")]
    put_table(source / "HAM10000_metadata.csv", rows)
    for row in rows[:20]:
        put(source / "HAM10000_images_part_1" / f"{row['image_id']}.jpg", picture(1))
    second = {f"{row['image_id']}.jpg": picture(2) for row in rows[20:]}
    put_zip(source / "HAM10000_images_part_2.zip", second)
    more = ("--test-share", "0.4", "--val-share", "0.2", "--max-skipped", "0.2")
    run(ham10000, source, tmp_path / "out", *more)
    splits = {s: rows_of(tmp_path / "out" / "ham10000" / s) for s in ("train", "val", "test")}
    assert sum(map(len, splits.values())) == 39  # squamous cell carcinoma is no code of HAM10000
    sides: dict[str, set[str]] = {}
    for split, found in splits.items():
        for row in found.values():
            sides.setdefault(row["study_id"], set()).add(split)
    assert all(len(side) == 1 for side in sides.values())
    assert {split for side in sides.values() for split in side} == set(splits)
    everything = {key: row for found in splits.values() for key, row in found.items()}
    row = everything["ham10000/ISIC_0000000"]
    assert (row["sex"], row["age"], row["labels"]) == ("M", 80.0, ["benign keratosis"])
    assert [(answer, kind) for _, answer, kind in said(row)][1:] == [
        ("no", "closed"), ("scalp", "open"),
    ]  # fmt: skip
    melanoma = everything["ham10000/ISIC_0000038"]
    assert (melanoma["sex"], melanoma["age"], melanoma["study_id"]) == (
        None, None, "ham10000/HAM_0000099",
    )  # fmt: skip
    assert [answer for _, answer, _ in said(melanoma)][1:] == ["yes"]


def quoted(value: str) -> str:
    return value if value.replace(".", "").isdigit() or not value else f'"{value}"'


@pytest.mark.parametrize("name", ["HAM10000_metadata.tab", "HAM10000_metadata"])
def test_ham10000_reads_the_forms_of_dataverse_and_its_ages(tmp_path: Path, name: str) -> None:
    rows = [
        ham_row(1, 1), ham_row(2, 2, age="0.0"), ham_row(3, 3, age="old", sex="x"),
        ham_row(4, 4, age="85+"),
    ]  # fmt: skip
    # As Dataverse ingests a table: tabs between columns, texts in quotes. Or as it was uploaded.
    tab = name.endswith(".tab")
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    body = [[quoted(value) for value in line] if tab else line for line in lines]
    put(tmp_path / "in" / name, "\n".join(("\t" if tab else ",").join(line) for line in body))
    for row in rows:
        put(tmp_path / "in" / "images" / f"{row['image_id']}.jpg", picture(1))
    shares = ("--test-share", "0", "--val-share", "0")
    run(ham10000, tmp_path / "in", tmp_path / "out", *shares)
    folder = tmp_path / "out" / "ham10000" / "train"
    assert [row["age"] for row in rows_of(folder).values()] == [80.0, None, None, 85.0]
    assert skipped(folder) == [
        ("ISIC_0000002", "age 0 is taken for unknown"),
        ("ISIC_0000003", UNREADABLE_SEX),
        ("ISIC_0000003", UNREADABLE_AGE),
    ]


# --- PAPILA


def put_papila(source: Path) -> Path:
    """Four patients; the header has three rows, as in the release."""
    header: list[dict[str, str | float]] = [
        {"B": "Age", "C": "Gender", "D": "Diagnosis", "E": "Refractive_Defect"},
        {"E": "dioptre_1", "F": "dioptre_2", "G": "astigmatism"},
        {"A": "ID"},
    ]
    patients: list[dict[str, str | float]] = [
        {"A": "#002", "B": 47, "C": 0, "D": 2, "E": 0.75},
        {"A": "#004", "B": 58, "C": 1, "D": 1},
        {"A": "#005", "B": 89.0, "C": 1, "D": 0},
        {"A": "#010", "C": 1, "D": 0},
    ]
    put_sheet(source / "ClinicalData" / "patient_data_od.xlsx", [*header, *patients])
    put_sheet(source / "ClinicalData" / "patient_data_os.xlsx", [*header, patients[1]])
    contours = source / papila.CONTOURS
    for name in ("RET002OD", "RET004OD", "RET005OD", "RET010OD", "RET004OS"):
        put(source / "FundusImages" / f"{name}.jpg", picture(3, (12, 10)))
        for expert in (1, 2):
            square = "2.0 1.0\n8.0 1.0\n8.0 7.0\n2.0 7.0\n"
            put(contours / f"{name}_disc_exp{expert}.txt", square)
            put(contours / f"{name}_cup_exp{expert}.txt", f"3 3\n{3 + expert} 3\n3 5\n")
    (contours / "RET010OD_cup_exp1.txt").unlink()
    return source


def test_the_other_expert_of_papila_is_no_rerun(tmp_path: Path) -> None:
    source = put_papila(tmp_path / "PapilaDB")
    none = ("--test-share", "0", "--val-share", "0", "--max-skipped", "0.5")
    run(papila, source, tmp_path / "out", *none)
    with pytest.raises(ValueError, match=r"other options: expert was 1, is 2\. Give --overwrite"):
        run(papila, source, tmp_path / "out", *none, "--expert", "2")


def test_papila_says_when_few_patients_miss_the_shares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = put_papila(tmp_path / "PapilaDB")
    papila.plan(source, {"test": 0.03, "val": 0.03}, 1, "separate")
    assert "papila: the splits of 5 eyes are not near" in " ".join(capsys.readouterr().out.split())


def test_papila_has_masks_grades_and_patients(tmp_path: Path) -> None:
    source = put_papila(tmp_path / "PapilaDB")
    none = ("--test-share", "0", "--val-share", "0", "--max-skipped", "0.5")
    run(papila, source, tmp_path / "out", *none)
    train = rows_of(tmp_path / "out" / "papila" / "train")
    eyes = ("002OD", "004OD", "004OS", "005OD", "010OD")
    assert list(train) == [f"papila/RET{eye}" for eye in eyes]
    suspect, right, left, healthy, incomplete = train.values()
    assert [row["labels"][0] for row in train.values()] == [
        "glaucoma suspect", "glaucoma", "glaucoma", "healthy", "healthy",
    ]  # fmt: skip
    assert [(row["sex"], row["age"]) for row in train.values()] == [
        ("M", 47.0), ("F", 58.0), ("F", 58.0), ("F", 89.0), ("F", None),
    ]  # fmt: skip
    assert right["patient_id"] == left["patient_id"] == "papila/4"
    assert (right["extra"]["eye"], left["extra"]["eye"]) == ("right", "left")
    assert [kind for _, _, kind in said(suspect)] == ["choice"]  # yes or no would be a guess
    assert [(kind, answer) for _, answer, kind in said(healthy)][1:] == [("closed", "no")]
    assert [(kind, answer) for _, answer, kind in said(right)][1:] == [("closed", "yes")]
    masks = masks_of(right)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "optic disc": 36, "optic cup": 2,
    }  # fmt: skip
    assert masks["optic disc"][1:7, 2:8].all()
    # A contour that is gone costs its target, not the eye's grade, and counts all the same.
    assert (list(masks_of(incomplete)), len(said(incomplete))) == (["optic disc"], 2)
    assert skipped(tmp_path / "out" / "papila" / "train") == [
        ("RET010OD", "optic cup: contour: file missing")
    ]
    with pytest.raises(ValueError, match="1 of 5 items skipped, 1 of them with a record that"):
        run(papila, source, tmp_path / "strict", "--test-share", "0", "--val-share", "0")


def test_suspects_can_be_left_out_and_patients_stay_together(tmp_path: Path) -> None:
    source = put_papila(tmp_path / "PapilaDB")
    releases = papila.plan(source, {"test": 0.5}, 2, "exclude")
    sides = {item.patient: release.split for release in releases for item in release.items}
    assert sum(len(release.items) for release in releases) == 5
    for release in releases:
        for item in release.items:
            assert sides[item.patient] == release.split
    suspect = next(i for r in releases for i in r.items if i.diagnosis == papila.SUSPECT)
    assert papila.convert(source, "train", 2, "exclude", suspect) is None


def test_a_value_without_a_meaning_is_an_error(tmp_path: Path) -> None:
    rows: list[dict[str, str | float]] = [
        {"B": "Age", "C": "Gender", "D": "Diagnosis"},
        {"A": "#002", "B": 40, "C": 0, "D": 3},
    ]
    table = put_sheet(tmp_path / "patient_data_od.xlsx", rows)
    with pytest.raises(ValueError, match=r"Diagnosis is one of .* got 3"):
        list(papila.read_eyes(table, "OD"))
    rows[0]["D"] = "Diagnose"
    put_sheet(tmp_path / "patient_data_od.xlsx", rows)
    with pytest.raises(ValueError, match=r"no column \['Diagnosis'\]"):
        list(papila.read_eyes(table, "OD"))


def test_a_contour_holds_the_pixels_whose_centres_it_surrounds() -> None:
    square = np.array([[0.5, 0.5], [3.5, 0.5], [3.5, 2.5], [0.5, 2.5]])
    mask = papila.fill_contour(square, 4, 5)
    np.testing.assert_array_equal(mask[1:3, 1:4], True)
    assert mask.sum() == 6
    beyond = papila.fill_contour(square - 2, 4, 5)
    np.testing.assert_array_equal(np.argwhere(beyond), [[0, 0], [0, 1]])


CORNERS = st.lists(st.tuples(st.floats(-3, 14), st.floats(-3, 14)), min_size=3, max_size=9)


@settings(deadline=None, max_examples=25)
@given(CORNERS)
def test_filling_agrees_with_counting_edges_above_each_pixel(
    corners: list[tuple[float, float]],
) -> None:
    mask = papila.fill_contour(np.array(corners), 12, 12)
    for y, x in np.ndindex(12, 12):
        above, on_border = 0, False
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
            along, across = np.array([x1 - x0, y1 - y0]), np.array([x - x0, y - y0])
            share = np.clip(along @ across / max(along @ along, 1e-12), 0, 1)
            on_border |= bool(np.linalg.norm(across - share * along) < 1e-6)
            if (x0 <= x) != (x1 <= x):
                above += y0 + (x - x0) * (y1 - y0) / (x1 - x0) < y
        assert on_border or mask[y, x] == above % 2


# --- programs


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_tells_every_default(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[argparse.Action] = []

    def stop(parser: argparse.ArgumentParser, arguments: Any) -> None:
        found.extend(parser._actions)
        parser.format_help()  # a stray % in a help text fails here
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(f"data_prep.{program}").main([])
    silent = [
        action.option_strings
        for action in found
        if not (action.required or action.default in (None, False, argparse.SUPPRESS))
        and action.default != []
        and "default: " not in (action.help or "")
    ]
    assert len(found) > 2 and not silent
    assert not [action.option_strings for action in found if not action.help]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--source", "gone"), "gone/ISIC2018_Task3_Training_GroundTruth is not a folder"),
        (("--job-index", "2"), "--job-index counts from 0 to --num-jobs - 1, got 2 of 1"),
        (("--max-skipped", "0.5"), "isic2018/train: 3 of 4 items skipped"),
    ],
)
def test_an_error_of_the_user_is_one_message_and_no_traceback(
    isic: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    command = [sys.executable, "-m", "data_prep.isic2018", "--source", str(isic)]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), *more],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert message in done.stderr


def test_every_program_reports_the_errors_of_its_user() -> None:
    for program in PROGRAMS:
        text = (ROOT / "data_prep" / f"{program}.py").read_text()
        assert text.endswith('if __name__ == "__main__":\n    run_program(main)\n'), program


@pytest.mark.parametrize("error", [ValueError("no column x"), PermissionError(13, "denied", "x")])
def test_an_error_of_the_user_is_its_message_and_exit_code_one(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_program(main)
    assert stopped.value.code == str(error)  # python prints it to stderr and exits with 1


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("toy, item 3: KeyError: 'x'")])
def test_an_error_of_the_program_keeps_its_traceback(error: Exception) -> None:
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        run_program(main)


# --- words


def test_yes_and_no_have_one_spelling_everywhere() -> None:
    assert [closed_answer(text) for text in ("Yes", " NO. ", "yes!", "Not seen", "y")] == [
        "yes", "no", "yes", None, None,
    ]  # fmt: skip
    assert question_of("Is it?", "YES") == ("Is it?", "yes", "closed", ())
    assert question_of("Is it?", "Yes", "OPEN ") == ("Is it?", "Yes", "open", ())
    assert question_of("a\n b <image>", "2") == ("a b", "2", "open", ())
    with pytest.raises(ValueError, match="unknown type 'other'"):
        question_of("Is it?", "yes", "other")
    with pytest.raises(ValueError, match="empty"):
        question_of("<image>", "yes")


def test_options_keep_their_order_and_the_answer_is_one_of_them() -> None:
    question = choice_of("Which?", ["liver", "spleen"], 1)
    assert question == ("Which?", "spleen", "choice", ("liver", "spleen"))
    with pytest.raises(ValueError, match="several choices"):
        choice_of("Which?", ["liver", "spleen", "liver"], 2)


def test_facts_are_the_words_of_the_release_and_what_it_leaves_open_is_left_out() -> None:
    stated = {"qid": 7, "question_type": ["PRES", "POS"], "organ": " CHEST\n", "evaluation": "NULL"}
    empty = {"case": None, "triple": [], "location": " "}
    assert conversations.facts_of(**stated, **empty) == {
        "qid": "7", "question_type": "PRES, POS", "organ": "CHEST",
    }  # fmt: skip


def test_held_out_shares_are_realised_and_a_key_never_moves() -> None:
    shares = {"test": 0.2, "val": 0.1}
    counts = Counter(drawn_split(f"patient {n}", shares) for n in range(5000))
    assert abs(counts["test"] - 1000) < 4 * 29  # standard deviation: sqrt(5000 * 0.2 * 0.8) = 28.3
    assert abs(counts["val"] - 500) < 4 * 22
    larger = {n for n in range(1000) if drawn_split(f"patient {n}", {"test": 0.3}) == "test"}
    assert larger >= {n for n in range(1000) if drawn_split(f"patient {n}", shares) == "test"}
    with pytest.raises(ValueError, match="held-out shares"):
        drawn_split("x", {"test": 0.8, "val": 0.3})


# --- files


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_and_jpeg_keep_their_bytes() -> None:
    for kind in ("PNG", "JPEG"):
        assert read_image(picture(1, kind=kind)) == (picture(1, kind=kind), 4, 6)


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "WEBP"])
def test_other_formats_become_png_with_the_same_pixels(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = read_image(encoded(Image.fromarray(pixels), kind, **options))
    opened = Image.open(io.BytesIO(image.data))
    assert opened.format == "PNG"
    np.testing.assert_array_equal(np.asarray(opened), pixels)


def test_palette_colours_and_sixteen_bits_survive() -> None:
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    opened = Image.open(io.BytesIO(read_image(encoded(palette, "PNG")).data))
    assert (opened.mode, opened.getpixel((0, 0))) == ("RGB", (200, 100, 50))
    deep = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000
    stored = read_image(encoded(Image.fromarray(deep), "TIFF"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored.data))), deep)


def test_images_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    frames = [Image.new("L", (6, 4), n) for n in (0, 9)]
    several = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    real = encoded(Image.fromarray(np.ones((4, 6), np.float32)), "TIFF")
    for data, reason in (
        (picture(1)[:-60], "unreadable"),
        (b"no image", "unreadable"),
        (several, "several frames"),
        (real, "mode F has no lossless PNG"),
    ):
        with pytest.raises(UnusableItemError, match=reason):
            read_image(data)
    put(tmp_path / "secret.jpg", picture(1))
    (tmp_path / "source").mkdir()
    for path, reason in (("../secret.jpg", "leaves"), ("x.jpg", "missing"), ("", "without")):
        with pytest.raises(UnusableItemError, match=reason):
            file_inside(tmp_path / "source", path)


def test_tables_are_read_with_quotes_marks_and_gzip(tmp_path: Path) -> None:
    rows = [{"a": 'x, "y"\nz', "b": "\u03b2"}]
    for name in ("plain.csv", "packed.csv.gz"):
        put_table(tmp_path / name, rows)
        assert list(read_table(find_table(tmp_path, name.removesuffix(".gz")), ("a",))) == rows
    put(tmp_path / "mark.csv", "\ufeffa,b\n1,2\n")
    assert list(read_table(tmp_path / "mark.csv", ("a", "b"))) == [{"a": "1", "b": "2"}]


def test_tables_that_are_none_are_errors_for_the_user(tmp_path: Path) -> None:
    put(tmp_path / "long.csv", "a,b\n1,2,3\n")
    with pytest.raises(ValueError, match=r"long\.csv:2: more fields"):
        list(read_table(tmp_path / "long.csv", ("a",)))
    put(tmp_path / "bytes.csv", b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"is not UTF-8 text .* save it as CSV in UTF-8"):
        list(read_table(tmp_path / "bytes.csv", ("a",)))
    put(tmp_path / "false.csv.gz", "a\n1\n")
    with pytest.raises(ValueError, match="not a readable CSV"):
        list(read_table(tmp_path / "false.csv.gz", ("a",)))
    with pytest.raises(ValueError, match=r"did you mean 'long\.csv'"):
        find_table(tmp_path, "lang.csv")


def test_a_spreadsheet_with_entities_is_refused(tmp_path: Path) -> None:
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaa">]><worksheet>&a;</worksheet>'
    path = put_zip(tmp_path / "x.xlsx", {"xl/worksheets/sheet1.xml": bomb})
    with pytest.raises(ValueError, match="declares a document type"):
        read_sheet(path)
    with pytest.raises(ValueError, match="no worksheet"):
        read_sheet(put_zip(tmp_path / "y.xlsx", {"a.txt": b""}))


def test_a_file_wins_over_an_archive_and_no_place_over_a_guess(tmp_path: Path) -> None:
    put_zip(tmp_path / "images_0.zip", {"images/a.jpg": b"1", "b/b.jpg": b"2"})
    put(tmp_path / "images" / "a.jpg", b"3")
    finder = ImageFinder(tmp_path, ("images",), "images_*.zip")
    assert finder.place("x/a.jpg") == Place("images/a.jpg", "")
    assert finder.place("b.jpg") == Place("images_0.zip", "b/b.jpg")
    assert finder.place("../c.jpg") is None
    with pytest.raises(ValueError, match="neither"):
        ImageFinder(tmp_path / "images", ("other",), "*.zip")


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTERS)
def test_help_states_the_layout_it_expects(name: str) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "data_prep" / f"{name}.py"), "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Layout of --source" in text
    assert "--num-workers" in text


def test_an_interrupted_program_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_program(interrupted)
    assert end.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
