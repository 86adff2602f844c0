"""A file that says something against itself or against the network is refused in a line that says what it is."""

import json
import re

import pytest
import torch

import harness
from backbones.dit.weights import contradiction
from backbones.ldm.weights import average_name
from harness.errors import UserError
from harness.weights import transfer
from harness.weights.files import open_weights
from harness.weights.load import load_into
from harness.weights.maps import Layout, Take, take_all
from harness.weights.transfer import export_file, import_file, inspect_file


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    """The network of `state` (dit-xs-4, 3 heads of 64) in diffusers' layout."""
    path = tmp_path_factory.mktemp("misfits")
    torch.save(state, path / "a.pt")
    return export_file(path / "a.pt", "diffusers", path / "folder")


def configured(folder, **items):
    """The folder with other items in its config; None takes one out."""
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(json.dumps({k: v for k, v in (json.loads(before) | items).items() if v is not None}))
    return path, before


@pytest.mark.parametrize(
    ("item", "value", "wanted"),
    [
        ("_class_name", "PixArtTransformer2DModel", '"DiTTransformer2DModel" or "Transformer2DModel"'),
        ("activation_fn", "gelu", '"gelu-approximate"'),
        ("attention_bias", False, "true"),
        ("attention_head_dim", 32, "64"),
        ("in_channels", 8, "4"),
        ("norm_elementwise_affine", True, "false"),
        ("norm_eps", 1e-3, "1e-05 or 1e-06"),
        ("norm_type", "ada_norm_single", '"ada_norm_zero"'),
        ("num_attention_heads", 6, "3"),
        ("num_attention_heads", "3", "3"),
        ("num_embeds_ada_norm", 1000, "10"),
        ("num_layers", 28, "6"),
        ("out_channels", 4, "8"),
        ("patch_size", 2, "4"),
    ],
)
def test_a_config_against_the_weights_is_refused_by_item(item, value, wanted, folder, spec, tmp_path):
    path, before = configured(folder, **{item: value})
    message = re.escape(f"config.json gives {item} {json.dumps(value)}, but the network has {wanted}")
    try:
        with pytest.raises(UserError, match=message):
            load_into(spec.build(num_classes=10), folder, spec)
        with pytest.raises(UserError, match=message):
            import_file(folder, tmp_path / "out.safetensors")
        document = inspect_file(folder)
        assert not document["fits"] and re.search(message, document["problem"])
        assert document["layout"] == "diffusers DiTTransformer2DModel"  # what it is does not hang on whether it fits
    finally:
        path.write_text(before)


@pytest.mark.parametrize("size", [4096, 1028, 33, 0, -4, "32", 32.0, True, [32]])
def test_a_size_that_no_latent_has_is_refused(size, folder, spec):
    path, before = configured(folder, sample_size=size)
    message = re.escape(f"config.json gives sample_size {json.dumps(size)}, which is not the side of a latent")
    try:
        with pytest.raises(UserError, match=message):
            load_into(spec.build(num_classes=10), folder, spec)
        assert re.search(message, inspect_file(folder)["problem"])
    finally:
        path.write_text(before)


def test_what_a_config_may_say(folder, spec):
    """Diffusers' own norm_eps, the class's older name, and items that are left out or null."""
    for items in ({"norm_eps": 1e-5, "_class_name": "Transformer2DModel"}, {"out_channels": None, "num_layers": None}):
        path, before = configured(folder, **items)
        try:
            load_into(spec.build(num_classes=10), folder, spec)
            assert inspect_file(folder)["fits"]
        finally:
            path.write_text(before)
    path, before = configured(folder, num_attention_heads=6, attention_head_dim=32)
    try:  # the network that is loaded decides, not the name
        load_into(spec.build(num_classes=10, heads=6), folder, spec)
    finally:
        path.write_text(before)


def test_null_for_the_heads_is_the_default_also_where_their_number_is_not_known(state):
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for heads, dim, fits in ((None, 64, True), (3, None, True), (None, None, True), (3, 64, True), (3, 32, False)):
        text = contradiction({"num_attention_heads": heads, "attention_head_dim": dim}, shapes, None)
        assert (text is None) == fits, (heads, dim)


def test_a_position_table_of_no_image_is_refused_before_it_is_built(state, tmp_path):
    torch.save({**state, "pos_embed": torch.empty(1, 2**40, 0)}, tmp_path / "a.pt")
    assert "1,099,511,627,776 tokens, but at most 65,536" in inspect_file(tmp_path / "a.pt")["problem"]


