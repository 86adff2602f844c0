"""Public files of ADM, LDM and BigGAN-deep, at reduced sizes: recognised by names and shapes, and back bit for bit."""

import pytest
import torch
from safetensors.torch import load_file
from state_dicts import same

import harness
from backbones.ldm.weights import COUNTERS, average_name
from harness.errors import UserError
from harness.weights.files import open_weights
from harness.weights.identify import expected_shapes, identify
from harness.weights.load import load_into
from harness.weights.transfer import export_file, import_file, inspect_file

FAMILIES = {
    "adm-xs": ("guided-diffusion", {"num_classes": 7}),
    "adm-u-xs": ("guided-diffusion", {}),
    "adm-classifier-xs": ("guided-diffusion", {"num_classes": 12}),
    "ldm-xs": ("ldm", {"num_classes": 7}),
}


def drawn(spec, **arguments):
    """A network with no zero in it, and its state."""
    net = spec.build(**arguments).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(std=0.05, generator=generator)
    return net, {name: tensor.clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_in_and_out_bit_for_bit(name, tmp_path):
    layout, arguments = FAMILIES[name]
    spec = harness.get_backbone(name)
    _, state = drawn(spec, **arguments)
    file = {"state_dict": state} if layout == "ldm" else state
    torch.save(file, tmp_path / "a.pt")
    written, about = import_file(tmp_path / "a.pt")
    assert (about["backbone"], about["arguments"], about["format"]) == (name, arguments, layout)
    same(load_file(written), state)
    back = torch.load(export_file(written, layout, tmp_path / "back"))
    same(back["state_dict"] if layout == "ldm" else back, state)
    with torch.device("meta"):
        net = spec.build(**arguments)
    load_into(net, tmp_path / "a.pt", spec)
    same(net.state_dict(), state)
    state.pop(next(iter(state)))
    torch.save(file, tmp_path / "b.pt")
    with pytest.raises(UserError, match="is missing"):
        import_file(tmp_path / "b.pt", backbone=name)


def test_an_unconditional_adm_is_told_from_a_conditional_one(tmp_path):
    _, state = drawn(harness.get_backbone("adm-xs"), num_classes=0)
    assert "label_emb.weight" not in state
    torch.save(state, tmp_path / "a.pt")
    document = inspect_file(tmp_path / "a.pt")
    assert document["backbone"] == "adm-xs" and document["arguments"] == {"num_classes": 0} and document["fits"]


def ldm_checkpoint(state, *, average):
    """What CompVis' Lightning module keeps: the autoencoder and the schedule's tables beside the denoiser."""
    tensors = dict(state)
    tensors |= {"betas": torch.rand(1000), "logvar": torch.rand(1000), "scale_factor": torch.tensor(1.0)}
    tensors |= {
        "first_stage_model.quantize.embedding.weight": torch.randn(8, 3),
        "first_stage_model.quant_conv.bias": torch.randn(3),
    }
    if average:
        tensors |= {average_name(name): tensor * 2 for name, tensor in state.items() if name.startswith("model.")}
        tensors |= {COUNTERS[0]: torch.tensor(0.9999), COUNTERS[1]: torch.tensor(5)}
    return {"epoch": 1, "global_step": 2, "state_dict": tensors, "callbacks": {}}


def test_an_ldm_checkpoint_keeps_what_lies_beside_the_network(tmp_path):
    spec = harness.get_backbone("ldm-xs")
    net, state = drawn(spec)
    checkpoint = ldm_checkpoint(state, average=False)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    document = inspect_file(tmp_path / "model.ckpt")
    assert document["fits"] and document["wrapping"] == "Lightning checkpoint"
    assert document["beside"] == {"betas": 1, "logvar": 1, "scale_factor": 1, "first_stage_model": 2}
    written, _ = import_file(tmp_path / "model.ckpt")
    same(torch.load(export_file(written, "ldm"))["state_dict"], checkpoint["state_dict"])
    provenance = load_into(net, written, spec)
    assert any("first_stage_model" in note for note in provenance.notes)
    first = torch.nn.ModuleDict({"quant_conv": torch.nn.Linear(1, 3), "quantize": torch.nn.Module()})
    first["quant_conv"].weight = None
    first["quantize"].embedding = torch.nn.Embedding(8, 3)
    load_into(first, tmp_path / "model.ckpt", prefix="first_stage_model.")
    assert torch.equal(first["quant_conv"].bias, checkpoint["state_dict"]["first_stage_model.quant_conv.bias"])
    first["quantize"].more = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"first_stage_model.quantize.more.weight is missing"):
        load_into(first, tmp_path / "model.ckpt", spec, prefix="first_stage_model.")


