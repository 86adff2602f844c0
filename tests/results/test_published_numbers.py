"""The CSV files of published numbers against a transcription of the paper's tables made apart from them."""

import json
from pathlib import Path

import pytest

from results import paper
from results.records import from_json, to_json

TABLES = json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="ascii"))
# Columns of the printed tables that are the row's name here, and the name's words.
NAMED = {"Model", "Image Resolution", "Decoder"}


def _row_name(table: str, cells: dict[str, str]) -> str:
    if table == "Table 4":
        steps, block = cells["Training Steps (K)"], cells["DiT Block"]
        return f"{cells['Model']}, {cells['Image Resolution']}, {steps}K, {block}"
    if table == "Table 6":
        return f"{cells['Model']}, {cells['Image Resolution']}"
    return cells.get("Model") or cells["Decoder"]


@pytest.mark.parametrize("table", [f"Table {number}" for number in range(1, 7)])
def test_every_cell_of_the_table(table):
    head, *rows = TABLES[table]
    expected = {}
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        name = _row_name(table, cells)
        for column, text in cells.items():
            if column not in NAMED:
                assert (name, column) not in expected
                expected[name, column] = "" if text == "-" else text
    found = [cell for cell in paper.values() if cell.table == table]
    assert {(cell.row, cell.column): cell.value for cell in found} == expected
    assert len(found) == len(expected)


def test_counts():
    counts = {name: sum(cell.table == name for cell in paper.values()) for name in TABLES}
    assert counts == {
        "Table 1": 16, "Table 2": 75, "Table 3": 45, "Table 4": 133, "Table 5": 15, "Table 6": 21, "Section 5.2": 2,
    }  # fmt: skip
    assert sum(counts.values()) == len(paper.values())


def test_attributes_agree_with_the_printed_columns():
    cells = [cell for cell in paper.values() if cell.table == "Table 4"]
    printed = {
        "Training Steps (K)": lambda cell: str(cell.training_steps // 1000),
        "Batch Size": lambda cell: str(cell.batch),
        "DiT Block": lambda cell: cell.block,
        "Learning Rate": lambda cell: f"{cell.learning_rate:.0e}".replace("-0", "-"),
    }
    checked = 0
    for cell in cells:
        assert f"{cell.resolution}x{cell.resolution}" in cell.row
        assert cell.backbone.startswith(cell.row.split(",")[0].lower().replace("/", "-"))
        if cell.column in printed:
            assert printed[cell.column](cell) == cell.value
            checked += 1
    assert checked == 4 * 19
    blocks = {cell.backbone: cell.block for cell in cells}
    for suffix in ("in-context", "cross-attention", "adaLN"):
        assert blocks[f"dit-xl-2-{suffix.lower()}"] == suffix
    for cell in paper.values():
        if "cfg=" in cell.row:
            assert float(cell.row.split("cfg=")[1].rstrip(")")) == cell.guidance_scale


def test_section_5_2():
    points = [record for record in paper.records() if record.source.table == "Section 5.2"]
    assert [(p.backbone, p.sampling.steps, p.value, p.n) for p in points] == [
        ("dit-l-2", 1000, 25.9, 10_000),
        ("dit-xl-2", 128, 23.7, 10_000),
    ]
    # "L/2 uses 80.7 Tflops to sample each image; XL/2 uses 5x less compute, 15.2 Tflops"
    assert [round(p.sampling.gflops_per_image / 1000, 1) for p in points] == [80.7, 15.2]
    assert all(p.training.steps == 400_000 for p in points)


def test_records():
    records = paper.records()
    metrics = [cell for cell in paper.values() if cell.metric and cell.value]
    assert len(records) == len(metrics) == 148
    assert len({record.identity_sha256 for record in records}) == 148
    assert all(record.provenance == "published" and record.source is not None for record in records)
    assert all(from_json(to_json(record)) == record for record in records)
    assert {(r.system, r.gflops) for r in records if r.system.startswith("adm-g-")} == {
        ("adm-g-256", 1120.0),
        ("adm-g-512", 1983.0),
        ("adm-g-adm-u-256", 742.0),
        ("adm-g-adm-u-512", 2813.0),
    }
    best = next(r for r in records if r.system == "dit-xl-2-256-cfg1.5" and r.source.table == "Table 2")
    assert (best.value, best.n, best.sampling.evaluations, best.sampling.decoder) == (
        2.27,
        50_000,
        500,
        "sd-vae-ft-ema",
    )
    assert best.training.gflops == pytest.approx(3 * 118.64 * 256 * 7_000_000, rel=1e-12)
    assert paper.printed()[best.source] == "2.27"
