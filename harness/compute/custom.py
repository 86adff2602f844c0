"""Compute of custom operations, which tracing cannot see into: declared by the package that brings them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from harness.errors import RunError, UserError, one_line, shown


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """The declared compute of one operation. Arguments of both functions: those of the operation."""

    name: str  # as messages show it
    count: Callable[..., int] | None  # None: the count of `composed`
    composed: Callable[..., Any] | None  # the same operation, made of others

    def flops(self, *args: Any, **kwargs: Any) -> int:
        """What `count` gives. Raises `UserError` in one line if it fails, or gives no number of flops."""
        assert self.count is not None
        try:
            flops = self.count(*args, **kwargs)
        except (UserError, RunError):
            raise
        except Exception as error:  # other people's code can raise anything
            raise UserError(f"register_flops: the count of {self.name} failed: {one_line(error)}") from error
        if isinstance(flops, bool) or not isinstance(flops, int) or flops < 0:
            raise UserError(
                f"register_flops: the count of {self.name} gave {shown(flops)}, not a whole number of flops"
            )
        return flops


@dataclass
class Blind:
    """What a count may have missed. silent: functions in which no arithmetic was seen. summed: element-wise products that
    are summed, by module path, in multiply-adds. declared: (operation, declared flops, those of its composed version,
    relative difference of their results where there are values) of the calls that have a composed version."""

    silent: list[str] = field(default_factory=list)
    summed: dict[str, int] = field(default_factory=dict)
    declared: list[tuple[str, int, int, float]] = field(default_factory=list)


_declared: dict[Hashable, Declaration] = {}


def register_flops(
    operation: Any, count: Callable[..., int] | None = None, *, composed: Callable[..., Any] | None = None
) -> None:
    """Declare the compute of a custom operation, for `harness flops`, plans, matched compute and records.

    operation: of torch an operator ("my_package::scan", torch.ops.my_package.scan, what torch.library.custom_op returns, or
    one of torch that the convention does not know, such as "aten::linalg_cholesky_ex") or a subclass of torch.autograd.Function; of JAX a primitive (jax.extend.core.Primitive).
    In torch it must run on the meta device (torch.library.register_fake; in a Function a branch for `x.is_meta`).

    count: a function of the operation's arguments (a Function's without ctx, a primitive's with its parameters by keyword)
    that returns its flops, whole: multiply-adds of matrix products, convolutions and other sums of products, by the
    convention of `harness.compute`. Tensors have shapes and no values. composed: a function of the same arguments that
    computes the same with operations that are counted; without `count` its count is taken, and with both `harness check`
    holds one against the other, and the values of the operation against those of `composed`.

        register_flops("my_package::scan", lambda x, a, b, c: 2 * x.numel() * b.shape[-1])

    Call it where the operation is defined: it takes effect when that module is imported. A later declaration of the same
    operation replaces the earlier one. torch.utils.flop_counter.register_flop_formula is honoured, too; it states two
    operations for a multiply-add, so half of its count is taken.

    Raises `UserError` for an operation of another kind, for one that is counted or free already, and without `count` and
    `composed`.
    """
    key, name = _key(operation)
    if count is None and composed is None:
        raise UserError(f"register_flops: {name} needs count, a function that returns its flops, or composed")
    _declared[key] = Declaration(name=name, count=count, composed=composed)


def declaration(key: Hashable) -> Declaration | None:
    """The declaration of an operation: an operator's name, a class of torch.autograd.Function, or ("jax", primitive)."""
    return _declared.get(key)


def _key(operation: Any) -> tuple[Hashable, str]:
    """The key in `_declared`, and the name in messages."""
    if isinstance(operation, type) and any(each.__module__ == "torch.autograd.function" for each in operation.__mro__):
        return operation, f"autograd.Function {operation.__name__}"
    # of torch.ops.NAMESPACE.NAME, of its overload, and of what torch.library.custom_op returns
    schema = getattr(operation, "_schema", None)
    name = getattr(schema, "name", None) or getattr(operation, "_qualified_op_name", None)
    name = name or getattr(operation, "_qualname", None)
    if isinstance(operation, str):
        name = operation.partition(".")[0]
    if isinstance(name, str) and name.count("::") == 1:
        if name.startswith("aten::"):
            from harness.compute.operators_torch import (  # not by those who declare operations of their own
                COUNTED,
                FREE,
            )

            if name in COUNTED or name in FREE:
                what = "counts" if name in COUNTED else "calls free"
                raise UserError(f"register_flops: {name} is an operator of torch, which the convention {what}")
        return name, f"operator {name}"
    if hasattr(operation, "bind") and isinstance(getattr(operation, "name", None), str):
        return ("jax", operation.name), f"primitive {operation.name}"
    raise UserError(
        f"register_flops: {shown(operation)} is no operator of torch.library, no torch.autograd.Function and no JAX primitive"
    )
