"""Copies of the state from a GPU: which go through a copy on the device, and what happens without pinned memory."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from harness.engines.torch.host_copies import host_copies

CUDA = torch.device("cuda")
MEGABYTE = 1 << 20


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU of 100 MB: its tensors are on the CPU. `direct` counts the copies that the current stream brings to
    the host, `on_device` those that are first made on the GPU."""
    state = SimpleNamespace(free=100 * MEGABYTE, reserved=0, direct=0, on_device=0, pins=True, inside=False)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    empty, copy = torch.empty, torch.Tensor.copy_

    class Side(nullcontext):
        def __enter__(self):
            state.inside = True

        def __exit__(self, *_):
            state.inside = False

    def allocate(*shape, pin_memory=False, **options):
        if pin_memory and not state.pins:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*shape, **options)

    def counted(self, source, non_blocking=False):
        if non_blocking:
            setattr(state, name := "on_device" if state.inside else "direct", getattr(state, name) + 1)
        return copy(self, source)

    monkeypatch.setattr(torch, "empty", allocate)
    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Side())
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: event)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (state.free, 100 * MEGABYTE))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state.reserved)
    return state


def copied(tensors, step_bytes):
    return {name: part() for name, part in host_copies([("model", lambda: tensors)], CUDA, step_bytes)}["model"]


def four():
    """Four tensors of a megabyte."""
    return {str(index): torch.full((MEGABYTE // 4,), float(index)) for index in range(4)}


@pytest.mark.parametrize(
    ("free", "reserved", "step", "on_device"),
    [
        (0, 80, 76, 2),  # the allocator holds 4 MB more than a step takes, of which copies may take half
        (0, 80, 80, 0),  # a step takes all
        (20, 60, 60, 4),
        (8, 80, 86, 1),  # a step will take 6 of the 8 MB that are free
        (0, 80, 90, 0),
    ],
)
def test_copies_on_the_device_take_what_a_step_leaves(gpu, free, reserved, step, on_device):
    gpu.free, gpu.reserved = free * MEGABYTE, reserved * MEGABYTE
    tensors = four()
    arrays = copied(tensors, step * MEGABYTE)
    assert (gpu.on_device, gpu.direct) == (on_device, 4 - on_device)
    assert all((arrays[name] == tensor.numpy()).all() for name, tensor in tensors.items())


def test_without_pinned_memory_the_copies_are_plain(gpu, caplog):
    gpu.pins = False
    tensors = four()
    arrays = copied(tensors, 0)
    assert (gpu.on_device, gpu.direct) == (0, 0)
    for name, tensor in tensors.items():
        tensor.add_(1)  # a later step
        assert (arrays[name] == tensor.numpy() - 1).all()
    assert caplog.text.count("no pinned memory for a checkpoint") == 1
