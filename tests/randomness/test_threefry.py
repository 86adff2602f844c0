"""The counter-based generator: known answers, goldens, numpy against torch, independence of the batch, statistics."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from harness.errors import UserError
from harness.randomness import Purpose, threefry_numpy, threefry_torch

# golden.json is part of every recorded experiment: a change of any number in it is a new generator, not a fix.
GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
GOLDEN_INDEX = [0, 1, 2**32 + 5, 2**63 - 1]
GOLDEN_CASES = [  # seed, purpose, step
    (0, 1, 0),
    (0, 2, 249),
    (12345678901234567890, 3, 2**32 + 3),
    (2**64 - 1, 12, 2**63 - 1),
]
SEED = 7
KNOWN_ANSWERS = [  # Random123 tests/kat_vectors, threefry2x32 20 rounds: counter, key, result
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


def compute(engine, as_index) -> list[dict]:
    """All values of one engine as plain Python numbers; as_index turns a list into the engine's int64 array."""
    rows = []
    for seed, purpose, step in GOLDEN_CASES:
        where = (seed, purpose, as_index(GOLDEN_INDEX), step)
        rows.append(
            {
                "seed": seed,
                "purpose": purpose,
                "index": GOLDEN_INDEX,
                "step": step,
                "bits": engine.bits(*where, 5).tolist(),
                "uniform": engine.uniform(*where, (3,)).tolist(),
                "normal": engine.normal(*where, (3, 1)).tolist(),
                "integers_10": engine.integers(*where, 10).tolist(),
                "integers_2147483648": engine.integers(*where, 2**31).tolist(),
            }
        )
    return rows


@pytest.fixture(params=["numpy words", "torch words"])
def torch_engine(request, monkeypatch):
    """threefry_torch with words from numpy (CPU) and from int32 tensors (other devices)."""
    if request.param == "torch words":
        monkeypatch.setattr(threefry_torch, "_uses_numpy", lambda index: False)
    return threefry_torch


def torch_words(*words):
    return [torch.tensor([word], dtype=torch.int64).to(torch.int32) for word in words]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter, key, result):
    words = threefry_numpy.threefry2x32(*(np.uint32(w) for w in (*key, *counter)))
    assert [w.dtype for w in words] == [np.uint32, np.uint32]
    assert tuple(int(w[0]) for w in words) == result
    words = threefry_torch.threefry2x32(*torch_words(*key, *counter))
    assert [w.dtype for w in words] == [torch.int32, torch.int32]
    assert tuple(int(w[0]) & 0xFFFFFFFF for w in words) == result


def test_golden_numpy():
    assert compute(threefry_numpy, np.array) == GOLDEN["cases"]  # normals too: float64 inside, rounded once
    order = [threefry_numpy.permutation(0, Purpose.DATA_ORDER, epoch, 12).tolist() for epoch in (0, 1)]
    assert order == GOLDEN["permutation_seed_0_n_12_epochs_0_1"]


def test_golden_torch(torch_engine):
    rows = compute(torch_engine, torch.tensor)
    assert len(rows) == len(GOLDEN["cases"])
    for row, golden in zip(rows, GOLDEN["cases"], strict=True):
        np.testing.assert_allclose(row.pop("normal"), golden["normal"], rtol=0, atol=1e-6)
        assert row == {name: value for name, value in golden.items() if name != "normal"}


def test_purposes_are_fixed():
    assert {p.name: int(p) for p in Purpose} == {
        "INITIAL_NOISE": 1, "STEP_NOISE": 2, "TRAINING_NOISE": 3, "TIMESTEP": 4, "FLIP": 5, "POSTERIOR": 6,
        "LABEL_DROPOUT": 7, "NETWORK_DROPOUT": 8, "DATA_ORDER": 9, "SAMPLE_LABEL": 10, "INITIALISATION": 11,
        "EVALUATION": 12, "CONDITIONING_NOISE": 13, "CONDITIONING_LEVEL": 14, "UPSAMPLER_NOISE": 15, "END_TIME": 16,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(5, 3, 3), (2, 33, 40)], ids=["odd count", "several chunks"])
