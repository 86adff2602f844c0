"""Figure 10: which records are drawn, on which panel, on which line, under which name; and how any figure is drawn."""

import dataclasses
from pathlib import Path

import pytest

from reports.charts import model_styles
from reports.drawing import draw
from reports.figures import figures, published_records
from reports.page.run_artifacts import SampleGrid
from results.records import Evaluation, Sampling, Training


def sampling_figure(records):
    return next((figure for figure in figures(records) if figure.name == "figure-10"), None)


def series_of(records):
    return [series for panel in sampling_figure(records).panels for series in panel.series]


def drawn(records, kinds=("svg",)):
    return draw(sampling_figure(records), model_styles(records), kinds)


def test_marks_of_a_study(study):
    figure = sampling_figure(study)
    assert len(figure.panels) == 1
    assert {series.label: len(series.marks) for series in figure.panels[0].series} == dict.fromkeys(
        ("dit-xs-2", "dit-xs-4", "unet-small"), 3
    )
    by_id = {record.id: record for record in study}
    for series in figure.panels[0].series:
        for mark in series.marks:  # of two seeds: mean, lowest, highest
            values = [by_id[record_id].value for record_id in mark.record_ids]
            assert len(values) == 2 and (mark.low, mark.high) == (min(values), max(values))
            assert mark.y == pytest.approx(sum(values) / 2)
            assert {by_id[record_id].sampling.gflops_per_image for record_id in mark.record_ids} == {mark.x}
    assert {row["record_id"]: row["value"] for row in figure.rows} == {
        record.id: record.value for record in study if record.metric == "fd"
    }
    one = next(record for record in study if record.metric == "fd")
    (series,) = series_of([one])
    assert (series.marks[0].y, series.marks[0].low, series.marks[0].high) == (one.value, one.low, one.high)


def test_lines_differ_by_name_in_what_they_differ(record):
    sampling = record().sampling
    records = [
        record(),
        record(sampling=dataclasses.replace(sampling, sampler="ddim", eta=0.0)),
        record(training=dataclasses.replace(record().training, steps=400_000)),
        record(sampling=dataclasses.replace(sampling, guidance_scale=1.5, guidance_channels="all")),
    ]
    assert {series.label for series in series_of(records)} == {
        "dit-xs-2 (800 steps, ddpm, guidance none)",
        "dit-xs-2 (800 steps, ddim, guidance none)",
        "dit-xs-2 (400K steps, ddpm, guidance none)",
        "dit-xs-2 (800 steps, ddpm, guidance 1.5 (all))",
    }
    # a difference that no label names still makes two lines, with two names
    twins = [record(), record(training=dataclasses.replace(record().training, images=7))]
    assert {series.label for series in series_of(twins)} == {"dit-xs-2", "dit-xs-2 #2"}


def test_panels_are_what_may_be_compared(record):
    records = [record(), record(n=500), record(dataset="other"), record("fid")]
    assert [len(panel.series) for panel in sampling_figure(records).panels] == [1, 1, 1, 1]
    assert sampling_figure([record(sampling=None), record("kid")]) is None


def test_published_marks_stand_alone_or_beside_comparable_ones(imagenet, study):
    published = published_records()
    figure = sampling_figure(published)
    assert [(row["provenance"], row["value"], row["sampling_steps"]) for row in figure.rows] == [
        ("published", 25.9, 1000),
        ("published", 23.7, 128),
    ]
    assert [each.label for panel in figure.panels for each in panel.series] == ["DiT-L/2", "DiT-XL/2"]
    assert {series.provenance for series in series_of([*study, *published])} == {"measured"}
    sampling = Sampling(sampler="ddpm", steps=128, gflops_per_image=15_186.0)
    near = imagenet("fid", 24.0, n=10_000, sampling=sampling)
    figure = sampling_figure([near, *published])
    assert len(figure.panels) == 1
    assert {series.label: series.provenance for series in figure.panels[0].series} == {
        near.system: "measured",
        "DiT-L/2 (paper)": "published",
        "DiT-XL/2 (paper)": "published",
    }
    other = dataclasses.replace(near.evaluation, suite="clean")
    alone = imagenet("fid", 24.0, n=10_000, sampling=sampling, evaluation=other)
    assert {series.provenance for series in series_of([alone, *published])} == {"measured"}


