"""What a network must do, check by check, in either framework.

A check is a function of a `Subject`. It returns None, or a remark about what works with a limitation, and raises `Failure`
where the network is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from harness.conformance.compute_checks import closed_form, compute
from harness.conformance.network import Failure, Output, move_weights
from harness.conformance.subject import IMAGES, Finding, Subject
from harness.errors import RunError, UserError, one_line, shown

MANY_IMAGES = 16
FEW_CLASSES = 4  # that the null label is told apart from, beside the last one
SAME_IMAGE = 1e-4  # relative difference between an image alone and in a batch: the order of sums may differ
MATTERS = 1e-6  # relative change of the output from which on an input counts as used
FROZEN = 0.1  # largest share of the numbers in parameters that may be fixed
BFLOAT16 = 0.1  # relative difference of a pass in bfloat16, root mean square


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference, relative to the standard deviation of `other`."""
    scale = float(other.std()) or 1.0
    return float(np.abs(one.astype(np.float64) - other).max()) / scale


def builds(subject: Subject) -> None:
    """The builder takes the spec's arguments and gives a network; twice with one seed, the same network."""
    one, other = subject.build().weights(), subject.build().weights()
    different = [name for name, value in one.items() if not np.array_equal(value, other[name], equal_nan=True)]
    if different:
        raise Failure(
            f"expected equal weights of two networks of one seed, came different ones, such as {different[0]}: draw them "
            "from the framework's own generator"
        )


def output(subject: Subject) -> None:
    """One tensor of the right shape and dtype, finite."""
    _check_output(subject, subject.build().call(subject.inputs()), "")
    _check_output(subject, subject.moved.call(subject.inputs()), " after its weights were moved by noise")


def _check_output(subject: Subject, out: Output, when: str, **changes: Any) -> None:
    expected = subject.output_shape(**changes)
    if expected is not None and out.values.shape != expected:
        raise Failure(
            f"expected an output of shape {expected}, came {out.values.shape}{when}: the argument out_channels "
            "is the number of the output's channels"
        )
    if out.dtype != "float32":
        raise Failure(f"expected float32 from float32 inputs, came {out.dtype}{when}")
    if not np.isfinite(out.values).all():
        raise Failure(f"expected a finite output, came NaN or infinity{when}")


def other_sizes(subject: Subject) -> str | None:
    """Other image sizes, channels and numbers of classes work, or are refused in one line."""
    arguments = subject.arguments
    changes: list[dict[str, Any]] = []
    if subject.spec.kind != "generator":
        changes.append({"input_size": 2 * arguments["input_size"]})
        changes.append({"in_channels": arguments["in_channels"] + 1})
    if arguments.get("num_classes", 0) > 1:
        changes.append({"num_classes": arguments["num_classes"] + 3})
    if subject.spec.kind in ("denoiser", "upsampler"):
        changes += [{"out_channels": arguments["in_channels"]}, {"out_channels": 2 * arguments["in_channels"]}]
    refused = []
    for change in changes:
        ((name, value),) = change.items()
        if name == "input_size" and "low_res_size" in arguments:
            change["low_res_size"] = 2 * arguments["low_res_size"]
        try:
            network = subject.build(**change)
        except UserError as error:
            refused.append(f"{name} {value} is refused: {error}")
            continue
        except Exception as error:  # third-party code can raise anything
            raise Failure(
                f"expected a network of {name} {value}, or UserError, came {one_line(error)}: the builder must refuse what does "
                "not fit with harness.errors.UserError"
            ) from error
        _check_output(subject, network.call(subject.inputs(**change)), f" with {name} {value}", **change)
    return "; ".join(refused) or None


def inputs_stay(subject: Subject) -> None:
    """No call writes into its inputs."""
    for training in (False, True):
        written = subject.moved.call(subject.inputs(), training=training).written
        if written:
            raise Failure(
                f"expected inputs that stay as they are, came a changed {' and '.join(written)}: the sampler uses them "
                "again; replace in-place operations such as add_ on inputs"
            )


