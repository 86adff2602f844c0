"""The Inception network of ADM's evaluator: the torch network against the same weights run apart from it, its files,
and what is refused. Against TensorFlow: the slow tests.
"""

import gzip
import subprocess
import sys
from collections import Counter

import inception_graph_maker as maker
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.features import EFFICIENTNET_LITE0_96, INCEPTION_2015, INCEPTION_2015_TF, inception_graph, inception_v3
from evaluators.features.graphdef import Malformed, map_file, read_graph
from evaluators.features.inception_graph import extract_in_batches, read_weights
from evaluators.features.inception_layers import convolutions
from evaluators.features.inception_self_test import largest_difference
from evaluators.features.inception_structure import check_structure
from evaluators.features.tf1_resize import resize_numpy
from harness.errors import RunError, UserError

SIZES = (32, 64, 256, 299, 512)
STAGES = ("pooled", "spatial", "logits")


@pytest.fixture(scope="module")
def extractor(made_inception):
    return INCEPTION_2015.load(weights=made_inception.graph)


def error(ours, theirs):
    """Largest difference over the root mean square."""
    theirs = theirs.astype(np.float64)
    return np.abs(ours - theirs).max() / np.sqrt((theirs**2).mean())


def normalised(images):
    return torch.from_numpy((resize_numpy(images) - 128) / 128).permute(0, 3, 1, 2)


# The network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_network_equals_the_unfolded_one_spelled_out_apart(size, extractor, made_inception):
    images = maker.pictures(1, size, seed=size)
    features = extractor(images)
    expected = maker.Runner(made_inception.writer.weights).features(normalised(images))
    for stage in STAGES:
        assert error(getattr(features, stage), expected[stage]) < inception_v3.TOLERANCES[stage], stage


def test_shapes_dtypes_order_and_independence_of_the_batch(extractor, made_inception):
    images = maker.pictures(4, 64, seed=5)
    features = extractor(images)
    widths = {"pooled": 2048, "spatial": 2023, "logits": 1008}
    for stage, width in widths.items():
        array = getattr(features, stage)
        assert array.shape == (4, width) and array.dtype == np.float32
    single = inception_v3.InceptionFeatures(INCEPTION_2015, read_weights(made_inception.graph), batch_size=1)
    turned = single(images[::-1])
    for stage in STAGES:
        assert error(getattr(turned, stage)[::-1], getattr(features, stage)) < inception_v3.TOLERANCES[stage]
    assert features.spatial.std() > 0.1 and features.pooled.std(axis=0).mean() > 0.01


def test_grey_and_its_rgb_copy_are_the_same(extractor):
    grey = maker.pictures(1, 32, seed=6)[..., :1]
    np.testing.assert_array_equal(extractor(grey).pooled, extractor(np.repeat(grey, 3, axis=3)).pooled)


def test_the_products_stay_in_float32_whatever_surrounds_them(extractor):
    images = maker.pictures(1, 32, seed=7)
    plain = extractor(images).logits
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            np.testing.assert_array_equal(extractor(images).logits, plain)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_preprocessing_is_exact():
    images = maker.pictures(1, 48)
    np.testing.assert_array_equal(inception_v3.preprocess(torch.from_numpy(images)).numpy(), normalised(images).numpy())


@pytest.mark.parametrize("bad", [np.zeros((2, 8, 8, 1), np.float32), np.zeros((2, 8, 8), np.uint8)])
def test_wrong_images_are_refused(extractor, bad):
    with pytest.raises(UserError, match="uint8 images"):
        extractor(bad)


def test_features_that_are_not_finite_name_their_image():
    def forward(batch):
        arrays = [np.zeros((len(batch), width), np.float32) for width in (2048, 2023, 1008)]
        arrays[1][batch[:, 0, 0, 0] == 7, 5] = np.nan
        return arrays

    images = np.zeros((5, 2, 2, 3), np.uint8)
    assert extract_in_batches("f", images, 2, forward).spatial.shape == (5, 2023)
    images[3] = 7
    with pytest.raises(RunError, match="image 3 are not finite"):
        extract_in_batches("f", images, 2, forward)


# The files ------------------------------------------------------------------------------------------------------------


