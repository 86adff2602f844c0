"""What two trainings on one machine cost each other: their speeds beside that of a lone one, as ratios.

    python benchmarks/shared_machine.py [--rounds 5] [--seconds 10]

Each training is a process of its own with as many threads as there are processors: dit-xs-2 on 8x8 images in batches of
128, float32. Rounds alternate between a lone one with OpenMP's default, a lone one whose threads wait passively (as
`harness` starts them), and two at once of either kind. Run it on a machine that does nothing else.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

BATCH = 128
POLICIES = {"default": None, "passive": "PASSIVE"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument(
        "--train", type=float, help=argparse.SUPPRESS
    )  # the time at which this process begins to measure
    options = parser.parse_args()
    if options.train is not None:
        print(steps_per_second(options.train, options.seconds))
        return
    found: dict[str, list[float]] = {}
    for index in range(options.rounds):
        for policy in POLICIES:
            for count in (1, 2):
                speeds = trained(count, policy, options.seconds)
                found.setdefault(f"{policy} x {count}", []).append(min(speeds))
        print(f"round {index + 1} of {options.rounds}", file=sys.stderr)
    lone = statistics.median(found["default x 1"])
    rows = {
        name: {"steps_per_second": statistics.median(values), "of_lone_default": statistics.median(values) / lone}
        for name, values in found.items()
    }
    print(json.dumps({"processors": os.cpu_count(), "rounds": options.rounds, "rows": rows}, indent=2))


def trained(count: int, policy: str, seconds: float) -> list[float]:
    """Steps per second of `count` processes that train at once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    if POLICIES[policy] is not None:
        environment["OMP_WAIT_POLICY"] = POLICIES[policy]
    begin = time.time() + 15  # when all have imported torch and warmed up
    words = [sys.executable, __file__, "--train", str(begin), "--seconds", str(seconds)]
    processes = [subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [float(process.communicate()[0]) for process in processes]


def steps_per_second(begin: float, seconds: float) -> float:
    """Training steps per second from the time `begin` on."""
    import torch

    from backbones.dit.torch_model import DiT
    from harness import registry

    torch.set_num_threads(os.cpu_count() or 1)
    spec = registry.backbones.get("dit-xs-2")
    net = DiT(**spec.arguments(input_size=8, in_channels=1, num_classes=10))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    x, t, y = torch.randn(BATCH, 1, 8, 8), torch.randint(0, 1000, (BATCH,)), torch.randint(0, 10, (BATCH,))

    def step() -> None:
        net(x, t, y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    if time.time() > begin:
        raise SystemExit("this machine is too slow to begin in time")
    while time.time() < begin:
        step()
    done = 0
    while time.time() < begin + seconds:
        step()
        done += 1
    return done / (time.time() - begin)


if __name__ == "__main__":
    main()