def repeats(subject: Subject) -> None:
    """Two calls of the network in evaluation mode give the same bits."""
    one, other = (subject.moved.call(subject.inputs()).values for _ in range(2))
    if not np.array_equal(one, other):
        raise Failure(
            f"expected the same output twice, came a difference of {_difference(one, other):.2g} of its standard deviation: "
            "something random works outside training"
        )


def inputs_matter(subject: Subject) -> None:
    """The output depends on every input: image, timestep, label."""
    inputs = subject.inputs()
    before = subject.moved.call(inputs).values
    for name, array in inputs.items():
        if name == "y" and subject.arguments.get("num_classes", 0) <= 1:
            continue
        if name == "t" and subject.spec.times == 2:
            for column, what in enumerate(("the time t[:, 0]", "the end of the step t[:, 1]")):
                changed = array.copy()
                changed[:, column] = array[::-1, column]
                if _difference(subject.moved.call({**inputs, name: changed}).values, before) < MATTERS:
                    raise Failure(f"expected an output that depends on {what}, came the same one for another")
            continue
        if array.dtype.kind == "f":
            changed = array[::-1].copy()
        elif name == "t":
            changed = (array + 400) % 1000
        else:
            changed = (array + 1) % subject.arguments["num_classes"]
        if _difference(subject.moved.call({**inputs, name: changed}).values, before) < MATTERS:
            raise Failure(f"expected an output that depends on {name}, came the same one for another {name}")


def fractional_times(subject: Subject) -> str | None:
    """Times that are floats, as objectives in continuous time give them."""
    if (
        subject.spec.kind == "generator" or subject.spec.time != "timestep" or subject.spec.times == 2
    ):  # whose times are floats in all checks
        return None
    inputs = subject.inputs()
    times = (inputs["t"] / 1000).astype(np.float32)
    try:
        out = subject.moved.call({**inputs, "t": times})
        between = subject.moved.call({**inputs, "t": times + np.float32(2e-4)})
    except Exception as error:  # third-party code can raise anything
        return f"takes timesteps only, so objectives in continuous time (sit, edm) cannot train it: float32 t gave {one_line(error)}"
    _check_output(subject, out, " with float32 t in [0, 1]")
    if np.array_equal(out.values, between.values):
        return "rounds t to whole numbers, so objectives in continuous time (sit, edm) cannot train it"
    if not np.isfinite(subject.moved.call({**inputs, "t": -times}).values).all():
        return "gives NaN or infinity for negative t, so the objective edm, whose network time is ln(sigma) / 4, cannot train it"
    return None


def null_label(subject: Subject) -> str | None:
    """The label for "no class" is one that the network knows, and is none of the classes."""
    classes = subject.arguments.get("num_classes", 0)
    if subject.spec.kind not in ("denoiser", "upsampler") or classes < 1:
        return None
    null = subject.spec.null_index(classes)
    if null is None:
        return "has no null label: no classifier-free guidance, and labels are not dropped in training"
    inputs = subject.inputs()
    if not isinstance(null, int) or null < 0:
        raise Failure(f"expected a null label that is an index, came {shown(null)}: correct null_label in the spec")
    # The index can lie beyond a table: torch raises an error, and JAX reads the last row or gives NaN.
    try:
        of_null = subject.moved.call({**inputs, "y": np.full(IMAGES, null)}).values
    except Exception as error:  # third-party code can raise anything
        raise Failure(
            f"expected the null label {null} to be known, came {one_line(error)}: the table of labels needs a row for it"
        ) from error
    if null < classes:
        raise Failure(f"expected a null label that is no class, came {null}, which is one of the {classes} classes")
    if not np.isfinite(of_null).all():
        raise Failure(f"expected an output for the null label {null}, came NaN: the table of labels needs a row for it")
    for label in sorted({*range(min(classes, FEW_CLASSES)), classes - 1}):
        of_class = subject.moved.call({**inputs, "y": np.full(IMAGES, label)}).values
        if _difference(of_null, of_class) < MATTERS:
            raise Failure(
                f"expected another output for the null label {null} than for class {label}, came the same: the table of "
                "labels needs a row for it"
            )
    return None


