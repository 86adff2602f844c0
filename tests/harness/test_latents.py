"""Caches of latents: what they hold, that a kill costs no whole chunk and no bit, and what is refused."""

import dataclasses
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from small_vae import save_vae

from harness.autoencoders.load import load_autoencoder
from harness.cli import group
from harness.data import encode, latents
from harness.data.images import ImageSet
from harness.data.load import NamedImages
from harness.data.prepared import CHUNK_IMAGES
from harness.errors import RunError, UserError
from harness.frameworks import torch_transfer
from harness.runs.samples import write_samples

COUNT = 2 * CHUNK_IMAGES + 30  # three chunks


def pictures(count=COUNT, side=16, channels=3):
    """Noise of several scales, so that every image and its mirror image are unlike."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, side // 4, side // 4, channels))
    noise = rng.integers(-30, 30, (count, side, side, channels))
    return (np.kron(small, np.ones((1, 4, 4, 1))) + noise).clip(0, 255).astype(np.uint8), rng.integers(0, 10, count)


def make(source, vae, out):
    return encode.make_cache(source, vae, out, environment={})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "small", scaling_factor=0.5, shift_factor=0.25)


@pytest.fixture(scope="module")
def vae(folder):
    return dataclasses.replace(load_autoencoder(str(folder)), batch=64)


@pytest.fixture(scope="module")
def source():
    images, labels = pictures()
    return NamedImages(images=ImageSet(name="noise", images=images, labels=labels), crop=None, name="")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vae, source):
    out = tmp_path_factory.mktemp("whole") / "cache"
    assert make(source, vae, out) is True
    assert sorted(each.name for each in out.iterdir()) == ["labels.npy", "latents.npy", "meta.json"]
    return out


def test_moments_are_those_of_diffusers_and_the_mirror_view_encodes_the_mirrored_image(folder, whole, source):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    found, rows = latents.load(whole), np.array([0, 5, CHUNK_IMAGES, COUNT - 1])
    assert isinstance(found.latents, np.memmap) and found.latents.shape == (COUNT, 2, 2, 4, 2, 2)
    for view in (0, 1):
        images = source.images.images[rows]
        images = images[:, :, ::-1] if view else images
        x = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            posterior = theirs.encode(x).latent_dist
        np.testing.assert_allclose(found.latents[rows, view, 0], posterior.mean.numpy(), atol=2e-6)
        np.testing.assert_allclose(found.latents[rows, view, 1], posterior.std.numpy(), atol=2e-6)
    mirrored_latent = found.latents[rows, 0, 0][..., ::-1]
    assert np.abs(found.latents[rows, 1, 0] - mirrored_latent).max() > 0.05  # no mirrored latent
    np.testing.assert_array_equal(found.labels, source.images.labels)
    assert (found.meta.scale, found.meta.shift) == (0.5, 0.25)


def test_what_a_network_learns_is_decoded_to_what_the_posterior_meant(folder, vae, whole):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    found = latents.load(whole)
    stored = torch.from_numpy(found.gather(np.arange(5), np.zeros(5, bool)))
    x0 = found.to_model_input(stored, lambda shape: torch.zeros(5, *shape))
    with torch.no_grad():
        expected = theirs.decode(stored[:, 0]).sample.clamp(-1, 1)
    torch.testing.assert_close(vae.decode(x0), expected, atol=1e-5, rtol=0)


def test_the_size_of_batches_is_rounding(vae, source):
    images = source.images.images[:20]
    one, many = (encode.encode(dataclasses.replace(vae, batch=batch), images) for batch in (1, 16))
    assert one.dtype == np.float32
    np.testing.assert_allclose(one, many, atol=2e-6)


def test_draws_have_the_mean_and_the_standard_deviation_of_the_posterior(whole):
    """4,000 draws from one example: means within 5 standard errors in each of its 16 elements, deviations within 6 %."""
    import jax.numpy as jnp

    from harness.randomness import Purpose, normal
    from harness.randomness import threefry_jax as in_jax
    from harness.randomness import threefry_torch as in_torch

    found, n = latents.load(whole), 4000
    stored = np.repeat(found.gather(np.array([3]), np.array([True])), n, axis=0)
    mean, std = found.latents[3, 1]
    positions = 10**6 + np.arange(n)
    index = torch.from_numpy(positions)
    x0 = found.to_model_input(
        torch.from_numpy(stored), lambda shape: in_torch.normal(5, Purpose.POSTERIOR, index, 0, shape)
    )
    assert x0.shape == (n, 4, 2, 2) and x0.dtype == torch.float32
    draws = x0.double().numpy() / 0.5 + 0.25
    assert (np.abs(draws.mean(0) - mean) < 5 * std / np.sqrt(n)).all()
    np.testing.assert_allclose(draws.std(0), std, rtol=0.06)
    assert std.min() > 0.05

    eps = normal(5, Purpose.POSTERIOR, positions[:9], 0, (4, 2, 2))
    np.testing.assert_allclose(x0[:9].numpy(), (mean + std * eps - 0.25) * 0.5, atol=2e-6)
    words = in_jax.words(positions)
    other = found.to_model_input(
        jnp.asarray(stored), lambda shape: in_jax.normal(5, Purpose.POSTERIOR, words, 0, shape)
    )
    np.testing.assert_allclose(np.asarray(other), x0.numpy(), atol=2e-6)


def test_rows_are_gathered_as_they_are_or_mirrored(whole):
    found = latents.load(whole)
    rows, mirrored = np.array([7, COUNT - 1, 7, 300]), np.array([False, True, True, False])
    stored = found.gather(rows, mirrored)
    for each, row, view in zip(stored, rows, mirrored, strict=True):
        np.testing.assert_array_equal(each, found.latents[row, int(view)])
    assert not isinstance(stored, np.memmap)


def bytes_of(folder):
    return {each.name: each.read_bytes() for each in folder.iterdir() if each.name != "meta.json"}


def test_work_that_was_cut_off_is_continued_to_the_same_bytes(vae, source, whole, tmp_path, monkeypatch):
    """Killed before each chunk, in the middle of writing one, and at each step of the end; nothing whole is repeated."""
    real, encoded = encode.encode, []

    class Killed(BaseException):
        pass

    def dies_at(number):
        def call(*arguments):
            if len(encoded) == number:
                raise Killed
            encoded.append(1)
            return real(*arguments)

        return call

    out = tmp_path / "cache"
    for number in range(3):
        monkeypatch.setattr(encode, "encode", dies_at(number))
        with pytest.raises(Killed):
            make(source, vae, out)
        assert not (out / "latents.npy").exists() and not (out / "meta.json").exists()
        with pytest.raises(UserError, match="is not complete: repeat the `harness data latents` command"):
            latents.load(out)
        with (out / "chunks.partial").open("ab") as file:  # a line that was being written
            file.write(b'[2, "ab')
        with (out / "latents.npy.partial").open("r+b") as file:  # and half a chunk
            file.seek(-40, 2)
            file.write(b"x" * 40)
    for step in ("write_bytes", "sync_folder", "write_json"):
        monkeypatch.setattr(encode, "encode", dies_at(3))
        with monkeypatch.context() as patch:
            patch.setattr(encode.files, step, lambda *_: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                make(source, vae, out)
        assert not (out / "meta.json").exists()
    monkeypatch.setattr(encode, "encode", dies_at(3))
    assert make(source, vae, out) is True
    assert len(encoded) == 3
    assert bytes_of(out) == bytes_of(whole)
    assert latents.load(out).meta == latents.load(whole).meta
    (out / "chunks.partial").write_bytes(b"{}\n")  # of a process that was killed after its last write
    assert make(source, vae, out) is False and not (out / "chunks.partial").exists()


def test_reading_and_writing_go_on_while_a_chunk_is_encoded(vae, source, whole, tmp_path, monkeypatch):
    """When the second chunk is about to be encoded, the third is read, and the first is written, each by its thread."""
    real, calls, done = encode.encode, [], {name: threading.Event() for name in ("third is read", "first is written")}

    class Watched(np.ndarray):
        def __getitem__(self, rows):
            if isinstance(rows, slice) and rows.start == 2 * CHUNK_IMAGES:
                done["third is read"].set()
            return np.asarray(self)[rows]

    append_line = encode._append_line

    def appended(lines, entry):
        append_line(lines, entry)
        if entry[0] == 0:
            assert threading.current_thread() is not threading.main_thread()
            done["first is written"].set()

    def watched(decoder, images):
        calls.append(len(images))
        assert threading.current_thread() is threading.main_thread() and images.dtype == np.uint8
        if len(calls) == 2:
            assert all(event.wait(60) for event in done.values())
        return real(decoder, images)

    monkeypatch.setattr(encode, "encode", watched)
    monkeypatch.setattr(encode, "_append_line", lambda lines, entry: (appended if isinstance(entry, list) else append_line)(lines, entry))  # fmt: skip
    seen = dataclasses.replace(
        source, images=dataclasses.replace(source.images, images=source.images.images.view(Watched))
    )
    assert make(seen, vae, tmp_path / "cache") is True
    assert calls == [CHUNK_IMAGES, CHUNK_IMAGES, 30] and bytes_of(tmp_path / "cache") == bytes_of(whole)


def test_images_reach_the_autoencoder_as_bytes(vae, source, monkeypatch):
    seen, to_device = [], torch_transfer.to_device
    monkeypatch.setattr(
        torch_transfer, "to_device", lambda part, device: (seen.append(part.dtype), to_device(part, device))[1]
    )
    images = source.images.images[:3]
    moments = encode.encode(vae, images)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = vae.posterior(x.contiguous()).numpy()
    np.testing.assert_array_equal(moments[:, 0], expected)
    assert seen == [torch.uint8, torch.float32]


def test_a_damaged_chunk_is_made_again(vae, source, whole, tmp_path, monkeypatch):
    out, real, encoded = tmp_path / "cache", encode.encode, []

    def dies(*arguments):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(1)
        return real(*arguments)

    monkeypatch.setattr(encode, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        make(source, vae, out)
    with (out / "latents.npy.partial").open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    encoded.clear()
    monkeypatch.setattr(encode, "encode", lambda *arguments: (encoded.append(1), real(*arguments))[1])
    make(source, vae, out)
    assert len(encoded) == 2 and bytes_of(out) == bytes_of(whole)


def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def test_verify_reads_every_byte(whole, tmp_path):
    done = CliRunner().invoke(group, ["data", "verify", str(whole)])
    assert done.exit_code == 0, done.exception
    assert (
        f"latents 4x2x2 of {COUNT:,} images of noise at 16 pixels" in done.output and "every hash holds" in done.output
    )
    out = copied(whole, tmp_path)
    for file, at in (("latents.npy", -9), ("labels.npy", -8)):
        before = (out / file).read_bytes()
        (out / file).write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        with pytest.raises(UserError, match=rf"images {2 * CHUNK_IMAGES} to {COUNT - 1} differ from their hash"):
            latents.verify(out)
        (out / file).write_bytes(before)
    latents.verify(out)
    with (out / "latents.npy").open("wb") as file:
        np.savez(file, np.zeros(3))
    with pytest.raises(UserError, match=r"latents.npy cannot be read"):
        latents.load(out)
    (out / "latents.npy").write_bytes((whole / "latents.npy").read_bytes()[:-4])
    with pytest.raises(UserError):
        latents.verify(out)


def test_a_finished_cache_that_was_damaged_is_not_taken_for_whole(folder, source, whole, tmp_path):
    out = copied(whole, tmp_path)
    assert encode.existing_cache(source, str(folder), out) == latents.read_meta(whole)
    os.truncate(out / "latents.npy", 2000)
    with pytest.raises(UserError, match=r"copy was complete once and is damaged \(.*latents.npy.*\); delete it"):
        encode.existing_cache(source, str(folder), out)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chunks": ["0" * 64] * 3}, "contradicts its own hash"),
        ({"schema": 99}, "newer harness"),
        ({"vae": {}}, "is not a latents file of this harness"),
        ({"shape": [1, 2]}, "contradicts its own hash"),
    ],
)
def test_a_meta_that_was_edited_is_refused(whole, tmp_path, change, says):
    out = copied(whole, tmp_path)
    data = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps({**data, **change}))
    with pytest.raises(UserError, match=says):
        latents.load(out)


def test_another_autoencoder_other_images_and_other_folders_are_refused(vae, source, whole, tmp_path):
    other = load_autoencoder(str(save_vae(tmp_path / "other", seed=1, scaling_factor=0.5, shift_factor=0.25)))
    with pytest.raises(UserError, match=rf"vae.*is 'vae-{vae.sha256[:12]}' there and 'vae-{other.sha256[:12]}' here"):
        make(source, other, whole)
    images, labels = pictures(40)
    few = NamedImages(images=ImageSet(name="noise", images=images, labels=labels), crop=None, name="")
    with pytest.raises(UserError, match="images.sha256 is"):
        make(few, vae, whole)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files"):
        make(few, vae, tmp_path / "full")
    grey = ImageSet(name="grey", images=images[..., :1], labels=labels)
    for data, words in ((grey, "16x16x1"), (ImageSet(name="x", images=images[:, :12, :12], labels=labels), "12x12x3")):
        with pytest.raises(UserError, match=f"{words}; autoencoder vae-.* takes squares of 3 channels"):
            make(NamedImages(images=data, crop=None, name=""), vae, tmp_path / "new")


def test_a_disk_without_room_is_said_before_the_work(vae, source, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10_000))
    monkeypatch.setattr(encode, "encode", None)
    with pytest.raises(RunError, match=r"latents take 0.00 GB and 0.00 GB are free; free some space"):
        make(source, vae, tmp_path / "cache")
    assert [each.getMessage() for each in caplog.records] == ["latents: 0.00 GB on the disk, 0.00 GB free"]


def test_the_command_takes_an_npz_and_says_what_it_made(folder, tmp_path):
    images, labels = pictures(40)
    write_samples(tmp_path / "images.npz", [images], labels, {})
    words = ["data", "latents", str(tmp_path / "images.npz"), "--vae", str(folder), "--out", str(tmp_path / "cache")]
    done = CliRunner().invoke(group, [*words, "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.exception
    facts = json.loads(done.stdout)
    assert facts["written"] is True and facts["shape"] == [40, 2, 2, 4, 2, 2]
    again = CliRunner().invoke(group, words)
    assert again.exit_code == 0 and "exists already, the same latents" in again.stdout
    for bad, says in (
        (str(tmp_path), "is neither a prepared data set nor an .npz; give the folder that `harness data prepare NAME"),
        ("imagenot", "is neither a folder nor a data set that needs none"),
        ("imagenet", "give the folder that `harness data prepare imagenet --from PATH --out DIR` makes"),
    ):
        done = CliRunner().invoke(group, ["data", "latents", bad, "--vae", str(folder), "--out", str(tmp_path / "x")])
        assert isinstance(done.exception, UserError) and says in str(done.exception)
