"""Checks that a network's compute is counted, and that what its package states of it is what there is."""

from __future__ import annotations

from harness.compute.custom import Blind
from harness.conformance.network import Failure
from harness.conformance.subject import Subject
from harness.errors import RunError, UserError
from harness.spec import Compute

NOTABLE = 0.01  # share of a network's flops from which on sums that are not counted are worth a remark
TRAINING_TRACES = 6  # of the compute in training mode, which must be the same whatever is drawn
SAME_OPERATION = 1e-3  # relative difference of a custom operation from its composed version


def compute(subject: Subject) -> str | None:
    """Every operation is counted, and what the package states, its closed form and its declarations, is what there is."""
    if subject.framework == "torch":
        from harness.compute.trace_torch import trace_and_doubt
    else:
        from harness.compute.trace_jax import trace_and_doubt
    traced, blind = trace_and_doubt(subject.spec, **subject.arguments)
    closed_form(subject, traced)
    _check_declarations(blind)
    remarks = []
    if subject.spec.closed_form is None:
        remarks.append(f"the compute is traced: {traced.gflops:.4g} Gflops, {traced.params:,} parameters")
    if subject.framework == "torch":
        _check_on_device(subject, traced)
    if (remark := _compare_training(subject, traced)) is not None:
        remarks.append(remark)
    if blind.silent:
        remarks.append(
            f"autograd.Function {', '.join(dict.fromkeys(blind.silent))} counts nothing, because nothing is computed in it on "
            "the meta device; declare its compute with harness.compute.register_flops"
        )
    summed = sum(blind.summed.values())
    if summed > NOTABLE * (traced.flops + summed):
        path = max(blind.summed, key=lambda name: blind.summed[name])
        remarks.append(
            f"element-wise products that are summed, {summed:,} multiply-adds beside {traced.flops:,} flops, are not counted, "
            f"such as in module {path or 'at the top'!r}; write them as a product (einsum, matmul), or declare them with "
            "harness.compute.register_flops"
        )
    return "; ".join(remarks) or None


def closed_form(subject: Subject, traced: Compute | None = None) -> None:
    """The closed form states the flops and the parameters that the network has. traced: if they were counted before."""
    if subject.spec.closed_form is None:
        return
    if traced is None:
        if subject.framework == "torch":
            from harness.compute.trace_torch import trace
        else:
            from harness.compute.trace_jax import trace
        traced = trace(subject.spec, **subject.arguments)
    stated = subject.spec.count(**subject.arguments)
    if (stated.flops, stated.params) != (traced.flops, traced.params):
        raise Failure(
            f"expected {traced.flops:,} flops and {traced.params:,} parameters, as traced from the network, came "
            f"{stated.flops:,} and {stated.params:,} from closed_form of the spec"
        )


def _compare_training(subject: Subject, traced: Compute) -> str | None:
    """The compute of training mode, stated or not, against the network. traced: in evaluation mode."""
    try:
        traces = _traces_of_training(subject)
    except (UserError, RunError) as error:
        if subject.spec.masked_training:
            raise Failure(f"expected a forward pass in training mode that can be counted, came {error}") from error
        return None  # what training mode adds, such as dropout of its own, needs no count
    found, counts = traces[0], {each.flops for each in traces}
    if len(counts) > 1:
        raise Failure(
            f"expected the same flops at each call in training mode, came {min(counts):,} to {max(counts):,}: for stochastic "
            "depth, compute every block and multiply its branch by a random mask, drawn for each image; a block that is left "
            "out for the whole batch makes training compute a matter of chance"
        )
    if not subject.spec.masked_training:
        if found.flops != traced.flops:
            raise Failure(
                f"expected {traced.flops:,} flops in training mode, as in sampling, came {found.flops:,}: give the spec "
                "masked_training=True, so that training compute is counted by what training computes"
            )
        return None
    stated = subject.spec.count(**subject.arguments).in_training
    if stated.flops != found.flops:
        raise Failure(
            f"expected {found.flops:,} flops in training mode, as traced from the network, came {stated.flops:,} in "
            "Compute.training of the closed form"
        )
    return f"masked training: {found.gflops:.4g} Gflops in training, {traced.gflops:.4g} in sampling"


def _traces_of_training(subject: Subject) -> list[Compute]:
    """The compute of training mode: with several draws in torch; of a program in JAX, which is one for all draws."""
    if subject.framework == "jax":
        from harness.compute.trace_jax import trace as trace_jax

        return [trace_jax(subject.spec, training=True, **subject.arguments)]
    import torch

    from harness.compute.trace_torch import trace

    traces = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(TRAINING_TRACES):
            torch.manual_seed(seed)
            traces.append(trace(subject.spec, training=True, **subject.arguments))
    return traces


def _check_declarations(blind: Blind) -> None:
    """Raise `Failure` for a declared operation that its composed version contradicts."""
    for name, declared, composed, difference in blind.declared:
        if declared != composed:
            raise Failure(
                f"expected {composed:,} flops of {name}, as its composed version has, came {declared:,} from its declaration"
            )
        if difference > SAME_OPERATION:
            raise Failure(
                f"expected the values of its composed version from {name}, came a difference of {difference:.2g} of their "
                "standard deviation: what is counted is not what is computed"
            )


def _check_on_device(subject: Subject, traced: Compute) -> None:
    """Raise `Failure` if a call on the CPU has another count than the trace, which runs on the meta device."""
    from harness.compute.trace_torch import count_call
    from harness.conformance.torch_network import TorchNetwork

    network = subject.moved
    assert isinstance(network, TorchNetwork)
    flops, blind = count_call(subject.spec, network.net.eval(), network.tensors(subject.inputs(1)))
    _check_declarations(blind)
    if flops != traced.flops:
        raise Failure(
            f"expected {flops:,} flops, as counted on the CPU, came {traced.flops:,} from the trace on the meta device: a branch "
            "for tensors without values (is_meta) leaves out what is computed; compute the same there, or declare it with "
            "harness.compute.register_flops"
        )
