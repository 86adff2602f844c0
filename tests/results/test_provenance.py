"""What a record says of its training, and what it keeps apart: data, versions, forks, suites, unknown seeds."""

import dataclasses
import json
import re

import pytest

from harness.errors import UserError
from results.cautions import cautions, compute_of
from results.checked_fields import BrokenRecord
from results.compare import compare, differing
from results.experiments import experiment_key, group_of
from results.lines import LineReader
from results.records import Environment, Training, comparable_key, from_json, to_json

OLD_ID = "cb617221a8fbf4c7d8407ccec3cdcff0e64c9599096705baa9733034a0b0fce0"
OLD_LINE = (
    '{"backbone":"dit-xs-2","dataset":"digits","environment":{"device":"cpu","versions":{"numpy":"2.4.6",'
    '"torch":"2.13.0"}},"evaluation":{"features":"efficientnet-lite0","features_sha256":"abababababababab'
    'abababababababababababababababababababababababab","suite":"embedded"},"framework":"torch","gflops":0'
    '.0637,"high":0.4,"id":"cb617221a8fbf4c7d8407ccec3cdcff0e64c9599096705baa9733034a0b0fce0","interval":'
    '"95 % delete-block jackknife","kind":"denoiser","low":0.3,"metric":"fd","n":1000,"params":4123456,"p'
    'rotocol":"digits","protocol_version":"1","provenance":"measured","resolution":8,"sampling":{"evaluat'
    'ions":25,"gflops_per_image":1.59,"sampler":"ddpm","seed":0,"steps":25},"schema":1,"system":"dit-xs-2'
    '","training":{"gflops":19568.6,"images":102400,"learning_rate":0.001,"seed":0,"steps":800},"value":0'
    ".3333333333333333}"
)


def trained(measured, value=10.0, seed=0, system="a", versions=None, **training):
    fields = {"steps": 800, "seed": seed, "checkpoint_sha256": f"{system}{seed}", **training}
    return measured(
        value=value, low=value - 0.5, high=value + 0.5, system=system, training=Training(**fields),
        environment=Environment(device="cpu", training_versions=versions),
    )  # fmt: skip


def test_ids_of_earlier_records_stay_and_their_lines_load(measured):
    assert measured().id == OLD_ID
    for read in (from_json, LineReader().read):
        assert read(OLD_LINE) == measured()
    known = dataclasses.replace(measured().training, dataset_sha256="cd" * 32, latents_sha256="ef" * 32)
    assert measured(training=known).id != OLD_ID


def test_other_training_data_make_another_experiment(measured):
    one = trained(measured, dataset_sha256="ab" * 32)
    other = trained(measured, 11.0, 1, dataset_sha256="cd" * 32)
    assert experiment_key(one) != experiment_key(other)
    assert experiment_key(one) == experiment_key(trained(measured, 11.0, 1, dataset_sha256="ab" * 32))
    with pytest.raises(UserError, match=r"A holds two results.*training dataset sha256 abab\S+ and cdcd"):
        compare([one, other], [trained(measured, system="b")])
    assert differing(one, other) == {"training dataset sha256": ("ab" * 32, "cd" * 32)}
    latent = trained(measured, dataset_sha256="ab" * 32, latents_sha256="12" * 32)
    other_latents = trained(measured, seed=1, dataset_sha256="ab" * 32, latents_sha256="34" * 32)
    assert "training latents sha256" in differing(latent, other_latents)
    assert experiment_key(latent) != experiment_key(other_latents)


def test_training_data_that_one_record_does_not_state_are_no_difference(measured):
    sides = [trained(measured), trained(measured, 11.0, 1, dataset_sha256="ab" * 32)], [trained(measured, system="b")]
    (found,) = compare(*sides)
    assert len(found.a.seeds) == 2
    third = trained(measured, 12.0, 2, dataset_sha256="cd" * 32)
    with pytest.raises(UserError, match="holds two results"):
        compare([*sides[0], third], sides[1])


def test_suite_versions_are_not_compared_and_protocol_versions_are_named(measured):
    first, second = (
        measured(system=name, evaluation=dataclasses.replace(measured().evaluation, suite_version=version))
        for name, version in (("a", "1"), ("b", "2"))
    )
    assert comparable_key(first) != comparable_key(second)
    with pytest.raises(UserError, match="suite version is 1 in A and 2 in B"):
        compare([first], [second])
    other = measured(system="b", protocol_version="2")
    assert differing(measured(), other) == {"protocol version": ("1", "2")}
    assert differing(measured(), measured(protocol="mine")) == {"protocol": ("digits", "mine")}


