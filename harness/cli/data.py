"""`harness data`: data sets for training, references for evaluation, and public files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from evaluators.features import INCEPTION_BACKENDS
from harness.cli.flags_from_settings import COUNT, PATH, TEXT, Value, entry_option, json_option, plugin_option
from harness.io.text import read_path


@click.group("data")
def command() -> None:
    """Data sets for training, references for evaluation, and public files."""


@command.command("prepare", short_help="Make a data set for training from images in classes.")
@click.argument("name", metavar="NAME")
@click.option("--from", "source", type=PATH, required=True, metavar="PATH", help="Where the images are.")
@click.option("--out", type=PATH, required=True, metavar="DIR", help="Where to write. Nothing is overwritten.")
@click.option(
    "--resolution",
    type=click.IntRange(1, 4096),
    default=256,
    show_default=True,
    help="Pixels per side after ADM's center crop.",
)
@json_option
def prepare(name: str, source: Path, out: Path, resolution: int, as_json: bool) -> None:
    """Decode and crop the images at PATH once, into a folder that training maps (--data DIR).

    NAME: imagenet, whose 1,000 classes and their order are checked, or a name for a data set of your own. PATH: class
    folders, ILSVRC2012_img_train.tar, webdataset shards, or the parquet files of a Hugging Face data set (extra
    parquet). If the command is killed, the same command continues.

    \b
        harness data prepare imagenet --from ILSVRC2012_img_train.tar --out imagenet-256
        harness data prepare birds --from birds/train --out birds-64 --resolution 64
    """
    from harness.data.prepare import prepare as prepare_dataset
    from harness.data.prepared import facts

    made = prepare_dataset(name, source, out, resolution=resolution)
    meta = made.meta
    if as_json:
        click.echo(json.dumps({"folder": str(made.folder), "new": made.new, **facts(meta)}, indent=2))
        return
    shape = "x".join(map(str, meta.shape[1:]))
    click.echo(f"{made.folder}: {'written' if made.new else 'exists already, the same data set'}")
    click.echo(f"  {meta.images:,} images {shape} in {len(meta.classes):,} classes, sha256 {meta.sha256[:12]}")


def _read_source(value: str) -> str:
    """The name of a data set, or a path as it was written: ./digits is no data set. ValueError if it is empty."""
    read_path(value)
    return value


@command.command("reference", short_help="Make an evaluation reference from images.")
@click.argument("source", type=Value("text", _read_source))
@plugin_option
@click.option("--out", type=PATH, required=True, metavar="FILE.npz", help="Where to write. Nothing is overwritten.")
@click.option(
    "--suite", type=TEXT, default="adm", show_default=True, metavar="NAME", help="A name of `harness list suites`."
)
@click.option(
    "--inception",
    "--features-weights",
    "weights",
    type=PATH,
    metavar="FILE",
    help="Weights of the suite's network; for suite adm classify_image_graph_def.pb, or its torch port.",
)
@entry_option
@click.option(
    "--backend",
    type=click.Choice(list(INCEPTION_BACKENDS)),
    default="torch",
    show_default=True,
    help="Framework that runs the Inception network.",
)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1; of JAX also tpu.")
@click.option("--images", type=COUNT, metavar="N", help="Keep N images for precision and recall. [default: all]")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the choice of N images."
)
@click.option("--data", type=PATH, metavar="PATH", help="Path of the data set, if SOURCE is one that needs it.")
@click.option(
    "--cache",
    type=PATH,
    metavar="DIR",
    help="Folder of features that were computed before. [default: $HARNESS_CACHE, or backbone-harness in $XDG_CACHE_HOME "
    "or ~/.cache]",
)
@json_option
def reference(
    source: str,
    out: Path,
    suite: str,
    weights: Path | None,
    entry: str | None,
    backend: str,
    device: str,
    images: int | None,
    seed: int,
    data: Path | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Make a reference file for evaluation: statistics of all images of SOURCE, and images for precision and recall.

    SOURCE: a folder of image files, an .npz or .npy, shards (.npz, .tar), a pattern of these, or a name of `harness list
    datasets`. If the command is killed, the same command continues.

    \b
        harness data reference train/ --out train.npz --images 10k --inception classify_image_graph_def.pb
        harness evaluate samples.npz --suite adm --reference train.npz --inception classify_image_graph_def.pb
    """
    from evaluators.suites import get_suite
    from harness.data.cache_dir import features
    from harness.io import files
    from harness.pipeline.evaluate import log_notes
    from harness.pipeline.evaluation_config import make_config
    from harness.pipeline.make_reference import make_reference, open_source

    files.check_output(out, "--out")
    config = make_config(get_suite(suite), weights, backend, reference=None, device=device, entry=entry)
    found = open_source(source, data)
    log_notes([found])
    made = make_reference(
        found,
        out,
        config.suite,
        weights=config.weights,
        entry=config.entry,
        images=images,
        seed=seed,
        cache=features(cache),
        device=device,
    )
    about, notes = made.about, log_notes([found])
    if as_json:
        facts = {"file": str(out), "written": made.written, "reference_sha256": about.sha256, "notes": notes}
        click.echo(json.dumps({**facts, **dataclasses.asdict(about)}, indent=2))
        return
    height, width, channels = about.shape
    click.echo(f"{out}: {'written' if made.written else 'exists already, the same reference'}")
    click.echo(f"  {about.images:,} images {height}x{width}x{channels}, {about.kept:,} kept for precision and recall")
    click.echo(f"  statistics of {about.features} ({about.features_sha256[:12]}), reference {about.sha256[:12]}")


