"""jax trains and samples what torch trains and samples: from the same start, on the same data and noise."""

import numpy as np
import pytest
import torch
from jax_runs import KINDS, engine, flax_net, request, workshop
from sampler_plans import ddim_plan, ddpm_plan

from harness.diffusion.schedule import Schedule
from harness.engines.jax.loss_functions import area_means
from harness.engines.jax.mesh import make_mesh, pick_devices
from harness.engines.jax.sampling import JaxStage, Network, load_weights, to_uint8
from harness.engines.torch.sampling import TorchStage
from harness.engines.torch.sampling import to_uint8 as torch_to_uint8
from harness.engines.torch.trainer import build
from harness.randomness.threefry_jax import words

RECIPE = {  # every item that changes the arithmetic of a step
    "learning_rate": "1e-4", "weight_decay": "5", "beta1": "0.85", "beta2": "0.99", "warmup_steps": "5", "clip_norm": "0.5",
    "ema_decay": "0.95", "ema_ramp": "true", "label_dropout": "0.2", "conditioning_noise": "0.3", "flip": "true",
}  # fmt: skip


def quick(names, few):
    """Parameters of a test, slow but for `few`: compiling is what takes the time."""
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]


def both(kind, folder, steps, settings=RECIPE):
    """The engines of the two frameworks for one recipe, from the same weights."""
    settings = {**settings} if kind == "upsampler" else {k: v for k, v in settings.items() if k != "conditioning_noise"}
    wanted = {
        name: request(kind, steps=steps, framework=name, settings=settings, sampling={"sampler": "euler"})
        for name in ("torch", "jax")
    }
    shops = {name: workshop(folder / name, each) for name, each in wanted.items()}
    net = build(wanted["torch"].spec, wanted["torch"].arguments, 0)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    return engine(shops["torch"], net), engine(shops["jax"], flax_net(wanted["jax"], start)), wanted["jax"]


@pytest.mark.parametrize("kind", quick(KINDS, ["dit"]))
def test_a_hundred_steps_from_the_same_start(kind, tmp_path):
    compare_training(kind, tmp_path, RECIPE)


@pytest.mark.parametrize("objective", quick(("sit", "sd3", "jit", "edm", "v-cosine", "v"), ["sit"]))
def test_a_hundred_steps_of_other_objectives(objective, tmp_path):
    settings = {**RECIPE, "objective": objective}
    if objective == "v":
        settings |= {"schedule": "vp-continuous", "loss_weight": "min-snr:5", "noise_scale": "1.5"}
    compare_training("dit", tmp_path, settings)