@pytest.mark.parametrize("seed", [0, None])
def test_checkpoints_of_unknown_seed_are_no_training_seeds(measured, seed):
    files = [
        trained(measured, value, system="x", seed=seed, checkpoint_sha256=f"{value}") for value in (10.0, 11.0, 12.0)
    ]
    if seed is None:
        with pytest.raises(UserError, match="A holds two checkpoints .*training seed is not known.*name one"):
            compare(files, [trained(measured, system="b")])
        assert len({experiment_key(record) for record in files}) == 3
    else:  # of one seed: checkpoints that differ in low bits
        (found,) = compare(files, [trained(measured, system="b")])
        assert len(found.a.seeds) == 1


def test_seeds_that_all_give_one_value_leave_the_noise_of_sampling(measured):
    a = [trained(measured, 10.0, seed) for seed in range(3)]
    b = [trained(measured, 10.1, seed, system="b") for seed in range(3)]
    (found,) = compare(a, b)
    assert found.verdict == "tie" and found.scope == "training seeds" and found.largest_tie > 0.1


EDITS = {
    "low": ('"low":0.3', '"low":0.33'),
    "high": ('"high":0.4', '"high":0.35'),
    "both": ('"low":0.3', '"low":0.2'),
    "interval": ("95 %", "99 %"),
    "direction": ('"id":"', '"higher_is_better":true,"id":"'),
    "check": ('"interval_check":"', '"interval_check":"0'),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_interval_is_refused(measured, edit):
    text = to_json(measured())
    edited = text.replace(*edit)
    assert edited != text
    reader = LineReader()
    assert reader.read(text) == measured()
    for read in (from_json, reader.read, LineReader().read):
        with pytest.raises(BrokenRecord, match="edited"):
            read(edited)


def test_the_check_is_for_every_line_but_optional(measured):
    without = re.sub(r'"interval_check":"\w*",', "", to_json(measured()))
    assert from_json(without) == LineReader().read(without) == measured()
    fields = json.loads(to_json(measured(low=None, high=None, interval=None)))
    with pytest.raises(BrokenRecord, match="edited"):
        from_json(json.dumps({**fields, "low": 0.3, "high": 0.4}))


def test_a_fork_is_another_experiment_only_if_its_precision_changed(measured):
    plain = trained(measured, precision="bfloat16")
    moved = trained(measured, 11.0, 1, precision="bfloat16", forked_at=30, parent_sha256="ab")
    mixed = trained(measured, 11.0, 1, precision="bfloat16", earlier_precision="float32 to step 30", forked_at=30)
    assert experiment_key(plain) == experiment_key(moved) != experiment_key(mixed)
    with pytest.raises(UserError, match="holds two results"):
        compare([plain, mixed], [trained(measured, system="b")])


def test_mixed_versions_are_warned_of(measured):
    one, same, other = (
        trained(measured, seed=seed, versions={"torch": torch, "harness": "0.4.0", "numpy": "2.0"})
        for seed, torch in enumerate(("2.12.0", "2.12.0", "2.13.0"))
    )
    assert cautions([one, same]) == []
    (text,) = cautions([one, same, other])
    assert "trained with torch 2.12.0 and 2.13.0" in text
    (text,) = cautions([one, trained(measured, seed=3)])
    assert "torch 2.12.0 and not recorded" in text
    resumed = trained(measured, seed=4, versions={"torch": "2.12.0, then 2.13.0"})
    assert cautions([resumed]) == ["trained with torch 2.12.0, then 2.13.0"]
    assert cautions([trained(measured), trained(measured, seed=1)]) == []  # nothing is known of either
    beside_a_package = [one, trained(measured, seed=5, versions={"torch": "2.12.0", "my-mixer": "0.1.0"})]
    assert cautions(beside_a_package) == []  # the network of the other one is no part of that package
    (found,) = [group_of([one, same, other])]
    assert len(found.seeds) == 3


def test_compute_that_is_not_matched_is_warned_of(measured):
    def side(system, training, an_image, **changes):
        sampling = dataclasses.replace(measured().sampling, gflops_per_image=an_image, **changes)
        return dataclasses.replace(trained(measured, system=system, gflops=training), sampling=sampling)

    def warnings(a, b):
        return [each.warning for each in compute_of(compare([a], [b]))]

    assert warnings(side("a", 100.0, 2.0), side("b", 101.9, 2.03)) == ["", ""]
    assert warnings(side("a", 100.0, 2.0), side("b", 370.0, 1.0)) == [
        "B has 3.7 times the training compute of A", "A has 2 times the sampling compute of B",
    ]  # fmt: skip
    assert warnings(side("a", 100.0, 2.0), side("b", None, 2.0, decoder_gflops=0.5)) == [
        "the training compute of B is not stated, so it cannot be matched",
        "B has 1.25 times the sampling compute of A",
    ]
    assert warnings(side("a", None, None), side("b", None, None)) == ["", ""]
