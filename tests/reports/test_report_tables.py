"""Tables: published cells, measured rows beside them, what may share a table, footnotes, escaping."""

import csv
import dataclasses
import io
import re

import pytest

from reports.render import escape_latex, to_csv, to_latex, to_markdown
from reports.rows import console_table, make_rows
from reports.sections import note_mark
from reports.tables import MAX_LINES, paper_tables, protocol_file_name, protocol_table
from reports.texts import count_text, measured_text, metric_title, quantity_text
from results import paper
from results.records import Sampling


def _table(name, records=()):
    return next(table for table in paper_tables(records) if table.name == name)


def _read(table):
    return list(csv.DictReader(io.StringIO(to_csv(table))))


def test_published_cells_reach_the_files_as_printed():
    columns = {"FID": "fid", "sFID": "sfid", "IS": "is", "Precision": "precision", "Recall": "recall"}
    checked = 0
    for number in range(1, 7):
        table = _table(f"table-{number}")
        rows = {row["model"]: row for row in _read(table)}
        text = to_markdown(table)
        for cell in paper.values():
            if cell.table == f"Table {number}":
                assert rows[cell.row][columns.get(cell.column, cell.column)] == cell.value
                assert rows[cell.row]["provenance"] == "published"
                assert not cell.value or re.search(rf" (\*\*)?{re.escape(cell.value)}(\*\*)?(<sup>=</sup>)? \|", text)
                checked += 1
    assert checked == 305


def test_measured_rows_join_table_2_and_are_told_apart(imagenet):
    table = _table("table-2", [imagenet("fid", 2.31), imagenet("is", 277.7), imagenet("kid", 0.001)])
    (section,) = table.sections
    assert [line.published for line in section.lines] == [True] * 15 + [False]
    cells = section.lines[-1].cells
    assert cells[0] == "dit-xl-2-256-cfg1.5 (800 steps, seed 0)" and cells[-1] == "measured"
    assert cells[1:4] == ("2.310 [2.290, 2.330]", "-", "277.700 [277.680, 277.720]")
    # the same guidance scale on other channels, and another framework, are differences that a footnote states
    notes = [section.footnotes[index] for index in section.lines[-1].notes]
    assert any("guidance 1.5 (all)" in note for note in notes) and any("framework torch" in note for note in notes)
    published = [section.footnotes[index] for index in section.lines[14].notes]
    assert any("guidance 1.5 (first-3)" in note for note in published)
    markdown, latex = to_markdown(table), to_latex(table)
    assert markdown.count("<sup>\u2020") == 16  # 15 rows and the note
    assert "dit-xl-2-256-cfg1.5 (800 steps" in markdown and latex.count("\\midrule") == 2
    assert "N = 50,000" in markdown


@pytest.mark.parametrize(
    "changes", [{"n": 10_000}, {"resolution": 128}, {"dataset": "imagenette"}, {"evaluation": None}]
)
def test_what_is_not_comparable_stays_out_of_table_2(imagenet, changes):
    assert len(_table("table-2", [imagenet("fid", 2.31)]).sections[0].lines) == 16
    (section,) = _table("table-2", [imagenet("fid", 2.31, **changes)]).sections
    assert len(section.lines) == 15


def test_other_features_are_another_section(imagenet):
    table = _table("table-2", [imagenet("fid", 2.31), imagenet("fid", 2.5, features="aa" * 32)])
    assert [len(section.lines) for section in table.sections] == [15, 1, 1]
    assert [row["section"] for row in _read(table)] == ["1"] * 15 + ["2", "3"]


