"""Figure 10: which records are drawn, on which panel, on which line, under which name."""

import dataclasses

from reports.figures import draw_sampling_compute
from reports.points import published_sampling_records, sampling_points
from results.records import Evaluation, Sampling


def test_points_of_a_study(study):
    points = sampling_points(study)
    assert len(points) == 18 and {point.panel for point in points} == {1}
    assert {point.line for point in points} == {"dit-xs-2", "dit-xs-4", "unet-small"}
    assert len({(point.line, point.run) for point in points}) == 6
    by_id = {record.id: record for record in study}
    for point in points:
        record = by_id[point.record_id]
        assert (point.value, point.low, point.high) == (record.value, record.low, record.high)
        assert point.gflops_per_image == record.sampling.gflops_per_image
    assert len(sampling_points(study, metric="kid")) == 18


def test_lines_differ_by_name_in_what_they_differ(record):
    sampling = record().sampling
    records = [
        record(),
        record(sampling=dataclasses.replace(sampling, sampler="ddim", eta=0.0)),
        record(training=dataclasses.replace(record().training, steps=400_000)),
        record(sampling=dataclasses.replace(sampling, guidance_scale=1.5, guidance_channels="all")),
    ]
    assert {point.line for point in sampling_points(records)} == {
        "dit-xs-2 (800 steps, ddpm, guidance none)",
        "dit-xs-2 (800 steps, ddim, eta 0, guidance none)",
        "dit-xs-2 (400K steps, ddpm, guidance none)",
        "dit-xs-2 (800 steps, ddpm, guidance 1.5 (all))",
    }
    # a difference that no label names still makes two lines, with two names
    twins = [record(), record(training=dataclasses.replace(record().training, images=7))]
    assert {point.line for point in sampling_points(twins)} == {"dit-xs-2", "dit-xs-2 #2"}


def test_panels_are_what_may_be_compared(record):
    records = [record(), record(n=500), record(dataset="other"), record("fid")]
    points = sampling_points(records)
    assert len(points) == 4 and {point.panel for point in points} == {1, 2, 3, 4}
    assert sampling_points([record(sampling=None), record("kid")]) == []


def test_published_points_stand_alone_or_beside_comparable_ones(imagenet, study):
    published = published_sampling_records()
    assert [point.provenance for point in sampling_points(published)] == ["published"] * 2
    assert all(point.provenance == "measured" for point in sampling_points([*study, *published]))
    sampling = Sampling(sampler="ddpm", steps=128, gflops_per_image=15_186.0)
    near = imagenet("fid", 24.0, n=10_000, sampling=sampling)
    points = sampling_points([near, *published])
    assert sorted(point.provenance for point in points) == ["measured", "published", "published"]
    assert {point.panel for point in points} == {1}
    assert {point.line for point in points if point.provenance == "published"} == {
        "dit-l-2-256 (paper)",
        "dit-xl-2-256 (paper)",
    }
    other = dataclasses.replace(near.evaluation, suite="clean")
    points = sampling_points([imagenet("fid", 24.0, n=10_000, sampling=sampling, evaluation=other), *published])
    assert [point.provenance for point in points] == ["measured"]


def test_names_that_look_like_markup_are_drawn_as_they_are(record):
    evaluation = Evaluation(suite="s", features="$\\sqrt{$ <&>")
    records = [
        record(system="a$b$_c <i> & \u4e2d\n\ud800", evaluation=evaluation, half=None),
        record(system="$\\frac{$", evaluation=evaluation, steps=50, value=11.0),
    ]
    files = draw_sampling_compute(sampling_points(records))
    assert files["png"].startswith(b"\x89PNG")
    svg = files["svg"].decode("utf-8")
    assert "a$b$_c &lt;i&gt; &amp; ?" in svg and "$\\frac{$" in svg
    assert "<i>" not in svg and "<dc:date>" not in svg


def test_one_point_many_models_and_many_panels_can_be_drawn(record):
    one = [record()]
    many = [record(system=f"model-{index}", value=5.0 + index, steps=10 + index) for index in range(14)]
    panels = [record(n=100 + index, value=float(index)) for index in range(3)]
    for records in (one, many, panels):
        files = draw_sampling_compute(sampling_points(records))
        assert sorted(files) == ["png", "svg"] and len(files["png"]) > 10_000
        assert all(record.system in files["svg"].decode() for record in records)


def test_the_steps_of_every_network_of_a_cascade_stand_at_its_point(record):
    sampling = dataclasses.replace(record().sampling, steps=40, stage_steps="40 + 30")
    (point,) = points = sampling_points([record(system="cascade", sampling=sampling)])
    assert (point.sampling_steps, point.stage_steps) == (40, "40 + 30")
    assert ">40 + 30<" in draw_sampling_compute(points)["svg"].decode()


def test_ticks_of_a_narrow_range_are_told_apart(record, monkeypatch):
    """Between 4 and 7.5 Gflops the axis has fractions, which must not all be called 4, 5 and 6."""
    from reports import figures

    drawn = []
    close = figures._set_axes

    def kept(axis, *rest):
        close(axis, *rest)
        drawn.append(axis)

    monkeypatch.setattr(figures, "_set_axes", kept)
    costs = (4.7, 5.99)
    records = [
        dataclasses.replace(
            record(system=f"s{cost:g}"), sampling=Sampling(sampler="ddpm", steps=50, gflops_per_image=cost)
        )
        for cost in costs
    ]
    draw_sampling_compute(sampling_points(records))
    (axis,) = drawn
    axis.figure.canvas.draw()
    low, high = axis.get_xlim()
    shown = [tick.label1.get_text() for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert len(shown) >= 2 and len(set(shown)) == len(shown)
