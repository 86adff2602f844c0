"""ADM's numbers against a plain reimplementation of its algorithm: on stored features, and in a whole evaluation of the
same files by torch, by JAX and by TensorFlow. Slow."""

import json
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.linalg
from click.testing import CliRunner
from inception_graph_maker import pictures

from evaluators import adm
from evaluators.features.inception_tf import InceptionGraphFeatures
from harness.cli import group

pytestmark = pytest.mark.slow
SQRTM = 1e-6  # relative, for covariances of full rank: two ways to take the same root
# Of the torch port against TensorFlow, as published for ADM's own batches; IS relative, a share absolute.
PORT = {"fid": 2e-3, "sfid": 2e-3, "is": 1e-3, "precision": 1.5e-3, "recall": 3e-3}

TASK = """
name = "pictures"
dataset = "npz"
resolution = 32
num_classes = 10
input_size = 32
in_channels = 3
samples = 100
suite = "adm"
"""
N, M = 700, 360  # one image is 1.43e-3 of precision and 2.8e-3 of recall


def plain_fid(x, y):
    """np.mean in the features' dtype, np.cov, sqrtm of the product, eps where that is not finite."""
    (mx, sx), (my, sy) = ((rows.mean(axis=0), np.cov(rows, rowvar=False)) for rows in (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)  # singular: as ADM's evaluator, which takes it
        root = scipy.linalg.sqrtm(sx @ sy)
    if not np.isfinite(root).all():
        offset = 1e-6 * np.eye(len(sx))
        root = scipy.linalg.sqrtm((sx + offset) @ (sy + offset))
    assert np.abs(np.diagonal(root).imag).max() < 1e-3
    return float((mx - my).dot(mx - my) + np.trace(sx) + np.trace(sy) - 2 * np.trace(root.real))


def fid_by_singular_values(x, y):
    """The same without a matrix root: tr (S_x S_y)^(1/2) is the sum of the singular values of the centred rows' product.

    Exact to float64 for singular covariances, for which sqrtm takes roots of rounding errors."""
    delta = x.mean(axis=0) - y.mean(axis=0)  # in the features' dtype
    a, b = ((r.astype(np.float64) - r.mean(axis=0, dtype=np.float64)) / np.sqrt(len(r) - 1) for r in (x, y))
    p, q = (np.linalg.qr(rows, mode="r") for rows in (a, b))  # a @ b.T would have a row for every image
    return float(delta @ delta + (a**2).sum() + (b**2).sum() - 2 * np.linalg.svd(p @ q.T, compute_uv=False).sum())


def plain_is(logits, rows=5000):
    z = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = z / z.sum(axis=1, keepdims=True)
    scores = []
    for start in range(0, len(p), rows):
        part = p[start : start + rows]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(axis=0)))).sum(axis=1).mean()))
    return float(np.mean(scores))


def tensorflow_precision_recall(reference, samples, block=2000):
    """Distances in TensorFlow's own float16, |u|^2 - 2 u.v + |v|^2, no root; the fourth smallest, itself included."""
    tf = pytest.importorskip("tensorflow")

    def distances(u, v):
        u, v = (tf.cast(each, tf.float16) for each in (u, v))
        nu, nv = (tf.reduce_sum(tf.square(each), 1) for each in (u, v))
        d = tf.maximum(nu[:, None] - 2 * tf.matmul(u, v, transpose_b=True) + nv[None], 0.0)
        assert np.isfinite(d.numpy()).all()
        return d.numpy().astype(np.float32)

    def radii(x):
        parts = [distances(x[i : i + block], x) for i in range(0, len(x), block)]
        return np.concatenate([np.partition(d, 3, axis=1)[:, 3] for d in parts])

    own, other = radii(reference), radii(samples)
    inside, covered = np.zeros(len(samples), bool), []
    for i in range(0, len(reference), block):
        d = distances(reference[i : i + block], samples)
        inside |= (d <= own[i : i + block, None]).any(axis=0)
        covered.append((d <= other).any(axis=1))
    return inside.mean(), np.concatenate(covered).mean()