def test_graph_and_port_hold_the_same_weights(made_inception):
    graph, port = read_weights(made_inception.graph), read_weights(made_inception.port)
    theirs = made_inception.writer.weights
    names = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "variance": "moving_variance"}
    assert len(graph.layers) == 94
    for read in (graph, port):
        for scope, layer in read.layers.items():
            np.testing.assert_array_equal(layer.kernel, theirs[f"{scope}/conv2d_params"])
            for mine, name in names.items():
                np.testing.assert_array_equal(getattr(layer, mine), theirs[f"{scope}/batchnorm/{name}"])
        np.testing.assert_array_equal(read.classifier, theirs["softmax/weights"])
    assert graph.sha256 == port.sha256 and len(graph.sha256) == 64
    assert (graph.is_graph, port.is_graph) == (True, False)
    assert not graph.known and "unknown weights" in graph.found and "compare with no published" in port.found


def test_a_port_is_read_from_the_entry_of_a_checkpoint(made_inception, tmp_path):
    port = torch.load(made_inception.port)
    other = {**port, "fc.weight": port["fc.weight"] * 2}
    whole = read_weights(made_inception.port)
    path = tmp_path / "port.pth"
    for content in ({"model": other, "ema": {"module": port}}, {f"module.{name}": each for name, each in port.items()}):
        torch.save(content, path)
        assert read_weights(path).sha256 == whole.sha256
    torch.save({"one": port, "two": other}, path)
    with pytest.raises(UserError, match=r"several entries .*: one, two; choose one with --entry NAME"):
        read_weights(path)
    assert read_weights(path, "one").sha256 == whole.sha256 != read_weights(path, "two").sha256
    with pytest.raises(UserError, match="a frozen graph has no entries: leave out --entry 'one'"):
        read_weights(made_inception.graph, "one")


def test_values_of_the_map_are_not_copied(made_inception):
    layer = read_weights(made_inception.graph).layers["mixed_10/tower_1/conv_1"]
    assert not layer.kernel.flags.owndata and not layer.kernel.flags.writeable


def test_the_hash_follows_every_weight(made_inception, tmp_path):
    data = bytearray(made_inception.graph.read_bytes())
    at = data.index(made_inception.writer.weights["mixed_9/conv/batchnorm/beta"].tobytes())
    data[at] ^= 1
    (tmp_path / "other.pb").write_bytes(data)
    assert read_weights(tmp_path / "other.pb").sha256 != read_weights(made_inception.graph).sha256


def test_the_public_files_are_known_by_size_and_hash(made_inception, monkeypatch):
    import hashlib

    data = made_inception.graph.read_bytes()
    monkeypatch.setattr(inception_graph, "GRAPH_SIZE", len(data))
    assert not read_weights(made_inception.graph).known
    monkeypatch.setattr(inception_graph, "GRAPH_MD5", hashlib.md5(data).hexdigest())
    monkeypatch.setattr(inception_graph, "PORT_SHA256", hashlib.sha256(made_inception.port.read_bytes()).hexdigest())
    for path, name in ((made_inception.graph, "classify_image"), (made_inception.port, "pt_inception")):
        weights = read_weights(path)
        assert weights.known and weights.found.startswith(name)


def test_published_identities():
    assert (inception_graph.GRAPH_SIZE, inception_graph.GRAPH_MD5) == (95673916, "e6bb154e85f5d4331c22abcddb5dcf31")
    assert inception_graph.PORT_SHA256.startswith("6726825d")  # as its name says
    # 23,885,392 float32 values fill all but 0.2 % of the public file
    values = sum(np.prod(conv.kernel) * conv.width_in * conv.width + 4 * conv.width for conv in convolutions())
    values += 2048 * 1008 + 1008
    assert 0 < inception_graph.GRAPH_SIZE - 4 * values < 0.002 * inception_graph.GRAPH_SIZE


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize(
    "array", [np.arange(6, dtype=np.float32).reshape(2, 3) / 7, np.array([-1, 2048], np.int32), np.array(3, np.int32)]
)
def test_constants_in_both_forms(array, typed):
    data = memoryview(maker.constant("c", array, typed))
    read = read_graph(data)["c"].array()
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype and read.shape == array.shape


def test_one_value_may_fill_a_constant():
    shape = maker.field(2, maker.field(2, maker.field(1, 4)))
    tensor = maker.field(1, maker.FLOAT) + shape + maker.field(5, np.float32(2.5).tobytes())
    data = maker.node("c", "Const", value=maker.field(8, tensor))
    np.testing.assert_array_equal(read_graph(memoryview(data))["c"].array(), np.full(4, 2.5, np.float32))


