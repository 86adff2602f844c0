"""Footnotes name settings as the table of settings does."""

import dataclasses

from harness.settings import RunOptions, settings_of
from reports.texts import (
    DISTINGUISHING_METADATA,
    METADATA,
    distinguishing_metadata,
    guidance_text,
    row_metadata,
)
from results.records import Sampling, Training


def test_every_setting_with_a_footnote_is_stated_under_its_name(record):
    footnotes = {known.footnote for known in settings_of(RunOptions).values() if known.footnote}
    full = dataclasses.replace(
        record(), framework="jax", training=Training(steps=800, seed=1, precision="bfloat16", micro_batch=8),
        sampling=Sampling(
            sampler="ddim", steps=50, eta=0.5, guidance_scale=1.5, guidance_channels="all", label_policy="random", seed=3,
            precision="float32", batch=16, decoder="ft-ema", spacing="karras", ema_width=0.05,
        ),
    )  # fmt: skip
    stated = row_metadata(full) | distinguishing_metadata(full)
    assert len(footnotes) > 10
    assert footnotes <= stated.keys()
    assert {
        "framework": "jax",
        "eta": "0.5",
        "training steps": "800",
        "guidance": "1.5 (all)",
    }.items() <= stated.items()


def test_every_name_has_its_place_in_the_order_of_notes(record):
    assert row_metadata(record()).keys() <= set(METADATA)
    assert distinguishing_metadata(record()).keys() <= set(DISTINGUISHING_METADATA)
    assert not set(METADATA) & set(DISTINGUISHING_METADATA)


def test_the_scale_of_a_classifier_may_be_missing(record):
    sampling = Sampling(sampler="ddpm", steps=25, guidance_channels="classifier")
    assert guidance_text(record(sampling=sampling)) == "scale not stated (classifier)"
    assert guidance_text(record(sampling=dataclasses.replace(sampling, guidance_scale=1.0))) == "1 (classifier)"
    assert guidance_text(record(sampling=Sampling(steps=25, guidance_scale=1.0))) == "none"
