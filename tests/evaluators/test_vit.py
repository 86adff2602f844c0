"""The Vision Transformers: outputs of the public code with the same weights, its file names, its preprocessing.

The expected numbers come from facebookresearch/dinov2 (vision_transformer.py, as torch.hub builds it), transformers
5.23 (Dinov2Model, CLIPVisionModelWithProjection) and open_clip 3.3 (whose image tower has openai/CLIP's names), each
with a width of 32, a depth of 2 and the weights of `filled`, on the images of `pixels`. At full width and depth the
number of parameters is compared with theirs.
"""

import hashlib
import re
import zlib
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.numpy import save_file

from evaluators.features import vit, vit_spec, vit_weights
from harness.errors import RunError, UserError

DINOV2 = replace(vit_spec.SHAPES["dinov2-vit-b-14"], width=32, depth=2, heads=2, grid=5, input_size=42)
CLIP = replace(vit_spec.SHAPES["clip-vit-l-14-336"], width=32, depth=2, heads=2, grid=3, input_size=42, projection=24)

# fmt: off
BLOCK = {  # of both: what a block holds, under the name of each layout, N being its number
    "facebook": {
        "blocks.N.norm1.weight": (32,), "blocks.N.norm1.bias": (32,), "blocks.N.attn.qkv.weight": (96, 32),
        "blocks.N.attn.qkv.bias": (96,), "blocks.N.attn.proj.weight": (32, 32), "blocks.N.attn.proj.bias": (32,),
        "blocks.N.ls1.gamma": (32,), "blocks.N.norm2.weight": (32,), "blocks.N.norm2.bias": (32,),
        "blocks.N.mlp.fc1.weight": (128, 32), "blocks.N.mlp.fc1.bias": (128,), "blocks.N.mlp.fc2.weight": (32, 128),
        "blocks.N.mlp.fc2.bias": (32,), "blocks.N.ls2.gamma": (32,),
    },
    "transformers dinov2": {
        **{f"encoder.layer.N.attention.attention.{part}.weight": (32, 32) for part in ("query", "key", "value")},
        **{f"encoder.layer.N.attention.attention.{part}.bias": (32,) for part in ("query", "key", "value")},
        "encoder.layer.N.attention.output.dense.weight": (32, 32), "encoder.layer.N.attention.output.dense.bias": (32,),
        "encoder.layer.N.layer_scale1.lambda1": (32,), "encoder.layer.N.layer_scale2.lambda1": (32,),
        "encoder.layer.N.mlp.fc1.bias": (128,), "encoder.layer.N.mlp.fc1.weight": (128, 32),
        "encoder.layer.N.mlp.fc2.bias": (32,), "encoder.layer.N.mlp.fc2.weight": (32, 128),
        "encoder.layer.N.norm1.bias": (32,), "encoder.layer.N.norm1.weight": (32,),
        "encoder.layer.N.norm2.bias": (32,), "encoder.layer.N.norm2.weight": (32,),
    },
    "transformers clip": {
        **{f"vision_model.encoder.layers.N.self_attn.{part}.weight": (32, 32) for part in ("k_proj", "v_proj", "q_proj", "out_proj")},
        **{f"vision_model.encoder.layers.N.self_attn.{part}.bias": (32,) for part in ("k_proj", "v_proj", "q_proj", "out_proj")},
        "vision_model.encoder.layers.N.layer_norm1.weight": (32,), "vision_model.encoder.layers.N.layer_norm1.bias": (32,),
        "vision_model.encoder.layers.N.mlp.fc1.weight": (128, 32), "vision_model.encoder.layers.N.mlp.fc1.bias": (128,),
        "vision_model.encoder.layers.N.mlp.fc2.weight": (32, 128), "vision_model.encoder.layers.N.mlp.fc2.bias": (32,),
        "vision_model.encoder.layers.N.layer_norm2.weight": (32,), "vision_model.encoder.layers.N.layer_norm2.bias": (32,),
    },
    "openai clip": {
        "visual.transformer.resblocks.N.ln_1.weight": (32,), "visual.transformer.resblocks.N.ln_1.bias": (32,),
        "visual.transformer.resblocks.N.attn.in_proj_weight": (96, 32), "visual.transformer.resblocks.N.attn.in_proj_bias": (96,),
        "visual.transformer.resblocks.N.attn.out_proj.weight": (32, 32), "visual.transformer.resblocks.N.attn.out_proj.bias": (32,),
        "visual.transformer.resblocks.N.ln_2.weight": (32,), "visual.transformer.resblocks.N.ln_2.bias": (32,),
        "visual.transformer.resblocks.N.mlp.c_fc.weight": (128, 32), "visual.transformer.resblocks.N.mlp.c_fc.bias": (128,),
        "visual.transformer.resblocks.N.mlp.c_proj.weight": (32, 128), "visual.transformer.resblocks.N.mlp.c_proj.bias": (32,),
    },
}
REST = {
    "facebook": {
        "cls_token": (1, 1, 32), "pos_embed": (1, 26, 32), "mask_token": (1, 32),
        "patch_embed.proj.weight": (32, 3, 14, 14), "patch_embed.proj.bias": (32,), "norm.weight": (32,), "norm.bias": (32,),
    },
    "transformers dinov2": {
        "embeddings.cls_token": (1, 1, 32), "embeddings.mask_token": (1, 32), "embeddings.position_embeddings": (1, 26, 32),
        "embeddings.patch_embeddings.projection.bias": (32,), "embeddings.patch_embeddings.projection.weight": (32, 3, 14, 14),
        "layernorm.bias": (32,), "layernorm.weight": (32,),
    },
    "transformers clip": {
        "vision_model.embeddings.class_embedding": (32,), "vision_model.embeddings.patch_embedding.weight": (32, 3, 14, 14),
        "vision_model.embeddings.position_embedding.weight": (10, 32),
        "vision_model.pre_layrnorm.weight": (32,), "vision_model.pre_layrnorm.bias": (32,),
        "vision_model.post_layernorm.weight": (32,), "vision_model.post_layernorm.bias": (32,),
        "visual_projection.weight": (24, 32),
    },
    "openai clip": {
        "visual.class_embedding": (32,), "visual.positional_embedding": (10, 32), "visual.proj": (32, 24),
        "visual.conv1.weight": (32, 3, 14, 14), "visual.ln_pre.weight": (32,), "visual.ln_pre.bias": (32,),
        "visual.ln_post.weight": (32,), "visual.ln_post.bias": (32,),
    },
}
GOLDEN = {  # layout, side: the first five features of both images, and the sum of all magnitudes
    ("facebook", 42): ([[1.8505205, 0.1159357, -0.8610728, 0.5717252, 0.1286386],
                        [2.0326209, -0.1321017, -1.2061641, 0.7162650, 0.0622067]], 47.04811577685177),
    ("facebook", 70): ([[1.6473718, -0.3413775, -1.2048109, 0.8869529, -0.8558584],
                        [1.6505383, -1.2043135, -1.4464000, 0.5450254, 0.1042693]], 49.71231360826641),
    ("transformers dinov2", 70): ([[-0.0524637, 0.0926930, -0.2131962, 0.0860740, 1.1002419],
                                   [0.2135853, 0.4629883, 0.1852534, 0.0097248, 0.9549575]], 47.9141701698245),
    ("transformers clip", 42): ([[0.0621316, 0.2060049, -0.0786943, 0.4635818, 0.0580733],
                                 [-0.0780167, 0.2539661, 0.0188628, 0.2239248, 0.0671496]], 7.9223699235590175),
    ("openai clip", 42): ([[0.2232189, -0.3153498, -0.1371536, -0.0607730, -0.0387448],
                           [0.3207428, -0.3300459, -0.1636349, -0.0504561, -0.0598367]], 8.006103654392064),
}
# fmt: on


