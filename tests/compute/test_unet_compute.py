"""The closed form of ADM and LDM: the paper's figures, the releases' sizes, the traced count and fvcore's.

Parameters, keys and multiply-adds are those of openai/guided-diffusion 22e0df8 and CompVis/latent-diffusion a506df5.
"""

import time

import pytest
import torch

from backbones.adm.spec import SPECS as ADM_SPECS
from backbones.ldm.spec import SPECS as LDM_SPECS
from harness.compute.check_fvcore import count_fvcore
from harness.compute.meta_torch import build_on_meta
from harness.compute.trace_torch import trace
from harness.registry import backbones

SPECS = (*ADM_SPECS, *LDM_SPECS)
BY_NAME = {spec.name: spec for spec in SPECS}
XS = [spec.name for spec in SPECS if "xs" in spec.name]
OURS = {*XS, "adm-u-32-64"}  # of no paper and no release

# Parameters and keys of the state dict. LDM's are those of the U-Net and of the class table, one key.
RELEASES = [
    ("adm-64", {}, 295_904_454, 541),
    ("adm-128", {}, 421_529_606, 493),
    ("adm-256", {}, 553_838_086, 567),
    ("adm-256", {"num_classes": 0}, 552_814_086, 566),
    ("adm-512", {}, 558_997_638, 645),
    ("adm-u-64-256", {}, 311_795_910, 567),
    ("adm-u-128-512", {}, 308_835_270, 537),
    ("adm-classifier-64", {}, 65_438_568, 307),
    ("adm-classifier-128", {}, 42_568_040, 221),
    ("adm-classifier-256", {}, 54_096_360, 249),
    ("adm-classifier-512", {}, 54_448_360, 281),
    ("ldm-4", {}, 400_920_579 + 1001 * 512, 688 + 1),
    ("ldm-8", {}, 394_984_196 + 1000 * 512, 626 + 1),
]


@pytest.mark.parametrize(("name", "overrides", "params", "keys"), RELEASES)
def test_sizes_of_the_releases(name, overrides, params, keys):
    assert BY_NAME[name].count(**overrides).params == params
    state = build_on_meta(BY_NAME[name], overrides).state_dict()
    assert len(state) == keys
    assert sum(value.numel() for value in state.values()) == params
    assert {value.dtype for value in state.values()} == {torch.float32}


def test_every_network_of_the_papers_has_a_row():
    assert {name for name, *_ in RELEASES} == {spec.name for spec in SPECS} - OURS


# arXiv:2212.09748, Table 6; an upsampler's figure is the sum of base and upsampler, one forward pass each.
@pytest.mark.parametrize(
    ("names", "gflops"),
    [
        (["adm-128"], 307),
        (["adm-256"], 1120),
        (["adm-512"], 1983),
        (["adm-64"], 110),
        (["adm-u-64-256"], 632),
        (["adm-64", "adm-u-64-256"], 742),
        (["adm-u-128-512"], 2506),
        (["adm-128", "adm-u-128-512"], 2813),
        (["ldm-4"], 104),
        (["ldm-8"], 57),
    ],
    ids=str,
)
def test_the_paper(names, gflops):
    counts = [BY_NAME[name].count() for name in names]
    assert round(sum(count.gflops for count in counts)) == gflops
    assert all(count.macs < count.flops and count.source == "closed form" for count in counts)


# Multiply-adds of the releases' forward pass on the meta device by torch.utils.flop_counter, torch 2.13.0.
MULTIPLY_ADDS = {
    "adm-64": 109_678_018_560,
    "adm-128": 306_927_894_528,
    "adm-256": 1_119_832_768_512,
    "adm-512": 1_982_334_763_008,
    "adm-u-64-256": 631_642_374_144,
    "adm-u-128-512": 2_504_784_986_112,
}
CLASSIFIER_MULTIPLY_ADDS = {
    "adm-classifier-64": 19_079_025_664,
    "adm-classifier-128": 21_040_256_000,
    "adm-classifier-256": 73_348_600_832,
    "adm-classifier-512": 112_766_866_432,
}


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_of_the_releases(name):
    assert BY_NAME[name].count().macs == MULTIPLY_ADDS[name]


