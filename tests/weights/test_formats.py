"""Every accepted file gives the same tensors, bit for bit, and each misfit is named."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import harness
from harness.errors import UserError
from harness.weights.containers import open_file
from harness.weights.files import open_weights
from harness.weights.load import load_into
from harness.weights.transfer import export_file, import_file, inspect_file

BLOCKS = ("", "-in-context", "-cross-attention", "-adaln")


def same(one, other):
    """The same names, dtypes, shapes and bits."""
    assert set(one) == set(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and one[name].shape == other[name].shape, name
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name


def as_bare(state, path):
    torch.save(state, path)


def as_legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def as_checkpoint(state, path):
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": other, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-XS/4")}, path)


def as_parallel(state, path):
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)


def as_parameters(state, path):
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in state.items()}, path)


def as_safetensors(state, path):
    save_file(state, path)


@pytest.mark.parametrize("write", [as_bare, as_legacy, as_checkpoint, as_parallel, as_parameters, as_safetensors])
def test_every_form_of_a_state_dict_is_read(write, state, spec, tmp_path):
    path = tmp_path / "weights"  # no ending: the content decides
    write(state, path)
    written, about = import_file(path)
    assert about["backbone"] == "dit-xs-4" and about["arguments"] == {"num_classes": 10} and about["format"] == "dit"
    same(load_file(written), state)
    with torch.device("meta"):
        net = spec.build(num_classes=10)
    provenance = load_into(net, path, spec)
    same(net.state_dict(), state)
    assert not any(tensor.is_meta for tensor in net.parameters()) and not net.pos_embed.requires_grad
    assert provenance.sha256 == about["source"]["sha256"] == inspect_file(path)["sha256"]
    same(torch.load(export_file(written, "dit", tmp_path / "back.pt")), state)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_four_block_designs_are_told_apart(block, tmp_path):
    spec = harness.get_backbone(f"dit-xs-2{block}")
    net = spec.build(num_classes=3, input_size=16, in_channels=3, out_channels=3)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    document = inspect_file(tmp_path / "a.pt")
    assert document["backbone"] == spec.name and document["fits"]
    assert document["arguments"] == {"num_classes": 3, "input_size": 16, "in_channels": 3, "out_channels": 3}
    assert document["values"] == sum(tensor.numel() for tensor in net.state_dict().values())
    if block:
        with pytest.raises(UserError, match="diffusers has no DiT with"):
            export_file(tmp_path / "a.pt", "diffusers")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint16, torch.bool]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype_and_layout_is_read_bit_for_bit(dtype, zipped, tmp_path):
    whole = torch.arange(24).reshape(4, 6).to(dtype)
    tensors = {"whole": whole, "turned": whole.T, "part": whole[1:3, 2:5], "scalar": whole[1, 1], "none": whole[:0]}
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    for name, stored in open_file(tmp_path / "a.pt").value.items():
        expected = tensors[name].contiguous()
        assert stored.read().tobytes() == expected.view(-1).view(torch.uint8).numpy().tobytes(), name
        assert stored.shape == tuple(expected.shape)


def test_tensors_that_share_memory_are_read_apart(tmp_path):
    base = torch.randn(6, 4)
    torch.save({"a": base, "b": base[2:], "c": base.view(-1)[3:]}, tmp_path / "a.pt")
    for name, tensor in (("a", base), ("b", base[2:]), ("c", base.view(-1)[3:])):
        np.testing.assert_array_equal(open_file(tmp_path / "a.pt").value[name].read(), tensor.numpy())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere_is_refused_in_one_line(zipped, state, spec, tmp_path):
    path = tmp_path / "a.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for length in (3, 100, 5000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError) as refusal:
            load_into(spec.build(num_classes=10), path, spec)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_flipped_bit_is_noticed(bare, spec):
    data = bytearray(bare.read_bytes())
    data[len(data) // 2] ^= 1
    bare.write_bytes(data)
    with pytest.raises(UserError, match="do not match their checksum"):
        load_into(spec.build(num_classes=10), bare, spec)


def test_safetensors_with_a_false_header_are_refused(state, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    data = path.read_bytes()
    for old, new in (
        (b"[0,16]", b"[0,15]"),
        (b"[0,16]", b"[1,16]"),
        (b'"F32"', b'"X99"'),
        (b"[4]", b"[9]"),
        (b"{", b"["),
    ):
        path.write_bytes(data.replace(old, new, 1))
        with pytest.raises(UserError):
            open_file(path)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="cut short"):
        open_file(path)


def rename(state):
    state["blocks.3.attn.kqv.weight"] = state.pop("blocks.3.attn.qkv.weight")


def drop(state):
    del state["final_layer.linear.bias"]


def add(state):
    state["stranger"] = torch.zeros(1)


def reshape(state):
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename, r"blocks.3.attn.qkv.weight is missing and blocks.3.attn.kqv.weight is unexpected"),
        (drop, r"final_layer.linear.bias is missing"),
        (add, r"stranger is unexpected"),
        (reshape, r"blocks.0.mlp.fc1.bias is \(5,\), the network's is \(768,\)"),
    ],
)
def test_misfits_are_named(spoil, message, state, spec, tmp_path):
    state = dict(state)
    spoil(state)
    torch.save(state, tmp_path / "a.pt")
    net = spec.build(num_classes=10)
    before = net.blocks[1].mlp.fc1.weight.clone()
    for attempt in (lambda: load_into(net, tmp_path / "a.pt", spec), lambda: import_file(tmp_path / "a.pt")):
        with pytest.raises(UserError, match=message):
            attempt()
    assert torch.equal(before, net.blocks[1].mlp.fc1.weight), "the network is as it was"
    document = inspect_file(tmp_path / "a.pt")
    assert document["backbone"] == "dit-xs-4" and not document["fits"]
    assert document["missing"] or document["unexpected"] or document["wrong_shape"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"], "nothing half written"


def test_another_architecture_is_refused(bare):
    other = harness.get_backbone("dit-xs-2")
    with pytest.raises(UserError, match=r"does not fit dit-xs-2"):
        load_into(other.build(num_classes=10), bare, other)
    with pytest.raises(UserError, match=r"does not fit dit-s-4"):
        import_file(bare, backbone="dit-s-4")


def test_weights_of_no_backbone_are_said_to_be_unknown(tmp_path):
    torch.save({"layer.weight": torch.zeros(2, 2)}, tmp_path / "a.pt")
    document = inspect_file(tmp_path / "a.pt")
    assert document["backbone"] is None and document["known"] is None and "layer.weight" in document["problem"]
    with pytest.raises(UserError, match="of no known backbone"):
        import_file(tmp_path / "a.pt")
    net = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2, bias=False)})
    assert load_into(net, tmp_path / "a.pt").sha256 == document["sha256"] and not net["layer"].weight.any()


# diffusers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, spec):
    """What diffusers itself saves of a DiT with the sizes of dit-xs-4, its embedders alike in every block."""
    diffusers = pytest.importorskip("diffusers")
    a = spec.defaults
    torch.manual_seed(3)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=a["heads"], attention_head_dim=a["width"] // a["heads"], in_channels=4, out_channels=8,
        num_layers=a["depth"], patch_size=a["patch"], sample_size=32, activation_fn="gelu-approximate",
        num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False, attention_bias=True,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.05)
        for block in theirs.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    path = tmp_path_factory.mktemp("diffusers") / "transformer"
    theirs.save_pretrained(path)
    return theirs.eval(), path


def test_a_diffusers_folder_gives_diffusers_outputs(folder, spec, tmp_path):
    theirs, path = folder
    ours = spec.build(num_classes=10).eval()
    provenance = load_into(ours, path.parent, spec)  # the pipeline's folder, with transformer/ in it
    assert any("position table" in note for note in provenance.notes) and "diffusers" in provenance.format
    eps = [(block.norm3.eps, block.norm1.emb.time_proj.downscale_freq_shift) for block in theirs.transformer_blocks]
    try:
        for block in theirs.transformer_blocks:  # the two differences, corrected
            block.norm1.emb.time_proj.downscale_freq_shift, block.norm3.eps = 0, 1e-6
        torch.manual_seed(2)
        x, t, y = torch.randn(2, 4, 32, 32), torch.tensor([3, 777]), torch.tensor([7, 10])
        with torch.no_grad():
            mine, other = ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample
    finally:
        for block, (norm, shift) in zip(theirs.transformer_blocks, eps, strict=True):
            block.norm3.eps, block.norm1.emb.time_proj.downscale_freq_shift = norm, shift
    assert mine.std() > 0.1
    torch.testing.assert_close(mine, other, rtol=0, atol=5e-5)


def test_import_and_export_of_diffusers_are_bit_exact(folder, tmp_path):
    theirs, path = folder
    written, about = import_file(path, tmp_path / "a.safetensors")
    assert about["backbone"] == "dit-xs-4" and len(about["notes"]) == 3
    back = export_file(written, "diffusers", tmp_path / "back")
    same(load_file(back / "diffusion_pytorch_model.safetensors"), theirs.state_dict())
    diffusers = pytest.importorskip("diffusers")
    again = diffusers.DiTTransformer2DModel.from_pretrained(back)
    same(again.state_dict(), theirs.state_dict())
    assert all(block.norm3.eps == 1e-6 for block in again.transformer_blocks)


def test_xl_has_the_538_names_of_diffusers():
    from backbones.dit.weights import to_diffusers
    from harness.weights.identify import expected_shapes

    shapes = expected_shapes(harness.get_backbone("dit-xl-2"), {})
    recipes = to_diffusers(shapes)
    sizes = [int(np.prod(recipe.shape(shapes))) for recipe in recipes.values()]
    assert len(shapes) == 292 and len(recipes) == 538 and sum(sizes) == 749_826_464  # measured in diffusers itself


def test_embedders_that_differ_are_refused_by_name(folder, spec, tmp_path):
    path = tmp_path / "transformer"
    shutil.copytree(folder[1], path)
    file = path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = "transformer_blocks.4.norm1.emb.timestep_embedder.linear_2.bias"
    tensors[name] = tensors[name] + 1e-7
    save_file(tensors, file)
    with pytest.raises(UserError, match=name):
        load_into(spec.build(num_classes=10), path, spec)
    with pytest.raises(UserError, match=name):
        import_file(path, tmp_path / "a.safetensors")
    assert name in inspect_file(path)["problem"]
    assert [each.name for each in tmp_path.iterdir()] == ["transformer"]


def test_without_its_config_a_diffusers_file_loads_by_the_network_alone(folder, spec, tmp_path):
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    shutil.copy(folder[1] / file.name, file)
    with pytest.raises(UserError, match=r"config.json \(sample_size\)"):
        import_file(file, tmp_path / "a.safetensors")
    net = spec.build(num_classes=10, input_size=16)
    load_into(net, file, spec)
    assert torch.equal(net.pos_embed, spec.build(input_size=16).pos_embed)
    (tmp_path / "config.json").write_text(json.dumps({"sample_size": 32}))
    with pytest.raises(UserError, match=r"pos_embed is \(1, 64, 192\), the network's is \(1, 16, 192\)"):
        load_into(net, file, spec)


def test_our_own_run_and_foreign_metadata_are_accepted(state, tmp_path):
    save_file(state, tmp_path / "ema.safetensors", metadata={"harness": "{not json"})
    assert open_weights(tmp_path / "ema.safetensors").imported is None
    assert inspect_file(tmp_path / "ema.safetensors")["fits"]