@pytest.mark.parametrize("zipped", [True, False])
def test_values_that_are_not_the_bytes_are_refused(zipped, tmp_path):
    turned = torch.randn(4, dtype=torch.cfloat).conj().imag
    assert turned.is_neg()
    torch.save({"w": turned}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"values are not its bytes \(marked neg\); save it with .resolve_neg"):
        open_weights(tmp_path / "a.pt")
    torch.save({"w": turned.resolve_neg().contiguous()}, tmp_path / "b.pt")
    assert torch.equal(torch.from_numpy(open_weights(tmp_path / "b.pt").tensors["w"].read()), turned.resolve_neg())


def test_a_moving_average_of_a_part_is_refused(tmp_path):
    spec = harness.get_backbone("ldm-xs")
    state = spec.build().state_dict()
    network = [name for name in state if name.startswith("model.")]
    averages = {average_name(name): state[name] for name in network}
    for lacking in (network[0], network[-1]):
        some = {name: tensor for name, tensor in averages.items() if name != average_name(lacking)}
        torch.save({"state_dict": {**state, **some}}, tmp_path / "a.ckpt")
        message = re.escape(f"{lacking} has no moving average ({average_name(lacking)} is missing)")
        with pytest.raises(UserError, match=message):
            load_into(spec.build(), tmp_path / "a.ckpt", spec)
        with pytest.raises(UserError, match=message):
            import_file(tmp_path / "a.ckpt")
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1)}
    torch.save({"state_dict": {**state, **counters}}, tmp_path / "b.ckpt")
    notes = load_into(spec.build(), tmp_path / "b.ckpt", spec).notes
    assert not any("moving average" in note for note in notes)


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "module.module._orig_mod.", "module."])
def test_what_wraps_a_network_is_dropped_in_any_order(prefix, state, spec, tmp_path):
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "a.pt")
    weights = open_weights(tmp_path / "a.pt")
    assert set(weights.tensors) == set(state) and weights.notes == (
        f"the prefix {prefix!r} was dropped from every name",
    )
    load_into(spec.build(num_classes=10), tmp_path / "a.pt", spec)


