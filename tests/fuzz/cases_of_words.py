"""Inputs in words: places, names, sidecars, runs, records and TOML."""

import json
import shutil

import numpy as np
from accidents import document, name, place, text_accident
from mutations import mutated
from valid_files import BACKBONE, EMBEDDED, PROTOCOL, STUDY, SYSTEM, toml

import harness


class Case:
    """One input: the files in `folder`, and what is called. may_change: names in the folder that are a command's to write."""

    def __init__(self, world, folder, draw):
        self.world, self.folder, self.draw = world, folder, draw
        self.words, self.call, self.may_change = (), None, set()

    def write(self, file, data):
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def samples(self, file="samples.npz", sidecar=True):
        shutil.copy(self.world.samples / "samples.npz", self.folder / file)
        if sidecar:
            shutil.copy(self.world.samples / "samples.json", (self.folder / file).with_suffix(".json"))
        return self.folder / file

    def run(self):
        shutil.copytree(self.world.folder / "run", self.folder / "run")
        self.may_change.add("run")
        return self.folder / "run"

    def rs(self):
        return np.random.RandomState(self.draw.randrange(2**31))


def of_places(case):
    draw, folder = case.draw, case.folder
    protocol = case.write("protocols/mine.toml", toml(PROTOCOL).encode())
    system = case.write("systems/tiny.toml", toml({**SYSTEM, "weak": None}).encode())
    study = case.write("studies/mine.toml", toml(STUDY).encode())
    samples, data = case.samples(), case.folder / "stored.npz"
    shutil.copy(case.world.folder / "stored.npz", data)
    pictures = folder / "pictures"
    for i, picture in enumerate(case.world.pictures):
        case.write(f"pictures/{i % 2}/{i}.png", picture)
    bare = folder / "bare.safetensors"
    shutil.copy(case.world.folder / bare.name, bare)

    def at(valid=None):
        return place(draw, folder, valid)

    run = case.run() if draw.random() < 0.35 else folder / "no-run"
    evaluate = ("evaluate", samples, *EMBEDDED)
    sample = (
        "sample",
        "--system",
        system,
        "--weights",
        f"base={bare}",
        "--samples",
        2,
        "--sampling-steps",
        1,
        "--device",
        "cpu",
    )
    train = (
        "train", "--backbone", BACKBONE, "--steps", 1, "--set", "batch=2", "--precision", "float32", "--micro-batch", 2,
        "--device", "cpu",
    )  # fmt: skip
    good = str(folder / "out")
    case.words = draw.choice(
        (
            lambda: ("evaluate", "--suite", "tiny", "--out", good, "--", at(samples)),
            lambda: ("evaluate", "--suite", "tiny", "--out", good, "--", at(pictures)),
            lambda: ("evaluate", at(samples), "--suite", "tiny"),
            lambda: (*evaluate, "--protocol", at(protocol)),
            lambda: (*evaluate, "--data", at(data), "--protocol", protocol),
            lambda: (*evaluate, "--reference", at(data)),
            lambda: (*evaluate, "--features-weights", at(bare)),
            lambda: ("evaluate", samples, "--suite", "adm", "--inception", at(bare), "--reference", data),
            lambda: (*evaluate, "--out", at()),
            lambda: (*evaluate, "--cache", at(), "--out", good),
            lambda: (*evaluate, "--neighbours", at(), "--out", good),
            lambda: ("sample", "--run", at(run)),
            lambda: ("sample", "--run", run, "--samples", 100, "--sampling-steps", 2, "--out", at()),
            lambda: (*sample[:2], at(system), *sample[3:], "--out", good),
            lambda: (*sample[:4], f"base={at(bare)}", *sample[5:], "--out", good),
            lambda: (*sample[:4], f"base={at(run)}", *sample[5:], "--out", good),
            lambda: (*sample, "--out", at()),
            lambda: ("sample", "--run", run, "--decoder", at()),
            lambda: (*train, "--out", at()),
            lambda: (*train, "--out", good, "--data", at(data), "--protocol", protocol),
            lambda: (*train, "--out", good, "--protocol", at(protocol)),
            lambda: (*train, "--out", good, "--fork", at(run)),
            lambda: ("plan", "--backbone", BACKBONE, "--protocol", protocol, "--data", at(data), "--device", "meta"),
            lambda: ("plan", "--budget", "1e6", "--protocol", at(protocol)),
            lambda: ("compare", at(run), at(run)),
            lambda: ("compare", run, at(run / "records.jsonl")),
            lambda: ("report", "--results", at(run), "--protocol", "none-of-them", "--out", at(pictures)),
            lambda: ("weights", "inspect", at(bare)),
            lambda: ("weights", "inspect", at(pictures), "--json"),
            lambda: ("weights", "import", at(bare), "--out", good),
            lambda: ("weights", "import", bare, "--out", at()),
            lambda: ("weights", "export", bare, "--format", "dit", "--out", at()),
            lambda: ("data", "prepare", "birds", "--from", at(pictures), "--out", good, "--resolution", 8),
            lambda: ("data", "prepare", "birds", "--from", pictures, "--out", at(), "--resolution", 8),
            lambda: ("data", "prepare", "imagenet", "--from", at(), "--out", at(pictures)),
            lambda: ("data", "reference", at(pictures), "--suite", "tiny", "--out", good + ".npz"),
            lambda: ("data", "reference", at(samples), "--suite", "tiny", "--out", good + ".npz"),
            lambda: ("data", "reference", samples, "--suite", "tiny", "--out", at()),
            lambda: ("data", "reference", samples, "--suite", "tiny", "--out", good + ".npz", "--cache", at()),
            lambda: ("data", "latents", at(data), "--vae", at(), "--out", at()),
            lambda: ("data", "verify", at(data)),
            lambda: ("data", "verify", at(pictures)),
            lambda: ("data", "fetch", "inception", "--url", "file:///nowhere", "--out", at()),
            lambda: ("study", at(study), "--status"),
            lambda: ("flops", BACKBONE, "--protocol", at(protocol)),
            lambda: ("new", "my-net", "--out", at()),
            lambda: ("check", BACKBONE, "--protocol", at(protocol)) if draw.random() < 0.1 else ("new", "n", "--out", at(pictures)),
            lambda: ("bench", "--backbone", BACKBONE, "--stages", "none", "--out", at()),
        )
    )()  # fmt: skip