def test_torch_equals_numpy(torch_engine, shape, monkeypatch):
    monkeypatch.setattr(threefry_torch, "CHUNK", 1000)
    index = np.arange(100) * 2**33 + 11
    step = np.arange(100)[::-1].copy()
    count = int(np.prod(shape))
    for s, t in ((3, 3), (step, torch.from_numpy(step))):
        where = (SEED, Purpose.STEP_NOISE, index, s)
        torch_where = (SEED, Purpose.STEP_NOISE, torch.from_numpy(index), t)
        words = torch_engine.bits(*torch_where, count)
        assert words.dtype == torch.int64 and words.shape == (100, count)
        np.testing.assert_array_equal(words.numpy(), threefry_numpy.bits(*where, count).astype(np.int64))
        unit = torch_engine.uniform(*torch_where, shape)
        assert unit.dtype == torch.float32 and unit.shape == (100, *shape)
        np.testing.assert_array_equal(unit.numpy(), threefry_numpy.uniform(*where, shape))
        z, expected = torch_engine.normal(*torch_where, shape), threefry_numpy.normal(*where, shape)
        assert z.dtype == torch.float32 and expected.dtype == np.float32
        assert z.shape == expected.shape == (100, *shape)
        np.testing.assert_allclose(z.numpy(), expected, rtol=0, atol=1e-6)
        assert np.mean(z.numpy() == expected) > 0.5  # 0.62 measured; the rest differs in the last bits
        for high in (1, 10, 1000, 2**31):
            drawn = torch_engine.integers(*torch_where, high)
            assert drawn.dtype == torch.int64 and drawn.shape == (100,)
            np.testing.assert_array_equal(drawn.numpy(), threefry_numpy.integers(*where, high))


@pytest.mark.parametrize("step", [5, "array"])
def test_sample_does_not_know_its_batch(torch_engine, step, monkeypatch):
    monkeypatch.setattr(threefry_torch, "CHUNK", 500)
    index = torch.arange(64)
    steps = torch.arange(64) % 7
    shape = (3, 9, 9)

    def draw(rows):
        return torch_engine.normal(SEED, Purpose.STEP_NOISE, index[rows], step if step == 5 else steps[rows], shape)

    whole = draw(torch.arange(64))
    for batch in (16, 1):
        parts = torch.cat([draw(torch.arange(i, i + batch)) for i in range(0, 64, batch)])
        assert torch.equal(parts, whole)
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(64))
    assert torch.equal(draw(shuffled), whole[shuffled])
    shorter = torch_engine.normal(SEED, Purpose.STEP_NOISE, index, step if step == 5 else steps, (7,))
    assert torch.equal(shorter, whole.reshape(64, -1)[:, :7])  # a shorter draw is a prefix


def test_draws_for_several_steps_and_purposes_are_those_of_one(torch_engine, monkeypatch):
    monkeypatch.setattr(threefry_torch, "STEPS_NUMBERS", 100)
    index, device = torch.arange(5) + 2**33, torch.device("cpu")
    for first in (0, 3 << 32):
        for shape in ((2, 3), (3, 3), (50,)):  # three steps at once, two, one
            noise = torch_engine.StepNormals(SEED, Purpose.STEP_NOISE, index, first, device)
            for step in (first, first + 1, first + 2, first + 7, first + 8, first + 3):
                assert torch.equal(
                    noise(step, shape), torch_engine.normal(SEED, Purpose.STEP_NOISE, index, step, shape)
                )
    purposes = (Purpose.POSTERIOR, Purpose.TRAINING_NOISE, Purpose.CONDITIONING_NOISE)
    for asked in (purposes, purposes[1:], purposes[::-1]):
        joint = torch_engine.JointNormals(SEED, purposes, index, device)
        for purpose, shape in zip(asked, ((2, 3), (2, 3), (5,)), strict=False):
            assert torch.equal(joint(purpose, shape), torch_engine.normal(SEED, purpose, index, 0, shape))


def test_step_may_be_one_number_or_one_for_each_sample():
    index = np.arange(6)
    for step in (3, 2**40 + 1):
        together = threefry_numpy.bits(SEED, Purpose.FLIP, index, step, 4)
        each = threefry_numpy.bits(SEED, Purpose.FLIP, index, np.full(6, step), 4)
        np.testing.assert_array_equal(together, each)


