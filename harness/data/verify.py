"""Verification of references, weights, prepared data sets and caches of latents against their hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from evaluators.reference_file import STATISTICS, About, check_content, read_about
from harness.data import imagenet, latents
from harness.data.prepared import CHUNK_IMAGES, damaged_chunks, read_meta
from harness.data.public_files import FILES
from harness.errors import UserError
from harness.images.npz import holds_statistics_alone, open_npz_file
from harness.images.open import open_images
from harness.images.source import ImageSource
from harness.io import files
from harness.io.processors import processors
from harness.io.progress import Bar


class Verdict(NamedTuple):
    """The result of a verification without errors.

    kind: of file, in words. holds: True: all hashes are right; None: there is no hash to compare with. text: what the
    file is, in one line.
    """

    kind: str
    holds: bool | None
    text: str


def verify(path: Path) -> Verdict:
    """Read every byte of a reference, Inception weights, a prepared data set or a cache of latents.

    UserError where it is damaged or differs from its own description, and for weights that are not the public ones.
    """
    if path.is_dir() and latents.is_cache(path):
        return Verdict("latents", True, latents.verify(path))
    if path.is_dir():
        return _verify_prepared(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; name a reference (.npz), {FILES['inception'].file}, or a folder of `harness data "
            "prepare` or `harness data latents`"
        )
    if path.suffix.lower() == ".npz":
        return _verify_npz(path)
    # any other file can only be the weights
    from evaluators.features.inception_graph import read_weights

    weights = read_weights(path)
    if not weights.known:
        raise UserError(f"{path} holds {weights.found}")
    return Verdict("weights", True, f"weights of ADM's evaluator: {weights.found}; features {weights.sha256[:12]}")


def _verify_prepared(folder: Path) -> Verdict:
    """Compare every chunk of a prepared data set with its hash, and the classes of ImageNet with the 1,000."""
    meta = read_meta(folder)
    if meta.name == imagenet.NAME and meta.classes != imagenet.classes():
        pairs = enumerate(zip(meta.classes, imagenet.classes(), strict=False))
        # 0 if one list of classes is the beginning of the other
        label = next((label for label, (found, wanted) in pairs if found != wanted), 0)
        raise UserError(f"{folder}: its classes are not ImageNet's in their order (label {label}); prepare it again")
    with Bar("verify", meta.images, "images") as bar:
        damaged = damaged_chunks(folder, meta, bar.advance, processors())
    if damaged:
        first = damaged[0] * CHUNK_IMAGES
        last = min(first + CHUNK_IMAGES, meta.images) - 1
        more = "" if len(damaged) == 1 else f"; so do {len(damaged) - 1:,} more of {len(meta.chunks):,} chunks"
        raise UserError(
            f"{folder}: chunk {damaged[0]} (images {first:,} to {last:,}, or their labels) differs from its hash{more}: damaged; "
            "prepare the data set again"
        )
    shape = "x".join(map(str, meta.shape[1:]))
    text = f"data set {meta.name}: {meta.images:,} images {shape} in {len(meta.classes):,} classes, crop {meta.crop}"
    return Verdict("prepared data set", True, f"{text}; all {len(meta.chunks):,} chunks as hashed; {meta.sha256[:12]}")


def _verify_npz(path: Path) -> Verdict:
    """Check a reference of this harness against its description, or a reference batch of ADM against its published md5."""
    if holds_statistics_alone(path):
        text = "mu and sigma without images; unverified: no published hash"
        return Verdict("statistics", None, f"{text}; sha256 {files.sha256_file(path)}")
    source = open_images(path, any_arr_1=True)
    with open_npz_file(path) as file:
        if (damaged := file.damaged_member()) is not None:
            raise UserError(f"{path}: {damaged} differs from its checksum: damaged; make or fetch it again")
    shape = "x".join(map(str, source.shape))
    about = read_about(path)
    if about is not None:
        _check_about(path, source, about)
        kept = "all" if about.kept == about.images else f"{about.kept:,}"
        text = (
            f"reference of {about.source}: {about.images:,} images {shape}, {kept} kept, statistics of {about.features}"
            f" ({about.features_sha256[:12]}); reference {about.sha256[:12]}"
        )
        return Verdict("reference", True, text)
    if not {"mu", "sigma"} <= set(source.extra_arrays):
        raise UserError(f"{path} holds {source.count:,} images {shape} and no statistics: it is no reference")
    public = next((each for each in FILES.values() if each.file == path.name), None)
    text = f"reference batch in ADM's layout: {source.count:,} images {shape}, {', '.join(sorted(source.extra_arrays))}"
    if public is None or public.md5 is None:
        return Verdict(
            "reference batch", None, f"{text}; unverified: no published hash; sha256 {files.sha256_file(path)}"
        )
    with path.open("rb") as stream:
        md5 = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 != public.md5:
        raise UserError(f"{path} has md5 {md5}, but the public {public.file} {public.md5}; fetch it again")
    return Verdict("reference batch", True, f"{text}; md5 {md5}, as published")


def _check_about(path: Path, source: ImageSource, about: About) -> None:
    """UserError where the arrays of a reference file differ from its description `about`. source: its images."""
    with open_npz_file(path) as file:
        arrays = {name: file.read(name) for name in file.names if name in (*STATISTICS, "label_counts")}
    check_content(path, about, arrays, source.sha256())
    if (source.count, tuple(source.shape)) != (about.kept, about.shape):
        raise UserError(f"{path}: it says {about.kept} images {about.shape}, there are {source.count} {source.shape}")
    if "label_counts" in arrays and int(arrays["label_counts"].sum()) != about.images:
        raise UserError(f"{path}: its labels count {int(arrays['label_counts'].sum())} images of {about.images}")