@pytest.mark.parametrize("stem", ["blocks", "transformer_blocks"])
@pytest.mark.parametrize("number", ["9" * 5000, "9" * 6, "9" * 7, "\u0661"])
def test_a_block_of_an_absurd_number_is_refused(stem, number, state, spec, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = dict(state) if stem == "blocks" else load_file(file)
    save_file({**tensors, f"{stem}.{number}.attn.proj.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match="is unexpected|is in the file, but not"):
        load_into(spec.build(num_classes=10), tmp_path / "a.safetensors", spec)
    assert not inspect_file(tmp_path / "a.safetensors")["fits"]


def refused(action):
    with pytest.raises(UserError) as refusal:
        action()
    return str(refusal.value)


def test_a_refusal_says_what_the_file_is(bare, spec, tmp_path):
    holds = f"{bare} holds dit-xs-4, num_classes 10 (DiT state dict)"
    ldm, other = harness.get_backbone("ldm-xs"), harness.get_backbone("dit-xs-2")
    assert refused(lambda: load_into(ldm.build(), bare, ldm)) == f"{holds}, which is not ldm-xs"
    assert refused(lambda: import_file(bare, backbone="ldm-xs")) == f"{holds}, which is not ldm-xs"
    for attempt in (
        lambda: load_into(other.build(num_classes=10), bare, other),
        lambda: import_file(bare, backbone="dit-xs-2"),
    ):
        assert refused(attempt).startswith(f"{holds} and does not fit dit-xs-2: pos_embed is (1, 64, 192), the network")
    text = refused(lambda: load_into(spec.build(), bare, spec))
    assert text.startswith(f"{holds} and does not fit dit-xs-4: y_embedder.embedding_table.weight is (11, 192)")
    assert inspect_file(bare, "ldm-xs")["layout"] is None and inspect_file(bare)["layout"] == "DiT state dict"


def test_a_refusal_does_not_guess_what_the_file_is(state, spec, tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"layer.weight": torch.zeros(2, 2)}, path)
    expected = f"{path} does not fit dit-xs-4: its names are not those of DiT state dict (the first is layer.weight)"
    assert refused(lambda: load_into(spec.build(), path, spec)) == expected
    assert refused(lambda: import_file(path, backbone="dit-xs-4")) == expected
    torch.save({name: tensor for name, tensor in state.items() if name != "pos_embed"}, path)
    expected = f"{path} (DiT state dict) does not fit dit-xs-4: pos_embed is missing (in all 1 missing)"
    assert refused(lambda: import_file(path, backbone="dit-xs-4")) == expected
    assert refused(lambda: load_into(spec.build(num_classes=10), path, spec)) == expected


@pytest.mark.parametrize("keys", [(0, 1), (b"a", b"b"), ("(int)", 7)])
def test_tensors_that_would_have_one_name_are_refused(keys, tmp_path):
    torch.save({key: torch.zeros(2) for key in keys}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a.pt holds two tensors under the name \((int|bytes)\); save net"):
        open_weights(tmp_path / "a.pt")


def test_a_layout_that_wants_another_tensor_says_which(bare, monkeypatch, tmp_path):
    for outward in (lambda shapes: {"a": Take("stranger")}, lambda shapes: {"a": Take(str(shapes["stranger"]))}):
        layout = Layout(name="dit", title="", marks=(), inward=take_all, outward=outward)
        monkeypatch.setattr(transfer, "_find_layout", lambda spec, name, layout=layout: layout)
        with pytest.raises(UserError, match="cannot be written as dit: stranger is missing"):
            export_file(bare, "dit", tmp_path / "out.pt")


def test_an_import_says_what_it_did_not_load(state, tmp_path):
    import argparse

    torch.save({"ema": state, "args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    written, about = import_file(tmp_path / "a.pt")
    assert about["not_loaded"] == ["argparse.Namespace"] == inspect_file(tmp_path / "a.pt")["not_loaded"]
    assert "not_loaded" not in open_weights(written).imported


@pytest.mark.parametrize(
    ("name", "layer", "arguments"),
    [
        ("dit-xs-4", "x_embedder.proj.weight", {"in_channels": 3}),
        ("adm-xs", "input_blocks.0.0.weight", {"in_channels": 1}),
        ("ldm-xs", "model.diffusion_model.input_blocks.0.0.weight", {"in_channels": 5}),
    ],
)
def test_a_first_layer_that_is_not_there_comes_first(name, layer, arguments, tmp_path):
    state = harness.get_backbone(name).build(**arguments).state_dict()
    state["stem.weight"] = state.pop(layer)
    torch.save(state, tmp_path / "a.pt")
    document = inspect_file(tmp_path / "a.pt")
    assert document["wrong_shape"], "the number of channels is a guess without it"
    assert document["problem"].startswith(f"{layer} is missing and stem.weight is unexpected")
    del state["stem.weight"]
    torch.save(state, tmp_path / "a.pt")
    assert inspect_file(tmp_path / "a.pt")["problem"].startswith(f"{layer} is missing (in all 1 missing")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(dtype, value, state, spec, tmp_path):
    given = {name: tensor.clone().to(dtype) for name, tensor in state.items()}
    given["blocks.1.mlp.fc2.weight"][2, 3] = value
    torch.save(given, tmp_path / "a.pt")
    message = "blocks.1.mlp.fc2.weight has values that are infinite or not a number"
    assert refused(lambda: load_into(spec.build(num_classes=10), tmp_path / "a.pt", spec)).count(message) == 1
    assert message in refused(lambda: import_file(tmp_path / "a.pt"))
    assert message in refused(lambda: export_file(tmp_path / "a.pt", "diffusers"))
    assert not (tmp_path / "a.safetensors").exists() and not (tmp_path / "a-diffusers").exists()
    document = inspect_file(tmp_path / "a.pt")
    assert not document["fits"] and document["problem"].startswith(message)


def test_an_overflow_on_the_way_into_the_network_is_refused(state, spec, tmp_path):
    torch.save(
        {**state, "pos_embed": torch.full_like(state["pos_embed"], 1e300, dtype=torch.float64)}, tmp_path / "a.pt"
    )
    assert "pos_embed has values" in refused(lambda: load_into(spec.build(num_classes=10), tmp_path / "a.pt", spec))
    assert inspect_file(tmp_path / "a.pt")["fits"]


def test_inspect_notices_damage_in_the_tensors(bare, state):
    data = bytearray(bare.read_bytes())
    data[data.index(state["blocks.1.mlp.fc2.weight"].numpy().tobytes()) + 5] ^= 1
    bare.write_bytes(data)
    document = inspect_file(bare)
    assert not document["fits"] and document["problem"].startswith("is damaged: the bytes of one of its tensors")


@pytest.mark.parametrize("when", ["before it is hashed", "after it was hashed"])
def test_a_file_that_changes_while_it_is_read_is_refused(when, bare, state, spec, monkeypatch, tmp_path):
    """The hash that is recorded is that of the tensors that are used."""
    from harness.weights import files
    from harness.weights.files import sha256

    def meanwhile(path):
        digest = None if when.startswith("before") else sha256(path)
        torch.save({name: tensor + 1 for name, tensor in state.items()}, path.with_name("other.pt"))
        path.with_name("other.pt").replace(path)
        return digest or sha256(path)

    monkeypatch.setattr(files, "sha256", meanwhile)
    assert "was changed while it was read" in refused(lambda: load_into(spec.build(num_classes=10), bare, spec))
    assert "was changed while it was read" in refused(lambda: import_file(bare, tmp_path / "out.safetensors"))
    assert not (tmp_path / "out.safetensors").exists()
