"""Small real runs in jax: digits, networks of few and narrow blocks that compile in a second or two."""

import dataclasses
import json

import jax
import numpy as np
from flax import nnx

from backbones.flax_weights import from_torch
from harness.data.digits import load
from harness.distributed.group import SINGLE_PROCESS
from harness.engines.backend import get_backend
from harness.engines.jax.mesh import threads
from harness.pipeline.train import RunSession
from harness.planning.request import make_request
from harness.runs.run import Resolved

DIT = {"depth": 2, "width": 48, "heads": 4}
UNET = {"width": 32, "multipliers": (1, 2), "res_blocks": 1, "head_channels": 16}
KINDS = {  # backbone and arguments, by what the name says
    "dit": ("dit-xs-2", DIT),
    "in-context": ("dit-xs-2-in-context", DIT),
    "cross-attention": ("dit-xs-2-cross-attention", DIT),
    "adaln": ("dit-xs-2-adaln", DIT),
    "adm": ("adm-xs", {**UNET, "attention_resolutions": (8, 4), "dropout": 0.0}),
    "ldm": ("ldm-xs", {**UNET, "attention_rates": (2,), "context_width": 24}),
    "upsampler": ("adm-u-xs", {**UNET, "attention_resolutions": (4,), "dropout": 0.0}),
    "classifier": ("adm-classifier-xs", {**UNET, "attention_resolutions": (4,)}),
}
SETTINGS = {"batch": "24", "learning_rate": "1e-3", "ema_decay": "0.9"}


def request(kind="dit", *, steps=12, framework="jax", settings=None, **options):
    """A request on digits for a network of few and narrow blocks."""
    backbone, arguments = KINDS[kind]
    settings = {**SETTINGS, **(settings or {})}
    wanted = make_request(
        backbone=backbone, protocol="digits", steps=steps, framework=framework, settings=settings, **options
    )
    return dataclasses.replace(wanted, arguments={**wanted.arguments, **arguments})


def resolved(framework="jax", **changes):
    """What would be measured, fixed."""
    count = threads()
    if framework == "torch":
        import torch

        count = torch.get_num_threads()
    plain = {"device": "cpu", "device_name": "test", "precision": "float32", "micro_batch": 24, "threads": count}
    return Resolved(**{**plain, **changes})


def workshop(folder, wanted=None, group=SINGLE_PROCESS, **changes):
    """A run in `folder`, created if it is not there."""
    wanted = wanted or request()
    shop = RunSession(wanted, load(), folder, group)
    if shop.run is None:
        shop.create(resolved(wanted.framework, **changes))
    return shop


def engine(shop, net=None):
    return get_backend(shop.run.framework).make_engine(shop.request, shop.run, shop.data, net)


def flax_net(wanted, state):
    """The Flax network of a request with a torch state dict (tensors or arrays)."""
    spec = wanted.spec
    net = nnx.eval_shape(lambda: spec.build("jax", **wanted.arguments))
    nnx.update(net, jax.tree.map(jax.numpy.asarray, from_torch(net, {k: np.asarray(v) for k, v in state.items()})))
    return net


def losses(shop):
    return [json.loads(line) for line in shop.run.log.read_text().splitlines()]
