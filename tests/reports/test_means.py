"""Means over seeds in tables and figures, and how often a best is named among equals."""

import csv
import dataclasses
import io
import math
import random

import pytest
from scipy.stats import t as student

from reports.figures_frontier import best_size
from reports.figures_gflops import compute_efficiency
from reports.figures_study import studies
from reports.means import is_distinguishable, mean_interval
from reports.points import constant_x, index_of, marks_of
from reports.render import to_csv
from reports.tables import paper_tables, protocol_table
from results.compare import compare
from results.experiments import group_of
from results.records import Environment, Sampling, Training

FD = ("fd", "")


def seeded(record, value, seed=0, *, drawn=0, steps=800, gflops=0.05, half=0.5, system="a", **changes):
    training = Training(steps=steps, gflops=gflops * steps * 1e5, seed=seed, checkpoint_sha256=f"{system}{seed}{steps}")
    sampling = Sampling(sampler="ddpm", steps=25, seed=drawn, samples_sha256=f"{system}{seed}{steps}{drawn}")
    return record(value=value, half=half, system=system, gflops=gflops, training=training, sampling=sampling, **changes)


def test_there_is_one_mean_everywhere(record):
    """Seed 0 with three sampling seeds of 10, seed 1 with one of 20: the mean of the seeds' means is 15, not 12.5."""
    records = [*(seeded(record, 10.0, 0, drawn=drawn) for drawn in range(3)), seeded(record, 20.0, 1)]
    (found,) = compare(records, [seeded(record, 9.0, system="b")])
    (mark,) = marks_of(records, constant_x(1.0))
    table = protocol_table("digits", [*records, seeded(record, 9.0, system="b")])
    means = [row for row in csv.DictReader(io.StringIO(to_csv(table))) if row["section"] == "2"]
    assert (found.a.value, mark.y, float(means[0]["fd"])) == (15.0, 15.0, 15.0)


def test_the_means_have_a_section_with_intervals_and_marks(record):
    values = {"a": (10.0, 11.0, 12.0), "b": (10.5, 11.5, 12.6), "c": (20.0, 21.0, 22.0), "d": (11.2,)}
    records = [
        seeded(record, value, seed, system=name) for name, found in values.items() for seed, value in enumerate(found)
    ]
    table = protocol_table("digits", records)
    seeds, means = table.sections
    assert len(seeds.lines) == 10 and len(means.lines) == 4 and means.heading.endswith("means over seeds")
    assert not any(mark for line in seeds.lines for mark in line.marks)  # the luckiest seed is not the best system
    rows = {row["system"]: row for row in csv.DictReader(io.StringIO(to_csv(table))) if row["section"] == "2"}
    half = student.ppf(0.975, 2) / math.sqrt(3)
    assert float(rows["a"]["fd"]) == 11.0 and float(rows["a"]["fd_high"]) == pytest.approx(11.0 + half)
    assert rows["a"]["seeds"] == "3 (0, 1, 2)" and not rows["a"]["fd_record"] and not rows["a"].get("training_seed")
    assert (float(rows["d"]["fd_low"]), rows["d"]["fd_interval"]) == (pytest.approx(10.7), "sampling")
    assert {name: row["fd_mark"] for name, row in rows.items()} == {"a": "tie", "b": "tie", "c": "", "d": "tie"}
    assert all(row["section"] != "2" or not row.get("fd_record") for row in rows.values())


def test_without_several_seeds_a_table_has_no_means(record):
    table = protocol_table("digits", [seeded(record, 10.0), seeded(record, 12.0, system="b")])
    (section,) = table.sections
    assert section.lines[0].marks[-1] == "best"
    assert "seeds" not in table.data[0]


def test_seeds_of_other_data_are_not_averaged_and_mixed_versions_are_named(record):
    def made(seed, data, torch):
        one = seeded(record, 10.0 + seed, seed)
        return dataclasses.replace(
            one,
            training=dataclasses.replace(one.training, dataset_sha256=data),
            environment=Environment(training_versions={"torch": torch}),
        )

    assert len(protocol_table("digits", [made(0, "ab", "2.1"), made(1, "cd", "2.1")]).sections) == 1
    _, means = protocol_table("digits", [made(0, "ab", "2.1"), made(1, "ab", "2.2")]).sections
    assert any("trained with torch 2.1 and 2.2" in remark for remark in means.remarks)


