"""The public files of evaluation and data sets: addresses, sizes and hashes.

Sources: openai/guided-diffusion, evaluations/README.md and evaluator.py; TensorFlow's models, classify_image.py;
zalandoresearch/fashion-mnist, README.md (with md5); https://www.cs.toronto.edu/~kriz/cifar.html (with md5). OpenAI
publishes no hashes: the two md5 of its files are those that others report of their copies.
"""

from __future__ import annotations

from dataclasses import dataclass

from evaluators.features.inception_graph import GRAPH_MD5, GRAPH_NAME, GRAPH_SIZE, GRAPH_URL

# address of the folder of ADM's evaluation, which holds the graph and the reference batches
_BATCHES = GRAPH_URL.rpartition("/")[0]


@dataclass(frozen=True, kw_only=True)
class PublicFile:
    """A file that others publish.

    name: for `harness data fetch`. file: its name on disk. urls: tried in turn; an address may also give a gzipped tar
    that holds the file. size: in bytes; size and md5 are None where they are not published. start: the file's first
    bytes; empty: not checked.
    """

    name: str
    file: str
    summary: str
    urls: tuple[str, ...]
    size: int | None = None
    md5: str | None = None
    start: bytes = b""


def _batch(name: str, path: str, summary: str, size: int | None = None, md5: str | None = None) -> PublicFile:
    """A reference batch of ADM. path: below `_BATCHES`."""
    return PublicFile(
        name=name,
        file=path.rpartition("/")[2],
        summary=summary,
        urls=(f"{_BATCHES}/{path}",),
        size=size,
        md5=md5,
        start=b"PK",  # an npz is a zip
    )


FILES = {
    each.name: each
    for each in (
        PublicFile(
            name="inception",
            file=GRAPH_NAME,
            summary="the network of ADM's evaluator, for suite adm (96 MB)",
            urls=(GRAPH_URL, "http://download.tensorflow.org/models/image/imagenet/inception-2015-12-05.tgz"),
            size=GRAPH_SIZE,
            md5=GRAPH_MD5,
        ),
        _batch("imagenet-64", "imagenet/64/VIRTUAL_imagenet64_labeled.npz", "ADM's reference batch of ImageNet 64"),
        _batch("imagenet-128", "imagenet/128/VIRTUAL_imagenet128_labeled.npz", "ADM's reference batch of ImageNet 128"),
        _batch("imagenet-256", "imagenet/256/VIRTUAL_imagenet256_labeled.npz", "the reference of the paper at 256 (2 GB)"),
        _batch("imagenet-512", "imagenet/512/VIRTUAL_imagenet512.npz", "the reference of the paper at 512 (0.9 GB)"),
        _batch(
            "lsun-bedroom", "lsun/bedroom/VIRTUAL_lsun_bedroom256.npz", "ADM's reference batch of LSUN bedroom",
            size=1_054_074_338, md5="765035466f3da1de10de3b72ff1a361b",
        ),
        _batch("lsun-cat", "lsun/cat/VIRTUAL_lsun_cat256.npz", "ADM's reference batch of LSUN cat"),
        _batch("lsun-horse", "lsun/horse/VIRTUAL_lsun_horse256.npz", "ADM's reference batch of LSUN horse"),
    )
}  # fmt: skip

_FASHION_MNIST = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion",
)
_CIFAR_10 = "cifar-10-binary.tar.gz"


@dataclass(frozen=True, kw_only=True)
class PublicDataset:
    """A data set whose files are fetched together."""

    name: str
    summary: str
    files: tuple[PublicFile, ...]


DATASETS = {
    "fashion-mnist": PublicDataset(
        name="fashion-mnist",
        summary="the four files of Fashion-MNIST, for protocol fashion-mnist-32 (31 MB)",
        files=tuple(
            PublicFile(
                name=file, file=file, summary="", urls=tuple(f"{base}/{file}" for base in _FASHION_MNIST),
                size=size, md5=md5,
            )
            for file, size, md5 in (
                ("train-images-idx3-ubyte.gz", 26_421_880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                ("train-labels-idx1-ubyte.gz", 29_515, "25c81989df183df01b3e8a0aad5dffbe"),
                ("t10k-images-idx3-ubyte.gz", 4_422_102, "bef4ecab320f06d8554ea6380940ec79"),
                ("t10k-labels-idx1-ubyte.gz", 5_148, "bb300cfdad3c16e7a12a480ee83cd310"),
            )
        ),
    ),
    "cifar-10": PublicDataset(
        name="cifar-10",
        summary="the binary version of CIFAR-10, for protocol cifar10-32 (170 MB)",
        files=(
            PublicFile(
                name=_CIFAR_10, file=_CIFAR_10, summary="", urls=(f"https://www.cs.toronto.edu/~kriz/{_CIFAR_10}",),
                size=170_052_171, md5="c32a1d4ab5d03f1284b67883e8d87530",
            ),
        ),
    ),
}  # fmt: skip
