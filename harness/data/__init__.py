"""Data sets: real images and their labels, known by name.

A `DatasetSpec` is an address; the images are read when `load` is called. Plug-ins add their own through the entry-point
group "harness.datasets".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import UserError
from harness.spec import load_attribute

if TYPE_CHECKING:
    from harness.data.images import ImageSet


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set known by name. `loader` is "module:attribute" of a function (folder: Path | None) -> ImageSet.

    finder: of a function (folder: Path | None, resolution: int | None) -> str | None that says, without reading the
    images, what is lacking and how to get it. Empty: whatever `loader` needs is there, but for the folder.
    """

    name: str
    summary: str
    loader: str
    needs_folder: bool = False  # True: `--data` must name where the files are
    finder: str = ""

    def missing(self, folder: Path | None = None, resolution: int | None = None) -> str | None:
        """What `load` would lack to have images of `resolution` pixels a side (None: of any), with the way to get it, in
        one line; None: nothing that can be told beforehand."""
        if folder is not None and not folder.exists():
            return f"{folder} does not exist"
        if self.finder:
            return load_attribute(self.finder, f"finder of data set {self.name!r}")(folder, resolution)
        return "name its place with --data PATH" if self.needs_folder and folder is None else None

    def load(self, folder: Path | None = None) -> ImageSet:
        """Read the images; what is missing is refused with the way to get it."""
        if self.needs_folder and folder is None:
            raise UserError(f"data set {self.name!r} is not on this machine: {self.missing()}")
        return load_attribute(self.loader, f"loader of data set {self.name!r}")(folder)


BUILT_IN = (
    DatasetSpec(
        name="digits",
        summary="1,797 real handwritten digits, 8x8x1, 10 classes; carried by scikit-learn",
        loader="harness.data.digits:load",
    ),
    DatasetSpec(
        name="fashion-mnist",
        summary="70,000 real pictures of clothing, 28x28x1 padded to 32x32x1, 10 classes; `harness data fetch fashion-mnist`",
        loader="harness.data.fashion_mnist:load",
        finder="harness.data.fashion_mnist:missing",
    ),
    DatasetSpec(
        name="imagenet",
        summary="1,281,167 photographs in 1,000 classes, made by `harness data prepare imagenet`; --data FOLDER",
        loader="harness.data.prepared:load_imagenet",
        needs_folder=True,
        finder="harness.data.prepared:missing_imagenet",
    ),
    DatasetSpec(
        name="prepared",
        summary="any images in classes, made by `harness data prepare NAME`; --data FOLDER",
        loader="harness.data.prepared:load",
        needs_folder=True,
        finder="harness.data.prepared:missing",
    ),
    DatasetSpec(
        name="npz",
        summary="any images in an .npz of ADM's layout (arr_0 uint8 NHWC, arr_1 labels); --data FILE",
        loader="harness.data.npz:load",
        needs_folder=True,
    ),
)