def of_names(case):
    draw = case.draw
    known = (
        "dit-xs-2", BACKBONE, "dit-xl-2", "digits", "imagenet-256", "ddpm", "ddim", "heun", "dopri5", "edm-stochastic", "embedded", "tiny",
        "adm", "fd", "karras", "learning_rate", "objective", "ema_decay", "sit", "cpu", "dit-xl-2-256-cfg1.5", "adm-g-256", "pixels",
        "1.5", "400k", "7M", "10:10:20", "shift:3", "4x8", "0.05:0.10",
    )  # fmt: skip

    def some(*words):
        return name(draw, *(words or known))

    plan = ("plan", "--backbone", BACKBONE, "--device", "meta")
    options = (
        "--protocol", "--steps", "--match", "--budget", "--seed", "--set", "--sampling-steps", "--samples", "--sampler", "--eta", "--spacing",
        "--ema-width", "--cfg", "--guidance-channels", "--labels", "--sampling-seed", "--sampling-precision", "--match-sampling",
        "--precision", "--compile", "--micro-batch", "--device", "--mesh", "--framework", "--out", "--data",
    )  # fmt: skip
    setting = f"{some('learning_rate', 'objective', 'schedule', 'batch', 'loss_weight', 'time_distribution', 'ema_widths', 'ema_decay', 'diffusion_steps', 'steps')}={some('1', 'sit', 'linear', 'min-snr:5', 'logit-normal:0:1', '0.05:0.10', 'flow')}"
    case.words = draw.choice(
        (
            lambda: (*plan, draw.choice(options), some()),
            lambda: (*plan, draw.choice(options), some(), draw.choice(options), some()),
            lambda: (*plan, "--set", setting),
            lambda: (*plan, "--set", "objective=sit", "--sampler", some("heun", "euler-maruyama:sbdm:tweedie", "dopri5"), "--spacing", some()),
            lambda: (*plan, "--cfg", some("1.5", "1.5@0.1-0.8", "2:rule@1-2")),
            lambda: ("plan", "--backbone", some()),
            lambda: ("plan", "--budget", some("1e6")),
            lambda: ("plan", "--match", some(f"{BACKBONE}@8")),
            lambda: ("sample", "--system", some("dit-xl-2-256-cfg1.5", "digits-cascade")),
            lambda: ("sample", "--system", some("digits-guided"), "--weights", some("base=x", "classifier=x")),
            lambda: ("sample", "--run", case.run(), draw.choice(("--step", "--sampler", "--spacing", "--cfg", "--samples", "--eta", "--sampling-seed", "--ema-width", "--labels", "--batch", "--framework", "--device", "--decoder", "--entry", "--compile")), some("2", "20", "ddim")),
            lambda: ("sample", "--run", case.run(), "--sampling-steps", 2, "--classes", some("1", "1,2"), "--grid", some("1x2", "2x2")),
            lambda: ("evaluate", case.samples(), *EMBEDDED, draw.choice(("--name", "--allow", "--device", "--backend", "--protocol", "--suite")), some()),
            lambda: ("evaluate", case.samples(sidecar=False), "--suite", some("tiny", "embedded:fd", "pixels:fd,kid", "tiny:fd")),
            lambda: ("evaluate", case.samples(sidecar=False), *EMBEDDED, "--name", some()),
            lambda: ("compare", some(), some(), "--step", some("2")),
            lambda: ("report", "--protocol", some(), "--results", some()),
            lambda: ("list", some("backbones", "systems")),
            lambda: ("flops", some(), some()),
            lambda: ("flops", BACKBONE, "--protocol", some("digits"), "--check", some("fvcore")),
            lambda: ("check", some("nothing")),
            lambda: ("check", BACKBONE, draw.choice(("--framework", "--protocol")), some("x")),
            lambda: ("new", some("my-net"), "--framework", some("torch", "torch,jax"), "--out", "made"),
            lambda: ("new", some("my-net", "class", "torch", "harness")),
            lambda: ("weights", "inspect", shutil.copy(case.world.folder / "both.pt", case.folder), "--entry", some("model", "ema")),
            lambda: ("weights", "inspect", shutil.copy(case.world.folder / "bare.pt", case.folder), "--backbone", some()),
            lambda: ("weights", "export", shutil.copy(case.world.folder / "bare.pt", case.folder), "--format", some("dit", "diffusers", "ldm"), "--out", "made"),
            lambda: ("data", "prepare", some("birds"), "--from", some(), "--out", some(), "--resolution", some("8")),
            lambda: ("data", "reference", some("digits"), "--suite", some("tiny"), "--out", some("made.npz"), "--images", some("5"), "--seed", some("1")),
            lambda: ("data", "fetch", name(draw, "zzz", "yyy")),
            lambda: ("study", case.write("mine.toml", toml(STUDY).encode()), "--status", "--jobs", some("1")),
            lambda: ("study", case.write("mine.toml", toml(STUDY).encode()), "--status", "--launcher", some("local", "slurm"), "--slurm", some("time=1", "partition=gpu")),
            lambda: ("bench", "--stages", some("none"), "--backbone", some()),
            lambda: (some("run", "plan", "list"), some(), some()),
            lambda: ("data", some("verify", "prepare"), some()),
        )
    )()  # fmt: skip


