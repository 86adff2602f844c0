"""The page in headless Chromium: it opens, answers to filter, sorting and pointer, and takes no text for code."""

import dataclasses
import json
import re

import numpy as np
import pytest
from browser import Browser, find_chromium
from page_figures import bubbles, curves
from PIL import Image

from reports.charts import Axis, Figure, Panel, Series, model_styles
from reports.page.curves import figure_data
from reports.page.writer import page_bytes, page_data
from reports.report import write_report
from reports.tables import paper_tables, protocol_table
from results import paper
from results.store import append, find_record_files, load

IMAGE_TAG = "<img src=x onerror=document.title='broken'>"
SCRIPT_TAG = "</script><script>document.title='broken'</script>\u2028<!--"
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if find_chromium() is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, makers):
    """A study with hostile names, a conflict, broken lines and a sample grid; figures with every kind of series."""
    folder = tmp_path_factory.mktemp("page")
    study, make = makers[0](), makers[1]
    run = folder / "runs" / "a"
    drawn = dataclasses.replace(study[0].sampling, samples_sha256="ab" * 32)
    study = [dataclasses.replace(study[0], sampling=drawn), *study[1:]]
    hostile = [make(value=30.0, system=IMAGE_TAG, steps=100), make(value=35.0, system=SCRIPT_TAG, steps=9)]
    append(run / "records.jsonl", [*study, *hostile, make(value=99.0, system="twice")])
    append(folder / "runs" / "b" / "records.jsonl", [make(value=98.0, system="twice")])
    with (run / "records.jsonl").open("a") as file:
        file.write(f'{{"schema": 2}}\n{IMAGE_TAG}\n')
    samples = run / "samples" / "step800-ddpm10"
    samples.mkdir(parents=True)
    Image.fromarray(np.arange(48 * 60, dtype=np.uint32).astype(np.uint8).reshape(48, 60)).save(samples / "grid.png")
    (samples / "samples.json").write_text(json.dumps({"sha256": "ab" * 32}))
    return folder


@pytest.fixture(scope="module")
def shown(folder):
    """(path of the page, its records by id, the figure of its curves)."""
    files = find_record_files([folder / "runs"])
    loaded = load(files)
    figures = [curves(loaded.records), bubbles()]
    data = page_data(
        [protocol_table("digits", loaded.records), *paper_tables(loaded.records)],
        figures,
        loaded.records,
        styles=model_styles([*loaded.records, *paper.records()]),
        published=paper.records(),
        record_files=files,
        problems=loaded.problems,
        conflicts=loaded.conflicts,
    )
    red = b"<svg xmlns='http://www.w3.org/2000/svg' width='40' height='30'><rect width='40' height='30' fill='#cc0000'/></svg>"
    page = page_bytes(data, figures, {"figure-10.svg": red})
    path = folder / "report.html"
    path.write_bytes(page)
    return path, {record.id: record for record in loaded.records}, figures[0]


@pytest.fixture(
    params=[(width, dark) for width in WIDTHS for dark in (False, True)],
    ids=lambda p: f"{p[0]}-{'dark' if p[1] else 'light'}",
)
def each_page(request, browser, shown):
    width, dark = request.param
    page = browser.page(shown[0], width=width, dark=dark)
    yield page, width, dark
    page.close()


@pytest.fixture
def page(browser, shown):
    page = browser.page(shown[0])
    yield page
    page.close()


def _rows(page, block: str, column: int | None = None, *, first: bool = False) -> list:
    """Texts of the rows, or of their cells in a column. first: of the first section alone, without the means over seeds."""
    cell = "row.textContent" if column is None else f"row.children[{column}].textContent"
    place = f"document.querySelector('#{block}{' table' if first else ''}')"
    where = f"{place}.querySelectorAll('tbody tr')"
    return page.run(f"[...{where}].map((row) => {cell})")