def test_tables_4_and_5_take_measured_rows(imagenet):
    unguided = Sampling(sampler="ddpm", steps=250)
    measured = imagenet("fid", 70.0, backbone="dit-b-4", system="dit-b-4", gflops=5.5664, sampling=unguided)
    first, second = _table("table-4", [measured]).sections
    assert first.lines[-1].cells[2:4] == ("-", "5.57")
    # what holds of all rows holds of the published ones as well, which were made in another framework
    assert "All rows: sampler ddpm, sampling steps 250, guidance none." in first.remarks
    assert (len(first.lines), len(second.lines)) == (18, 2)
    assert first.lines[-1].cells[-2] == "70.000 [69.980, 70.020]"
    assert len(_table("table-4", [imagenet("fid", 2.3)]).sections[0].lines) == 17  # guided: not of Table 4
    assert len(_table("table-5", [imagenet("fid", 2.3)]).sections[0].lines) == 4


def test_seeds_are_told_apart_in_sections_of_table_4_without_the_paper(imagenet):
    for features in (("ef" * 32, "ab" * 32), ("ef" * 32,)):  # two sections of measured rows, or one with the paper's
        measured = [
            imagenet(
                "fid", 70.0 + seed, name, backbone="dit-b-4", system="dit-b-4", seed=seed,
                sampling=Sampling(sampler="ddpm", steps=250),
            )
            for name in features
            for seed in (0, 1)
        ]  # fmt: skip
        sections = [each for each in _table("table-4", measured).sections if each.lines[-1].cells[-1] == "measured"]
        assert len(sections) == len(features)
        for section in sections:
            notes = [" ".join(section.footnotes[index] for index in line.notes) for line in section.lines[-2:]]
            assert "training seed 0" in notes[0] and "training seed 1" in notes[1]


def test_protocol_table(study):
    table = protocol_table("digits", study)
    assert table.name == "table-digits"
    section, means = table.sections
    assert len(section.lines) == 18 and len(table.data) == 18 + len(means.lines)
    assert section.columns[-3:] == ("FD-1K\u2193", "KD\u2193", "Precision\u2191")
    head = dict(zip(section.columns, section.lines[0].cells, strict=True))
    assert (head["System"], head["Seed"], head["Sampling steps"]) == ("dit-xs-4", "0", "10")
    assert head["FD-1K\u2193"] == "39.6 [37.6, 41.6]"
    rows = _read(table)
    assert all(row["n"] == "1000" and row["provenance"] == "measured" for row in rows)
    values = {float(row["fd"]) for row in rows if row["section"] == "1"}
    assert values == {record.value for record in study if record.metric == "fd"}
    assert protocol_table("imagenet-256", study) is None


def test_rows_are_merged_only_where_all_identity_agrees(record):
    sampling = record().sampling
    others = [
        record("kid"),
        record("kid", sampling=dataclasses.replace(sampling, eta=0.5)),
        record("kid", sampling=dataclasses.replace(sampling, uint8_rule="round")),
        record("kid", training=dataclasses.replace(record().training, recipe_hash="00")),
        record("kid", protocol_version="2"),
        record("kid", n=999),
    ]
    rows = make_rows([record(), *others])
    assert sorted(len(row.records) for row in rows) == [1, 1, 1, 1, 1, 2]
    table = protocol_table("digits", [record(), *others])
    assert [len(section.lines) for section in table.sections] == [5, 1]  # N = 999 is not comparable
    notes = " ".join(table.sections[0].footnotes)
    for word in ("eta 0.5", "uint8 rule round", "recipe 00", "protocol version 2"):
        assert word in notes


def test_console_table(study, record):
    rows = console_table(make_rows(study))
    assert len(rows) == 18 and len({tuple(row) for row in rows}) == 1
    assert rows[0]["KD\u2193"] == "0.00990 [0.00941, 0.01040]"
    assert "Params (M)" in rows[0] and console_table([]) == []
    mixed = console_table(make_rows([record(), record(n=500)]))
    assert {row["N"] for row in mixed} == {"1000", "500"} and all("FD\u2193" in row for row in mixed)


NASTY = "a|b_c%d&e#f{g}h\\i$j^k~l<m>n`o*p[q]r\ns\ud800t"