# Graphs that are another network --------------------------------------------------------------------------------------

_WINDOW = {
    "ksize": maker.integers((1, 3, 3, 1)),
    "strides": maker.integers((1, 1, 1, 1)),
    "padding": maker.word("SAME"),
}
_NORM = [f"conv_2/{each}" for each in ("Conv2D", *(f"batchnorm/{c}" for c in ("moving_mean", "moving_variance", "beta", "gamma")))]  # fmt: skip
_JOIN = ["mixed_5/join/concat_dim", "mixed_5/tower/conv_2", "mixed_5/conv", "mixed_5/tower_1/conv_4", "mixed_5/tower_2/conv"]  # fmt: skip
_SIX = ["conv", "tower/mixed/conv", "tower/mixed/conv_1", "tower_1/mixed/conv", "tower_1/mixed/conv_1", "tower_2/conv"]


def _join_of_six(*order):
    inputs = ("mixed_9/join/concat_dim", *(f"mixed_9/{_SIX[i]}" for i in order))
    return maker.node("mixed_9/join", "Concat", inputs)


CHANGED = {
    "average in the last block": maker.node("mixed_10/tower_2/pool", "AvgPool", ["mixed_9/join"], **_WINDOW),
    "maximum in the block before": maker.node("mixed_9/tower_2/pool", "MaxPool", ["mixed_8/join"], **_WINDOW),
    "epsilon": maker.node("conv_2/batchnorm", "BatchNormWithGlobalNormalization", _NORM, variance_epsilon=maker.real(1e-5), scale_after_normalization=maker.flag(True)),
    "another resize": maker.node("ResizeBilinear", "ResizeBilinear", ["ExpandDims", "ResizeBilinear/size"], half_pixel_centers=maker.flag(True)),
    "another size": maker.constant("ResizeBilinear/size", np.array([224, 224], np.int32)),
    "another shift": maker.constant("Sub/y", np.array(127.5, np.float32)),
    "branches swapped": maker.node("mixed_5/join", "Concat", _JOIN),
    "the two ends of a fork swapped": _join_of_six(0, 2, 1, 3, 4, 5),
    "forks swapped": _join_of_six(0, 3, 4, 1, 2, 5),
    "a branch of six missing": _join_of_six(0, 1, 2, 3, 4),
    "a join that holds itself": maker.node("mixed_9/join", "Concat", ["mixed_9/join/concat_dim", "mixed_9/join", "mixed_9/conv"]),
    "channels first": maker.constant("mixed_5/join/concat_dim", np.array(1, np.int32)),
    "stride": maker.node("conv_1/Conv2D", "Conv2D", ["conv", "conv_1/conv2d_params"], strides=maker.integers((1, 2, 2, 1)), padding=maker.word("VALID")),
    "padding": maker.node("conv_1/Conv2D", "Conv2D", ["conv", "conv_1/conv2d_params"], strides=maker.integers((1, 1, 1, 1)), padding=maker.word("SAME")),
    "no rectifier": maker.node("conv_1", "Relu6", ["conv_1/control_dependency"]),
    "a block left out": maker.node("mixed_7/join", "Identity", ["mixed_6/join"]),
    "another tap": maker.node("mixed_6/conv", "Identity", ["mixed_7/conv"]),
    "another classifier": maker.node("softmax/logits/MatMul", "MatMul", ["pool_3/_reshape", "softmax/biases"]),
    "a circle": maker.node("conv", "Identity", ["conv"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def nodes(made_inception):
    return read_graph(map_file(made_inception.graph))


def test_the_made_graph_has_what_is_published_of_the_public_one(nodes):
    assert dict(Counter(node.op for node in nodes.values())) == maker.SUMMARY
    constants = [node for node in nodes.values() if node.op == "Const"]
    texts = [node for node in constants if node.name == "DecodeJpeg/contents"]  # one text, the only one
    assert sum(node.array().size for node in constants if node not in texts) + len(texts) == maker.PARAMETERS
    inputs = [name for node in nodes.values() for name in node.inputs]
    assert sum(name.startswith("^") for name in inputs) == maker.CONTROL_INPUTS
    assert tuple(nodes)[:50] == maker.FIRST_NODES
    names = [node.name for node in constants]
    between = names[names.index("mixed_9/join/concat_dim") + 1 : names.index("mixed_10/join/concat_dim")]
    assert len(between) == 45 and not any("concat_dim" in name for name in between)
    assert nodes["mixed_10/join"].inputs == ["mixed_10/join/concat_dim", *(f"mixed_10/{each}" for each in _SIX)]


def test_the_public_structure_passes(nodes):
    check_structure(nodes)


@pytest.mark.parametrize("scopes", [("mixed_9",), ("mixed_10",), ("mixed_9", "mixed_10")])
def test_joins_of_joins_pass(scopes, nodes):
    joins = b"".join(maker.nested(scope) for scope in scopes)
    check_structure(nodes | read_graph(memoryview(joins)))


@pytest.mark.parametrize("what", CHANGED)
def test_another_structure_under_the_same_constants_is_refused(what, nodes):
    with pytest.raises(Malformed):
        check_structure(nodes | read_graph(memoryview(CHANGED[what])))


# These compute the same features in another way: which of them the public graph has, no listing says.
SAME_FEATURES = {
    "products the other way round": maker.node("Mul", "Mul", ["Mul/y", "Sub"]),
    "a pool without its check": maker.node("pool", "MaxPool", ["conv_2"], ksize=maker.integers((1, 3, 3, 1)), strides=maker.integers((1, 2, 2, 1)), padding=maker.word("VALID")),
    "weights through identities": maker.node("a", "Identity", ["softmax/weights"]) + maker.node("softmax/logits/MatMul", "MatMul", ["pool_3/_reshape", "a"]),
    "a padding where a window of 8 needs none": maker.node("pool_3", "AvgPool", ["mixed_10/join"], ksize=maker.integers((1, 8, 8, 1)), strides=maker.integers((1, 8, 8, 1)), padding=maker.word("SAME")),
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(made_inception):
    return read_weights(made_inception.graph)


def checked(nodes, weights):
    inception_graph._check_network(weights.path, nodes, weights.layers, weights.classifier)


@pytest.mark.parametrize("what", SAME_FEATURES)
def test_another_structure_with_the_same_features_is_accepted(what, nodes, weights, caplog):
    changed = nodes | read_graph(memoryview(SAME_FEATURES[what]))
    checked(changed, weights)
    assert largest_difference(changed, weights.layers, weights.classifier) < 1e-9
    is_other = what in ("products the other way round", "a padding where a window of 8 needs none")
    assert ("its structure is not that of classify_image_graph_def.pb" in caplog.text) == is_other


@pytest.mark.parametrize(
    "what", ["average in the last block", "epsilon", "another resize", "forks swapped", "a circle"]
)
def test_another_structure_with_other_features_is_refused(what, nodes, weights, caplog):
    with pytest.raises(Malformed, match="features of a test picture differ by|depends on itself"):
        checked(nodes | read_graph(memoryview(CHANGED[what])), weights)
    assert not caplog.text


def test_an_operation_that_the_public_graph_does_not_have_is_refused(nodes, weights):
    with pytest.raises(Malformed, match="conv_1 is Relu6, which is no operation of this network"):
        checked(nodes | read_graph(memoryview(CHANGED["no rectifier"])), weights)


def test_another_network_is_refused_in_one_line(made_inception, tmp_path):
    changed = made_inception.graph.read_bytes().replace(b"mixed_10/tower_2/pool", b"mixed_10/tower_2/poul")
    (tmp_path / "other.pb").write_bytes(changed)
    read_weights(tmp_path / "other.pb")  # another name of a node changes nothing
    changed = made_inception.graph.read_bytes().replace(b"MaxPool", b"AvgPool")
    (tmp_path / "other.pb").write_bytes(changed)
    with pytest.raises(UserError, match=r"other.pb is not the frozen graph of Inception-v3: .*md5 e6bb154e"):
        read_weights(tmp_path / "other.pb")


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [INCEPTION_2015, INCEPTION_2015_TF])
def test_without_a_file_the_refusal_says_where_to_get_it(spec):
    with pytest.raises(UserError, match=r"--inception FILE.*95,673,916 bytes, md5 e6bb154e.*https://openaipublic"):
        spec.load()


def test_extractors_with_weights_of_their_own_take_no_file(tmp_path):
    with pytest.raises(UserError, match="take no weight file"):
        EFFICIENTNET_LITE0_96.load(weights=tmp_path)


def test_tensorflow_runs_no_torch_port(made_inception):
    with pytest.raises(UserError, match="is a torch port"):
        INCEPTION_2015_TF.load(weights=made_inception.port)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "web page"),
        (gzip.compress(b"x", mtime=0), "tar -xzf"),
        (b"\x00" * 64, "not the frozen graph"),
        (b"PK\x03\x04 and no more", "damaged or cut short"),
        (maker.node("a", "NoOp"), "node conv/conv2d_params is missing"),
    ],
)
def test_files_that_are_something_else(content, says, tmp_path):
    (tmp_path / "f.pb").write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_weights(tmp_path / "f.pb")
    assert "\n" not in str(caught.value)


