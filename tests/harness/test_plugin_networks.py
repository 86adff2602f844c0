"""Networks that a plug-in may bring and DiT is not: shared weights, running statistics, idle parameters."""

import numpy as np
import pytest
import torch
from small_runs import request, workshop
from torch import nn

from harness.engines.torch import resolve
from harness.engines.torch.trainer import TorchEngine
from harness.errors import UserError


class Net(nn.Module):
    """Batch norm, one weight under two names, and on demand a parameter that nothing uses."""

    def __init__(self, idle=False):
        super().__init__()
        self.into = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.out = nn.Conv2d(4, 2, 1)
        if idle:
            self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, x, t, y):
        h = self.norm(self.into(x)).permute(0, 2, 3, 1)
        return self.out(self.second(self.first(h).relu()).permute(0, 3, 1, 2))


def engine(tmp_path, net, micro_batch=24):
    wanted = request(steps=4)
    shop = workshop(tmp_path / "run", wanted, micro_batch=micro_batch)
    return TorchEngine(
        wanted.spec,
        net,
        arguments=wanted.spec.arguments(**wanted.arguments),
        recipe=wanted.recipe,
        seed=0,
        resolved=shop.run.resolved,
        data=shop.data,
    )


def test_a_shared_weight_is_averaged_under_both_names(tmp_path):
    torch.manual_seed(0)
    made = engine(tmp_path, Net())
    for step in range(1, 4):
        made.step(step, lambda: False)
    ema = dict(made.state_dicts())["ema"]()
    assert np.array_equal(ema["first.weight"], ema["second.weight"])
    assert not np.array_equal(ema["first.weight"], made.net.first.weight.detach().numpy())


def test_an_interrupted_step_leaves_running_statistics_as_they_were(tmp_path):
    made = engine(tmp_path, Net(), micro_batch=6)
    made.step(1, lambda: False)
    before = {name: value.clone() for name, value in made.net.state_dict().items()}
    asked = iter([False, False, True])
    assert made.step(2, lambda: next(asked)) is False
    assert before["norm.num_batches_tracked"] == 4
    assert all(torch.equal(before[name], value) for name, value in made.net.state_dict().items())


def test_measuring_the_speed_leaves_the_network_as_it_was():
    net = Net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    arguments = {"in_channels": 1, "input_size": 8, "num_classes": 10}
    assert resolve.measure(net, 4, arguments, torch.device("cpu"), "float32") > 0
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(each.grad is None for each in net.parameters())


def test_a_parameter_without_a_gradient_is_named(tmp_path):
    with pytest.raises(UserError, match="parameter idle of the network gets no gradient"):
        engine(tmp_path, Net(idle=True)).step(1, lambda: False)
