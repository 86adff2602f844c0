"""The table of seeds: only systems with enough seeds of both kinds, and the same sampling seeds of every training seed."""

import dataclasses

import pytest

from reports.lottery import COLUMNS, seeds_table
from results.variances import components

VALUES = {0: [50.0, 51.0, 52.0], 1: [55.0, 54.0, 56.0], 2: [47.0, 49.0, 48.0]}  # training seed -> by sampling seed


def drawn(record, values, **changes):
    made = []
    for seed, row in values.items():
        for sampling_seed, value in enumerate(row):
            each = record(value=value, half=1.0, seed=seed, **changes)
            sampling = dataclasses.replace(each.sampling, seed=sampling_seed, samples_sha256=f"{seed}-{sampling_seed}")
            made.append(dataclasses.replace(each, sampling=sampling))
    return made


def test_a_system_with_three_seeds_of_both_kinds_has_a_row(record):
    table = seeds_table(drawn(record, VALUES))
    (section,), (row,) = table.sections, table.data
    assert section.columns == COLUMNS and len(section.lines) == 1 and len(section.lines[0].cells) == len(COLUMNS)
    expected = components(list(VALUES.values()))
    assert (row["training_seeds"], row["sampling_seeds"]) == (3, 3)
    assert row["mean"] == pytest.approx(154 / 3) and row["training_variance"] == expected.training > 0
    assert row["sampling_variance"] == pytest.approx(1.0)
    seeds = [row["seeds_for_0.01"], row["seeds_for_0.02"], row["seeds_for_0.05"]]
    assert seeds == sorted(seeds, reverse=True) and seeds[-1] >= 2
    assert len(row["records"].split()) == 9


def test_sampling_seeds_that_one_training_lacks_are_left_out(record):
    more = {seed: [*row, 90.0] if seed == 0 else row for seed, row in VALUES.items()}
    (row,) = seeds_table(drawn(record, more)).data
    assert row["sampling_seeds"] == 3 and row["mean"] == pytest.approx(154 / 3)


@pytest.mark.parametrize("values", [{0: VALUES[0], 1: VALUES[1]}, {seed: row[:2] for seed, row in VALUES.items()}])
def test_fewer_seeds_have_no_table(record, values):
    assert seeds_table(drawn(record, values)) is None