def test_it_opens_without_complaint_request_or_overflow(each_page, shown):
    page, width, dark = each_page
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith("data:")] == [shown[0].as_uri()]
    assert page.run("document.documentElement.scrollWidth") == width
    # What is wider than the page scrolls inside its own box.
    outside = "[...document.querySelectorAll('main *')].filter((node) => node.getBoundingClientRect().right > innerWidth + 1 && !node.closest('.scroll')).map((node) => node.outerHTML.slice(0, 99))"
    assert page.run(outside) == []
    picture = page.screenshot()
    ground = np.array([20, 23, 26] if dark else [255, 255, 255])
    assert (picture == ground).all(-1).mean() > 0.5  # mostly the scheme's ground ...
    ink = np.abs(picture.astype(int) - ground).max(-1) > 90
    assert 0.01 < ink.mean() < 0.4  # ... and text all over it
    assert (ink.reshape(3, -1).mean(1) > 0.003).all() and (ink[:, : width // 2].mean(1) > 0).mean() > 0.2


def test_the_curves_have_the_colours_of_the_figures(each_page, shown):
    page, width, dark = each_page
    page.run("document.querySelector('#figure-10 .plot').scrollIntoView()")
    page.settle()
    left, top, right, bottom = page.run(
        "(() => { const box = document.querySelector('#figure-10 .plot svg').getBoundingClientRect();"
        " return [box.left, box.top, box.right, box.bottom]; })()"
    )
    assert right - left > 0.8 * min(width, 500) and bottom - top >= 300
    picture = page.screenshot()[int(top) : int(bottom), int(left) : int(right)]
    styles = model_styles([*shown[1].values(), *paper.records()])
    for series in shown[2].panels[0].series:
        colour = np.array([int(styles[series.model].colour[at : at + 2], 16) for at in (1, 3, 5)])
        colour = np.floor((colour + 255) / 2 + 0.5) if dark else colour
        assert (np.abs(picture - colour).max(-1) <= 2).sum() > 20, series.label
    # the marks stand at four places or more across and down the panel
    box = page.run(
        "[...document.querySelectorAll('#figure-10 .mark path')].map((mark) => mark.getBoundingClientRect()).map((box) => [box.x, box.y])"
    )
    assert len(box) == 20 and np.ptp(np.array(box), axis=0).min() > 100


def test_text_of_records_stays_text(page):
    assert page.run("document.title") == "backbone-harness report"
    assert page.run("document.querySelectorAll('img:not([src^=\"data:\"])').length") == 0
    assert page.run("document.querySelectorAll('script').length") == 2
    names = _rows(page, "table-digits", 0)
    assert any(name.startswith(IMAGE_TAG) for name in names) and any(
        name.startswith(SCRIPT_TAG.replace("\u2028", " ")[:20]) for name in names
    )
    assert IMAGE_TAG in page.run("document.querySelector('#figure-10 .keys').textContent")
    texts = page.run("document.querySelector('#left-out').textContent")
    assert "99.0" in texts and "98.0" in texts and "not a JSON object" in texts


def test_the_top_says_what_there_is(page, shown):
    text = page.run("document.querySelector('#summary').textContent")
    measured = len(shown[1])
    assert f"{measured} measured records, {len(paper.records())} published" in text
    assert "2 lines skipped, 1 conflict" in text and "digits" in text and "imagenet-256" in text
    targets = page.run("[...document.querySelectorAll('nav a')].map((link) => decodeURIComponent(link.hash.slice(1)))")
    assert {"table-digits", "table-1", "figure-10", "samples", "records", "left-out"} <= set(targets)
    assert all(page.run(f"document.getElementById({json.dumps(name)}) !== null") for name in targets)


def test_filters(page):
    everyone = _rows(page, "table-digits")
    page.type("#table-digits input[type=search]", "UNET-small  50")
    kept = _rows(page, "table-digits")
    assert 0 < len(kept) < len(everyone) and all("unet-small" in row and "50" in row for row in kept)
    assert (
        page.run("document.querySelector('#table-digits output').textContent") == f"{len(kept)} of {len(everyone)} rows"
    )
    page.type("#table-digits input[type=search]", "nobody")
    assert _rows(page, "table-digits") == ["no row matches"] * 2  # in each section
    # The reader's own come first.
    assert page.run("document.querySelector('#records tbody tr').className") == "measured"
    page.run("document.querySelector('#records input[data-kind=published]').click()")
    assert page.run("document.querySelectorAll('#records tr.published').length") == 0 < len(_rows(page, "records"))
    page.run("document.querySelector('#records input[data-kind=measured]').click()")
    assert _rows(page, "records") == ["no row matches"]


def test_footnotes_stay_with_their_rows(page):
    notes = "document.querySelector('#table-2 .notes').textContent"
    assert "guidance 1.25" in page.run(notes)
    page.type("#table-2 input[type=search]", "bigGAN")
    assert (
        len(_rows(page, "table-2")) == 1
        and "guidance 1.25" not in page.run(notes)
        and "as published" in page.run(notes)
    )


def test_what_all_rows_share_is_said_once(page):
    titles = page.run("[...document.querySelectorAll('#table-digits thead th')].map((head) => head.textContent)")
    notes = page.run("document.querySelector('#table-digits .notes').textContent")
    assert "Sampler" not in titles and "Seed" in titles
    (shared,) = re.findall(r"All rows: [^.]*\.[^.]*", notes)
    assert all(
        text in shared for text in ("Params (M) 4.1", "Training steps 800", "Sampler ddpm", "protocol version 1")
    )


def test_sorting_knows_numbers_and_their_direction(page):
    titles = page.run("[...document.querySelectorAll('#table-digits thead th')].map((head) => head.textContent)")
    column = next(index for index, title in enumerate(titles) if title.startswith("FD-1K"))
    head = f"document.querySelectorAll('#table-digits thead th')[{column}]"

    def state():
        values = [float(text.split()[0]) for text in _rows(page, "table-digits", column, first=True) if text != "-"]
        return page.run(f"{head}.getAttribute('aria-sort')"), values

    order = state()[1]
    assert state()[0] == "none" and order != sorted(order)
    page.run(f"{head}.querySelector('button').focus()")
    page.press("Enter")
    assert state() == ("ascending", sorted(order))
    page.press("Enter")
    assert state() == ("descending", sorted(order, reverse=True))
    page.press("Enter")
    assert state() == ("none", order)
    recall = next(index for index, title in enumerate(titles) if title.startswith("Precision"))
    page.run(f"document.querySelectorAll('#table-digits thead th')[{recall}].querySelector('button').click()")
    cells = _rows(page, "table-digits", recall, first=True)
    known = [float(text.split()[0]) for text in cells if text != "-"]
    assert known == sorted(known, reverse=True)  # higher is better
    assert cells[-2:] == ["-", "-"]  # what is not known stands last


def _mark(page, index: int) -> tuple[float, float]:
    return tuple(
        page.run(
            "(() => { document.querySelector('#figure-10 .plot').scrollIntoView({block: 'center'}); const box ="
            f" document.querySelectorAll('#figure-10 .mark path')[{index}].getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
    )


def test_the_pointer_finds_the_record_and_a_click_pins_it(page, shown):
    _, records, figure = shown
    marks = [mark for series in figure.panels[0].series for mark in series.marks]
    index = next(i for i, mark in enumerate(marks) if records[mark.record_ids[0]].system == "unet-small")
    record = records[marks[index].record_ids[0]]
    page.hover(*_mark(page, index))
    tip = page.run("document.querySelector('#figure-10 .tip').innerText")
    for text in (
        "unet-small",
        "FD-1K",
        f"{record.value:.1f}",
        "[",
        "ddpm, 10 sampling steps",
        "800 training steps",
        "N = 1,000",
    ):
        assert text in tip
    assert record.id[:12] in tip and "measured" in tip
    page.hover(5, 5)
    assert page.run("document.querySelector('#figure-10 .tip').hidden")
    page.click(*_mark(page, index))
    assert page.run("document.querySelectorAll('.pin').length") == 1
    panel = page.run("document.querySelector('#panel').innerText")
    assert record.id in panel and record.identity_sha256 in panel and "cpu" in panel and "bfloat16" in panel
    assert page.run("location.hash") == f"#record-{record.id[:16]}"
    page.press("Escape")
    assert (
        page.run("document.querySelector('#panel').hidden")
        and page.run("document.querySelectorAll('.pin').length") == 0
    )


def test_the_keyboard_walks_along_the_marks(page, shown):
    page.run("document.querySelector('#figure-10 .mark[tabindex=\"0\"]').focus()")
    first = page.run("document.querySelector('#figure-10 .tip').innerText")
    page.press("ArrowRight")
    second = page.run("document.querySelector('#figure-10 .tip').innerText")
    assert first and second and first != second
    page.press("Enter")
    assert not page.run("document.querySelector('#panel').hidden")
    shown_id = page.run("document.querySelector('#panel dd').textContent")
    assert shown_id[:12] in second or shown[1][shown_id].system in second


def test_a_long_line_has_no_signs_and_still_answers(page):
    panel = "#figure-2 .panels > :nth-child(3)"
    assert page.run(f"document.querySelectorAll('{panel} .mark').length") == 0
    left, bottom = page.run(
        f"(() => {{ const plot = document.querySelector('{panel} .plot'); plot.scrollIntoView({{block: 'center'}});"
        " const box = plot.querySelector('svg > path').getBoundingClientRect(); return [box.left, box.bottom]; })()"
    )
    page.hover(left + 1, bottom - 1)
    tip = page.run(f"document.querySelector('{panel} .tip').innerText")
    assert "loss of a run" in tip and "step " in tip


def test_a_mark_of_several_records_offers_them(page):
    page.run(
        "document.querySelector('#figure-2 .panels > :nth-child(2) .mark').dispatchEvent(new MouseEvent('mousemove'))"
    )
    box = page.run(
        "(() => { const mark = document.querySelectorAll('#figure-2 .panels > :nth-child(2) .mark rect')[1];"
        " mark.scrollIntoView({block: 'center'}); const box = mark.getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    page.click(*box)
    assert "2 records" in page.run("document.querySelector('#panel').innerText")
    page.run("document.querySelector('#panel .choice button').click()")
    assert "Printed in arXiv:2212.09748" in page.run("document.querySelector('#panel').innerText")


def test_series_are_switched_off_by_their_labels(page):
    count = "document.querySelectorAll('#figure-10 .mark').length"
    before = page.run(count)
    page.run("document.querySelectorAll('#figure-10 .keys button')[2].click()")
    assert page.run(count) == before - 3
    assert page.run("document.querySelectorAll('#figure-10 .keys button')[2].getAttribute('aria-pressed')") == "false"
    page.run("document.querySelectorAll('#figure-10 .keys button')[2].click()")
    assert page.run(count) == before


def test_a_number_leads_to_its_record_and_an_address_to_a_record(page, browser, shown):
    page.run("document.querySelector('#table-2 tbody button.value').click()")
    panel = page.run("document.querySelector('#panel').innerText")
    assert "Table 2" in panel and "BigGAN-deep" in panel and "harness sample --system biggan-deep-256" in panel
    record = next(record for record in shown[1].values() if record.system == IMAGE_TAG)
    again = browser.page(f"{shown[0].as_uri()}#record-{record.id[:16]}")
    assert again.run("document.querySelector('#panel h2').textContent") == IMAGE_TAG
    other = next(record for record in shown[1].values() if record.system == SCRIPT_TAG)
    again.run(f"void (location.hash = '#record-{other.id[:16]}')")
    again.settle()
    assert again.run("document.querySelector('#panel h2').textContent") == SCRIPT_TAG
    assert again.complaints == []
    again.close()
    table = browser.page(f"{shown[0].as_uri()}#table-4")
    assert abs(table.run("document.querySelector('#table-4').getBoundingClientRect().top")) < 20
    table.close()


def test_grids_stand_with_their_records(page):
    assert page.run("document.querySelectorAll('#samples img').length") == 1
    page.run("document.querySelector('#samples img').scrollIntoView()")
    page.settle()
    assert page.run("document.querySelector('#samples img').naturalWidth") == 60
    assert "dit-xs-2" in page.run("document.querySelector('#samples figcaption').textContent")
    page.run("document.querySelector('#samples button').click()")
    assert "ab" * 32 in page.run("document.querySelector('#panel').innerText")


def test_every_figure_of_a_whole_report_is_drawn(browser, folder, undrawn):
    out = folder / "whole"
    write_report([folder / "runs"], out)
    names = {path.stem for path in out.glob("*.csv") if not path.stem.startswith("table-")}
    for width in WIDTHS:
        page = browser.page(out / "report.html", width=width)
        assert page.complaints == [] and page.run("document.documentElement.scrollWidth") == width
        drawn = page.run(
            "[...document.querySelectorAll('section.figure')].map((block) => [block.id,"
            " [...block.querySelectorAll('.plot')].every((plot) => plot.querySelector('.mark, svg > path'))])"
        )
        assert {"figure-2", "figure-10"} <= names == {name for name, _ in drawn} and all(whole for _, whole in drawn)
        # no text outside of its picture, no number of an axis upon another
        cut = page.run(
            "[...document.querySelectorAll('.plot > svg')].flatMap((svg) => { const frame = svg.getBoundingClientRect();"
            " return [...svg.querySelectorAll('text')].filter((text) => { const box = text.getBoundingClientRect();"
            " return box.left < frame.left - 2 || box.right > frame.right + 2 || box.bottom > frame.bottom + 2; })"
            ".map((text) => text.textContent); })"
        )
        assert cut == []
        upon = page.run(
            "[...document.querySelectorAll('.plot > svg')].flatMap((svg) => { const boxes ="
            " [...svg.querySelectorAll('.axes text:not(.title)')].map((text) => text.getBoundingClientRect());"
            " return boxes.filter((one, i) => boxes.some((other, j) => i < j && one.left < other.right - 1 &&"
            " other.left < one.right - 1 && one.top < other.bottom - 4 && other.top < one.bottom - 4)).map((box) => box.x); })"
        )
        assert upon == []
        page.close()


def test_without_scripts_there_are_the_static_figures(browser, shown):
    page = browser.page(shown[0], scripts=False)
    picture = page.screenshot()
    assert (np.abs(picture.astype(int) - [204, 0, 0]).max(-1) < 8).sum() >= 1000
    assert page.complaints == []
    page.close()


def test_a_panel_without_marks_has_its_place():
    empty = Series(label="a", model="a", kind="line", provenance="measured", marks=())
    axis = Axis(title="x")
    for series in ((), (empty,)):
        figure = Figure(name="f", title="f", panels=(Panel(heading="", x=axis, y=axis, series=series),), rows=())
        (panel,) = figure_data(figure, model_styles([]))["panels"]
        assert [each["marks"] for each in panel["series"]] == [[] for _ in series]


def test_published_records_of_record_files_count_as_published(record):
    printed = paper.records()
    data = page_data(
        [], [], [record(), *printed[:3], dataclasses.replace(printed[0], system="another")], styles={}, published=printed,
        record_files=(), problems=(), conflicts=(),
    )  # fmt: skip
    summary, more = data["summary"], len(printed) + 1
    assert (summary["measured"], summary["published"]) == (1, more)
    assert {"name": "digits", "measured": 1, "published": 0} in summary["protocols"]
    assert sum(each["published"] for each in summary["protocols"]) == more


def test_rows_and_records_beyond_the_caps_are_counted(browser, folder, shown, monkeypatch):
    monkeypatch.setattr("reports.page.payload.MAX_ROWS", 5)
    monkeypatch.setattr("reports.page.writer.MAX_RECORDS", 12)
    monkeypatch.setattr("reports.page.run_artifacts.MAX_GRIDS", 0)
    records = list(shown[1].values())
    table = protocol_table("digits", records)
    data = page_data(
        [table], [], records, styles={}, published=(), record_files=find_record_files([folder / "runs"]), problems=(), conflicts=()
    )  # fmt: skip
    content = page_bytes(data, [], {})
    path = folder / "small.html"
    path.write_bytes(content)
    page = browser.page(path)
    assert len(_rows(page, "table-digits", first=True)) == 5 and len(_rows(page, "records")) == 12
    assert {"dit-xs-2", "unet-small"} <= {
        name.strip("abc,") for name in _rows(page, "table-digits", 0, first=True)
    }  # not the first 5
    left = sum(len(section.lines) - 5 for section in table.sections)
    text = page.run("document.querySelector('main').innerText")
    assert f"{left} rows are left out here; table-digits.csv has all of them" in text
    assert f"{len(records) - 12} records" in text and "1 of 1 grids have no room here" in text
    page.close()