def test_an_ldm_checkpoint_with_a_moving_average_gives_that(tmp_path):
    spec = harness.get_backbone("ldm-xs")
    net, state = drawn(spec)
    checkpoint = ldm_checkpoint(state, average=True)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    expected = {name: tensor * (2 if name.startswith("model.") else 1) for name, tensor in state.items()}
    provenance = load_into(net, tmp_path / "model.ckpt", spec)
    same(net.state_dict(), expected)
    assert any("moving average (model_ema)" in note for note in provenance.notes)
    written, _ = import_file(tmp_path / "model.ckpt")
    imported = load_file(written)
    same({name: imported[name] for name in state}, expected)
    assert not any(name.startswith("model_ema.") for name in imported)
    checkpoint["state_dict"]["model_ema.stranger"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(UserError, match="model_ema.stranger is unexpected"):
        load_into(net, tmp_path / "b.ckpt", spec)


def test_a_biggan_folder_of_hugging_face_is_read(tmp_path):
    spec = harness.get_backbone("biggan-deep-128")
    arguments = {"width": 16, "num_classes": 5, "latent_size": 8}
    net, state = drawn(spec, **arguments)
    (tmp_path / "biggan").mkdir()
    torch.save(state, tmp_path / "biggan" / "pytorch_model.bin")
    (tmp_path / "biggan" / "config.json").write_text("{}")
    with torch.device("meta"):
        net = spec.build(**arguments)
    provenance = load_into(net, tmp_path / "biggan", spec)
    same(net.state_dict(), state)
    assert provenance.format.startswith("Hugging Face BigGAN")
    document = inspect_file(tmp_path / "biggan")
    assert document["backbone"].startswith("biggan-deep-") and not document["fits"] and document["wrong_shape"]


@pytest.mark.parametrize(
    "name",
    ["dit-xl-2", "dit-xl-2-in-context", "dit-l-4-adaln", "dit-s-8-cross-attention"]
    + ["adm-64", "adm-128", "adm-256", "adm-512", "adm-u-64-256", "adm-u-128-512", "adm-u-32-64"]
    + ["adm-classifier-64", "adm-classifier-512", "ldm-4", "ldm-8"]
    + ["biggan-deep-128", "biggan-deep-256", "biggan-deep-512"],
)
def test_networks_of_the_paper_are_recognised_at_full_size(name, tmp_path):
    from harness.registry import backbones
    from harness.weights.files import WeightFile
    from harness.weights.tensors import Stored

    spec = harness.get_backbone(name)
    shapes = expected_shapes(spec, {})
    tensors = {key: Stored(file=tmp_path, dtype="F32", shape=shape, start=0) for key, shape in shapes.items()}
    weights = WeightFile(
        path=tmp_path, stat=(), container="torch zip", wrapping="state dict", tensors=tensors, symbols=()
    )
    match = identify(weights, backbones)
    assert match.exact and match.spec is spec and match.arguments == {}


def test_a_plug_in_network_is_recognised_by_its_own_names(tmp_path):
    spec = harness.BackboneSpec(
        name="two-layers", family="plugged", defaults={"input_size": 8, "in_channels": 1},
        builders={"torch": f"{two_layers.__module__}:two_layers"},
    )  # fmt: skip
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "a.pt")
    import sys
    import types

    sys.modules.setdefault(two_layers.__module__, types.ModuleType(two_layers.__module__)).two_layers = two_layers
    match = identify(open_weights(tmp_path / "a.pt"), [harness.get_backbone("dit-xs-4"), spec])
    assert match.exact and match.spec is spec


def two_layers(*, input_size, in_channels):
    return torch.nn.Linear(3, 2)