def filled(layout):
    """A state dict in that layout, every tensor a function of its name."""
    shapes = dict(REST[layout])
    for n in range(2):
        shapes |= {name.replace(".N.", f".{n}."): shape for name, shape in BLOCK[layout].items()}
    state = {}
    for name, shape in shapes.items():
        value = 0.2 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if len(shape) == 1 and not name.endswith("bias") and "class_embedding" not in name:
            value = value + 1.0  # what multiplies
        state[name] = value.astype(np.float32)
    return state


def pixels(side):
    return torch.from_numpy(np.random.RandomState(side).standard_normal((2, 3, side, side)).astype(np.float32))


def extractor(layout, path, shape=None, **changes):
    shape = shape or (CLIP if "clip" in layout else DINOV2)
    spec = replace(vit_spec.CLIP_VIT_L_14_336 if "clip" in layout else vit_spec.DINOV2_VIT_B_14, dim=shape.dim)
    save_file({**filled(layout), **changes}, path)
    return vit.VitFeatures(spec, shape, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    return {layout: extractor(layout, folder / f"{layout}.safetensors") for layout in REST}


@pytest.mark.parametrize(("layout", "side"), GOLDEN)
def test_network_equals_the_public_code(files, layout, side):
    first, magnitude = GOLDEN[layout, side]
    with torch.inference_mode():
        features = files[layout].net(pixels(side))
    np.testing.assert_allclose(features[:, :5].numpy(), first, atol=1e-5)
    assert float(features.double().abs().sum()) == pytest.approx(magnitude, rel=1e-6)


def test_positions_are_facebooks_bicubic_with_its_offset(files):
    """By hand: the cubic kernel with a = -0.75, at (i + 0.5) * 5 / 3.1 - 0.5, edges repeated."""

    def kernel(t):
        t = abs(t)
        if t < 1:
            return 1.25 * t**3 - 2.25 * t**2 + 1
        return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    matrix = np.zeros((3, 5))
    for i in range(3):
        at = (i + 0.5) * 5 / 3.1 - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            matrix[i, min(max(j, 0), 4)] += kernel(at - j)
    table = filled("facebook")["pos_embed"][0]
    grid = np.einsum("ij,kl,jld->ikd", matrix, matrix, table[1:].reshape(5, 5, 32)).reshape(9, 32)
    with torch.inference_mode():
        found = files["facebook"].net.positions(3)[0].numpy()
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], grid, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [("dinov2-vit-b-14", 86580480, 175), ("dinov2-vit-l-14", 304368640, 343), ("clip-vit-l-14-336", 304293888, 296)],
)
def test_full_size_has_the_public_number_of_parameters(name, parameters, tensors):
    shape = vit_spec.SHAPES[name]
    with torch.device("meta"):
        net = vit.VisionTransformer(shape)
        features = net(torch.empty(1, 3, shape.input_size, shape.input_size))
    mask_token = 0 if shape.projection else shape.width  # in DINOv2's files, for its training
    assert sum(each.numel() for each in net.parameters()) + mask_token == parameters
    assert len(net.state_dict()) + bool(mask_token) == tensors
    assert features.shape == (1, vit_spec.SPECS[name].dim)
    assert len(net.blocks) == {"b": 12}.get(name[11], 24)