@pytest.mark.parametrize("name", CLASSIFIER_MULTIPLY_ADDS)
def test_multiply_adds_of_classifiers_but_for_tokens_that_are_thrown_away(name):
    """The release pools by attention for all 65 tokens of 512 channels and takes the first; here only that is made."""
    attention, read_out = 2 * 64 * 65 * 512, 64 * 512 * 1000
    assert BY_NAME[name].count().macs + attention + read_out == CLASSIFIER_MULTIPLY_ADDS[name]


@pytest.mark.parametrize(("name", "counted"), [("ldm-4", 104_224_088_064), ("ldm-8", 57_036_242_944)])
def test_multiply_adds_of_ldm_but_for_half_of_the_attention_to_the_class(name, counted):
    """The release sums the values over the one context token by torch.einsum, which makes of it an elementwise
    product (aten.mul) that torch's flop counter does not see: half of the multiply-adds of that attention."""
    count = BY_NAME[name].count()
    to_class = sum(row.flops for row in count.rows if row.kind == "attention" and row.part.endswith("attn2"))
    assert count.macs - to_class // 2 == counted


def assert_same(closed, traced):
    assert (closed.source, traced.source) == ("closed form", "traced")
    assert list(traced.breakdown.items()) == list(closed.breakdown.items())  # in the order of execution too
    assert all(type(flops) is int for flops in [*closed.breakdown.values(), *traced.breakdown.values()])
    assert (traced.flops, traced.macs, traced.params) == (closed.flops, closed.macs, closed.params)


@pytest.mark.parametrize("name", BY_NAME)
def test_closed_form_equals_trace(name):
    assert_same(BY_NAME[name].count(), trace(BY_NAME[name]))


ALL = ["adm-xs", "adm-u-xs", "adm-classifier-xs", "ldm-xs"]
ADM = ALL[:3]
UNETS = ["adm-xs", "adm-u-xs", "ldm-xs"]


@pytest.mark.parametrize(
    ("names", "overrides"),
    [
        (["adm-xs", "adm-classifier-xs", "ldm-xs"], {"input_size": 12, "in_channels": 1, "num_classes": 7}),
        (ALL, {"heads": 2, "head_channels": 0}),
        (ALL, {"width": 32, "multipliers": (1, 3, 2), "res_blocks": 3, "head_channels": 16}),
        (ALL, {"multipliers": (1,)}),
        (ALL, {"width": 96, "multipliers": (2, 1)}),
        (ALL, {"gradient_checkpointing": True, "dropout": 0.2}),
        (UNETS, {"out_channels": 5}),
        (["adm-xs", "adm-u-xs"], {"num_classes": 0}),
        (ADM, {"multipliers": (0.5, 1, 1.5)}),
        (ADM, {"multipliers": [1, 2]}),
        (ADM, {"attention_resolutions": ()}),
        (ADM, {"attention_resolutions": (32, 8), "qkv_first": True}),
        (["adm-u-xs"], {"input_size": 12, "in_channels": 1, "low_res_size": 5}),
        (["ldm-xs"], {"attention_rates": ()}),
        (["ldm-xs"], {"attention_rates": (1, 2, 64)}),
        (["ldm-xs"], {"transformer_depth": 2, "context_width": 17}),
        (["ldm-xs"], {"null_class": False}),
    ],
    ids=str,
)
def test_closed_form_equals_trace_with_other_arguments(names, overrides):
    for name in names:
        assert_same(BY_NAME[name].count(**overrides), trace(BY_NAME[name], **overrides))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("adm-xs", {}),
        ("adm-xs", {"num_classes": 0, "qkv_first": True}),
        ("adm-u-xs", {}),
        ("adm-classifier-xs", {}),
        ("ldm-xs", {}),
        ("ldm-xs", {"transformer_depth": 2, "heads": 1, "head_channels": 0}),
    ],
    ids=str,
)
def test_fvcore_agrees(name, overrides):
    pytest.importorskip("fvcore")
    given = {"input_size": 16, "width": 32, "head_channels": 16, **overrides}
    assert count_fvcore(BY_NAME[name], **given) == BY_NAME[name].count(**given).flops


def test_all_backbones_are_counted_in_a_moment():
    with_closed_form = [backbones.get(name) for name in backbones.names()]
    with_closed_form = [spec for spec in with_closed_form if spec.closed_form is not None]
    assert {spec.name for spec in with_closed_form} >= set(BY_NAME)
    start = time.perf_counter()
    assert all(spec.count().flops > 0 for spec in with_closed_form)
    assert time.perf_counter() - start < 5