def images_alone(subject: Subject) -> None:
    """No image depends on the others in its batch, neither in evaluation nor in training mode."""
    inputs = subject.inputs()
    together = subject.moved.call(inputs).values
    for image in range(IMAGES):
        alone = subject.moved.call({name: array[image : image + 1] for name, array in inputs.items()}).values
        if alone.shape[0] != 1:
            raise Failure(f"expected one output for one image, came {alone.shape[0]}")
        if (found := _difference(alone, together[image : image + 1])) > SAME_IMAGE:
            raise Failure(
                f"expected the same output for an image alone and in a batch, came a difference of {found:.2g} of its "
                "standard deviation: something is summed or normalised over the batch, or taken from one of its images"
            )
    for image in (0, IMAGES - 1):
        of_input, _ = subject.moved.gradients(inputs, slice(image, image + 1))
        if np.abs(np.delete(of_input, image, axis=0)).max() > 0:
            raise Failure(
                "expected images that do not depend on each other in training, came a gradient of one image's output with "
                "respect to another image: batch norm, or a mean over the batch"
            )


def training_mode(subject: Subject) -> str | None:
    """Training mode computes the same, but for dropout."""
    inputs = subject.inputs()
    before = {name: value.copy() for name, value in subject.moved.weights().items()}
    training, evaluation = (subject.moved.call(inputs, training=mode).values for mode in (True, False))
    changed = [
        n for n, value in subject.moved.weights().items() if not np.array_equal(value, before[n], equal_nan=True)
    ]
    if changed:
        raise Failure(
            f"expected weights that a call leaves as they are, came a changed {changed[0]}: running statistics of a batch "
            "make an image depend on others"
        )
    if _difference(training, evaluation) > SAME_IMAGE and not subject.spec.masked_training:
        return "computes something else in training than in sampling: right for dropout and stochastic depth, wrong for the rest"
    return None


def gradients(subject: Subject) -> str | None:
    """Every parameter that is trained is real and gets a gradient, and little is frozen."""
    weights = subject.moved.weights()
    for name in subject.moved.trained():
        if np.iscomplexobj(weights[name]):  # which neither torch's fused AdamW nor the average of the weights takes
            raise Failure(
                f"expected real parameters, came {weights[name].dtype} of {name}: keep it as a float32 parameter with a last "
                "axis of 2, and make it complex in the call (torch.view_as_complex; in JAX w[..., 0] + 1j * w[..., 1])"
            )
    # Many images, because a network may choose parts of itself by image or label.
    _, found = subject.moved.gradients(subject.inputs(MANY_IMAGES), slice(None))
    silent = [name for name, value in found.items() if value is None or not np.any(value)]
    if silent:
        raise Failure(
            f"expected a gradient for each of {len(found)} parameters, came none for {len(silent)}, such as {silent[0]}: "
            "use it in the call, or remove it"
        )
    frozen = subject.moved.frozen()
    if not frozen:
        return None
    sizes = {name: value.size for name, value in weights.items()}
    of_frozen = sum(sizes[name] for name in frozen)
    share = of_frozen / (of_frozen + sum(sizes[name] for name in found))
    if share > FROZEN:
        raise Failure(
            f"expected parameters that are trained, came {len(frozen)} with {share:.0%} of all numbers that need no gradient, "
            f"such as {frozen[0]}: make what is fixed a buffer"
        )
    return f"{', '.join(frozen[:3])} {'is' if len(frozen) == 1 else 'are'} not trained ({share:.1%} of all numbers)"