def compare_training(kind, folder, settings):
    """Losses within 1e-3 relative at each of 100 steps, weights and averages within 1e-2 of what they moved."""
    theirs, mine, _ = both(kind, folder, 100, settings)
    before = {name: np.array(value) for name, value in dict(theirs.state_dicts())["model"]().items()}
    for step in range(1, 101):
        assert theirs.step(step, lambda: False) and mine.step(step, lambda: False)
    expected, found = np.array(theirs.pop_losses()), np.array(mine.pop_losses())
    assert expected.shape == found.shape == (100, len(theirs.loss_terms)) and np.isfinite(expected).all()
    assert expected[-10:, 0].mean() < 0.99 * expected[:10, 0].mean()  # it learns, so there is something to compare
    weights = np.array(list(theirs.loss_terms.values()))
    np.testing.assert_allclose(found @ weights, expected @ weights, rtol=1e-3)
    for part in ("model", "ema", "first_moment", "second_moment"):
        one, other = dict(theirs.state_dicts())[part](), dict(mine.state_dicts())[part]()
        assert one.keys() == other.keys()
        scale = np.sqrt(
            sum(np.square(one[n] - (before[n] if part in ("model", "ema") else 0)).sum() for n in one if n != "step")
        )
        error = np.sqrt(sum(np.square(one[n] - other[n]).sum() for n in one if n != "step"))
        assert scale > 0 and error < 1e-2 * scale, (part, error / scale)
        assert all(other[n].dtype == np.float32 and other[n].shape == one[n].shape for n in one)
        if "moment" in part:
            assert one["step"] == other["step"] == 100


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Weights after 60 steps, by kind; in torch, at a rate that makes samples of something."""
    kept = {}

    def weights(kind):
        if kind not in kept:
            wanted = request(
                kind, steps=60, framework="torch", settings={"learning_rate": "2e-3", "label_dropout": "0.2"}
            )
            shop = workshop(tmp_path_factory.mktemp(kind) / "run", wanted)
            shop.train(60)
            kept[kind] = load_weights(shop.run.ema_checkpoint(60) / "ema.safetensors")
        return kept[kind]

    return weights


def stages(kind, weights, plan, **settings):
    """The stage of each framework, with a classifier where there are weights of one."""
    wanted = request(kind)
    spec, arguments = wanted.spec, wanted.spec.arguments(**wanted.arguments)
    guide = settings.pop("classifier", None)
    mesh = make_mesh(pick_devices("cpu")[:1], None)

    def torch_net(kind, state):
        each = request(kind)
        net = each.spec.build("torch", **each.arguments)
        net.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
        return net

    def jax_net(kind, state):
        each = request(kind)
        return Network.load(each.spec, each.spec.arguments(**each.arguments), state, "float32", mesh)

    theirs = TorchStage(
        spec, torch_net(kind, weights), plan, arguments=arguments, precision="float32", device=torch.device("cpu"),
        classifier=None if guide is None else torch_net("classifier", guide), **settings,
    )  # fmt: skip
    mine = JaxStage(
        spec, jax_net(kind, weights), plan, arguments=arguments, precision="float32", mesh=mesh,
        classifier=None if guide is None else jax_net("classifier", guide), **settings,
    )  # fmt: skip
    return theirs, mine


SCHEDULE = Schedule.named("linear", 1000)
CASES = {  # kind, plan, settings
    "ddpm": ("dit", lambda: ddpm_plan(SCHEDULE, 25), {}),
    "guided, clipped": ("dit", lambda: ddpm_plan(SCHEDULE, 25, clip_denoised=True), {"guidance_scale": 1.5, "guidance_channels": "first-3"}),
    "guided within an interval": ("dit", lambda: ddpm_plan(SCHEDULE, 25), {"guidance_scale": 2.0, "guidance_interval": "0.2-2", "guidance_channels": "first-3"}),
    "ddim with noise, by a classifier": ("dit", lambda: ddim_plan(SCHEDULE, 20, eta=0.5), {"classifier": "classifier", "classifier_scale": 2.0}),
    "ddpm, by a classifier": ("dit", lambda: ddpm_plan(SCHEDULE, 20), {"classifier": "classifier", "classifier_scale": 2.0}),
    "upsampler": ("upsampler", lambda: ddpm_plan(SCHEDULE, 20), {"number": 1, "conditioning_noise": 0.2}),
}  # fmt: skip


@pytest.mark.parametrize("case", quick(CASES, ["ddpm", "ddim with noise, by a classifier"]))
def test_samples_of_a_trained_network(case, trained):
    """From the same noise within 1e-3 of the samples' standard deviation."""
    kind, plan, settings = CASES[case]
    settings = {**settings}
    if "classifier" in settings:
        settings["classifier"] = trained("classifier")
    theirs, mine = stages(kind, trained(kind), plan(), **settings)
    rows, y = np.arange(5, 13), np.arange(8) % 10
    low = None
    if kind == "upsampler":
        low = np.random.RandomState(0).uniform(-1, 1, (8, 1, 4, 4)).astype(np.float32)
    steps = []
    expected = theirs.draw(
        3, torch.from_numpy(rows), torch.from_numpy(y), None if low is None else torch.from_numpy(low), lambda: None
    ).numpy()
    found = np.asarray(mine.draw(3, words(rows), y.astype(np.int32), low, lambda: steps.append(1)))
    assert found.dtype == np.float32 and found.shape == expected.shape and len(steps) == plan().steps
    assert expected.std() > 0.2 and np.isfinite(expected).all()
    assert np.abs(found - expected).max() < 1e-3 * expected.std()
    assert mine.evaluations == theirs.evaluations


def test_area_means_are_torchs():
    x = np.random.RandomState(0).standard_normal((2, 3, 8, 7)).astype(np.float32)
    for side in (1, 3, 4, 7):
        expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x), side).numpy()
        np.testing.assert_allclose(area_means(x, side), expected, atol=1e-6)


def test_grey_levels_are_torchs():
    x = np.random.RandomState(0).uniform(-1.2, 1.2, (4, 3, 50, 50)).astype(np.float32)
    for rule in ("dit", "adm", "ldm", "biggan"):
        np.testing.assert_array_equal(to_uint8(x, rule), torch_to_uint8(torch.from_numpy(x), rule))


def test_the_kinds_are_those_that_are_trained():
    from harness.engines.loss_terms import LOSS_TERMS

    assert {request(kind).spec.kind for kind in KINDS} == set(LOSS_TERMS)
