"""Inputs in binary: checkpoints, sample files and folders; and calls of the Python interface."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from accidents import document
from mutations import mutated
from PIL import Image
from valid_files import BACKBONE, EMBEDDED, OTHERS, PROTOCOL, SYSTEM, tiny, toml

import harness


def of_checkpoints(case):
    draw, torch = case.draw, case.world.torch
    kind = draw.randrange(10)
    if kind < 4:
        file = draw.choice(("bare.safetensors", "bare.pt", "both.pt", "list.ckpt", "weights.npz"))
        data = case.world.bytes[file]
        if file.endswith(".safetensors") and draw.random() < 0.5:
            size = int.from_bytes(data[:8], "little")
            header = document(json.loads(data[8 : 8 + size]), draw)
            data = (
                (len(header) if draw.random() < 0.9 else draw.choice((0, 1 << 62, 5))).to_bytes(8, "little")
                + header
                + data[8 + size :]
            )
        else:
            data = mutated(data, case.rs())
        path = case.write(file, data)
    else:
        state = dict(case.world.state)
        for key in draw.sample(list(state), draw.choice((0, 1, 1, 2))):
            state[key] = _damaged(state[key], draw, torch)
        prefix = draw.choice(
            ("", "", "module.", "_orig_mod.", "model.", "a.b.c.", "module.module.model.", "ema.", ".", "\u00e9.")
        )
        state = {prefix + key: value for key, value in state.items()}
        if draw.random() < 0.2:
            del state[draw.choice(list(state))]
        if draw.random() < 0.2:
            state[draw.choice(("x", 1, None, ("a",), b"b", "pos_embed.x", "", "\0"))] = torch.zeros(2)
        nested = draw.choice(
            (
                lambda: state, lambda: {"model": state}, lambda: {"model": state, "ema": state}, lambda: {"ema": {"shadow": state, "decay": 1}},
                lambda: {"a": {"b": {"c": {"d": state}}}}, lambda: [state, state], lambda: (state,), lambda: list(state.values()),
                lambda: {"ema": {"shadow_params": list(state.values())}, "model": None}, lambda: {"state_dict": state, "state_dict_ema": {}},
                lambda: {1: state, "ema": [1, 2]}, lambda: {"model": {**state, "self": 1}, "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
                lambda: {"ema_model": state, "model_ema": state, "ema": state}, lambda: torch.zeros(3), dict, lambda: None, lambda: _cycle(state),
            )
        )()  # fmt: skip
        path = case.folder / draw.choice(("a.pt", "a.ckpt", "a.bin", "a.pth", "a.safetensors"))
        if path.suffix == ".safetensors" or draw.random() < 0.1:
            from safetensors.torch import save_file

            tensors = {str(key): value.contiguous().clone() for key, value in state.items() if _plain(value)}
            try:
                save_file(tensors, path)
            except Exception:
                torch.save(nested, path)
        else:
            torch.save(nested, path, _use_new_zipfile_serialization=draw.random() < 0.8)
        if draw.random() < 0.1:
            path.write_bytes(mutated(path.read_bytes(), case.rs()))
    if draw.random() < 0.1:  # a folder of parts
        shutil.copy(path, case.folder / "model-00001-of-00002.safetensors")
        index = {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(case.world.state, "model-00001-of-00002.safetensors"),
        }
        folder = case.folder / "parts"
        folder.mkdir()
        shutil.copy(path, folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(document(index, draw))
        path = draw.choice((folder, folder / "model.safetensors.index.json"))
    system = case.write("tiny.toml", toml({**SYSTEM, "weak": None}).encode())
    backbone = draw.choice(((), ("--backbone", BACKBONE), ("--backbone", BACKBONE), ("--backbone", "adm-xs")))
    case.words = draw.choice(
        (
            ("weights", "inspect", path, *backbone), ("weights", "inspect", path, *backbone, "--json"),
            ("weights", "import", path, *backbone, "--out", "made"),
            ("weights", "export", path, *backbone, "--format", draw.choice(("dit", "diffusers", "guided-diffusion")), "--out", "made"),
            ("sample", "--system", system, "--weights", f"base={path}", "--samples", 2, "--sampling-steps", 1, "--device", "cpu"),
            ("sample", "--system", system, "--weights", f"base={path}", "--samples", 2, "--sampling-steps", 1, "--device", "cpu"),
            ("data", "verify", path),
            ("evaluate", case.samples(), "--suite", "adm", "--inception", path, "--reference", "samples.npz"),
            ("evaluate", case.samples(), "--suite", "embedded:fd", "--features-weights", path),
        )
    )  # fmt: skip


def _damaged(tensor, draw, torch):
    """The tensor in another dtype, shape or form, or something else instead of it."""
    return draw.choice(
        (
            lambda: tensor.to(
                draw.choice(
                    (torch.float64, torch.int32, torch.bool, torch.complex64, torch.bfloat16, torch.float8_e4m3fn)
                )
            ),
            lambda: tensor[None],
            lambda: tensor.reshape(-1),
            lambda: tensor[:0],
            lambda: tensor.sum(),
            lambda: torch.full_like(tensor, float("nan")),
            lambda: tensor.to_sparse() if tensor.ndim == 2 else tensor,
            lambda: tensor.expand(1, *tensor.shape),
            lambda: torch.nn.Parameter(tensor),
            lambda: tensor.to("meta"),
            lambda: draw.choice((None, 1, "x", [], {}, tensor.numpy(), b"x", (tensor, tensor))),
        )
    )()


def _plain(value):
    torch = sys.modules["torch"]
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
    )


def _cycle(state):
    table = {"model": dict(state)}
    table["self"] = table
    return table


def of_npz(case):
    draw = case.draw
    images, labels = case.world.images, case.world.labels
    kind = draw.randrange(8)
    if kind < 3:
        file = draw.choice(("stored.npz", "deflated.npz", "reference.npz"))
        path = case.write(file, mutated(case.world.bytes[file], case.rs()))
    else:
        images = draw.choice(
            (
                images, images, images.astype(draw.choice(("f4", "f8", "i8", "?", ">u2", "S3", "c8", "M8[s]"))), images[:, :0], images[:0],
                images[:1], images[..., 0], images[None], images.transpose(0, 3, 1, 2), np.repeat(images, draw.choice((2, 3, 4)), axis=3), images.T,
                np.zeros((), "u1"), np.array([None]), np.zeros_like(images), images[:, ::-1], np.asfortranarray(images),
                np.zeros(3, [("a", "u1")]), np.tile(images, (1, draw.choice((2, 50)), 2, 1)), images // 255,
            )
        )  # fmt: skip
        labels = draw.choice(
            (
                labels, labels, labels.astype("f4"), labels + 1, labels - 5, labels[:3], labels[:, None], labels.astype("U3"), labels * 2**40,
                labels * np.nan, labels.astype("?"), np.array(3), np.array([None] * len(labels)), np.zeros((0,), "i8"), labels.astype("u8"),
            )
        )  # fmt: skip
        arrays = {"arr_0": images, "arr_1": labels}
        if draw.random() < 0.3:
            arrays.pop(draw.choice(list(arrays)))
        if draw.random() < 0.3:
            d = draw.choice((1, 6, 6, 6, 7, 0))
            arrays["mu"] = draw.choice(
                (np.zeros(d), np.full(d, np.nan), np.zeros((d, 1)), np.zeros(d, "f2"), np.array("x"), np.full(d, 1e308))
            )
            arrays["sigma"] = draw.choice((np.eye(d), -np.eye(d), np.full((d, d), np.inf), np.eye(d)[None], np.eye(d, dtype="c8"), np.triu(np.ones((d, d))), np.eye(d) * 1e300))  # fmt: skip
        if draw.random() < 0.1:
            arrays[draw.choice(("x", "arr_2", "meta", "mu_s", "../x"))] = np.zeros(2)
        path = case.folder / draw.choice(("s.npz", "s.npz", "s.npz", "s.npy"))
        if path.suffix == ".npy":
            np.save(path, images, allow_pickle=True)
        else:
            draw.choice((np.savez, np.savez_compressed))(path, **arrays)
    samples = case.samples("good.npz")
    protocol = case.write("mine.toml", toml(PROTOCOL).encode())
    case.words = draw.choice(
        (
            ("evaluate", path, *EMBEDDED), ("evaluate", path, *EMBEDDED, "--reference", samples), ("evaluate", path, *EMBEDDED, "--reference", path),
            ("evaluate", samples, *EMBEDDED, "--reference", path), ("evaluate", samples, "--suite", "tiny:fd", "--reference", path, "--json"),
            ("evaluate", path, *EMBEDDED, "--neighbours", "n.png"), ("data", "reference", path, "--suite", "tiny", "--out", "made.npz"),
            ("data", "verify", path), ("data", "reference", path, "--suite", "tiny", "--out", "made.npz", "--images", "3"),
            ("plan", "--backbone", BACKBONE, "--protocol", protocol, "--data", path, "--device", "meta"),
            ("evaluate", samples, *EMBEDDED, "--protocol", protocol, "--data", path),
            ("data", "prepare", "x", "--from", path, "--out", "made", "--resolution", 8), ("data", "latents", path, "--vae", "nowhere", "--out", "made"),
        )
    )  # fmt: skip
    if draw.random() < 0.1:
        case.call = lambda: harness.evaluate_images(
            _batches(draw, images), draw.choice(("digits", "tiny", 3)), name="x", config=tiny()
        )


def _batches(draw, images):
    return draw.choice(
        (
            iter([images]),
            iter([]),
            images,
            [images, None],
            iter([np.atleast_1d(images)[:2], np.atleast_1d(images)[..., :0]]),
            None,
            "x",
        )
    )


def of_folders(case):
    draw, folder = case.draw, case.folder / "tree"
    folder.mkdir()
    for _ in range(draw.choice((0, 1, 2, 3))):
        top = draw.choice(("0", "1", "2", "007", "a", "__MACOSX", "lost+found", "@eaDir", ".hidden", "cache", "-1", "1.5", " ", "\u00e9", os.fsdecode(b"\xff"), "a\nb", "n01440764", "9" * 30))  # fmt: skip
        (folder / top).mkdir(exist_ok=True)
    for i in range(draw.choice((0, 1, 3, 8))):
        within = draw.choice([folder, *(each for each in folder.iterdir() if each.is_dir())])
        stem = draw.choice(
            (f"{i}", f"x{i}", "._x", f" {i}", os.fsdecode(b"\xe9") + str(i), f"a\n{i}", f"-{i}", "9" * 200 + str(i))
        )
        path = within / (
            stem
            + draw.choice(
                (
                    ".png",
                    ".png",
                    ".png",
                    ".PNG",
                    ".jpg",
                    ".bmp",
                    ".gif",
                    ".tif",
                    ".jfif",
                    ".txt",
                    ".json",
                    ".npz",
                    ".tar",
                    ".cls",
                    "",
                )
            )
        )
        kind = draw.randrange(14)
        if path.is_symlink() or path.exists():  # a pipe, perhaps, to which nothing can be written
            continue
        with contextlib.suppress(FileExistsError):
            if kind == 0:
                path.symlink_to(draw.choice((path, "/nowhere", "..", "/dev/zero")))
            elif kind == 1:
                os.mkfifo(path)
            elif kind == 2:
                path.mkdir()
            elif kind == 3:
                path.write_bytes(b"")
            elif kind in (4, 5):
                path.write_bytes(mutated(draw.choice(case.world.pictures), case.rs()))
            elif kind == 6:
                out = io.BytesIO()
                mode = draw.choice(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "HSV"))
                with contextlib.suppress(OSError, ValueError, KeyError):
                    Image.new(mode, draw.choice(((8, 8), (8, 9), (1, 1), (1, 3000), (0, 4)))).save(
                        out, draw.choice(("PNG", "TIFF", "GIF", "BMP", "JPEG", "WEBP"))
                    )
                path.write_bytes(out.getvalue())
            else:
                path.write_bytes(draw.choice(case.world.pictures))
    if draw.random() < 0.1:
        for each in folder.iterdir():
            if not each.is_symlink():
                each.chmod(draw.choice((0, 0o400, 0o755)))
    target = folder
    if draw.random() < 0.25:  # the same in a tar
        import tarfile

        target = case.folder / "tree.tar"
        form = draw.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
        with tarfile.open(target, "w", format=form) as archive, contextlib.suppress(OSError, UnicodeError):
            archive.add(folder, draw.choice(("tree", ".", "", "../x", "/x")))
        if draw.random() < 0.5:
            target.write_bytes(mutated(target.read_bytes(), case.rs()))
    samples = case.samples("good.npz", sidecar=False)
    case.words = draw.choice(
        (
            ("evaluate", target, *EMBEDDED, "--out", "r.jsonl"), ("evaluate", target, *EMBEDDED, "--protocol", "digits"), ("evaluate", samples, *EMBEDDED, "--reference", target),
            ("data", "reference", target, "--suite", "tiny", "--out", "made.npz"), ("data", "prepare", "x", "--from", target, "--out", "made", "--resolution", 8),
            ("data", "prepare", "imagenet", "--from", target, "--out", "made", "--resolution", 8), ("data", "verify", target), ("compare", target, target),
            ("evaluate", folder / "*.png", *EMBEDDED), ("weights", "inspect", target), ("report", "--results", target, "--protocol", "none-of-them", "--out", "page"),
        )
    )  # fmt: skip


def of_python(case):
    """The Python interface with values of other types."""
    draw = case.draw
    things = [
        *OTHERS, b"x", Path("x"), Path("a\0b"), 1 + 2j, object(), int, lambda: 1, iter([1]), {1, 2}, np.float32(3), np.int64(2),
        np.array([1, 2]), np.nan, range(3), "1,2", ("a", 1), [Path()], {"a": None}, {1: 2}, "digits", BACKBONE, "ddim", "2", np.zeros((2, 8, 8, 1), "u1"),
    ]  # fmt: skip

    def some():
        return draw.choice(things)

    def some_but_none():  # None: the suite of the protocol, whose network takes its time
        return draw.choice([each for each in things if each is not None])

    samples = case.samples()
    shared = {"backbone": BACKBONE, "device": "meta"}
    names = ("protocol", "steps", "match", "budget", "seed", "data", "framework", "settings", "precision", "compile", "micro_batch", "device", "mesh", "out", "sampling_steps", "samples", "sampler", "eta", "spacing", "ema_width", "cfg", "guidance_channels", "labels", "sampling_seed", "match_sampling")  # fmt: skip
    case.call = draw.choice(
        (
            lambda: harness.plan(**{**shared, draw.choice(names): some()}),
            lambda: harness.plan(**{**shared, draw.choice(names): some(), draw.choice(names): some()}),
            lambda: harness.plan(backbone=some()),
            lambda: harness.train(**{**shared, draw.choice(("loggers", "logger", "fork", "gradient_checkpointing", "protocol", "data", "seed")): some()}),
            lambda: harness.sample(run=some()),
            lambda: harness.sample(system=some(), weights=some()),
            lambda: harness.sample(system="digits-guided", weights={some_key(draw): some()}),
            lambda: harness.evaluate(some(), suite="tiny"),
            lambda: harness.evaluate(samples, suite=some_but_none()),
            lambda: harness.evaluate(samples, suite="tiny", **{draw.choice(("protocol", "data", "reference", "features_weights", "backend", "device", "name", "out", "cache", "neighbours", "allow")): some()}),
            lambda: harness.evaluate_images(some(), "digits", name="x", config=tiny()),
            lambda: harness.evaluate_images(iter([case.world.images]), "digits", some(), name="x", config=tiny()),
            lambda: harness.evaluate_images(iter([case.world.images]), "digits", name="x", config=some_but_none()),
            lambda: harness.evaluate_images(iter([case.world.images]), some(), name="x", config=tiny()),
            lambda: harness.evaluate_images(iter([case.world.images]), "digits", name=some(), config=tiny()),
            lambda: harness.evaluate_images(iter([case.world.images]), "digits", name="x", config=tiny(), count=some()),
            lambda: harness.evaluate_images(iter([case.world.images, some()]), "digits", name="x", config=tiny()),
            lambda: harness.evaluate_images(iter([case.world.images]), "digits", name="x", config=tiny(), labels=some()),
            lambda: harness.compare(some(), some()),
            lambda: harness.compare(samples, samples, step=some()),
            lambda: harness.report(results=some(), protocol="none-of-them"),
            lambda: harness.load_records(some()),
            lambda: harness.get_backbone(some()),
            lambda: harness.get_protocol(some()),
            lambda: harness.register_backbone(some()),
            lambda: harness.get_backbone(BACKBONE).count(**{draw.choice(("input_size", "in_channels", "num_classes", "depth", "x")): some()}),
            lambda: harness.get_backbone(BACKBONE).build("torch", **{draw.choice(("input_size", "in_channels", "num_classes", "depth", "x")): draw.choice((1, 3, "x", None, -1, [], 0.5))}),
            lambda: harness.get_backbone(BACKBONE).build(some()),
        )
    )  # fmt: skip
    case.loose = True


def some_key(draw):
    return draw.choice(("base", "classifier", "x", "", 1, None))