def save_and_load(subject: Subject) -> None:
    """A network with other initial weights becomes the same one when its weights are loaded."""
    other = subject.build(seed=1)
    other.load(subject.moved.weights())
    one, loaded = subject.moved.call(subject.inputs()).values, other.call(subject.inputs()).values
    if not np.array_equal(one, loaded):
        raise Failure(
            f"expected the same output after saving and loading, came a difference of {_difference(loaded, one):.2g} of its "
            "standard deviation: something random or learned is neither parameter nor buffer"
        )


def bfloat16(subject: Subject) -> str | None:
    """The network also works in bfloat16."""
    inputs = subject.inputs()
    try:
        out = subject.moved.call(inputs, precision="bfloat16").values
    except Exception as error:  # third-party code can raise anything
        return f"works in float32 alone: in bfloat16 it gave {one_line(error)}"
    expected = subject.moved.call(inputs).values
    error_size = float(np.sqrt(np.mean(np.square(out - expected)))) / (float(expected.std()) or 1.0)
    if not np.isfinite(out).all() or error_size > BFLOAT16:
        return f"is inexact in bfloat16: the output differs by {error_size:.2g} of its standard deviation; train it in float32"
    return None


def memory(subject: Subject) -> None:
    """What is kept for the backward pass, as plans count it."""
    from harness.conformance.memory_check import check_memory  # imports torch

    check_memory(subject)


def one_graph(subject: Subject) -> str | None:
    """torch.compile sees the network as one graph."""
    import torch

    from harness.conformance.torch_network import TorchNetwork

    network = subject.build()
    assert isinstance(network, TorchNetwork)
    move_weights(network)
    expected = network.call(subject.inputs()).values
    try:
        network.net = torch.compile(network.net, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
        found = network.call(subject.inputs()).values
    except Exception as error:  # torch's compiler and third-party code can raise anything
        return (
            f"--compile would be of little use, because torch.compile breaks the network into parts: {one_line(error)}"
        )
    finally:
        torch.compiler.reset()
    if _difference(found, expected) > SAME_IMAGE:
        raise Failure(
            f"expected the same output with torch.compile, came a difference of {_difference(found, expected):.2g} of its "
            "standard deviation"
        )
    return None


Check = Callable[[Subject], str | None]
QUICK: dict[str, Check] = {
    "output": output,
    "inputs stay as they are": inputs_stay,
    "the same output twice": repeats,
    "image, time and label matter": inputs_matter,
    "null label": null_label,
    "images do not depend on each other": images_alone,
    "training and sampling mode": training_mode,
    "gradients": gradients,
    "closed form": closed_form,
}
"""Those that `harness run` and `harness train` do before the first step of a network that is not built in."""
CHECKS: dict[str, Check] = {
    "builder": builds,
    **{name: check for name, check in QUICK.items() if check is not closed_form},  # which is in "compute"
    "other sizes": other_sizes,
    "fractional times": fractional_times,
    "save and load": save_and_load,
    "bfloat16": bfloat16,
    "compute": compute,
}
OF_TORCH: dict[str, Check] = {**CHECKS, "memory": memory, "torch.compile": one_graph}
ALL: dict[str, dict[str, Check]] = {"torch": OF_TORCH, "jax": CHECKS}  # by framework


def run_checks(subject: Subject, checks: dict[str, Check]) -> Iterator[Finding]:
    """The findings, one for each check, as they come; none after a network that cannot be built or called."""
    for name, check in checks.items():
        try:
            remark = check(subject)
        except Failure as failure:
            yield Finding("failed", subject.framework, name, str(failure))
        except (UserError, RunError) as error:
            yield Finding("failed", subject.framework, name, str(error))
        except Exception as error:  # third-party code can raise anything
            yield Finding("failed", subject.framework, name, f"expected no error, came {one_line(error)}")
        else:
            yield Finding("note" if remark else "ok", subject.framework, name, remark or "")
            continue
        if check in (builds, output):  # all others need it
            return