# --- preprocessing


def by_pillow_in_float(image, size):
    """Pillow's own antialiased bicubic on float images, which does not round."""
    channels = [
        Image.fromarray(image[..., c].astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        for c in range(image.shape[2])
    ]
    return np.stack([np.asarray(each) for each in channels])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 96), (300, 260)])
def test_dinov2_preprocessing(height, width):
    images = np.random.RandomState(0).randint(0, 256, (2, height, width, 3)).astype(np.uint8)
    shape = vit_spec.SHAPES["dinov2-vit-l-14"]
    x = vit.preprocess(images, shape).numpy()
    assert x.shape == (2, 3, 224, 224) and x.dtype == np.float32
    mean, std = np.reshape([0.485, 0.456, 0.406], (3, 1, 1)), np.reshape([0.229, 0.224, 0.225], (3, 1, 1))
    for image, found in zip(images, x, strict=True):
        np.testing.assert_allclose(found, (by_pillow_in_float(image, 224) / 255 - mean) / std, atol=2e-4)


def test_clip_preprocessing_takes_the_square_in_the_middle_and_rounds():
    images = np.random.RandomState(0).randint(0, 256, (2, 50, 71, 3)).astype(np.uint8)
    x = vit.preprocess(images, vit_spec.SHAPES["clip-vit-l-14-336"]).numpy()
    assert x.shape == (2, 3, 336, 336)
    mean = np.reshape([0.48145466, 0.4578275, 0.40821073], (3, 1, 1))
    std = np.reshape([0.26862954, 0.26130258, 0.27577711], (3, 1, 1))
    levels = (x * std + mean) * 255
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-3)
    # google-research's cmmd/io_util.py: left = (w - l) // 2
    square = Image.fromarray(images[1]).crop((10, 0, 60, 50)).resize((336, 336), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(levels[1].transpose(1, 2, 0), np.asarray(square), atol=1e-3)


@pytest.mark.parametrize("layout", ["facebook", "transformers clip"])
def test_images_to_features(files, layout):
    images = np.random.RandomState(0).randint(0, 256, (11, 20, 20, 1)).astype(np.uint8)
    features = files[layout](images).pooled
    assert features.shape == (11, files[layout].dim) and features.dtype == np.float32
    np.testing.assert_allclose(files[layout](images.repeat(3, axis=3)).pooled, features, atol=1e-5)
    np.testing.assert_allclose(files[layout](images[::-1]).pooled[::-1], features, atol=1e-5)
    if "clip" in layout:
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-6)
    with pytest.raises(UserError, match="uint8 images"):
        files[layout](images / 255)


