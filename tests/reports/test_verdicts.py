"""Who wins at the same training compute: which opponents meet, by which rule, and what the table says of it."""

import csv
import dataclasses
import io

import pytest

from reports.render import to_csv, to_latex, to_markdown
from reports.tables import protocol_file_name
from reports.verdicts import MAX_LINES, verdict_table
from results.compare import compare
from results.matched import matchups
from results.records import Environment, Sampling, Source, Training


@pytest.fixture
def trained(record):
    def make(system, gflops, value, *, metric="fd", seed=0, half=0.5, **changes):
        training = Training(steps=800, gflops=gflops, seed=seed)
        return record(metric, value, half=half, system=system, training=training, **changes)

    return make


def _pairs(records):
    """(system, opponent, verdict) of each matchup."""
    (found,) = matchups(records)
    return [
        (each.group.records[0].system, each.opponent.records[0].system, each.verdict().verdict)
        for each in found.matchups
    ]


def test_opponents_are_those_of_the_same_compute(trained):
    records = [trained("a", 100.0, 12.0), trained("b", 102.0, 15.0), trained("c", 102.1, 9.0), trained("d", 200.0, 1.0)]
    # b is within 2 % of a and of c; c is not within 2 % of a; nobody is near d
    assert _pairs(records) == [("a", "b", "win"), ("c", "b", "win")]  # b's own line would say the second again
    (found,) = matchups(records)
    assert (found.experiments, found.alone) == (4, 1)


def test_each_meets_the_best_of_the_others(trained):
    records = [trained(name, 100.0, value) for name, value in (("a", 12.0), ("b", 12.5), ("c", 15.0))]
    assert _pairs(records) == [("a", "b", "tie"), ("c", "a", "loss")]
    higher = [trained(name, 100.0, value, metric="precision", half=0.01) for name, value in (("a", 0.5), ("b", 0.7))]
    assert _pairs(higher) == [("b", "a", "win")]


def test_the_rule_is_that_of_compare(trained):
    sides = {"a": (12.0, 12.4, 11.9), "b": (12.6, 13.1, 12.7)}
    records = [
        trained(name, 100.0, value, seed=seed) for name, values in sides.items() for seed, value in enumerate(values)
    ]
    (found,) = matchups(records)
    (match,) = found.matchups
    (expected,) = compare([r for r in records if r.system == "a"], [r for r in records if r.system == "b"])
    verdict = match.verdict()
    assert (verdict.verdict, verdict.scope, verdict.largest_tie, verdict.degrees_of_freedom, verdict.difference) == (
        expected.verdict, expected.scope, expected.largest_tie, expected.degrees_of_freedom, expected.difference,
    )  # fmt: skip
    assert expected.scope == "training seeds" and expected.verdict == "win"


def test_only_what_may_be_compared_meets(trained):
    for changes in (
        {"n": 500},
        {"sampling": Sampling(sampler="ddim", steps=25)},
        {"sampling": Sampling(sampler="ddpm", steps=50)},
        {"sampling": Sampling(sampler="ddpm", steps=25, guidance_scale=1.5, guidance_channels="all")},
    ):
        assert verdict_table([trained("a", 100.0, 12.0), trained("b", 100.0, 15.0, **changes)]) is None
    unknown = [trained(name, 100.0, value, metric="my_metric") for name, value in (("a", 1.0), ("b", 2.0))]
    assert verdict_table(unknown) is None  # nobody knows which way is better
    without = [dataclasses.replace(each, training=None) for each in unknown]
    assert verdict_table(without) is None
    printed = Source(table="t", row="r", column="c")
    published = [trained(name, 100.0, 12.0, provenance="published", source=printed) for name in ("a", "b")]
    assert verdict_table(published) is None


def test_the_table_says_by_how_much_and_by_which_rule(trained):
    longer = dataclasses.replace(trained("b", 101.0, 20.0), framework="jax")
    records = [trained("a", 100.0, 12.0), longer, trained("a", 300.0, 9.0)]
    table = verdict_table(records)
    (section,) = table.sections
    (line,) = section.lines
    cells = dict(zip(section.columns, line.cells, strict=True))
    assert (cells["System"], cells["Best opponent"]) == ("a (800 steps, seed 0)", "b (800 steps, seed 0)")
    assert (cells["Difference"], cells["Verdict"], cells["If trained again"]) == ("-8 \u00b1 0.71", "win", "unknown")
    assert cells["Value"] == "12.0 [11.5, 12.5]" and cells["Opponent differs in"] == "framework jax (here torch)"
    assert "differs by at most 2 %" in section.remarks[0] and "1 of 3 trained experiments" in section.remarks[1]
    (row,) = csv.DictReader(io.StringIO(to_csv(table)))
    assert (row["verdict"], float(row["difference"]), row["records"]) == ("win", -8.0, records[0].id)
    assert r"-8 $\pm$ 0.71" in to_latex(table) and "| win |" in to_markdown(table)