def test_missing_cut_short_damaged_and_folders(made_inception, tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_weights(tmp_path / "none.pb")
    with pytest.raises(UserError, match="directory"):
        read_weights(tmp_path)
    data = made_inception.graph.read_bytes()
    (tmp_path / "cut.pb").write_bytes(data[:-1000])
    with pytest.raises(UserError, match="cut short"):
        read_weights(tmp_path / "cut.pb")
    at = data.index(made_inception.writer.weights["conv/conv2d_params"].tobytes())
    (tmp_path / "nan.pb").write_bytes(data[:at] + np.float32(np.nan).tobytes() + data[at + 4 :])
    with pytest.raises(UserError, match="conv/conv2d_params is not finite"):
        read_weights(tmp_path / "nan.pb")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not a torch port"):
        read_weights(tmp_path / "other.pth")


SMALL = b"".join((maker.constant("c", np.arange(4, dtype=np.float32)), maker.constant("i", np.array([1, 2], np.int32), True), CHANGED["epsilon"]))  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_broken_graphs_are_malformed_and_nothing_else(data):
    raw = bytearray(SMALL)
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=6)):
        raw[at] = byte
    cut = data.draw(st.integers(0, len(raw)))
    try:
        for node in read_graph(memoryview(bytes(raw[:cut]))).values():
            node.integers("strides"), node.text("padding"), node.real("variance_epsilon"), node.flag("x")
            if node.op == "Const":
                assert node.array().nbytes < 1 << 30
    except Malformed:
        pass