def test_the_decoder_is_counted_in_a_panel_of_its_own_where_its_cost_is_known(record):
    sampling = dataclasses.replace(record().sampling, decoder="sd-vae-ft-mse", decoder_gflops=2.0)
    unknown = dataclasses.replace(record().sampling, decoder="other", steps=50, gflops_per_image=9.0)
    figure = sampling_figure([record(sampling=sampling), record(sampling=unknown), record(system="pixels")])
    without, counted = figure.panels
    assert "not counted" in without.x.text and "not counted" not in counted.x.text
    gflops = record().sampling.gflops_per_image
    assert sorted(mark.x for each in without.series for mark in each.marks) == [gflops, gflops, 9.0]
    assert sorted(mark.x for each in counted.series for mark in each.marks) == [gflops, gflops + 2.0]
    assert all(each.marks for each in counted.series) and draw(figure, model_styles([record()]), ("svg",))


def test_of_many_lines_the_best_and_the_longest_trained_are_drawn(record):
    many = [record(system=f"model-{index:03d}", value=5.0 + index) for index in range(30)]
    figure = sampling_figure(many)
    assert [series.label for series in figure.panels[0].series] == [f"model-{index:03d}" for index in range(24)]
    assert "6 more lines are not drawn" in figure.panels[0].note
    longer = [dataclasses.replace(each, training=dataclasses.replace(each.training, steps=900)) for each in many[:9]]
    figure = sampling_figure([*many[:9], *longer])
    assert {row["training_steps"] for row in figure.rows} == {900} and len(figure.rows) == 9
    assert "longest training" in figure.panels[0].note


def test_names_that_look_like_markup_are_drawn_as_they_are(record):
    evaluation = Evaluation(suite="s", features="$\\sqrt{$ <&>")
    records = [
        record(system="a$b$_c <i> & \u4e2d\n\ud800", evaluation=evaluation, half=None),
        record(system="$\\frac{$", evaluation=evaluation, steps=50, value=11.0),
    ]
    files = drawn(records, ("png", "svg", "pdf"))
    assert files["png"].startswith(b"\x89PNG") and files["pdf"].startswith(b"%PDF")
    svg = files["svg"].decode("utf-8")
    assert "a$b$_c &lt;i&gt; &amp; ?" in svg and "$\\frac{$" in svg
    assert "<i>" not in svg and "<dc:date>" not in svg


def test_one_mark_and_many_panels_can_be_drawn(record):
    panels = [record(n=100 + index, value=float(index), half=None) for index in range(3)]
    for records in ([record()], panels):
        svg = drawn(records)["svg"].decode()
        assert all(record.system in svg for record in records)


def test_the_steps_of_every_network_of_a_cascade_stand_at_its_mark(record):
    sampling = dataclasses.replace(record().sampling, steps=40, stage_steps="40 + 30")
    ((mark,),) = [series.marks for series in series_of([record(system="cascade", sampling=sampling)])]
    assert mark.text == "40 + 30" and ("sampling steps", "40 + 30") in mark.facts


def test_steps_that_are_not_stated_are_named_nowhere(record):
    sampling = Sampling(sampler="ddpm", gflops_per_image=1.0)
    records = [
        record(system=name, value=9.0 - i, training=training, sampling=sampling)
        for i, name in enumerate(("a", "b"))
        for training in (Training(seed=0), Training(steps=800, seed=0))
    ]
    assert {each.label for each in series_of(records)} == {"a", "a (800 steps)", "b", "b (800 steps)"}
    figure = next(figure for figure in figures(records) if figure.name == "pareto")
    assert {mark.text for panel in figure.panels for each in panel.series for mark in each.marks} >= {"b"}
    for figure in (*figures(records), *figures(records[::2])):
        texts = [mark.text for panel in figure.panels for each in panel.series for mark in each.marks]
        texts += [panel.note for panel in figure.panels]
        assert not any(wrong in text for text in texts for wrong in ("None", "- steps", " 0 steps", "; ;")), figure.name
    title = SampleGrid(path=Path("run/grid.png"), records=(records[1],)).title
    assert title == "a, 800 training steps, seed 0, ddpm"


def test_ticks_of_a_narrow_range_are_told_apart(record, monkeypatch):
    """Between 4 and 7.5 Gflops the axis has fractions, which must not all be called 4, 5 and 6."""
    from reports import drawing

    panels = []
    close = drawing._set_up_axes

    def kept(axes, *rest):
        close(axes, *rest)
        panels.append(axes)

    monkeypatch.setattr(drawing, "_set_up_axes", kept)
    costs = (4.7, 5.99)
    records = [
        dataclasses.replace(
            record(system=f"s{cost:g}"), sampling=Sampling(sampler="ddpm", steps=50, gflops_per_image=cost)
        )
        for cost in costs
    ]
    drawn(records)
    (axes,) = panels
    low, high = axes.get_xlim()
    shown = [tick.label1.get_text() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert len(shown) >= 2 and len(set(shown)) == len(shown)
