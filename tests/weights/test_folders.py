"""Weights in folders, as diffusers, transformers and training scripts write them, and in several parts with an index."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from state_dicts import same

from harness.errors import UserError
from harness.weights.files import open_weights
from harness.weights.load import load_into
from harness.weights.transfer import import_file, inspect_file


def shards(folder, state, stem="diffusion_pytorch_model", variant="", ending="safetensors"):
    """As diffusers and transformers write weights in two parts, with an index."""
    folder.mkdir(exist_ok=True)
    names, places = list(state), {}
    for number in (1, 2):
        part = names[: len(names) // 2] if number == 1 else names[len(names) // 2 :]
        file = f"{stem}{variant}-{number:05}-of-00002.{ending}"
        tensors = {name: state[name] for name in part}
        save_file(tensors, folder / file) if ending == "safetensors" else torch.save(tensors, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{ending}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize(
    ("stem", "variant", "ending"),
    [
        ("diffusion_pytorch_model", "", "safetensors"),
        ("diffusion_pytorch_model", ".fp16", "safetensors"),
        ("pytorch_model", "", "bin"),
        ("model", "", "safetensors"),
    ],
)
def test_weights_in_several_parts_are_read(stem, variant, ending, state, spec, tmp_path):
    index = shards(tmp_path / "net", state, stem, variant, ending)
    for path in (tmp_path / "net", index):
        net = spec.build(num_classes=10)
        provenance = load_into(net, path, spec)
        same(net.state_dict(), state)
    written, about = import_file(tmp_path / "net", tmp_path / "a.safetensors")
    same(load_file(written), state)
    document = inspect_file(index)
    assert document["sha256"] == about["source"]["sha256"] == provenance.sha256 and document["tensors"] == len(state)
    first = next(tmp_path.glob("net/*-00001-of-*"))
    if not variant:
        with pytest.raises(UserError, match="is one part of several; give the index"):
            open_weights(first)
    if ending == "safetensors":
        save_file({name: state[name] + 1 for name in load_file(first)}, first)
    else:
        torch.save({name: state[name] + 1 for name in torch.load(first)}, first)
    assert inspect_file(index)["sha256"] != document["sha256"]


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..\\secret.safetensors", "C:x", "", "."],
)
def test_no_index_leads_out_of_its_folder(name, state, tmp_path):
    index = shards(tmp_path / "net", state)
    save_file({"pos_embed": state["pos_embed"]}, tmp_path / "secret.safetensors")
    document = json.loads(index.read_text())
    document["weight_map"]["pos_embed"] = name
    index.write_text(json.dumps(document))
    with pytest.raises(UserError, match="not a file in its folder|not there"):
        open_weights(index)


def spoil_missing_part(index, document):
    next(index.parent.glob("*-00002-of-*")).unlink()


def spoil_extra_name(index, document):
    document["weight_map"]["stranger"] = document["weight_map"]["pos_embed"]


def spoil_two_parts(index, document):
    parts = sorted(index.parent.glob("*-of-00002.safetensors"))
    save_file({**load_file(parts[1]), "pos_embed": torch.zeros(1)}, parts[1])


def spoil_map(index, document):
    document["weight_map"] = ["a"]


def spoil_json(index, document):
    document.clear()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_missing_part, "is not there; fetch all parts"),
        (spoil_extra_name, "stranger is not in .* where it should be"),
        (spoil_two_parts, "pos_embed is in .* and in"),
        (spoil_map, "no weight_map"),
        (spoil_json, "no weight_map"),
    ],
)
def test_parts_that_contradict_their_index_are_refused(spoil, message, state, tmp_path):
    index = shards(tmp_path / "net", state)
    document = json.loads(index.read_text())
    spoil(index, document)
    index.write_text(json.dumps(document))
    with pytest.raises(UserError, match=message) as refusal:
        open_weights(tmp_path / "net")
    assert "\n" not in str(refusal.value)


def save(state, path):
    path.parent.mkdir(exist_ok=True, parents=True)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


FOLDERS = {  # files that hold the average, and others that hold the raw weights
    "a variant alone": (["diffusion_pytorch_model.fp16.safetensors"], []),
    "a variant of a pipeline": (["transformer/diffusion_pytorch_model.fp16.safetensors"], []),
    "an older pickle": (["diffusion_pytorch_model.bin"], ["diffusion_pytorch_model.fp16.bin"]),
    "the file without a variant": (["diffusion_pytorch_model.safetensors"], ["diffusion_pytorch_model.non_ema.safetensors"]),
    "diffusers' training script": (
        ["transformer_ema/diffusion_pytorch_model.safetensors"],
        ["transformer/diffusion_pytorch_model.safetensors", "optimizer.bin", "random_states_0.pkl"],
    ),
    "U-ViT's": (["nnet_ema.pth"], ["nnet.pth", "optimizer.pth"]),
    "a repository of one file": (["DiT-XL-2-256x256.pt"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_the_file_of_a_folder_is_found(name, state, average, spec, tmp_path):
    first, others = FOLDERS[name]
    for file in first:
        save(average, tmp_path / "net" / file)
    for file in others:
        save(state, tmp_path / "net" / file)
    net = spec.build(num_classes=10)
    load_into(net, tmp_path / "net", spec)
    same(net.state_dict(), average)
    if others:
        load_into(net, tmp_path / "net", spec, entry=others[0])
        same(net.state_dict(), state)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no weight file .it is empty."),
        (["README.md"], "has no weight file .it has README.md."),
        (["a.pt", "b.pt"], "has several weight files: a.pt, b.pt; name one of them"),
        (
            ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bf16.safetensors"],
            "several variants of its weights: .*bf16.*, .*fp16.*; name one of them",
        ),
    ],
)
def test_what_a_folder_lacks_is_said_truly(files, message, state, tmp_path):
    (tmp_path / "net").mkdir()
    for file in files:
        save(state, tmp_path / "net" / file)
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path / "net")


def test_a_variant_of_an_autoencoder_is_found(tmp_path):
    from harness.autoencoders.files import locate

    (tmp_path / "vae").mkdir()
    config = {"_class_name": "AutoencoderKL", "block_out_channels": [8]}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    save_file({"decoder.conv_in.bias": torch.zeros(1)}, tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    found, file = locate(tmp_path, "--vae")
    assert found == config and file.name == "diffusion_pytorch_model.fp16.safetensors"