def test_the_interval_of_a_mean(record):
    one = group_of([seeded(record, 10.0, half=0.5)])
    assert mean_interval(one) == (9.5, 10.5, "sampling")
    assert mean_interval(group_of([seeded(record, 10.0, half=None)]))[:2] == (None, None)
    same = group_of([seeded(record, 10.0, seed, half=0.5) for seed in range(2)])  # equal values tell of no noise
    assert mean_interval(same)[:2] == pytest.approx((10 - 0.5 / 2**0.5, 10 + 0.5 / 2**0.5))


def curves(record, draw, seeds, gap=0.0):
    """Training curves of two systems of which b is worse by `gap`: training seeds spread by 1, sampling by 0.3."""
    return [
        seeded(record, 20.0 - 2 * step + offset + draw.gauss(0, 1) + draw.gauss(0, 0.3), seed, steps=400 * 2**step,
               gflops=gflops, system=system, half=0.6)
        for system, gflops, offset in (("a", 0.05, 0.0), ("b", 0.06, gap))
        for seed in range(seeds)
        for step in range(3)
    ]  # fmt: skip


@pytest.mark.parametrize("seeds", [1, 3])
def test_how_often_a_budget_has_a_winner_among_equals(record, seeds):
    draw = random.Random(seeds)

    def named(gap):
        figure = best_size(studies(index_of(curves(record, draw, seeds, gap)), []))
        return [row for row in figure.rows if row["best"] == "yes"], figure

    tables = 60
    wrong = sum(len(named(0.0)[0]) for _ in range(tables)) / (5 * tables)
    assert wrong < 0.05 + 4 * math.sqrt(0.05 * 0.95 / tables)  # the budgets of one figure are not independent
    if seeds > 1:
        winners, figure = named(30.0)
        assert len(winners) == 5 and all(row["system"] == "a" for row in winners)
        assert {row["best"] for row in figure.rows} == {"yes", "no"}
    equal = named(0.0)[1]
    assert "not distinguishable" in {row["best"] for row in equal.rows}
    assert "not distinguishable" in equal.panels[0].note


def test_many_seeds_are_no_better_than_one(record):
    """Of equals, ten seeds would beat one in 10 of 11 tables if the luckiest seed counted."""
    draw = random.Random(3)
    first = 0
    trials = 100
    for _ in range(trials):
        records = [seeded(record, draw.gauss(10, 1), seed, system="many") for seed in range(10)]
        records += [seeded(record, draw.gauss(10, 1), 0, system="one")]
        figure = compute_efficiency([], index_of(records), [])
        (panel,) = figure.panels
        first += panel.series[0].label == "many"
        assert "each system's best setting" in panel.note
    assert 0.3 < first / trials < 0.7
    assert len(figure.rows) == 11  # all seeds of the bars


def test_published_values_are_compared_as_printed_and_not_with_measured_ones(record):
    from results import paper

    printed = [one for one in paper.records() if one.table == "Table 4" and one.metric == "fid"][:2]
    groups = [group_of([one]) for one in sorted(printed, key=lambda one: one.value)]
    assert is_distinguishable(*groups)
    measured = group_of([seeded(record, 500.0)])
    assert not is_distinguishable(groups[0], measured)


def test_the_papers_tables_have_means_of_our_seeds_too(imagenet):
    def table(*records):
        return next(table for table in paper_tables(records) if table.name == "table-2")

    seeds = [imagenet("fid", 2.2 + 0.1 * seed, seed=seed) for seed in range(3)]
    section = table(*seeds).sections[-1]
    assert section.heading.endswith("means over seeds") and len(section.lines) == 1
    assert section.lines[0].values[-1] == pytest.approx(2.3)
    marked = [line.published for line in table(*seeds).sections[0].lines if any(line.marks)]
    assert marked and all(marked)
    assert not any("means" in each.heading for each in table(seeds[0]).sections)
