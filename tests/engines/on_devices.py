"""One run after the other on meshes of devices, as a process of its own, or as one of several.

usage: on_devices.py FOLDER KIND STEPS PAUSE MESH...    PAUSE: seconds before a step, so that it can be killed
prints {mesh: bytes of the training state on each device}
"""

import json
import sys
import time
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))

from jax_runs import request, workshop

from harness.engines.backend import join_processes
from harness.engines.jax.trainer import JaxEngine
from harness.pipeline import training_loop
from harness.pipeline.sample import sample_run

training_loop.MIN_CHECKPOINT_SECONDS = training_loop.CHECKPOINT_SHARE = 1e-9  # a checkpoint whenever it may be
training_loop.MAX_LOST_SECONDS = 0.0


def state_bytes(state):
    held = dict.fromkeys(map(str, jax.devices()), 0)
    for array in jax.tree.leaves(state):
        for shard in array.addressable_shards:
            held[str(shard.device)] += shard.data.nbytes
    return list(held.values())


def main(folder, kind, steps, pause, *meshes):
    group, facts, steps = join_processes("jax"), {}, int(steps)
    step, last = JaxEngine.step, []

    def watched(engine, *arguments):
        time.sleep(float(pause))
        last[:] = [engine]
        return step(engine, *arguments)

    JaxEngine.step = watched
    for mesh in meshes:
        wanted = request(kind, steps=steps, settings={"batch": "16", "label_dropout": "0.2"}, samples=30)
        shop = workshop(Path(folder) / mesh, wanted, group=group, mesh=mesh, micro_batch=16)
        shop.train(steps)
        sample_run(shop.run, wanted, steps, 5, precision="float32", batch=12, group=group)
        facts[mesh] = state_bytes(last[0]._state)
    print(json.dumps(facts))


main(*sys.argv[1:])