def test_features_that_are_not_finite_fail(tmp_path):
    bad = extractor("facebook", tmp_path / "w.safetensors", **{"norm.bias": np.full(32, np.nan, np.float32)})
    with pytest.raises(RunError, match="not finite"):
        bad(np.zeros((1, 42, 42, 3), np.uint8))


# --- files


def test_hash_and_description_know_the_weights(files, tmp_path):
    again = extractor("facebook", tmp_path / "w.safetensors")
    assert again.sha256 == files["facebook"].sha256
    other = extractor("facebook", tmp_path / "x.safetensors", **{"norm.bias": np.zeros(32, np.float32)})
    assert other.sha256 != again.sha256
    assert re.search(r"bicubic.*facebookresearch/dinov2 w\.safetensors, sha256 [0-9a-f]{12}$", again.description)


def test_a_torch_file_a_classifier_and_half_precision_are_read(files, tmp_path):
    state = {name: torch.from_numpy(value) for name, value in filled("facebook").items()}
    torch.save(state, tmp_path / "w.pth")
    read = vit_weights.read_state(tmp_path / "w.pth", files["facebook"].net.state_dict(), "x")
    assert all(torch.equal(read.state[name], state[name]) for name in read.state) and "mask_token" not in read.state
    whole = {f"dinov2.{name}": value for name, value in filled("transformers dinov2").items()}
    save_file({**whole, "classifier.weight": np.zeros((2, 64), np.float32)}, tmp_path / "c.safetensors")
    layer = vit_weights.read_state(tmp_path / "c.safetensors", files["facebook"].net.state_dict(), "x")
    np.testing.assert_array_equal(layer.state["norm.weight"], filled("transformers dinov2")["layernorm.weight"])
    save_file(
        {name: value.astype(np.float16) for name, value in filled("openai clip").items()}, tmp_path / "h.safetensors"
    )
    half = vit_weights.read_state(tmp_path / "h.safetensors", files["openai clip"].net.state_dict(), "x").state
    assert all(each.dtype == torch.float32 for each in half.values())
    np.testing.assert_allclose(half["proj.weight"], filled("openai clip")["visual.proj"].T, atol=1e-3)


