"""Broken files: mutated npz, npy, PNG and tar files give the original pixels or one refusal; never another exception,
never a wait, never other pixels."""

import io
import signal
import tarfile
import time

import numpy as np
import pytest
from mutations import mutated
from PIL import Image

from harness.errors import RunError, UserError
from harness.images.open import open_images

IMAGES = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 3)).astype(np.uint8)
LABELS = np.arange(6) % 3
PATIENCE = 2  # seconds an input may take
KINDS = ("stored.npz", "deflated.npz", "array.npy", "images.tar", "pax.tar", "image.png", "palette.png", "image.jpg")


class TooSlow(BaseException):
    """Raised by the alarm; no reader catches it."""


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def seeds(kind):
    """(valid bytes, the pixels in them; None where the format holds no checksum)"""
    out = io.BytesIO()
    if kind == "stored.npz":
        np.savez(out, IMAGES, LABELS)
    elif kind == "deflated.npz":
        np.savez_compressed(out, IMAGES // 64, LABELS, mu=np.zeros(4))
        return out.getvalue(), IMAGES // 64
    elif kind == "array.npy":
        np.save(out, IMAGES)
        return out.getvalue(), None
    elif kind.endswith(".tar"):
        form = tarfile.PAX_FORMAT if kind == "pax.tar" else tarfile.GNU_FORMAT
        with tarfile.open(fileobj=out, mode="w", format=form) as archive:
            for i, image in enumerate(IMAGES[:3]):
                members = (
                    (f"{'long' * 30}{i}.png", encoded(Image.fromarray(image), "PNG")),
                    (f"{'long' * 30}{i}.cls", b"1"),
                )
                for name, data in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        return out.getvalue()[: 512 * 40], IMAGES[:3]
    elif kind == "image.png":
        return encoded(Image.fromarray(IMAGES[0]), "PNG"), IMAGES[:1]
    elif kind == "palette.png":
        palette = Image.fromarray(IMAGES[0]).quantize(9)
        return encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))[None]
    else:
        return encoded(Image.fromarray(IMAGES[0]), "JPEG"), None
    return out.getvalue(), IMAGES


def attempt(path, truth, data):
    """ "read" or "refused"; anything else is an error of the test."""

    def alarm(*_):
        raise TooSlow(f"{path.name}: more than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        source = open_images(path)
        images = source.array()
    except (UserError, RunError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert images.dtype == np.uint8 and images.shape == (source.count, *source.shape)
    if truth is not None:
        np.testing.assert_array_equal(images, truth)
    elif path.suffix == ".npy":  # no checksum: what the bytes say, as numpy reads them
        np.testing.assert_array_equal(images, np.load(io.BytesIO(data), allow_pickle=False))
    return "read"


def fuzz(folder, kind, inputs, seed):
    """How many inputs were read, how many refused, and the slowest one's seconds."""
    random = np.random.RandomState(seed)
    data, truth = seeds(kind)
    path = folder / kind
    target = folder if kind.endswith(("png", "jpg")) else path  # a folder of one image
    outcomes, slowest = {"read": 0, "refused": 0}, 0.0
    for i in range(inputs):
        broken = mutated(data, random)
        path.write_bytes(broken)
        start = time.perf_counter()
        try:
            outcomes[attempt(target if target == path else folder, truth, broken)] += 1
        except BaseException:
            print(f"input {i} of kind {kind}, seed {seed}")
            raise
        slowest = max(slowest, time.perf_counter() - start)
    return outcomes, slowest


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_mutated_is_valid_before(tmp_path, kind):
    data, truth = seeds(kind)
    (tmp_path / kind).write_bytes(data)
    assert attempt(tmp_path if kind.endswith(("png", "jpg")) else tmp_path / kind, truth, data) == "read"


@pytest.mark.parametrize("kind", KINDS)
def test_75_broken_files_of_a_kind(tmp_path, kind):
    outcomes, _ = fuzz(tmp_path, kind, 75, seed=1)
    assert outcomes["refused"] > 20  # the mutations do reach the reader


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_10000_broken_files(tmp_path, kind):
    outcomes, slowest = fuzz(tmp_path, kind, 10_000 // len(KINDS), seed=2)
    print(kind, outcomes, f"slowest {slowest * 1e3:.0f} ms")
    assert outcomes["refused"] > 100
