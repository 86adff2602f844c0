"""Small ImageNets of real JPEG files: cuttings of scikit-learn's two sample photographs, in folders of WordNet ids.

`make_tree` makes the class folders; `as_tars`, `as_shards` and `as_parquet` pack a tree as others keep it.
"""

import functools
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from harness.data import imagenet


@functools.cache
def _photographs():
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(each) for each in load_sample_images().images]  # 640x427 each


def cutting(random, sides=(40, 90)):
    """A photograph (RGB) of sides drawn from `sides`, cut from one of the two at random."""
    photograph = _photographs()[random.randint(2)]
    width, height = random.randint(*sides, 2)
    left, top = random.randint(photograph.width - width), random.randint(photograph.height - height)
    return photograph.crop((left, top, left + width, top + height))


def jpeg(image, **options):
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88, **options)
    return out.getvalue()


def make_tree(folder, classes=10, images=4, sides=(40, 90), seed=0):
    """`images` JPEG files for each of the first `classes` classes of ImageNet (or the names given), below `folder`.
    Returns the paths in the order in which a prepared data set has them."""
    names = imagenet.classes()[:classes] if isinstance(classes, int) else classes
    random, paths = np.random.RandomState(seed), []
    for name in names:
        place = Path(folder) / name
        place.mkdir(parents=True)
        for number in sorted(random.choice(10 * images + 9, images, replace=False), key=str):
            paths.append(place / f"{name}_{number}.JPEG")
            paths[-1].write_bytes(jpeg(cutting(random, sides)))
    return paths


def linked(tree, folder):
    """A copy of a tree that can be changed."""
    shutil.copytree(tree, folder, copy_function=os.link)
    return folder


def as_tars(tree, path):
    """The official form: a tar of one tar a class. Members lie in any order."""
    with tarfile.open(path, "w") as outer:
        for place in sorted(tree.iterdir(), reverse=True):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for each in sorted(place.iterdir(), key=lambda each: each.name[::-1]):
                    tar.add(each, each.name)
            info = tarfile.TarInfo(f"{place.name}.tar")
            info.size = len(inner.getvalue())
            outer.addfile(info, io.BytesIO(inner.getvalue()))
    return path


def shuffled(tree, seed=1):
    """(label, path) of every file, shuffled as shards are."""
    rows = [(label, each) for label, place in enumerate(sorted(tree.iterdir())) for each in sorted(place.iterdir())]
    return [rows[i] for i in np.random.RandomState(seed).permutation(len(rows))]


def as_shards(tree, folder, images=7, relabel=lambda label, path: label):
    """Webdataset: tars of KEY.jpg beside KEY.cls."""
    folder.mkdir()
    rows = shuffled(tree)
    for start in range(0, len(rows), images):
        with tarfile.open(folder / f"train-{start:06d}.tar", "w") as tar:
            for label, path in rows[start : start + images]:
                members = {"jpg": path.read_bytes(), "cls": str(relabel(label, path)).encode(), "json": b"{}"}
                for kind, data in members.items():
                    info = tarfile.TarInfo(f"{path.stem}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def as_parquet(tree, folder, images=9, group=4, relabel=lambda label, path: label, classes=None, hub_names=True):
    """A data set of the Hugging Face hub as it lies on the disk: shards of {image: {bytes, path}, label}."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    (folder / "data").mkdir(parents=True)
    label_type = {"_type": "ClassLabel", "names": list(classes)} if classes else {"_type": "Value", "dtype": "int64"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": label_type}}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps(features)},
    )
    rows = shuffled(tree, 2)
    shards = range(0, len(rows), images)
    for number, start in enumerate(shards):
        part = [
            {
                "image": {
                    "bytes": path.read_bytes(),
                    "path": f"{path.stem}_{path.parent.name}.JPEG" if hub_names else path.name,
                },
                "label": relabel(label, path),
            }
            for label, path in rows[start : start + images]
        ]
        table = pa.Table.from_pylist(part, schema=schema)
        name = f"train-{number:05d}-of-{len(shards):05d}.parquet"
        parquet.write_table(table, folder / "data" / name, row_group_size=group)
    return folder