def test_text_from_records_is_escaped(record):
    table = protocol_table("digits", [record(system=NASTY, framework="<script>")])
    markdown, latex = to_markdown(table), to_latex(table)
    (line,) = [line for line in markdown.splitlines() if line.startswith("| a")]
    assert len(re.findall(r"(?<!\\)\|", line)) == len(table.sections[0].columns) + 1
    assert "<script>" not in markdown and "&lt;script&gt;" in markdown
    (line,) = [line for line in latex.splitlines() if line.startswith("a|b")]
    assert r"a|b\_c\%d\&e\#f\{g\}h\textbackslash{}i\$j\textasciicircum{}k\textasciitilde{}l" in line
    assert len(re.findall(r"(?<!\\)&", line)) == len(table.sections[0].columns) - 1
    depth = 0
    for character in re.sub(r"\\[\\{}]", "", latex):
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    for text in (markdown, latex, to_csv(table)):
        text.encode("utf-8")
    assert len(_read(table)) == 1
    assert escape_latex("[50K]") == "{[}50K{]}"


def test_protocol_names_are_safe_file_names():
    names = ["digits", "../../etc/x", "a/b", "a%2Fb", "2", "..", "x" * 5000, "x" * 5001, "\ud800", "\u4e2d"]
    made = [protocol_file_name(name) for name in names]
    assert len(set(made)) == len(names) and made[0] == "table-digits"
    assert all(re.fullmatch(r"[A-Za-z0-9_.~%-]{1,120}", name) for name in made)
    assert protocol_file_name("2") not in {f"table-{number}" for number in range(1, 7)}


@pytest.mark.parametrize("name", ["../../evil", "2", "a/b"])
def test_the_table_of_a_protocol_is_named_safely(record, name):
    table = protocol_table(name, [record(protocol=name)])
    assert table.name == protocol_file_name(name) and "/" not in table.name


def test_number_texts():
    assert metric_title("fid", 50_000) == "FID-50K\u2193" and metric_title("fid", 49_999) == "FID-49999\u2193"
    assert metric_title("precision", 50_000, "adm-fp16") == "Precision (adm-fp16)\u2191"
    assert metric_title("my_metric", 10) == "my_metric"
    for features, kid, score in (
        (None, "KID", "IS"),
        ("inception", "KID", "IS"),
        ("efficientnet-lite0-96", "KD", "IS-style"),
    ):
        assert metric_title("kid", 10, features=features) == f"{kid}\u2193"
        assert metric_title("is", 10, features=features) == f"{score}\u2191"
    assert measured_text(3.26789, 3.21, 3.33) == "3.27 [3.21, 3.33]"
    assert measured_text(0.00123, 0.0011, 0.0014) == "0.00123 [0.00110, 0.00140]"
    assert measured_text(123.456, 100, 150) == "123 [100, 150]"
    assert measured_text(1.5, 1.5, 1.5) == "1.5 [1.5, 1.5]" and measured_text(1 / 3, None, None) == "0.3333"
    assert [count_text(count) for count in (None, 0, 800, 400_000, 7_000_000, 1_301_000)] == [
        "-", "0", "800", "400K", "7M", "1301K",
    ]  # fmt: skip
    assert [quantity_text(value) for value in (118.6379, 0.0171, 29660.0, 6.378e11, None)] == [
        "118.64", "0.0171", "29660", "6.38e11", "-",
    ]  # fmt: skip
    assert [note_mark(index) for index in (0, 25, 26, 27, 701, 702)] == ["a", "z", "aa", "ab", "zz", "aaa"]


def test_very_many_rows_are_in_the_csv_file_and_the_first_and_best_are_printed(record):
    records = [record(value=100.0 - 0.01 * index, half=0.001, system=f"s{index:04}") for index in range(MAX_LINES + 50)]
    table = protocol_table("digits", records)
    (section,) = table.sections
    assert len(table.data) == len(records) and len(section.lines) == MAX_LINES + 1
    assert section.lines[-1].marks[-1] == "best" and section.remarks[0] == "49 more rows are in the CSV file."
