"""`--compile`: what is chosen and why, that it is frozen, and that a compiled run continues to the bit."""

import dataclasses
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sampler_plans import ddpm_plan

from harness import registry
from harness.diffusion.schedule import Schedule
from harness.engines.jax.resolve import refuse_torch_options
from harness.engines.torch import compiling, sampling
from harness.engines.torch.sampling import TorchSampler
from harness.errors import UserError
from harness.protocols import Sampling
from harness.runs.run import Resolved
from harness.runs.sample_set import SampleRequest

CPU = torch.device("cpu")
DIGITS = {"input_size": 8, "in_channels": 1, "num_classes": 10, "out_channels": 2}


def build(name="dit-xs-4"):
    return registry.backbones.get(name).build("torch", **DIGITS)


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling takes no time and changes nothing; `calls` are the networks that it was asked for."""
    calls = []
    monkeypatch.setattr(compiling, "compile_network", calls.append)
    return calls


def choose(wanted, *, seconds=1.0, images=10_000, compiled=0.5, unavailable=None, all_max=float):
    passes = iter([100.0, compiled])  # the first of them compiles

    def measure():
        if isinstance(compiled, Exception):
            raise compiled
        return next(passes)

    net = SimpleNamespace(modules=list, parameters=list)
    return compiling.choose(
        wanted, net, unavailable=unavailable, seconds=seconds, images=images, measure=measure, all_max=all_max
    )


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # within torch
def test_blocks_are_compiled_whole_under_ddp(monkeypatch):
    from torch import _dynamo

    monkeypatch.setattr(_dynamo.config, "optimize_ddp", True)  # torch's default
    compiling.compile_network(torch.nn.Linear(2, 2))  # nothing is compiled before its first call
    assert not _dynamo.config.optimize_ddp


def test_auto_compiles_what_is_faster_over_the_whole_run(uncompiled, monkeypatch):
    assert choose("auto").mode == "on" and len(uncompiled) == 1
    assert "2.00 times as fast" in choose("auto").reason
    assert choose("auto", compiled=1.2).mode == "off"
    assert choose("auto", compiled=0.99).mode == "off"  # less than the margin
    clock = iter([0.0, 5500.0])  # compiling took longer than it saves
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: next(clock))
    assert choose("auto").mode == "off"


def test_auto_does_not_try_where_it_cannot_pay_off(uncompiled):
    choice = choose("auto", images=60)
    assert choice.mode == "off" and "60 s is over before compiling pays off" in choice.reason and uncompiled == []


def test_a_compiler_that_fails_or_is_missing_is_an_error_only_if_asked_for(uncompiled):
    choice = choose("auto", compiled=RuntimeError("CppCompileError: no such header\nand more"))
    assert choice.mode == "off" and choice.reason.endswith("(CppCompileError: no such header)")
    with pytest.raises(UserError, match="--compile on: torch.compile failed here .*; leave it out"):
        choose("on", compiled=RuntimeError("CppCompileError"))
    assert choose("auto", unavailable="there is none") == ("off", "there is none", None)
    with pytest.raises(UserError, match="--compile on: there is none"):
        choose("on", unavailable="there is none")
    assert choose("off").mode == "off"


def several(processes, wanted):
    """What each of several processes chooses. If one waits for the others in vain, it fails after ten seconds."""
    meeting = threading.Barrier(len(processes))
    values = [0.0] * len(processes)

    def one(number):
        def all_max(value):
            values[number] = value
            meeting.wait(10)
            largest = max(values)
            meeting.wait(10)
            return largest

        try:
            return choose(wanted, compiled=processes[number], all_max=all_max)
        except UserError as refusal:
            return str(refusal)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, range(len(processes))))


def test_processes_agree_on_compiling(uncompiled):
    assert [choice.mode for choice in several([0.5, 0.6], wanted="auto")] == ["on", "on"]
    assert {choice.seconds for choice in several([0.5, 0.6], wanted="auto")} == {0.6}
    assert [choice.mode for choice in several([0.5, 1.2], wanted="auto")] == ["off", "off"]  # the slowest decides
    failed, waited = several([RuntimeError("no such header"), 0.5], wanted="auto")
    assert failed == ("off", "torch.compile failed here (no such header)", None)
    assert waited == ("off", "torch.compile failed in another process", None)
    failed, waited = several([RuntimeError("no such header"), 0.5], wanted="on")
    assert failed == "--compile on: torch.compile failed here (no such header); leave it out"
    assert waited == "--compile on: torch.compile failed in another process; leave it out"
    for wanted in ("auto", "on"):  # what `measure` refuses is no failure of the compiler
        refused, waited, failed = several([UserError("no gradient"), 0.5, RuntimeError("no header")], wanted)
        assert refused == "no gradient" and waited == failed
        assert waited == "a training step cannot be measured in another process; its message says why"


def test_on_compiles_whatever_it_gains(uncompiled):
    assert choose("on", compiled=2.0, images=1).mode == "on"


def test_the_compiler_is_looked_for_where_torch_will(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "needs a C++ compiler and there is no g++" in compiling.unavailable_reason(CPU)
    named = tmp_path / "mine++"
    named.write_text("#!/bin/sh\n")
    named.chmod(0o755)
    monkeypatch.setenv("CXX", "mine++")
    assert compiling.unavailable_reason(CPU) is None
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    monkeypatch.setenv("CC", "mine++")
    assert "needs triton" in compiling.unavailable_reason(torch.device("cuda"))
    assert "not used on xpu" in compiling.unavailable_reason(torch.device("xpu"))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # what torch imports of itself
def test_equal_blocks_are_compiled_once_for_all_of_them():
    net = build()
    assert compiling.units(net) == list(net.blocks)
    other = build("adm-xs")
    assert compiling.units(other) == [other]
    names = list(net.state_dict())
    compiling.compile_network(net)
    assert net.blocks[0]._compiled_call_impl is not None and list(net.state_dict()) == names
    compiling.undo(net)
    assert net.blocks[0]._compiled_call_impl is None


def test_runs_and_samples_of_before_are_what_they_were():
    old = {"device": "cpu", "device_name": "x", "precision": "float32", "micro_batch": 4, "threads": 2}
    assert Resolved(**old).compile == "off"
    wanted = SampleRequest(
        step=1,
        sampling=Sampling(),
        steps=10,
        count=8,
        precision="float32",
        batch=4,
        compile="off",
        checkpoint_sha256="0",
        decoder=None,
    )
    assert "compile" not in wanted.settings
    assert dataclasses.replace(wanted, compile="on").settings["compile"] == "on"


def test_a_batch_that_is_filled_up_holds_the_same_images(monkeypatch):
    seen = []
    monkeypatch.setattr(sampling, "check_available", lambda device: None)
    monkeypatch.setattr(
        sampling, "compile_sampler", lambda net, device: lambda x, t, y: seen.append(len(x)) or net(x, t, y)
    )
    spec, net = registry.backbones.get("dit-xs-4"), build()
    plan = ddpm_plan(Schedule.named("linear", 1000), 2)
    settings = {"arguments": spec.arguments(**DIGITS), "precision": "float32", "device": CPU}
    whole = TorchSampler(spec, net, plan, Sampling(), **settings, compile="on", batch=4)
    plain = TorchSampler(spec, net, plan, Sampling(), **settings)
    index, labels = np.arange(3), np.array([1, 5, 9])
    np.testing.assert_array_equal(whole.draw(index, labels), plain.draw(index, labels))
    assert set(seen) == {4}


def test_what_is_torchs_is_refused_in_jax():
    for options in ({"precision": "tf32"}, {"compile": "on"}):
        with pytest.raises(UserError, match="belongs to --framework torch"):
            refuse_torch_options(**options)
    refuse_torch_options("bfloat16")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch warns itself of
@pytest.mark.parametrize("name", ["dit-xs-4"])
def test_gradients_of_compiled_networks_are_those_without(name):
    torch.manual_seed(0)
    plain, compiled = build(name).train(), build(name).train()
    for weight in plain.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.05)
    compiled.load_state_dict(plain.state_dict())
    compiling.compile_network(compiled)
    x, t, y = torch.randn(8, 1, 8, 8), torch.randint(0, 1000, (8,)), torch.randint(0, 10, (8,))
    for net in (plain, compiled):
        net(x, t, y).square().mean().backward()
    for (path, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            scale = float(theirs.grad.norm())
            assert float((ours.grad - theirs.grad).norm()) <= 1e-4 * scale + 1e-9, path


def test_the_residual_stream_of_a_dit_is_contiguous():
    net, seen = build(), []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    net(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert seen == [True] * len(net.blocks)


def harness(*words, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "harness", *words], cwd=cwd, capture_output=True, text=True, timeout=1200
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_compiled_run_continues_to_the_bit_and_is_the_experiment_without(tmp_path):
    """Four steps at once, and two and two in a process each; beside them the run without, and samples of both."""

    def train(out, steps, *words):
        common = ["--backbone", "dit-xs-4", "--precision", "float32", "--set", "batch=8", "--set", "warmup_steps=0"]
        code, text = harness("train", *common, "--steps", str(steps), "--out", out, *words, cwd=tmp_path)
        assert code == 0, text
        return text

    assert "compile     on (" in train("whole", 4, "--compile", "on")
    train("halves", 2, "--compile", "on")
    train("halves", 4)
    train("plain", 4)

    def losses(out):
        return [json.loads(line)["mse"] for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]

    assert losses("whole") == losses("halves") and len(losses("whole")) == 4
    # Other kernels of the same function; on some processors the first losses are equal to the bit.
    np.testing.assert_allclose(losses("whole"), losses("plain"), rtol=1e-5)
    code, text = harness("train", "--backbone", "dit-xs-4", "--set", "batch=8", "--set", "warmup_steps=0", "--steps", "4",
                         "--out", "whole", "--compile", "off", cwd=tmp_path)  # fmt: skip
    assert code == 2 and "created with compile on, which is frozen" in text

    def sample(out):
        words = ["--sampling-steps", "4", "--samples", "10", "--batch", "8", "--cfg", "2"]
        code, text = harness("sample", "--run", out, *words, cwd=tmp_path)
        assert code == 0, text
        (path,) = (tmp_path / out / "samples").glob("*/samples.npz")
        facts = json.loads(path.with_suffix(".json").read_text())
        with np.load(path) as file:
            return file["arr_0"].astype(int), facts["identity"]["sampling"].get("compile")

    (compiled, recorded), (plain, without) = sample("whole"), sample("plain")
    assert (recorded, without) == ("on", None)
    assert np.abs(compiled - plain).max() <= 1
