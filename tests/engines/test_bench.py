"""`harness bench`: its figures follow from its timings by the stated convention."""

import json

import pytest
import torch
from click.testing import CliRunner

from harness import registry
from harness.cli import group
from harness.engines.torch import bench, resolve, roofline
from harness.errors import UserError
from harness.frameworks import torch_transfer
from harness.spec import BackboneSpec

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Timings so short that only the arithmetic on them is of interest."""
    monkeypatch.setattr(bench, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(bench, "EVALUATED", 2)
    monkeypatch.setattr(roofline, "SIDES", {"cpu": 64})
    monkeypatch.setattr(roofline, "SECONDS", {"cpu": 0.001})
    monkeypatch.setattr(roofline, "BANDWIDTH_BYTES", {"cpu": 1 << 16})


def invoke(*words):
    """Exit status, stdout, and the refusal where there was one."""
    result = CliRunner().invoke(group, ["bench", *words])
    return result.exit_code, result.stdout, result.exception


def test_figures_follow_from_images_per_second_by_the_convention(quick, tmp_path):
    out = tmp_path / "kept.json"
    code, stdout, error = invoke(
        "--backbone", "dit-xs-4", "--batch", "2", "--sampling-steps", "3", "--json", "--out", str(out)
    )
    assert code == 0, error
    found = json.loads(stdout)
    assert found == json.loads(out.read_text())
    assert [row["stage"] for row in found["rows"]] == ["training", "sampling", "evaluation"]
    macs = registry.backbones.get("dit-xs-4").count().macs
    assert found["gmacs"] == macs / 1e9
    training, sampling, evaluation = found["rows"]
    assert training["tflops"] == pytest.approx(2 * macs * 3 * training["images_per_second"] / 1e12)
    # Two of the three steps' evaluations an image are guidance's; a batch of 2 is one image.
    assert (sampling["batch"], sampling["micro_batch"]) == (1, 2)
    assert sampling["tflops"] == pytest.approx(2 * macs * 3 * 2 * sampling["images_per_second"] / 1e12)
    for row in (training, sampling):
        peak = found["roofline"]["tflops"][row["precision"]]
        assert row["utilisation"] == pytest.approx(row["tflops"] / peak) and row["low"] <= row["images_per_second"]
        assert row["peak_memory_bytes"] > 1e8
    # The figure of the network at 96 pixels is published: 0.39 G multiply-adds at 224, as (96 / 224) squared.
    assert evaluation["tflops"] / evaluation["images_per_second"] * 1e3 == pytest.approx(
        2 * 0.39 * (96 / 224) ** 2, rel=0.1
    )
    assert found["peak_from"] == "measured matrix product"


class OwnChannels(torch.nn.Module):
    """As many output channels as its input has, whatever the objective."""

    def __init__(self, input_size, in_channels, num_classes, out_channels):
        super().__init__()
        self.label, self.out = torch.nn.Embedding(num_classes + 1, 1), torch.nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, t, y):
        return self.out(x + self.label(y)[:, :, None, None] + t[:, None, None, None] / 1000)


@pytest.fixture
def own_channels(monkeypatch):
    defaults = {"input_size": 8, "in_channels": 1, "num_classes": 10, "out_channels": 1}
    fields = {"defaults": defaults, "null_label": "num_classes", "builders": {"torch": f"{__name__}:OwnChannels"}}
    registry.backbones.names()  # loads it, so that what is restored is whole
    for name in ("_items", "_owners"):
        monkeypatch.setattr(registry.backbones, name, {**getattr(registry.backbones, name)})
    registry.backbones.register(BackboneSpec(name="own-channels", **fields))
    registry.backbones.register(BackboneSpec(name="of-two-times", times=2, **fields))


def test_a_network_without_room_for_a_variance_is_measured(quick, own_channels):
    code, stdout, error = invoke(
        "--backbone", "own-channels", "--batch", "2", "--sampling-steps", "2", "--stages", "training,sampling", "--json"
    )
    assert code == 0, error
    assert [row["stage"] for row in json.loads(stdout)["rows"]] == ["training", "sampling"]
    _, _, error = invoke("--backbone", "of-two-times")
    assert isinstance(error, UserError) and "is given two times, and only networks of one" in str(error)


def test_a_table_is_what_a_person_gets(quick):
    code, stdout, error = invoke("--backbone", "adm-classifier-xs", "--precision", "float32", "--batch", "1")
    assert code == 0, error
    assert "MFU over" in stdout and "training" in stdout and "sampling" not in stdout.partition("MFU over")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "tf32", "--device", "cpu"], "tf32 is that of NVIDIA's matrix units"),
        (["--backbone", "biggan-deep-128"], "is a generator"),
        (["--backbone", "adm-classifier-xs", "--stages", "sampling"], "of which only training"),
        (["--device", "meta"], "computes nothing"),
        (["--backbone", "dit-xs4"], "did you mean dit-xs-4"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(words, message, monkeypatch):
    monkeypatch.setattr(bench, "measure_roofline", lambda _: pytest.fail("measured"))
    code, _, error = invoke(*words)
    assert code and isinstance(error, UserError) and message in str(error)


def test_what_was_kept_is_not_overwritten(tmp_path):
    (tmp_path / "kept.json").write_text("{}")
    _, _, error = invoke("--out", str(tmp_path / "kept.json"))
    assert isinstance(error, UserError) and "exists already" in str(error)
    assert (tmp_path / "kept.json").read_text() == "{}"


def test_an_unknown_stage_is_named():
    result = CliRunner().invoke(group, ["bench", "--stages", "trainig"])
    assert result.exit_code == 2 and "did you mean training" in result.stderr


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_the_peak_is_the_data_sheets_where_the_device_is_in_the_table(name, peak, quick, monkeypatch):
    """By its full name: a similar one belongs to another card, or to a part of one."""
    monkeypatch.setattr(roofline, "device_name", lambda device: name)
    found = roofline.measure_roofline(CPU)
    assert found.tflops["bfloat16"] >= found.tflops_median["bfloat16"] > 0
    measured = (found.tflops["bfloat16"], "measured matrix product")
    assert found.peak("bfloat16") == (measured if peak is None else (peak, "data sheet"))


def roofline_of(tflops, data_sheet):
    return roofline.Roofline(
        device_name="x", tflops={"bfloat16": tflops}, tflops_median={}, gbytes_per_second=1.0,
        gbytes_per_second_median=1.0, data_sheet_tflops={"bfloat16": data_sheet} if data_sheet else {},
    )  # fmt: skip


def test_more_than_the_roofline_is_warned_of():
    assert roofline_of(10.0, None).warning("training", "bfloat16", 10.0) == ""
    said = roofline_of(10.0, None).warning("training", "bfloat16", 12.0)
    assert said.startswith("training came to 12 TFLOP/s, more than the 10 of the matrix products measured here")
    assert roofline_of(10.0, 20.0).warning("training", "bfloat16", 9.0) == ""
    assert "measured here" in roofline_of(10.0, 20.0).warning("training", "bfloat16", 12.0)
    assert "more than the 8 of the data sheet" in roofline_of(10.0, 8.0).warning("training", "bfloat16", 9.0)


def test_the_warning_stands_below_the_table(quick, monkeypatch):
    monkeypatch.setattr(roofline, "matrix_tflops", lambda *_: [1e-9])
    code, stdout, error = invoke("--backbone", "adm-classifier-xs", "--precision", "float32", "--batch", "1")
    assert code == 0, error
    assert stdout.splitlines()[-1].startswith("over 100 %: training came to")


def test_matrix_products_are_of_normal_numbers(monkeypatch):
    """Ones take a GPU less power, and so a higher clock than a network gets."""
    seen = []
    monkeypatch.setattr(roofline, "SIDES", {"cpu": 64})
    monkeypatch.setattr(roofline, "seconds_of", lambda call, *_: seen.append(call()) or [1.0])
    roofline.matrix_tflops(CPU, "float32")
    entries = seen[0] / seen[0].shape[0] ** 0.5  # of a product of normal numbers: again of variance 1
    assert abs(float(entries.mean())) < 0.1 and abs(float(entries.std()) - 1) < 0.1


def test_auto_never_takes_tf32():
    found = roofline.Roofline(
        device_name="x", tflops={"float32": 50.0, "tf32": 400.0, "bfloat16": 30.0}, tflops_median={},
        gbytes_per_second=1.0, gbytes_per_second_median=1.0, data_sheet_tflops={},
    )  # fmt: skip
    assert found.fastest == "float32"


def test_float32_is_float32_for_convolutions_too(monkeypatch):
    """By default, torch lets convolutions use TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        resolve.set_arithmetic(CPU, "float32")
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        resolve.set_arithmetic(torch.device("cuda"), "tf32")
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(resolve, "device_name", lambda device: "Tesla T4")
        with pytest.raises(UserError, match="begins with NVIDIA's Ampere"):
            resolve.set_arithmetic(torch.device("cuda"), "tf32")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_a_gpu_is_given_pinned_memory_and_not_waited_for():
    calls = []

    class Host:
        device = CPU

        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            calls.append((device.type, non_blocking))
            return self

    torch_transfer.to_device(Host(), torch.device("cuda"))
    assert calls == ["pinned", ("cuda", True)]
    held = torch.ones(3)
    assert torch_transfer.to_device(held, CPU) is held