def test_the_table_says_which_compute_is_matched(trained):
    sampling = Sampling(sampler="ddpm", steps=25, gflops_per_image=10.0)
    for theirs, text in ((10.1, "10.00"), (30.0, "10.00 (opponent 30.00)"), (None, "10.00 (opponent -)")):
        other = dataclasses.replace(sampling, gflops_per_image=theirs)
        table = verdict_table([trained("a", 100.0, 12.0, sampling=sampling), trained("b", 100.0, 15.0, sampling=other)])
        (section,) = table.sections
        cells = dict(zip(section.columns, section.lines[0].cells, strict=True))
        assert cells["Gflops an image"] == text
        assert "Training compute is matched; sampling compute is not" in section.remarks[0]
        (row,) = csv.DictReader(io.StringIO(to_csv(table)))
        assert row["sampling_gflops"] == "10.0" and row.get("opponent_sampling_gflops", "") == str(theirs or "")


def test_objectives_are_named_where_they_are_what_differs(trained):
    """Else both sides of a line read alike: one network, one seed, equal steps."""
    first, second, third = trained("a", 100.0, 12.0), trained("a", 100.0, 15.0), trained("b", 100.0, 20.0)

    def of(record, objective, schedule):
        return dataclasses.replace(
            record, training=dataclasses.replace(record.training, objective=objective, schedule=schedule)
        )

    records = [of(first, "velocity", "flow"), of(second, "v", "cosine"), of(third, "velocity", "flow")]
    lines = verdict_table(records).sections[0].lines
    names = {(line.cells[0], line.cells[2]) for line in lines}
    assert ("a (velocity on flow, 800 steps, seed 0)", "a (v on cosine, 800 steps, seed 0)") in names
    assert ("b (800 steps, seed 0)", "a (800 steps, seed 0)") in names and len(names) == 2


def test_a_mean_over_several_versions_is_marked(trained):
    mixed = [
        dataclasses.replace(
            trained("a", 100.0, 12.0 + seed, seed=seed),
            environment=Environment(training_versions={"torch": f"2.{seed}"}),
        )
        for seed in range(2)
    ]
    (section,) = verdict_table([*mixed, trained("b", 100.0, 15.0)]).sections
    assert "a (800 steps, 2 seeds): trained with torch 2.0 and 2.1." in section.remarks


def test_without_intervals_nothing_is_claimed(trained):
    table = verdict_table([trained("a", 100.0, 12.0, half=None), trained("b", 100.0, 15.0, half=None)])
    assert [line.cells[1] for line in table.sections[0].lines] == ["unknown"]


def test_what_was_measured_twice_counts_once(trained):
    twice = trained("a", 100.0, 12.3, sampling=Sampling(sampler="ddpm", steps=25, batch=7))
    once = trained("a", 100.0, 12.0, sampling=Sampling(sampler="ddpm", steps=25, batch=8))
    opponent = trained("b", 100.0, 15.0, sampling=Sampling(sampler="ddpm", steps=25))
    for records in ([twice, once, opponent], [opponent, once, twice]):
        ((match,),) = [each.matchups for each in matchups(records)]
        assert [record.id for record in match.group.records] == [min(twice.id, once.id)]


def test_of_very_many_lines_the_rest_is_counted(trained):
    records = [trained(f"s{index}", 100.0, 10.0 + index) for index in range(MAX_LINES + 11)]
    records += [trained(f"s{index}", 100.0, 10.0 + index, metric="kid") for index in range(2)]
    (section,) = verdict_table(records).sections
    assert len(section.lines) == MAX_LINES
    assert "and 1 further metrics and ways of sampling are left out" in section.remarks[-1]
    (section,) = verdict_table(records[-2:]).sections
    assert len(section.lines) == 1 and "left out" not in " ".join(section.remarks)


def test_exactly_as_many_lines_as_fit_leave_nothing_out(trained):
    records = [trained(f"s{index}", 100.0, 10.0 + index) for index in range(MAX_LINES + 1)]
    (section,) = verdict_table(records).sections
    assert len(section.lines) == MAX_LINES and "left out" not in " ".join(section.remarks)
    (section,) = verdict_table([*records, trained("last", 100.0, 9999.0)]).sections
    assert len(section.lines) == MAX_LINES and "left out" in section.remarks[-1]


def test_the_rule_of_many_systems_is_said(trained):
    records = [trained(f"s{index}", 100.0, 10.0 + 0.2 * index, half=0.5) for index in range(5)]
    (section,) = verdict_table(records).sections
    assert {line.cells[1] for line in section.lines} == {"tie"}  # 0.8 is a loss in a pair, and a tie among five
    assert compare(records[:1], records[4:])[0].verdict == "win"
    assert "compared at once" in section.remarks[0] and "5 % of tables" in section.remarks[0]


def test_no_protocol_takes_its_name():
    assert protocol_file_name("verdicts") == "table-protocol-verdicts"
