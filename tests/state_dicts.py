"""Comparison of state dicts."""

import torch


def same(one, other):
    """Fail unless two state dicts have the same names, dtypes and values."""
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name
