"""Stages data and labels: the training images against the reference, and images against their classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from harness.data.images import ImageSet
from harness.diagnose.expectation import Expectation
from harness.diagnose.finding import FAULT, OK, SUSPECT, UNKNOWN, Finding
from harness.diagnose.subject import Subject, spread

SIDE = 16  # to which images are averaged for the classifier
LARGEST_Z = 5.0  # of a statistic of the images: beyond it two sets are different; of four statistics once in 400,000
SMALLEST_EFFECT = 0.1  # in standard deviations of an image: less does not count, however many images there are
CHUNK = 256  # images that are in memory as float64
COMPARED_BYTES = 1 << 31  # of larger sets of images only statistics are compared
FOLDS = 5
RIDGE = 1e-2
CHANCES = 3.0  # the classifier must be right so many times as often as by chance, else it says nothing
AGREEING = 0.5  # share of the classifier's own accuracy below which labels do not belong to the images


@dataclass(frozen=True, kw_only=True)
class Statistic:
    """A mean over images of one set and of another, and how far apart they are."""

    name: str
    mean: float
    expected: float
    z: float
    effect: float  # in standard deviations of an image

    @property
    def differs(self) -> bool:
        return abs(self.z) > LARGEST_Z and abs(self.effect) > SMALLEST_EFFECT

    def __str__(self) -> str:
        return f"{self.name} {self.mean:.4g} (reference {self.expected:.4g})"


def image_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> float64 (N,) of images uint8 (N, H, W, C): brightness, contrast, sharpness and border.

    sharpness: root mean square of the differences of neighbouring pixels over the contrast: filters that blur lower it, those
    that pick single pixels raise it. border: mean of the outermost ring minus that of the image: a crop changes it.
    """
    parts = [_statistics_of(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _statistics_of(images: np.ndarray) -> dict[str, np.ndarray]:
    x = images.astype(np.float64).mean(axis=3) / 255  # (n, H, W)
    mean, contrast = x.mean(axis=(1, 2)), x.std(axis=(1, 2))
    steps = (np.diff(x, axis=1) ** 2).mean(axis=(1, 2)) + (np.diff(x, axis=2) ** 2).mean(axis=(1, 2))
    ring = np.concatenate([x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]], axis=1)
    return {
        "brightness": mean,
        "contrast": contrast,
        "sharpness": np.sqrt(steps) / np.maximum(contrast, 1e-6),
        "border": ring.mean(axis=1) - mean,
    }


def compare_statistics(images: np.ndarray, reference: np.ndarray) -> list[Statistic]:
    """The statistics of two sets of images, uint8 (N, H, W, C) of one size."""
    ours, theirs = image_statistics(spread(images)), image_statistics(spread(reference))
    found = []
    for name, a in ours.items():
        b = theirs[name]
        error = float(np.sqrt(a.var() / len(a) + b.var() / len(b)))
        gap = float(a.mean() - b.mean())
        deviation = float(np.sqrt((a.var() + b.var()) / 2))
        found.append(
            Statistic(
                name=name, mean=float(a.mean()), expected=float(b.mean()),
                z=0.0 if gap == 0 else gap / max(error, 1e-12), effect=0.0 if gap == 0 else gap / max(deviation, 1e-12),
            )
        )  # fmt: skip
    return found


def check_data(subject: Subject, expected: Expectation) -> Finding:
    """The training images: their hash, and their pixels against those of the reference."""
    run = subject.run
    if run is None:
        return Finding(stage="data", status=UNKNOWN, measured="the samples have no run beside them")
    sha256 = run.identity["dataset_sha256"]
    wanted = expected.dataset_sha256
    same_hash = wanted is not None and wanted == sha256
    hash_text = f"hash {sha256[:12]}"
    wanted_text = f"hash {wanted[:12]}, " if wanted else ""
    if subject.training is None:
        status = OK if same_hash else UNKNOWN if wanted is None else SUSPECT
        return Finding(
            stage="data", status=status, measured=f"{hash_text}; the images are not at hand (name them with --data)",
            expected=wanted_text.removesuffix(", "),
        )  # fmt: skip
    ours, reference = subject.training.images, subject.reference.images
    wanted_text += "pixels as those of the reference"
    if _same_images(ours, reference):
        return Finding(
            stage="data",
            status=OK,
            measured=f"{hash_text}; the images are those of the reference",
            expected=wanted_text,
        )
    if ours.shape[1:] != reference.shape[1:]:
        return Finding(
            stage="data", status=FAULT, measured=f"images are {ours.shape[1:]}",
            expected=f"{reference.shape[1:]}, as the reference",
        )  # fmt: skip
    statistics = compare_statistics(ours, reference)
    different = [each for each in statistics if each.differs]
    if not different:
        status = OK if same_hash or wanted is None else SUSPECT
        text = (
            f"{hash_text}; other images than the reference's, with the same brightness, contrast, sharpness and border"
        )
        return Finding(stage="data", status=status, measured=text, expected=wanted_text)
    mended = None
    if subject.can_count(min(len(ours), len(subject.images))):
        # What a perfect network would have: it makes images like those that it was trained on.
        floor = subject.distance(spread(ours, len(subject.images))).value
        mended = subject.own_distance.value - floor
    why = _cause(statistics)
    return Finding(
        stage="data", status=FAULT, measured=f"{hash_text}; {', '.join(map(str, different))}: {why}",
        expected=wanted_text, mended=mended,
    )  # fmt: skip


def _same_images(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same images, in any order."""
    if a is b:
        return True
    if a.shape != b.shape or a.nbytes > COMPARED_BYTES:
        return False

    def hashes(images: np.ndarray) -> list[int]:
        return sorted(hash(image.tobytes()) for image in images)

    return np.array_equal(a, b) or hashes(a) == hashes(b)


def _cause(statistics: list[Statistic]) -> str:
    """What usually makes the statistics differ so."""
    by_name = {each.name: each for each in statistics}
    if by_name["brightness"].differs:
        return "another data set, or values scaled otherwise"
    if by_name["border"].differs and not by_name["sharpness"].differs:
        return "another crop"
    if by_name["sharpness"].differs:
        return "resized with another filter" + (", or another crop" if by_name["border"].differs else "")
    return "another contrast"


class Classifier:
    """A linear classifier of images, averaged to at most SIDE pixels: ridge regression of the classes, in closed form."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: int):
        self.classes = classes
        x = _pixels(images)
        self._mean, self._scale = x.mean(axis=0), x.std(axis=0) + 1e-3
        x = self._prepared(x)
        targets = np.eye(classes)[labels]  # (N, classes)
        gram = x.T @ x / len(x)
        self._weights = np.linalg.solve(gram + RIDGE * np.eye(len(gram)), x.T @ targets / len(x))

    def _prepared(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([(x - self._mean) / self._scale, np.ones((len(x), 1))], axis=1)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Classes int64 (N,) of images uint8 (N, H, W, C)."""
        return np.argmax(self._prepared(_pixels(images)) @ self._weights, axis=1)


def _pixels(images: np.ndarray) -> np.ndarray:
    """float64 (N, pixels) of images averaged to at most SIDE pixels a side."""
    factor = -(-images.shape[1] // SIDE)
    side = images.shape[1] // factor
    parts = []
    for start in range(0, len(images), CHUNK):
        x = images[start : start + CHUNK, : side * factor, : side * factor].astype(np.float64) / 255  # (n, H, W, C)
        x = x.reshape(len(x), side, factor, side, factor, -1).mean(axis=(2, 4))  # (n, side, side, C)
        parts.append(x.reshape(len(x), -1))
    return np.concatenate(parts)


def cross_validated(images: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """The share of images whose label the classifier of the others gives, over FOLDS parts."""
    fold = np.arange(len(images)) % FOLDS
    right = 0
    for each in range(FOLDS):
        model = Classifier(images[fold != each], labels[fold != each], classes)
        right += int((model.predict(images[fold == each]) == labels[fold == each]).sum())
    return right / len(images)


def check_labels(subject: Subject, expected: Expectation) -> Finding:
    """Whether images belong to their classes: training images by a classifier of the reference, samples by one of these."""
    classes = subject.protocol.num_classes
    stage = "labels"
    if classes < 2:
        return Finding(stage=stage, status=UNKNOWN, measured="the protocol has no classes")
    teacher, name = _teacher(subject)
    if teacher is None:
        return Finding(
            stage=stage, status=UNKNOWN, measured="no labelled images are at hand; name them with --reference or --data"
        )
    images, labels = _few(teacher)
    accuracy = cross_validated(images, labels, classes)
    if accuracy < CHANCES / classes:
        text = f"a linear classifier is right for {accuracy:.0%} of {name}, which is too little to judge by"
        return Finding(stage=stage, status=UNKNOWN, measured=text)
    model = Classifier(images, labels, classes)
    wanted = f"about {accuracy:.0%}, as of {name}"
    training = subject.training
    if training is not None and training.labelled and training is not teacher:
        own, own_labels = _few(training)
        predicted = model.predict(own)
        agreement = float((predicted == own_labels).mean())
        if agreement < AGREEING * accuracy:
            text = f"the training labels agree with a classifier for {agreement:.0%} of the images"
            return Finding(
                stage=stage,
                status=FAULT,
                measured=f"{text}: {_relabelled(predicted, own_labels, accuracy)}",
                expected=wanted,
            )
    if subject.labels is None:
        return Finding(stage=stage, status=UNKNOWN, measured="the samples have no labels")
    rows = spread(np.arange(len(subject.images)))
    asked = subject.labels[rows]
    predicted = model.predict(subject.images[rows])
    agreement = float((predicted == asked).mean())
    text = f"{agreement:.0%} of the samples are classified as the class asked for"
    relabelled, _ = _best_relabelling(predicted, asked)
    # A network that was hardly trained makes images of no class, so that a low share is no sign of wrong labels.
    if agreement < AGREEING * accuracy and relabelled > max(2 * agreement, AGREEING * accuracy):
        words = _relabelled(predicted, asked, accuracy)
        return Finding(stage=stage, status=FAULT, measured=f"{text}: {words}", expected=wanted)
    return Finding(stage=stage, status=OK, measured=text, expected=f"{wanted} at most")


def _teacher(subject: Subject) -> tuple[ImageSet | None, str]:
    """The labelled images whose labels are trusted, and their name: the reference's, if it has some, else the training's."""
    reference = subject.reference
    if reference.labelled and len(np.unique(reference.labels)) > 1:
        return reference, "the reference images"
    if subject.training is not None and subject.training.labelled:
        return subject.training, "the training images"
    return None, ""


def _few(images: ImageSet) -> tuple[np.ndarray, np.ndarray]:
    rows = spread(np.arange(len(images)))
    return images.images[rows], images.labels[rows]


def _best_relabelling(predicted: np.ndarray, labels: np.ndarray) -> tuple[float, dict[int, int]]:
    """(the share that would agree if each label stood for another class, label -> that class): the best one-to-one choice."""
    from scipy.optimize import linear_sum_assignment

    classes = int(max(predicted.max(), labels.max())) + 1
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (labels, predicted), 1)
    rows, columns = linear_sum_assignment(-table)
    moved = {
        int(row): int(column) for row, column in zip(rows, columns, strict=True) if row != column and table[row, column]
    }
    return float(table[rows, columns].sum() / len(labels)), moved


def _relabelled(predicted: np.ndarray, labels: np.ndarray, accuracy: float) -> str:
    """Whether labels are in another order of classes, or shuffled."""
    share, moved = _best_relabelling(predicted, labels)
    if share < AGREEING * accuracy:
        return "they are shuffled"
    words = [f"{label} is {found}" for label, found in moved.items()]
    return f"another order of classes ({', '.join(words[:5])}{', ...' if len(words) > 5 else ''})"