def test_reading_weights_loads_no_framework():
    code = (
        "import sys, evaluators.features.inception_graph, evaluators.features.inception_tf;"
        "print([m for m in ('torch', 'tensorflow', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tensorflow_that_is_missing_is_a_refusal_with_the_remedy(made_inception, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UserError, match="pip install tensorflow-cpu"):
        INCEPTION_2015_TF.load(weights=made_inception.graph)


# Against TensorFlow ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_torch_equals_tensorflow_stage_by_stage(extractor, made_inception):
    pytest.importorskip("tensorflow")
    images = np.concatenate([maker.pictures(60, 256, seed=9), np.stack([np.full((256, 256, 3), v, np.uint8) for v in (0, 255)]),
                             np.random.default_rng(3).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)])  # fmt: skip
    tensorflow = INCEPTION_2015_TF.load(weights=made_inception.graph)
    assert tensorflow.sha256 == extractor.sha256
    resized, scaled = tensorflow.stages(images, "ResizeBilinear:0", "Mul:0")
    np.testing.assert_array_equal(resized, resize_numpy(images))
    np.testing.assert_array_equal(
        scaled.transpose(0, 3, 1, 2), inception_v3.preprocess(torch.from_numpy(images)).numpy()
    )
    ours, theirs = extractor(images), tensorflow(images)
    found = {stage: error(getattr(ours, stage), getattr(theirs, stage)) for stage in STAGES}
    print(found)
    assert all(found[stage] < inception_v3.TOLERANCES[stage] for stage in STAGES), found
    for size in SIZES:
        few = maker.pictures(2, size, seed=size)[..., : 1 if size == 32 else 3]
        np.testing.assert_array_equal(
            tensorflow.stages(few, "ResizeBilinear:0")[0], np.repeat(resize_numpy(few), 3 // few.shape[3], axis=3)
        )
        ours, theirs = extractor(few), tensorflow(few)
        for stage in STAGES:
            assert error(getattr(ours, stage), getattr(theirs, stage)) < inception_v3.TOLERANCES[stage], (size, stage)
    tensorflow.close()
