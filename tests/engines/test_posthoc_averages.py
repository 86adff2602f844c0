"""The power-function averages of both frameworks: equal to each other, and loaded by each other."""

import numpy as np
from jax_runs import engine, flax_net, request, workshop

from harness.engines.ema import gamma_of, power_weight
from harness.engines.torch.trainer import build

PARTS = ("ema-0.05", "ema-0.1")
SETTINGS = {"ema_widths": "0.05:0.10"}


def averages(made):
    found = dict(made.state_dicts())
    return {part: found[part]() for part in PARTS}


def test_torch_and_jax_average_alike(tmp_path):
    """In each framework against float64 averages of its own weights, and torch against jax, within 1e-6.

    At a small rate: what the frameworks' own steps differ by is no matter of the averages.
    """
    settings = {**SETTINGS, "learning_rate": "1e-5"}
    wanted = {name: request(framework=name, settings=settings) for name in ("torch", "jax")}
    shops = {name: workshop(tmp_path / name, each) for name, each in wanted.items()}
    net = build(wanted["torch"].spec, wanted["torch"].arguments, 0)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    made = {"torch": engine(shops["torch"], net), "jax": engine(shops["jax"], flax_net(wanted["jax"], start))}
    expected = {}
    for step in range(1, 13):
        for framework, each in made.items():
            assert each.step(step, lambda: False)
            model = dict(each.state_dicts())["model"]()
            for part in PARTS:
                share = power_weight(gamma_of(float(part.removeprefix("ema-"))), step)
                before = expected.get((framework, part), dict.fromkeys(model, 0.0))
                expected[framework, part] = {
                    name: before[name] + share * (value.astype(np.float64) - before[name])
                    for name, value in model.items()
                }
    found = {framework: averages(each) for framework, each in made.items()}
    for part in PARTS:
        one, other = found["torch"][part], found["jax"][part]
        assert one.keys() == other.keys() and len(one) > 20
        moved = 0.0
        for name in one:
            for framework in made:
                np.testing.assert_allclose(found[framework][part][name], expected[framework, part][name], atol=1e-6)
            np.testing.assert_allclose(one[name], other[name], atol=1e-6)
            moved = max(moved, np.abs(one[name] - start[name].numpy()).max())
        assert moved > 3e-5


def test_a_continued_run_in_jax_keeps_the_averages(tmp_path):
    settings = {**SETTINGS, "ema_snapshots": "2"}
    whole = workshop(tmp_path / "whole", request(steps=6, settings=settings))
    whole.train(6)
    workshop(tmp_path / "run", request(steps=6, settings=settings)).train(4)
    again = workshop(tmp_path / "run", request(steps=6, settings=settings))
    again.train(6)
    assert whole.run.posthoc_steps() == [3, 6] and again.run.posthoc_steps() == [3, 4, 6]
    for step in (3, 6):
        for part in PARTS:
            files = [shop.run.posthoc_checkpoint(step) / f"{part}.safetensors" for shop in (whole, again)]
            assert files[0].read_bytes() == files[1].read_bytes()