def test_no_two_addresses_share_a_block():
    edges = np.array([0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1])
    index, step = (a.ravel() for a in np.meshgrid(edges, edges))
    blocks = set()
    for seed in (0, 1, 2**32, 2**64 - 1):
        for purpose in Purpose:
            words = threefry_numpy.bits(seed, purpose, index, step, 8).reshape(-1, 2)
            blocks.update(map(tuple, words.tolist()))
    assert len(blocks) == 4 * len(Purpose) * len(index) * 4


def test_distribution_and_independence():
    n, shape = 400, (500,)
    index = np.arange(n)
    streams = {
        (p, step): threefry_numpy.normal(SEED, p, index, step, shape).ravel().astype(np.float64)
        for p in (Purpose.INITIAL_NOISE, Purpose.STEP_NOISE)
        for step in (0, 1)
    }
    for z in streams.values():
        size = z.size
        assert abs(z.mean()) < 4 / size**0.5
        assert abs(z.var() - 1) < 4 * (2 / size) ** 0.5
        assert abs((z**3).mean()) < 4 * (15 / size) ** 0.5
        assert abs((z**4).mean() - 3) < 4 * (96 / size) ** 0.5
        assert stats.kstest(z, "norm").pvalue > 1e-3
        grid = z.reshape(n, *shape)
        for a, b in ((grid[:-1], grid[1:]), (grid[:, :-1], grid[:, 1:])):  # next sample, next element
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / size**0.5
    between = np.corrcoef(list(streams.values())) - np.eye(len(streams))
    assert np.abs(between).max() < 4 / size**0.5
    unit = threefry_numpy.uniform(SEED, Purpose.TIMESTEP, index, 0, shape)
    assert unit.dtype == np.float32 and unit.min() >= 0 and unit.max() < 1
    assert stats.kstest(unit.ravel(), "uniform").pvalue > 1e-3


def test_integers_are_uniform():
    drawn = threefry_numpy.integers(SEED, Purpose.SAMPLE_LABEL, np.arange(100_000), 0, 10)
    assert drawn.dtype == np.int64 and drawn.shape == (100_000,)
    assert stats.chisquare(np.bincount(drawn, minlength=10)).pvalue > 1e-3
    assert set(threefry_numpy.integers(SEED, Purpose.SAMPLE_LABEL, np.arange(9), 0, 1)) == {0}


def test_permutation():
    order = threefry_numpy.permutation(SEED, Purpose.DATA_ORDER, 0, 1797)
    assert order.dtype == np.int64 and order.shape == (1797,)
    np.testing.assert_array_equal(np.sort(order), np.arange(1797))
    again = threefry_numpy.permutation(SEED, Purpose.DATA_ORDER, 1, 1797)
    assert np.mean(order == again) < 0.01
    assert threefry_numpy.permutation(SEED, Purpose.DATA_ORDER, 0, 0).shape == (0,)
    first = np.array([threefry_numpy.permutation(SEED, Purpose.DATA_ORDER, e, 5)[0] for e in range(2000)])
    assert stats.chisquare(np.bincount(first, minlength=5)).pvalue > 1e-3


def test_empty_batch(torch_engine):
    assert threefry_numpy.normal(SEED, Purpose.FLIP, np.arange(0), 0, (2, 3)).shape == (0, 2, 3)
    assert torch_engine.normal(SEED, Purpose.FLIP, torch.arange(0), 0, (2, 3)).shape == (0, 2, 3)
    assert torch_engine.uniform(SEED, Purpose.FLIP, torch.arange(0), 0, (2,)).shape == (0, 2)


def test_bad_arguments(torch_engine):
    index = torch.arange(2)
    for engine, idx in ((threefry_numpy, index.numpy()), (torch_engine, index)):
        for seed in (-1, 2**64):
            with pytest.raises(UserError, match="seed"):
                engine.bits(seed, Purpose.FLIP, idx, 0, 1)
        for step in (-1, 2**63):
            with pytest.raises(UserError, match="step"):
                engine.bits(0, Purpose.FLIP, idx, step, 1)
        for high in (0, 2**31 + 1):
            with pytest.raises(UserError, match="upper bound"):
                engine.integers(0, Purpose.FLIP, idx, 0, high)
        with pytest.raises(TypeError, match="integers"):
            engine.bits(0, Purpose.FLIP, idx * 1.0, 0, 1)
        with pytest.raises(TypeError, match="step"):
            engine.bits(0, Purpose.FLIP, idx, idx[:1], 1)