@command.command("latents", short_help="Encode images by a VAE once, for training in its latents.")
@click.argument("images", type=TEXT, metavar="IMAGES")
@plugin_option
@click.option(
    "--vae",
    type=TEXT,
    required=True,
    metavar="DIR|NAME",
    help="A diffusers AutoencoderKL (a folder, or ft-ema, ft-mse), or a name of `harness list autoencoders`.",
)
@entry_option
@click.option("--out", type=PATH, required=True, metavar="DIR", help="The folder to make.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1. [default: an accelerator if there is one]")
@json_option
def latents(images: str, vae: str, entry: str | None, out: Path, device: str | None, as_json: bool) -> None:
    """Encode every image and its mirror image once: means and standard deviations of the posteriors, which training
    samples from.

    IMAGES: a folder of `harness data prepare`, an .npz in ADM's layout, or a name of `harness list datasets`. If the
    command is killed, the same command continues.

    \b
        harness data prepare imagenet --from PATH --out imagenet-256 --resolution 256
        harness data latents imagenet-256 --vae ft-ema --out imagenet-256-latents
        harness run --backbone dit-xl-2 --protocol imagenet-256 --data imagenet-256-latents
    """
    from harness.data.encode import existing_cache, make_cache
    from harness.data.latents import read_meta
    from harness.data.load import open_image_set

    source = open_image_set(images)
    meta = existing_cache(source, vae, out, entry)
    new = False
    if meta is None:  # no cache, an incomplete one, or one of other images or another VAE, which make_cache refuses
        from harness.autoencoders.load import load_autoencoder
        from harness.engines.torch.resolve import device_name, pick_device
        from harness.runs.provenance import environment

        target = pick_device(device)
        encoder = load_autoencoder(vae, device=str(target), flag="--vae DIR", entry=entry)
        new = make_cache(source, encoder, out, environment=environment(device_name(target)))
        meta = read_meta(out)
    if as_json:
        facts = {"images": meta.images, "vae": meta.vae, "shape": meta.shape, "sha256": meta.sha256}
        click.echo(json.dumps({"folder": str(out), "written": new, **facts}, indent=2))
        return
    click.echo(f"{out}: {'written' if new else 'exists already, the same latents'}")
    click.echo(f"  {meta.shape[0]:,} images of {meta.images['name']}, latents {'x'.join(map(str, meta.latent_shape))}")
    click.echo(f"  by {meta.vae['name']} ({meta.vae['weights_sha256'][:12]}), scale {meta.scale:g}; {meta.sha256[:12]}")


@command.command("fetch", short_help="Download a public file of evaluation, or a data set.")
@click.argument("name", metavar="NAME", required=False)
@click.option(
    "--out",
    type=PATH,
    metavar="PATH",
    help="Where to write: a file, or the folder of a data set. [default: the working folder; for a data set the folder "
    "where `harness run` finds it]",
)
@click.option("--url", metavar="URL", help="Another address: of the file, or of a .tgz that holds it.")
@json_option
def fetch(name: str | None, out: Path | None, url: str | None, as_json: bool) -> None:
    """Download a public file, or the files of a data set, and check them. If a download breaks off, the same command
    continues it. Without NAME: list what there is.

    \b
        harness data fetch inception
        harness data fetch fashion-mnist
        harness data fetch cifar-10
    """
    from harness.data.fetch import fetch as fetch_file
    from harness.data.fetch import fetch_dataset
    from harness.data.public_files import DATASETS, FILES
    from harness.errors import UserError
    from harness.registry import unknown

    if name is None:
        width = max(map(len, FILES))
        for file in FILES.values():
            click.echo(f"{file.name:<{width}}  {file.file}: {file.summary}")
        for dataset in DATASETS.values():
            click.echo(f"{dataset.name:<{width}}  {dataset.summary}")
        return
    if name not in FILES and name not in DATASETS:
        raise UserError(unknown("public file", name, [*FILES, *DATASETS]))
    fetched = fetch_dataset(DATASETS[name], out, url) if name in DATASETS else [fetch_file(FILES[name], out, url)]
    if as_json:
        facts = [{**dataclasses.asdict(each), "path": str(each.path)} for each in fetched]
        click.echo(json.dumps(facts if name in DATASETS else facts[0], indent=2))
        return
    for each in fetched:
        verified = f"md5 {each.md5}, as published" if each.verified else "unverified: no published hash"
        click.echo(f"{each.path}: {'' if each.new else 'exists already; '}{each.bytes:,} bytes, {verified}")
        click.echo(f"  sha256 {each.sha256}")


@command.command("verify", short_help="Say what a file or data set is, and whether its hashes hold.")
@click.argument("file", type=PATH, metavar="PATH")
@json_option
def verify(file: Path, as_json: bool) -> None:
    """Say what PATH is (a reference, weights of the Inception network, a prepared data set, a cache of latents), and
    compare every byte with its own or the published hashes. Exit code 2 if one differs."""
    from harness.data.verify import verify as verify_path

    verdict = verify_path(file)
    click.echo(json.dumps(verdict._asdict(), indent=2) if as_json else f"{file}: {verdict.text}")
