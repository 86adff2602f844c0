"""Figure 13 draws the loss that was trained on: each logged term times its weight, and nothing that has none."""

import json

import numpy as np
import pytest

from harness.engines.loss_terms import LOSS_TERMS
from reports.figures_loss import training_loss

STEPS = 100


def write_run(folder, backbone, **terms):
    """A run's two files; terms: name -> values of all steps."""
    folder.mkdir()
    identity = {
        "backbone": backbone, "protocol": {"name": "digits", "dataset": "digits", "resolution": 8},
        "recipe": {"batch": 128, "learning_rate": 0.002}, "seed": 0, "framework": "torch",
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"schema": 1, "identity": identity}))
    values = np.stack(list(terms.values()), axis=1).tolist()
    rows = [{"step": step, **dict(zip(terms, row, strict=True))} for step, row in enumerate(values, start=1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def drawn(figure):
    """(heights of the one line of the first panel, title of its axis, terms in the file beside it)."""
    panel = figure.panels[0]
    (line,) = panel.series
    (terms,) = {row["terms"] for row in figure.rows}
    assert [row["loss"] for row in figure.rows] == [mark.y for mark in line.marks]
    assert [mark.x for mark in line.marks] == list(range(1, STEPS + 1))
    return [mark.y for mark in line.marks], panel.y.title, terms


def test_a_classifiers_accuracy_is_no_part_of_its_loss(tmp_path, record):
    """A classifier that does not learn (2.3 is the logarithm of ten classes), beside an accuracy that rises."""
    run = write_run(
        tmp_path / "run", "adm-classifier-xs",
        cross_entropy=np.full(STEPS, 2.3), accuracy=np.linspace(0.1, 0.9, STEPS),
    )  # fmt: skip
    heights, axis, terms = drawn(training_loss([run], [record(system="adm-classifier-xs", gflops=0.01)]))
    assert heights == pytest.approx([2.3] * STEPS)
    assert axis == "Training loss (cross_entropy)" and terms == "cross_entropy"


def test_a_denoisers_terms_count_whole(tmp_path, record):
    run = write_run(tmp_path / "run", "dit-xs-2", mse=np.full(STEPS, 0.25), vb=np.full(STEPS, 0.5))
    heights, axis, terms = drawn(training_loss([run], [record()]))
    assert heights == pytest.approx([0.75] * STEPS)
    assert axis == "Training loss (mse + vb)" and terms == "mse + vb"


def test_a_term_of_half_the_weight_counts_half_and_says_so(tmp_path, record, monkeypatch):
    monkeypatch.setitem(LOSS_TERMS, "denoiser", {"mse": 1.0, "vb": 0.5})
    run = write_run(tmp_path / "run", "dit-xs-2", mse=np.full(STEPS, 0.25), vb=np.full(STEPS, 0.5))
    heights, axis, terms = drawn(training_loss([run], [record()]))
    assert heights == pytest.approx([0.5] * STEPS)
    assert axis == "Training loss (mse + 0.5 vb)" and terms == "mse + 0.5 vb"


def test_a_long_log_that_is_read_in_places_is_weighed_alike(tmp_path, record, monkeypatch):
    monkeypatch.setattr("reports.figures_loss.WHOLE_BYTES", 1000)
    many = 3000
    run = write_run(
        tmp_path / "run", "adm-classifier-xs", cross_entropy=np.full(many, 2.3), accuracy=np.full(many, 0.5)
    )
    figure = training_loss([run], [record(system="adm-classifier-xs", gflops=0.01)])
    assert {round(row["loss"], 6) for row in figure.rows} == {2.3}


def test_terms_of_a_backbone_that_is_not_installed_are_added_as_they_are_logged(tmp_path, record):
    """Runs stand by themselves: without the plug-in nobody knows another weight."""
    run = write_run(tmp_path / "run", "somebodys", mse=np.full(STEPS, 0.25), extra=np.full(STEPS, 0.5))
    heights, _, terms = drawn(training_loss([run], [record(system="somebodys")]))
    assert heights == pytest.approx([0.75] * STEPS) and terms == "mse + extra"