def test_clips_text_tower_is_left_alone(files, tmp_path):
    extra = {"text_model.final_layer_norm.bias": np.zeros(4, np.float32), "logit_scale": np.zeros(1, np.float32)}
    again = extractor("transformers clip", tmp_path / "w.safetensors", **extra)
    with torch.inference_mode():
        torch.testing.assert_close(again.net(pixels(42)), files["transformers clip"].net(pixels(42)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("facebook", {"blocks.2.norm1.weight": np.ones(32, np.float32)}, r"blocks\.2\.norm1\.weight is unexpected"),
        ("facebook", {"norm.bias": np.ones(31, np.float32)}, r"norm\.bias is \(31,\), the network's is \(32,\)"),
        ("openai clip", {"visual.proj": np.ones((24, 32), np.float32)}, r"visual\.proj is \(24, 32\)"),
        ("transformers clip", {"vision_model.embeddings.class_embedding": np.ones(30, np.float32)}, "class_embedding"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, layout, change, message):
    with pytest.raises(UserError, match=message):
        extractor(layout, tmp_path / "w.safetensors", **change)


def test_weights_of_the_other_network_are_refused(tmp_path):
    save_file(filled("transformers clip"), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"does not hold the weights of dinov2-vit-b-14"):
        vit.VitFeatures(vit_spec.DINOV2_VIT_B_14, DINOV2, tmp_path / "w.safetensors")


def test_weights_are_found_where_torch_hub_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UserError, match=r"--features-weights FILE or --features-weights facebook/dinov2-base.*dinov2_vitb14_pretrain"
    ):
        vit_spec.DINOV2_VIT_B_14.load()
    with pytest.raises(UserError, match="openai/clip-vit-large-patch14-336"):
        vit_spec.CLIP_VIT_L_14_336.load()
    (tmp_path / "checkpoints").mkdir()
    save_file(filled("facebook"), tmp_path / "checkpoints" / "dinov2_vitb14_pretrain.pth")
    found = vit.VitFeatures(replace(vit_spec.DINOV2_VIT_B_14, dim=32), DINOV2, None)
    assert found.description.split("; ")[-1].startswith("facebookresearch/dinov2 dinov2_vitb14_pretrain.pth")


def test_a_hub_name_is_looked_up_in_the_cache_first(tmp_path, monkeypatch):
    asked = []

    def cached(repository, file, local_files_only):
        asked.append((repository, file, local_files_only))
        if file == "model.safetensors" or local_files_only:
            raise LocalEntryNotFoundError("no such file and no connection")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    shape = vit_spec.SHAPES["dinov2-vit-l-14"]
    assert vit_weights.find_weights("x", shape, "facebook/dinov2-large") == tmp_path / "pytorch_model.bin"
    assert [each[1:] for each in asked] == [
        ("model.safetensors", True),
        ("pytorch_model.bin", True),
        ("model.safetensors", False),
        ("pytorch_model.bin", False),
    ]
    assert vit_weights.find_weights("x", shape, tmp_path) == tmp_path  # a folder that is there is never a hub name
    asked.clear()
    for mistyped in ("weights/dino.pth", "weights/model.safetensors", "/no/such/file"):
        with pytest.raises(UserError, match=mistyped):
            vit.load(vit_spec.DINOV2_VIT_L_14, "cpu", Path(mistyped))
    assert not asked

    def broken(*args, **options):
        raise OSError("the disk is full\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(
        UserError, match=r"was not fetched from the hub \(the disk is full\); name --features-weights FILE"
    ):
        vit_weights.find_weights("x", shape, "facebook/dinov2-large")


# --- entries of checkpoints


def torch_state(layout, factor=1.0):
    return {name: torch.from_numpy(value * np.float32(factor)) for name, value in filled(layout).items()}


@pytest.mark.parametrize("layout", REST)
def test_of_two_networks_in_a_file_the_entry_is_named(layout, files, tmp_path):
    path, expected = tmp_path / "two.pt", files[layout].net.state_dict()
    torch.save({"student": torch_state(layout), "teacher": torch_state(layout, 0.5)}, path)
    with pytest.raises(UserError, match=r"several entries .*: student, teacher; choose one with --entry NAME"):
        vit_weights.read_state(path, expected, "x")
    with pytest.raises(UserError, match="has no entry 'stranger'; it has student, teacher"):
        vit_weights.read_state(path, expected, "x", "stranger")
    student, teacher = (vit_weights.read_state(path, expected, "x", entry) for entry in ("student", "teacher"))
    for name, tensor in teacher.state.items():
        torch.testing.assert_close(tensor, student.state[name] * 0.5, rtol=0, atol=0)
    assert student.sha256 != teacher.sha256, "the cache of features and records tell networks apart by the hash"


@pytest.mark.parametrize("layout", REST)
def test_a_network_is_found_beside_others_and_under_prefixes(layout, files, tmp_path):
    expected, state, path = files[layout].net.state_dict(), torch_state(layout), tmp_path / "w.pt"
    head = {f"head.{n}.weight": torch.zeros(3, 3) for n in range(300)}  # more tensors than the network has
    for content in (
        {"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()} | head, "step": 3},
        {f"module.model.{name}": tensor for name, tensor in state.items()},
        {"model": state, "dino_head": head},
    ):
        torch.save(content, path)
        read = vit_weights.read_state(path, expected, "x")
        assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest(), (
            "the entry that is read without asking has the file's hash"
        )
        for name, tensor in files[layout].net.state_dict().items():
            torch.testing.assert_close(read.state[name], tensor, rtol=0, atol=0)


def test_specs_fit_their_shapes():
    for name, spec in vit_spec.SPECS.items():
        shape = vit_spec.SHAPES[name]
        assert (spec.name, spec.dim, spec.input_size) == (name, shape.dim, shape.input_size)
        assert spec.classes is None and spec.weights_option == "--features-weights"
        assert shape.eps == (1e-5 if shape.projection else 1e-6)  # too small a difference for the parity tests
        assert shape.input_size % shape.patch == 0 and shape.width % shape.heads == 0