def float16_unsure(balls, points):
    """Number of points whose membership float16 rounding may change: nearer to the surface of a deciding ball than its error.

    Each of |u|^2, 2 u.v and |v|^2 is rounded to 11 bits, and so is the radius, a distance like the other."""
    balls, points = (each.astype(np.float64) for each in (balls, points))

    def distances(u, v):
        return (u**2).sum(axis=1)[:, None] - 2 * u @ v.T + (v**2).sum(axis=1)[None]

    radius = np.partition(distances(balls, balls), 3, axis=1)[:, 3]
    size = (points**2).sum(axis=1)[:, None] + (balls**2).sum(axis=1)[None]
    depth = (radius[None] - distances(points, balls)) / size  # (points, balls), positive inside
    return int((np.abs(depth.max(axis=1)) < 6 * 2.0**-11).sum())


# On stored features ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    """Like pool3: not negative, float32, correlated; 10,000 and 10,500 rows, full rank. And logits."""
    r = np.random.RandomState(0)
    mixing = r.randn(300, 256) * np.geomspace(1, 0.05, 300)[:, None] / 8
    x = np.maximum(r.randn(10_500, 300) @ mixing + 0.1 * r.randn(10_500, 256) + 0.3, 0).astype(np.float32)
    y = np.maximum(1.05 * r.randn(10_000, 300) @ mixing + 0.1 * r.randn(10_000, 256) + 0.32, 0).astype(np.float32)
    return x, y, (x @ (r.randn(256, 1008) * 0.5)).astype(np.float32)


@pytest.mark.parametrize(
    "case", ["full rank", "features that are always zero", "fewer rows than dimensions", "few rows"]
)
def test_fid_of_stored_features(case, stored):
    x, y, _ = (each.copy() for each in stored)
    if case == "features that are always zero":
        x[:, ::9] = y[:, ::9] = 0
    elif case != "full rank":
        x, y = x[: 200 if case.startswith("fewer") else 12], y[:150]
    ours = adm.fid(x, adm.statistics(y))
    by_root, by_values = plain_fid(x, y), fid_by_singular_values(x, y)
    print(case, ours, ours / by_root - 1, ours / by_values - 1)
    assert ours == pytest.approx(by_values, rel=1e-6)
    # null eigenvalues are rounding, 1e-16 of the largest, and their roots 1e-8 each
    assert ours == pytest.approx(by_root, rel=SQRTM if case == "full rank" else 1e-4)


def test_inception_score_of_stored_features(stored):
    logits = stored[2]  # 10,500 rows: two splits and a ragged one
    print(adm.score(logits), plain_is(logits))
    assert adm.score(logits) == pytest.approx(plain_is(logits), rel=1e-6)
    assert adm.score(logits) == pytest.approx(plain_is(logits.astype(np.float64)), rel=1e-5)


def test_precision_and_recall_of_stored_features(stored):
    x, y, _ = stored
    x, y = x[:, :64], y[:, :64]
    ours = adm.precision_and_recall(y, x)
    theirs = tensorflow_precision_recall(y, x)
    exact = adm.precision_and_recall(y, x, "exact")
    print(ours, theirs, exact)
    assert abs(ours[0] - theirs[0]) <= PORT["precision"] and abs(ours[1] - theirs[1]) <= PORT["recall"]


# A whole evaluation ---------------------------------------------------------------------------------------------------


