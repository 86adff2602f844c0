"""Small real networks, and files of them as the public projects write them."""

import pytest
import torch

import harness

CLASSES = 10


@pytest.fixture(scope="session")
def spec():
    return harness.get_backbone("dit-xs-4")


def filled(net, seed=0):
    """`net` with every tensor drawn: nothing is zero, so that a mix-up shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name != "pos_embed" and tensor.is_floating_point():
                tensor.normal_(std=0.05, generator=generator)
    return net.eval()


@pytest.fixture(scope="session")
def net(spec):
    return filled(spec.build(num_classes=CLASSES))


@pytest.fixture(scope="session")
def state(net):
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@pytest.fixture
def bare(state, tmp_path):
    path = tmp_path / "bare.pt"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def average(state):
    """A moving average that differs from `state` in every tensor that is trained."""
    return {name: tensor if name == "pos_embed" else tensor * 2 + 1 for name, tensor in state.items()}