def of_sidecars(case):
    draw = case.draw
    path = case.samples()
    sidecar = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_bytes(document(sidecar, draw))
    if draw.random() < 0.6:
        case.words = ("evaluate", path, *EMBEDDED, "--out", case.folder / "r.jsonl")
        return
    run = case.run()
    shutil.copy(path.with_suffix(".json"), run / "samples" / case.world.samples.name / "samples.json")
    case.words = draw.choice(
        (
            ("sample", "--run", run, "--samples", 100, "--sampling-steps", 2),
            ("evaluate", run / "samples" / case.world.samples.name, *EMBEDDED),
            ("evaluate", run, *EMBEDDED),
            ("compare", run, run),
        )
    )


def of_runs(case):
    draw, run = case.draw, case.run()
    step = run / "checkpoints" / "step-00000002"
    file = draw.choice(
        (run / "run.json", run / "run.json", step / "state.json", run / "snapshots" / step.name / "state.json")
    )
    file.write_bytes(document(json.loads(file.read_text()), draw))
    if draw.random() < 0.2:
        other = draw.choice([each for each in run.rglob("*") if each.is_file()])
        other.write_bytes(mutated(other.read_bytes(), case.rs()))
    if draw.random() < 0.1:
        (run / "log.jsonl").write_bytes(text_accident((run / "log.jsonl").read_bytes(), draw))
    case.words = draw.choice(
        (
            ("sample", "--run", run, "--samples", 100, "--sampling-steps", draw.choice((1, 2))),
            ("sample", "--run", run, "--classes", "1", "--grid", "1x2", "--sampling-steps", 1),
            ("evaluate", run / "samples" / case.world.samples.name, *EMBEDDED),
            ("compare", run, run),
            ("report", "--results", run, "--protocol", "none-of-them"),
            ("train", "--backbone", BACKBONE, "--steps", 2, "--set", "batch=8", "--precision", "float32", "--micro-batch", 8, "--device", "cpu", "--out", run),
            ("train", "--backbone", BACKBONE, "--steps", 3, "--set", "batch=8", "--device", "cpu", "--out", run),
            ("train", "--backbone", BACKBONE, "--steps", 3, "--set", "batch=8", "--device", "cpu", "--out", "other", "--fork", run),
            ("sample", "--system", case.write("tiny.toml", toml({**SYSTEM, "weak": None}).encode()), "--weights", f"base={run}", "--samples", 2, "--device", "cpu"),
            ("weights", "inspect", run / "snapshots" / step.name / "ema.safetensors"),
            ("data", "verify", run),
        )
    )  # fmt: skip


