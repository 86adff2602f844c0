"""Charts: how a model looks, and what stands on an axis."""

import itertools
import subprocess

import numpy as np
import pytest

from reports import render_pool
from reports.charts import COLOURS, Axis, model_styles
from reports.drawing import draw
from reports.figures import figures as made
from reports.labels import place_labels
from reports.render_pool import RenderPool
from results import paper

# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB.
SIMULATED = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def linear(colour):
    parts = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    ratios = TO_XYZ @ rgb / np.array([0.95047, 1.0, 1.08883])
    roots = np.where(ratios > 216 / 24389, np.cbrt(ratios), (24389 / 27 * ratios + 16) / 116)
    return np.array([116 * roots[1] - 16, 500 * (roots[0] - roots[1]), 200 * (roots[1] - roots[2])])


@pytest.mark.parametrize("sight", SIMULATED)
def test_colours_are_told_apart_by_everybody(sight):
    seen = [lab(np.clip(SIMULATED[sight] @ linear(colour), 0, 1)) for colour in COLOURS]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 20


def test_colours_can_be_read_on_white():
    luminance = [linear(colour) @ np.array([0.2126, 0.7152, 0.0722]) for colour in COLOURS]
    assert min(1.05 / (each + 0.05) for each in luminance) >= 3  # WCAG 2.1, 1.4.11: graphics and large text


def test_a_model_looks_the_same_whatever_else_is_drawn(record):
    own = [record(system=f"net-{index:02d}") for index in range(25)]
    styles = model_styles([*own, *paper.records()])
    assert styles == model_styles([*paper.records(), *own[::-1]])
    looks = [styles[f"net-{index:02d}"] for index in range(25)]
    assert len(set(looks)) == 25 and len({style.colour for style in looks[:10]}) == 10
    sizes = {size: {styles[f"dit-{size}-{patch}"] for patch in (2, 4, 8)} for size in ("s", "b", "l", "xl")}
    assert all(len(found) == 3 and len({style.colour for style in found}) == 1 for found in sizes.values())
    assert len({style.colour for found in sizes.values() for style in found}) == 4
    # what is measured takes its colour before what is only published
    assert model_styles([record(system="zzz"), *paper.records()])["zzz"] == model_styles([record(system="zzz")])["zzz"]


def test_published_systems_never_look_like_a_size_of_dit(record):
    sizes = {style.colour for name, style in model_styles(paper.records()).items() if name in ("dit-s-2", "dit-xl-8")}
    for count in (0, 4, 9):
        styles = model_styles([*(record(system=f"net-{index}") for index in range(count)), *paper.records()])
        assert not sizes & {styles[name].colour for name in ("ldm-4", "ldm-8", "adm-256", "dit-xl-2-in-context")}


def test_labels_cover_neither_one_another_nor_marks():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(6, 4))
    FigureCanvasAgg(sheet)
    axes = sheet.add_axes((0.1, 0.1, 0.8, 0.8))
    axes.set_xscale("log")
    axes.set(xlim=(1, 100), ylim=(0, 10))
    points = [(10.0, 5.0), (10.5, 5.1), (11.0, 4.9), (10.0, 5.6), (60.0, 2.0)]
    place_labels(axes, [(x, y, f"model-{index}", "black") for index, (x, y) in enumerate(points)], points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5 and not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    places = axes.transData.transform(points)
    assert not any(box.contains(*place) for box in boxes for place in places)
    frame = axes.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 + 4 for box in boxes)


def test_labels_stay_out_of_bubbles():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(6, 4))
    FigureCanvasAgg(sheet)
    axes = sheet.add_axes((0.1, 0.1, 0.8, 0.8))
    axes.set(xlim=(0, 10), ylim=(0, 10))
    points, radii = [(3.0, 5.0), (4.4, 5.0), (3.4, 7.0)], [16.0, 14.0, 10.0]
    place_labels(axes, [(x, y, "a model", "black") for x, y in points], points, radii)
    scale = sheet.dpi / 72
    for text in axes.texts:
        box = text.get_window_extent()
        for centre, radius in zip(axes.transData.transform(points), radii, strict=True):
            nearest = np.clip(centre, box.min, box.max)
            assert np.linalg.norm(nearest - centre) > radius * scale


def test_the_rightmost_bubble_has_its_label_on_the_right():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(6, 4))
    FigureCanvasAgg(sheet)
    axes = sheet.add_axes((0.1, 0.1, 0.8, 0.8))
    axes.set(xlim=(0, 10), ylim=(0, 10))
    points, radii = [(3.0, 5.0), (9.0, 5.0)], [40.0, 40.0]
    place_labels(axes, [(x, y, "DiT-XL/2, 675M", "black") for x, y in points], points, radii)
    centre, _ = axes.transData.transform(points[1])
    (box,) = [text.get_window_extent() for text in axes.texts if text.xy == points[1]]
    assert centre + radii[1] * sheet.dpi / 72 < box.x0 < box.x1 <= axes.get_window_extent().x1 + 4


def test_a_worker_imports_nothing_from_the_current_folder(tmp_path):
    (tmp_path / "textwrap.py").write_text("open('ran', 'w').close()")
    done = subprocess.run(render_pool._COMMAND, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"")
    assert [path.name for path in tmp_path.iterdir()] == ["textwrap.py"]


def test_of_many_labels_those_without_room_are_left_out():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(6, 4))
    FigureCanvasAgg(sheet)
    axes = sheet.add_axes((0.1, 0.1, 0.8, 0.8))
    axes.set(xlim=(0, 10), ylim=(0, 10))
    points = [(5 + 0.02 * index, 5.0) for index in range(30)]
    place_labels(axes, [(x, y, f"model-{x:g}", "black") for x, y in points], points)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert 3 < len(boxes) < 30 and not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_axis_text():
    assert Axis(title="FID-50K", better="lower").text == "FID-50K (lower is better)"
    assert Axis(title="Compute", unit="Gflops").text == "Compute (Gflops)" and Axis(title="Steps").text == "Steps"


def test_workers_draw_the_same_bytes(study, monkeypatch):
    figures = [each for each in made(study) if each.name in ("figure-8", "figure-10")]
    styles = model_styles(study)
    alone = {figure.name: draw(figure, styles) for figure in figures}
    here = []

    def drawn_here(figure, styles):
        here.append(figure.name)
        return alone[figure.name]

    monkeypatch.setattr(render_pool, "draw", drawn_here)
    monkeypatch.setattr(render_pool, "_processors", lambda: 2)
    with RenderPool() as pool:
        pool.begin(figures, styles)
        (thread,) = pool._threads
        thread.join()  # the worker draws both
        assert pool.finish() == alone and here == []
    assert pool._workers[0].returncode is not None
    fails = (*render_pool._COMMAND[:-1], "raise SystemExit(1)")
    monkeypatch.setattr(render_pool, "_COMMAND", fails)  # the figures of a worker that fails are drawn
    with RenderPool() as pool:
        pool.begin(figures, styles)
        assert pool.finish() == alone and sorted(here) == sorted(alone)
    monkeypatch.setattr(render_pool, "_processors", lambda: 1)
    with RenderPool() as pool:
        pool.begin([], styles)
        assert pool.finish() == {} and pool._workers == []


def test_workers_end_with_the_report(study, monkeypatch):
    monkeypatch.setattr(render_pool, "_processors", lambda: 2)
    with pytest.raises(KeyboardInterrupt), RenderPool() as pool:
        pool.begin(made(study), model_styles(study))
        raise KeyboardInterrupt
    assert pool._workers[0].returncode is not None and not pool._threads[0].is_alive()