@dataclass
class Evaluated:
    """Output of the command with each backend, and TensorFlow's features: (samples, reference)."""

    values: dict
    hashes: set
    samples: object
    reference: object


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, made_inception):
    pytest.importorskip("tensorflow")
    folder = tmp_path_factory.mktemp("backends")
    images = np.concatenate([pictures(20, 32, seed) for seed in range((N + M) // 20)])
    np.savez(folder / "samples.npz", arr_0=images[:N], arr_1=np.arange(N) % 10)
    np.savez(folder / "reference.npz", arr_0=images[N:])
    (folder / "task.toml").write_text(TASK)
    values, hashes, seen = {}, set(), []
    call = InceptionGraphFeatures.__call__

    def spy(self, images):
        seen.append(call(self, images))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InceptionGraphFeatures, "__call__", spy)
        for backend in ("tensorflow", "torch", "jax"):
            arguments = [
                "evaluate", folder / "samples.npz", "--suite", "adm", "--protocol", folder / "task.toml",
                "--reference", folder / "reference.npz", "--inception", made_inception.graph, "--json",
                "--backend", backend, "--out", folder / f"{backend}.jsonl",
            ]  # fmt: skip
            done = CliRunner().invoke(group, list(map(str, arguments)))
            assert done.exit_code == 0, done.exception
            records = json.loads(done.stdout)["records"]
            values[backend] = {each["metric"]: each["value"] for each in records}
            hashes |= {each["evaluation"]["features_sha256"] for each in records}
    rows = {name: np.concatenate([getattr(each, name) for each in seen]) for name in ("pooled", "spatial", "logits")}
    assert len(rows["pooled"]) == N + M  # the reference comes first
    halves = [{name: each[part] for name, each in rows.items()} for part in (slice(M, None), slice(M))]
    return Evaluated(values, hashes, *halves)


def test_tensorflow_gives_what_the_algorithm_gives(evaluated):
    ours, samples, reference = evaluated.values["tensorflow"], evaluated.samples, evaluated.reference
    theirs = {
        "fid": fid_by_singular_values(samples["pooled"], reference["pooled"]),
        "sfid": fid_by_singular_values(samples["spatial"], reference["spatial"]),
        "is": plain_is(samples["logits"]),
    }
    for metric, value in theirs.items():
        print(metric, ours[metric], value, ours[metric] / value - 1)
    shares = tensorflow_precision_recall(reference["pooled"], samples["pooled"])
    print("precision, recall", ours["precision"], ours["recall"], shares)
    for metric, value in theirs.items():
        assert ours[metric] == pytest.approx(value, rel=1e-6), metric
    unsure = (
        float16_unsure(reference["pooled"], samples["pooled"]),
        float16_unsure(samples["pooled"], reference["pooled"]),
    )
    print("images whose place float16 cannot tell", unsure)
    assert round(abs(ours["precision"] - shares[0]) * N) <= min(unsure[0], 0.01 * N)
    assert round(abs(ours["recall"] - shares[1]) * M) <= min(unsure[1], 0.01 * M)


@pytest.mark.parametrize("kind", ["pooled", "spatial"])
def test_sqrtm_agrees_as_far_as_it_can(kind, evaluated):
    """In the space that all rows span: the same result, but in 2048 dimensions it would take minutes."""
    x, y = (each[kind].astype(np.float64) for each in (evaluated.samples, evaluated.reference))
    basis = np.linalg.qr(np.concatenate([x, y]).T)[0]
    value = plain_fid(x @ basis, y @ basis)
    ours = evaluated.values["tensorflow"]["fid" if kind == "pooled" else "sfid"]
    print(kind, ours, value, ours / value - 1)
    assert ours == pytest.approx(value, rel=1e-4)  # singular: N < 2048


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_both_agree_with_tensorflow(backend, evaluated):
    """All five numbers, of a graph of the public form (`inception_graph_maker`)."""
    ours, tensorflow = evaluated.values[backend], evaluated.values["tensorflow"]
    print(ours, tensorflow)
    assert list(ours) == list(tensorflow) == list(PORT)
    assert len(evaluated.hashes) == 1
    for metric, tolerance in PORT.items():
        scale = 1.0 if metric in ("precision", "recall") else abs(tensorflow[metric])
        assert abs(ours[metric] - tensorflow[metric]) <= tolerance * scale, metric
