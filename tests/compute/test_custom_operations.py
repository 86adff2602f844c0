"""The compute of custom operations: declared, held against a composed version, and warned of where nothing is seen."""

import json

import custom_networks as networks
import pytest
import torch
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.compute import custom, register_flops
from harness.compute.trace_torch import trace
from harness.conformance.checks import CHECKS, run_checks
from harness.conformance.suite import check_closed_form, check_quickly, subject_of
from harness.errors import RunError, UserError

MACS = networks.TOKENS * networks.WIDTH * networks.STATES


@pytest.fixture(autouse=True)
def undeclared(monkeypatch):
    monkeypatch.setattr(custom, "_declared", {})


def count(x, a):
    return x.numel() // x.shape[0] * a.shape[1]


def checked(network, **fields):
    """(status, message) of the check of compute."""
    (found,) = run_checks(subject_of(networks.spec_of(network, **fields), "torch", {}), {"compute": CHECKS["compute"]})
    return found.status, found.message


@pytest.mark.parametrize(
    "operation", ["doors_test::mix", torch.ops.doors_test.mix, torch.ops.doors_test.mix.default, networks.mix]
)
@pytest.mark.parametrize(
    "how", [{"count": count}, {"composed": networks.composed}, {"count": count, "composed": networks.composed}]
)
def test_an_operator_counts_as_declared(operation, how):
    with pytest.raises(RunError, match=r"doors_test::mix .* declare its compute with harness.compute.register_flops"):
        trace(networks.spec_of(networks.ByOperator))
    register_flops(operation, **how)
    compute = trace(networks.spec_of(networks.ByOperator))
    assert compute.flops == networks.OUTSIDE + MACS
    assert compute.breakdown["", "custom"] == MACS
    assert checked(networks.ByOperator)[0] == "note"


def test_a_function_counts_as_declared_and_is_warned_of_if_not():
    status, message = checked(networks.ByFunction)
    assert status == "failed" and "a branch for tensors without values" in message
    register_flops(networks.Mix, count, composed=networks.composed)
    assert trace(networks.spec_of(networks.ByFunction)).flops == networks.OUTSIDE + MACS
    assert checked(networks.ByFunction)[0] == "note"
    assert (
        networks.Mix.forward is vars(networks.Mix)["forward"].__func__
        and "followed" not in networks.Mix.forward.__qualname__
    )


def test_a_function_that_shows_nothing_anywhere_is_named(monkeypatch):
    monkeypatch.setattr(
        networks.Mix, "forward", staticmethod(lambda ctx, x, a: ctx.save_for_backward(x, a) or x.clone())
    )
    status, message = checked(networks.ByFunction)
    assert status == "note" and "autograd.Function Mix counts nothing" in message


def test_an_operator_of_torch_counts_as_declared():
    with pytest.raises(RunError, match="aten::linalg_cholesky_ex .* declare its compute"):
        trace(networks.spec_of(networks.ByCholesky))
    register_flops("aten::linalg_cholesky_ex", lambda x, **options: x.shape[-1] ** 3 // 6)
    assert trace(networks.spec_of(networks.ByCholesky)).flops == networks.OUTSIDE + networks.WIDTH**3 // 6


def test_torchs_own_registrations_are_honoured():
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    @register_flop_formula(torch.ops.doors_test.mix)
    def formula(x_shape, a_shape, out_shape=None, **kwargs):
        return 2 * x_shape[1] * x_shape[2] * a_shape[1]

    try:
        assert trace(networks.spec_of(networks.ByOperator)).flops == networks.OUTSIDE + MACS
        register_flops("doors_test::mix", lambda x, a: 7)  # this project's own door goes first
        assert trace(networks.spec_of(networks.ByOperator)).flops == networks.OUTSIDE + 7
    finally:
        del flop_registry[torch.ops.doors_test.mix]


def test_a_wrong_declaration_is_not_believed():
    register_flops("doors_test::mix", lambda x, a: 2 * count(x, a), composed=networks.composed)
    status, message = checked(networks.ByOperator)
    assert status == "failed" and f"expected {MACS:,} flops of operator doors_test::mix" in message
    register_flops("doors_test::mix", count, composed=lambda x, a: 1.5 * networks.composed(x, a))
    status, message = checked(networks.ByOperator)
    assert status == "failed" and "came a difference of" in message and "not what is computed" in message


def test_a_branch_for_tensors_without_values_is_found():
    status, message = checked(networks.ByBranch)
    assert status == "failed"
    assert f"expected {networks.OUTSIDE + MACS:,} flops, as counted on the CPU, came {networks.OUTSIDE:,}" in message


def test_products_that_are_summed_element_by_element_are_warned_of():
    assert "element-wise" not in checked(networks.ByProduct)[1]
    assert trace(networks.spec_of(networks.ByProduct)).flops == networks.OUTSIDE + MACS
    status, message = checked(networks.ByElements)
    assert status == "note"
    assert f"summed, {MACS:,} multiply-adds beside {networks.OUTSIDE:,} flops, are not counted" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((print, count), "is no operator of torch.library, no torch.autograd.Function and no JAX primitive"),
        (("aten::mm", count), "aten::mm is an operator of torch, which the convention counts$"),
        ((torch.ops.aten.mul, count), "aten::mul is an operator of torch, which the convention calls free$"),
        (("doors_test::mix",), "needs count, a function that returns its flops, or composed"),
    ],
)
def test_what_cannot_be_declared_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        register_flops(*arguments)


@pytest.mark.parametrize(
    ("wrong", "message"), [(lambda x, a: 1.5, "gave 1.5, not a whole"), (lambda x: 1, "failed: TypeError")]
)
def test_a_count_that_fails_is_one_line(wrong, message):
    register_flops("doors_test::mix", wrong)
    with pytest.raises(UserError, match=message):
        trace(networks.spec_of(networks.ByOperator))


def test_a_wrong_closed_form_is_refused_before_training():
    spec = networks.spec_of(networks.ByProduct, closed_form=networks.half_of_the_flops)
    for check in (check_quickly, check_closed_form):
        with pytest.raises(
            UserError, match=r"fails the check 'closed form': expected [\d,]+ flops .* from closed_form"
        ):
            check(spec, "torch", {})


def test_fvcore_counts_what_moves_pixels_and_hides_no_row(monkeypatch):
    pytest.importorskip("fvcore")
    registry.backbones.names()  # loaded, before what is there is copied
    for name in ("_items", "_owners"):
        monkeypatch.setattr(registry.backbones, name, {**getattr(registry.backbones, name)})
    register_flops(networks.mix, count)
    for network in (networks.Moves, networks.ByOperator):
        registry.backbones.register(networks.spec_of(network))
    done = CliRunner().invoke(group, ["flops", "custom-byoperator", "custom-moves", "--check", "fvcore", "--json"])
    wrong, moves = json.loads(done.stdout)["rows"]
    assert moves["fvcore_gflops"] == moves["gflops"]
    assert "fvcore_gflops" not in wrong and "fvcore does not count doors_test::mix" in wrong["fvcore_error"]
    assert isinstance(done.exception, RunError)
    done = CliRunner().invoke(group, ["flops", "custom-byoperator", "custom-moves", "--check", "fvcore"])
    assert "custom-moves" in done.stdout and isinstance(done.exception, RunError)