def of_records(case):
    draw = case.draw
    lines = []
    for line in case.world.records.splitlines():
        for seed in range(draw.choice((1, 1, 3))):
            table = json.loads(line)
            if seed:
                table["training"] = {**(table.get("training") or {}), "seed": seed}
                table["value"] = draw.random()
                table.pop("id", None)
            elif draw.random() < 0.5:
                lines.append(line.encode())
            lines.append(document(table, draw, lambda each: json.dumps(each, separators=(",", ":"))))
    data = b"\n".join(lines) + draw.choice((b"\n", b"", b"\n\n", b"\r\n", b'{"'))
    path = case.write("a/records.jsonl", data)
    other = case.write("b/records.jsonl", case.world.records.encode())
    case.words = draw.choice(
        (
            ("compare", path, other), ("compare", path.parent, other.parent), ("compare", path, path, "--json"),
            ("evaluate", case.samples(), *EMBEDDED, "--out", path),
        )
    )  # fmt: skip
    case.may_change.add("a/records.jsonl")  # a torn last line is cut off, on purpose
    if draw.random() < 0.3:
        case.call = lambda: harness.load_records(str(path))


def of_toml(case):
    draw = case.draw
    kind = draw.choice(("protocol", "study", "system"))
    table = {"protocol": PROTOCOL, "study": STUDY, "system": SYSTEM}[kind]
    if kind == "system" and draw.random() < 0.6:
        table = {key: value for key, value in table.items() if key != "weak"}
    path = case.write("mine.toml", document(table, draw, toml))
    shutil.copy(case.world.folder / "stored.npz", case.folder)
    shutil.copy(case.world.folder / "bare.safetensors", case.folder)
    case.words = {
        "protocol": draw.choice(
            (
                ("plan", "--backbone", BACKBONE, "--protocol", path, "--data", "stored.npz", "--device", "meta"),
                ("plan", "--budget", "1e3", "--protocol", path),
                ("flops", BACKBONE, "--protocol", path),
                ("evaluate", case.samples(sidecar=draw.random() < 0.3), "--protocol", path, "--data", "stored.npz"),
                ("train", "--backbone", BACKBONE, "--protocol", path, "--data", "stored.npz", "--steps", 1, "--device", "cpu", "--precision", "float32", "--micro-batch", 8)
                if draw.random() < 0.2
                else ("check", "nothing", "--protocol", path),
            )
        ),
        "study": draw.choice((("study", path, "--status"), ("study", path, "--status", "--json"), ("study", path, "--report"))),
        "system": ("sample", "--system", path, "--weights", "base=bare.safetensors", "--weights" if "weak" in table else "--samples", "weak=bare.safetensors" if "weak" in table else 2, "--samples", 2, "--sampling-steps", 1, "--device", "cpu"),
    }[kind]  # fmt: skip
