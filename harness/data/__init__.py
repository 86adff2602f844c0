"""Data sets: real images with labels, known by name.

A `DatasetSpec` says how to find and load one; images are read when `load` is called. Plug-ins add data sets through the
entry-point group "harness.datasets".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import RunError, UserError, one_line
from harness.spec import load_attribute

if TYPE_CHECKING:
    from harness.data.images import ImageSet

    Loader = Callable[[Path | None], ImageSet]
    Namer = Callable[[Mapping[str, str]], tuple[tuple[str, ...], ...]]
    Finder = Callable[[Path | None, int | None], str | None]


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set known by name.

    loader: "module:attribute" of a function (folder: Path | None) -> ImageSet. finder: "module:attribute" of a function
    (folder: Path | None, resolution: int | None) -> str | None. Without reading the images it returns what is missing
    and how to get it, in one line, or None. An empty finder: nothing but the folder can be missing. images: number of
    training images, which is the length of an epoch; None: it depends on the folder. namer: "module:attribute" of a
    function (source paths of a run, see `harness.data.examples`) -> the names of each class in the order of labels, the
    first of them for display; empty: classes have numbers alone.
    """

    name: str
    summary: str
    loader: str
    needs_folder: bool = False  # whether `--data` must name the files
    finder: str = ""
    images: int | None = None
    namer: str = ""

    def class_names(self, source_paths: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
        """The names of each class in the order of labels; empty where they are not known. source_paths: of a run."""
        if not self.namer:
            return ()
        names: Namer = load_attribute(self.namer, f"namer of data set {self.name!r}")
        return names(source_paths)

    def missing(self, folder: Path | None = None, resolution: int | None = None) -> str | None:
        """What is missing before the data set can be loaded, and how to get it, in one line; None: nothing, so far as
        is known without reading the images.

        folder: what --data names, for some data sets a file; None: not given. resolution: pixels per side that the
        images must have; None: any.
        """
        if folder is not None and not folder.exists():
            return f"{folder} does not exist"
        if self.finder:
            find: Finder = load_attribute(self.finder, f"finder of data set {self.name!r}")
            return find(folder, resolution)
        return "name its path with --data PATH" if self.needs_folder and folder is None else None

    def load(self, folder: Path | None = None) -> ImageSet:
        """The images and labels. UserError, which says how to get it, where it is missing. folder: as in `missing`."""
        if self.needs_folder and folder is None:
            raise UserError(f"data set {self.name!r} is not on this machine: {self.missing()}")
        from harness.data.images import ImageSet

        loader: Loader = load_attribute(self.loader, f"loader of data set {self.name!r}")
        try:
            images = loader(folder)
        except (UserError, RunError, MemoryError, OSError):
            raise
        except Exception as error:  # other people's code can raise anything
            raise UserError(f"data set {self.name!r}: its loader {self.loader} failed: {one_line(error)}") from error
        if not isinstance(images, ImageSet):
            raise UserError(
                f"data set {self.name!r}: its loader {self.loader} gave a {type(images).__name__}, not a harness.ImageSet"
            )
        return images


BUILT_IN = (
    DatasetSpec(
        name="digits",
        images=1_797,
        summary="1,797 real handwritten digits, 8x8x1, 10 classes; part of scikit-learn",
        loader="harness.data.digits:load",
    ),
    DatasetSpec(
        name="fashion-mnist",
        images=70_000,
        summary="70,000 pictures of clothing, 28x28x1 padded to 32x32x1, 10 classes; `harness data fetch fashion-mnist`",
        loader="harness.data.fashion_mnist:load",
        finder="harness.data.fashion_mnist:missing",
        namer="harness.data.fashion_mnist:class_names",
    ),
    DatasetSpec(
        name="cifar-10",
        images=50_000,
        summary="50,000 photographs (the training part), 32x32x3, 10 classes; `harness data fetch cifar-10`",
        loader="harness.data.cifar10:load",
        finder="harness.data.cifar10:missing",
        namer="harness.data.cifar10:class_names",
    ),
    DatasetSpec(
        name="imagenet",
        images=1_281_167,
        summary="1,281,167 photographs in 1,000 classes, made by `harness data prepare imagenet`; --data FOLDER",
        loader="harness.data.prepared:load_imagenet",
        needs_folder=True,
        finder="harness.data.prepared:missing_imagenet",
        namer="harness.data.imagenet:class_names",
    ),
    DatasetSpec(
        name="prepared",
        summary="any images in classes, made by `harness data prepare NAME`; --data FOLDER",
        loader="harness.data.prepared:load",
        needs_folder=True,
        finder="harness.data.prepared:missing",
        namer="harness.data.prepared:class_names",
    ),
    DatasetSpec(
        name="npz",
        summary="any images in an .npz of ADM's layout (arr_0 uint8 NHWC, arr_1 labels); --data FILE",
        loader="harness.data.npz:load",
        needs_folder=True,
    ),
)
