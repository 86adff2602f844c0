"""Guards: what makes no sense is refused before a number is formed, what is doubtful is said beside it.

`survey` looks once at every image; `check` compares two surveys and what the suite expects, and answers with findings.
Refused is what makes the number wrong or meaningless for certain, and can be mended; a warning is what may be the truth
about a bad model or a strange data set. GUARDS holds each name with its rule and reason. Not here, because they are
refused elsewhere: arrays that are not uint8 or have channels first (`harness.images.source`), features that are not
finite (`evaluators.reference.extract`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from evaluators.jpeg_traces import JpegTraces
from harness.errors import UserError
from harness.images.source import ImageSource, from_batches
from harness.registry import unknown

BATCH = 256
TRACE_BLOCKS = 1024  # 8 x 8 blocks of each batch that are searched for traces of JPEG and counted into the histogram
DUPLICATES = 0.01  # Fashion-MNIST's 60,000 and the 1,797 digits have none at all
CONSTANT = 0.5
COPIES = 0.01
SWAPPED = 0.5
UNEVEN_P = 1e-6
ADM_IMAGES = 10_000  # images in ADM's reference batches of ImageNet 64, 128 and 256 (512 has 1,000)

GUARDS = {
    "too-few": "refused: fewer images than a metric's minimum; its estimate is then mostly bias",
    "name-of-count": "refused: fewer images than a name promises (FID-50K: 50,000); FID falls with N, so the name misleads",
    "duplicates": "refused when fewer distinct images are left than a metric needs, or only one; else a warning above 1 %"
    " (and twice the reference's share): a generator may collapse, but equal noise in every process looks the same",
    "constant": "refused when more than half are one flat colour (a failed decoding); else a warning, for a single black"
    " image is how a NaN is often written",
    "unit-range": "refused: no value above 1; pixels in [0, 1] were cast to uint8",
    "signed-range": "refused: only 0, 1 and 255; pixels in [-1, 1] were cast to uint8. Only 0 and 255 is a warning unless"
    " the reference is so too, as bilevel images are",
    "half-range": "a warning: all but 0.1 % of the values lie in one half of 0..255, and the reference's do not; a forgotten"
    " scaling, or a dark model",
    "jpeg": "refused: samples kept as JPEG against a lossless reference, for they can be saved again. A warning: traces of"
    " JPEG in the pixels, or a JPEG reference, which may be all there is",
    "same-images": "refused: samples and reference are the same images; the distance is 0 by construction",
    "swapped": "refused: half of the reference is among the samples, or only the samples bring mu and sigma",
    "copies": "a warning: more than 1 % of the samples are images of the reference",
    "statistics-in-samples": "a warning: the samples bring mu and sigma, which ADM's evaluator would use instead of pixels",
    "resolution": "refused: samples and reference differ in height, width or channels; resizing one changes the number",
    "reference-statistics": "refused for 10,000 images without mu and sigma where the suite takes these from the file:"
    " ADM's images, meant for precision and recall. A warning for another number of images, or another suite",
    "labels-missing": "a warning: the task has classes and the samples no labels, so their balance cannot be checked",
    "labels-outside": "refused: a label that the task does not have",
    "labels-uneven": "a warning: class counts differ by more than 1 where they were meant to be balanced, or are less even"
    " than chance makes them once in a million draws (chi-square); FID compares class shares as well",
}
NEVER_ALLOWED = ("too-few", "resolution", "labels-outside")  # no number could be formed, or it would have no meaning


@dataclass(frozen=True, kw_only=True)
class Finding:
    """name: a key of GUARDS. level: "refuse" or "warn". text: one line, what and what to do."""

    name: str
    level: str
    text: str

    def __post_init__(self):
        assert self.name in GUARDS and self.level in ("refuse", "warn"), self


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the suite and the protocol expect.

    minimum: fewest images by metric. names: of metrics, suite, protocol and row, searched for such as FID-50K. classes:
    how many there are; None: unconditional. label_policy: "random", "balanced" or None (not known).
    reference_statistics: the suite takes mu and sigma from the reference's file. allow: names of GUARDS whose refusal
    the user has waived; it becomes a warning.
    """

    minimum: Mapping[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    classes: int | None = None
    label_policy: str | None = None
    reference_statistics: bool = False
    allow: tuple[str, ...] = ()

    def __post_init__(self):
        for name in self.allow:
            if name not in GUARDS:
                raise UserError(unknown("guard", name, GUARDS))
            if name in NEVER_ALLOWED:
                raise UserError(f"guard {name!r} cannot be waived: {GUARDS[name]}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Survey:
    """What one pass over a set of images finds.

    sha256: of shape and pixels. hashes: int64 (N,), equal for equal images (within one process). constant, distinct:
    numbers of images. lowest, highest: of all values. wrapped: no value but 0, 1 and 255. ones: 1 is among them.
    histogram: int64 (256,) of first-channel values of some images, spread over the set. jpeg: traces of JPEG in the
    pixels.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    labels: np.ndarray | None
    lossy: bool
    extra_arrays: tuple[str, ...]
    notes: tuple[str, ...]
    sha256: str | None
    hashes: np.ndarray
    distinct: int
    constant: int
    first_constant: int | None
    lowest: int
    highest: int
    wrapped: bool
    ones: bool
    histogram: np.ndarray
    jpeg: bool

    @property
    def brings_statistics(self) -> bool:
        """Whether the file holds mu and sigma."""
        return {"mu", "sigma"} <= set(self.extra_arrays)


def survey(
    images: ImageSource | np.ndarray,
    *,
    name: str | None = None,
    labels: np.ndarray | None = None,  # of an array; a source has its own
    progress: Callable[[str, int, int | None], None] | None = None,  # (stage, images done, images in all)
) -> Survey:
    """Look at every image once, in batches: about 10 us an image of 64 x 64 x 3, and the content hash beside it."""
    if isinstance(images, np.ndarray):
        if len(images) == 0:
            raise UserError(f"{name or 'the images'}: there are none")
        images = from_batches([images], len(images), labels=labels, name=name or "the images")
    name = name or images.name
    per_image = max(1, (images.shape[0] // 8) * (images.shape[1] // 8))
    traces, histogram, hashes, searched = JpegTraces(), np.zeros(256, np.int64), [], set()
    constant, first_constant, lowest, highest, wrapped, ones = 0, None, 255, 0, True, False
    for batch in images.batches(BATCH):
        flat = np.ascontiguousarray(batch).reshape(len(batch), -1)  # (n, H*W*C)
        lowest, highest = min(lowest, int(flat.min())), max(highest, int(flat.max()))
        wrapped = wrapped and int((flat + np.uint8(1)).max()) <= 2  # 255 becomes 0
        ones = ones or (wrapped and bool((flat == 1).any()))
        # one flat colour: equal to itself shifted by a pixel; a short look first spares most images the long one
        channels = batch.shape[3]
        head = flat[:, : 64 * channels]
        maybe = np.flatnonzero((head[:, channels:] == head[:, :-channels]).all(axis=1))
        flats = maybe[(flat[maybe, channels:] == flat[maybe, :-channels]).all(axis=1)]
        if len(flats) and first_constant is None:
            first_constant = len(hashes) + int(flats[0])
        constant += len(flats)
        here = [hash(row.tobytes()) for row in flat]  # SipHash of 64 bits: equal pixels, equal hash
        hashes += here
        some = range(0, len(batch), -(-len(batch) * per_image // TRACE_BLOCKS))
        histogram += np.bincount(batch[some][..., 0].ravel(), minlength=256)
        fresh = {here[i]: i for i in some if here[i] not in searched}  # copies of one image would pass for a comb
        searched.update(fresh)
        traces.add(batch[sorted(fresh.values())])
        if progress is not None:
            progress(f"survey of {name}", len(hashes), images.count)
    known = np.array(hashes, np.int64)
    return Survey(
        name=name,
        count=len(known),
        shape=tuple(images.shape),
        labels=images.labels,
        lossy=images.lossy,
        extra_arrays=tuple(images.extra_arrays),
        notes=tuple(images.notes),
        sha256=images.sha256() if images.content_known else None,
        hashes=known,
        distinct=len(np.unique(known)),
        constant=constant,
        first_constant=first_constant,
        lowest=lowest,
        highest=highest,
        wrapped=wrapped,
        ones=ones,
        histogram=histogram,
        jpeg=traces.jpeg,
    )


def check(
    samples: Survey | ImageSource | np.ndarray, reference: Survey | ImageSource | np.ndarray | None, task: Task
) -> list[Finding]:
    """Every finding, refusals first; none means that nothing speaks against the number. None: there is no reference."""
    if not isinstance(samples, Survey):
        samples = survey(samples, name=None if isinstance(samples, ImageSource) else "the samples")
    if reference is not None and not isinstance(reference, Survey):
        reference = survey(reference, name=None if isinstance(reference, ImageSource) else "the reference")
    found = [each for guard in (_counts, _content, _range, _labels) for each in guard(samples, reference, task)]
    if reference is not None:
        found += [each for guard in (_pair, _jpeg, _reference) for each in guard(samples, reference, task)]
    elif samples.lossy:
        found.append(_warn("jpeg", f"{samples.name} was stored with loss (JPEG); save PNG files or an npz"))
    waived = [
        Finding(name=each.name, level="warn", text=f"{each.text} (allowed)") if each.name in task.allow else each
        for each in found
    ]
    return sorted(waived, key=lambda each: each.level != "refuse")


def enforce(findings: list[Finding], say: Callable[[str], None]) -> None:
    """Say the warnings, and raise one UserError for the refusals: the first in words, others by name."""
    for each in findings:
        if each.level == "warn":
            say(f"warning ({each.name}): {each.text}")
    refusals = [each for each in findings if each.level == "refuse"]
    if refusals:
        others = ", ".join(dict.fromkeys(each.name for each in refusals[1:] if each.name != refusals[0].name))
        raise UserError(f"{refusals[0].text} ({refusals[0].name}{f'; also {others}' if others else ''})")


def _refuse(name: str, text: str) -> Finding:
    return Finding(name=name, level="refuse", text=text)


def _warn(name: str, text: str) -> Finding:
    return Finding(name=name, level="warn", text=text)


def _counts(samples: Survey, reference: Survey | None, task: Task) -> Iterator[Finding]:
    short = [f"{metric} needs {least}" for metric, least in task.minimum.items() if samples.count < least]
    if short:
        yield _refuse("too-few", f"{samples.name}: {samples.count} images are too few: {', '.join(short)}; draw more")
    for name in task.names:
        promised = re.search(r"(?i)(?<![a-z])s?(?:fid|fd|kid|is|inception)[-_ ]?([0-9]+)k(?![a-z0-9])", name)
        if promised and samples.count < int(promised[1]) * 1000:
            text = f"{samples.name}: {name!r} promises {promised[1]},000 images, there are {samples.count}"
            yield _refuse("name-of-count", f"{text}; draw more, or call it by what it is")


def _content(samples: Survey, reference: Survey | None, task: Task) -> Iterator[Finding]:
    least = max(task.minimum.values(), default=0)
    natural = 0.0 if reference is None else 1 - reference.distinct / reference.count
    for images in (samples, reference) if reference is not None else (samples,):
        share = 1 - images.distinct / images.count
        text = f"{images.name}: only {images.distinct} of {images.count} images are distinct"
        hint = (
            "was the same noise drawn in every process or batch?" if images is samples else "make the reference again"
        )
        if images.count > 1 and (
            images.distinct == 1 or (images is samples and images.distinct < least <= images.count)
        ):
            yield _refuse("duplicates", f"{text}; {hint}")
        elif share > DUPLICATES and (images is reference or share > 2 * natural):
            yield _warn("duplicates", f"{text}; {hint}")
        if images.constant > CONSTANT * images.count:
            text = f"{images.name}: {images.constant} of {images.count} images are one flat colour"
            yield _refuse("constant", f"{text}; look at image {images.first_constant}: its decoding failed")
        elif images.constant and (
            images is reference
            or reference is None
            or images.constant / images.count > reference.constant / reference.count
        ):
            text = f"{images.name}: {images.constant} of {images.count} images are one flat colour"
            yield _warn("constant", f"{text} (first: image {images.first_constant}); black is often a NaN")


def _range(samples: Survey, reference: Survey | None, task: Task) -> Iterator[Finding]:
    for images in (samples, reference) if reference is not None else (samples,):
        if images.lowest == images.highest:
            continue  # said as constant or as duplicates
        if images.highest <= 1:
            yield _refuse(
                "unit-range", f"{images.name}: values are 0 and 1 only; multiply by 255 before the cast to uint8"
            )
        elif images.wrapped and images.ones:
            text = f"{images.name}: values are 0, 1 and 255 only, as when [-1, 1] is cast to uint8"
            yield _refuse("signed-range", f"{text}; scale to 0..255 first")
    if reference is None:
        return
    bilevel = samples.wrapped and not samples.ones and (samples.lowest, samples.highest) == (0, 255)
    if bilevel and not reference.wrapped:
        yield _warn("signed-range", f"{samples.name}: values are 0 and 255 only, the reference's are not")
    halves = [_half(each) for each in (samples, reference)]
    if halves[0] and halves[0] != halves[1] and samples.highest > 1 and samples.lowest < samples.highest:
        yield _warn(
            "half-range", f"{samples.name}: values lie {halves[0]} only, the reference's do not; was it scaled?"
        )


def _half(images: Survey) -> str | None:
    """The half of 0..255 that holds all but 0.1 % of the values."""
    total = images.histogram.sum()
    if images.histogram[129:].sum() <= 0.001 * total:
        return "in 0..128"
    return "in 127..255" if images.histogram[:127].sum() <= 0.001 * total else None


def _pair(samples: Survey, reference: Survey, task: Task) -> Iterator[Finding]:
    if samples.shape != reference.shape:
        text = f"{samples.name} has images {samples.shape}, {reference.name} {reference.shape} (H, W, C)"
        yield _refuse("resolution", f"{text}; take the reference of that resolution")
        return
    if samples.sha256 is not None and samples.sha256 == reference.sha256:
        yield _refuse("same-images", f"{samples.name} and {reference.name} are the same images; name the samples first")
        return
    among = float(np.isin(reference.hashes, samples.hashes).mean())
    copied = float(np.isin(samples.hashes, reference.hashes).mean())
    if among >= SWAPPED:
        text = f"{samples.name} holds {among:.0%} of the images of {reference.name}"
        yield _refuse("swapped", f"{text}; are the arguments swapped, or is it training data?")
    elif copied > COPIES:
        yield _warn("copies", f"{copied:.1%} of {samples.name} are images of {reference.name}, pixel by pixel")


def _jpeg(samples: Survey, reference: Survey, task: Task) -> Iterator[Finding]:
    ours, theirs = samples.lossy or samples.jpeg, reference.lossy or reference.jpeg
    if ours == theirs:
        return
    if samples.lossy:
        text = f"{samples.name} is stored as JPEG, {reference.name} is lossless: the distance would measure the JPEG"
        yield _refuse("jpeg", f"{text}; save the samples as PNG files or npz")
        return
    lossy, clean = (samples, reference) if ours else (reference, samples)
    how = "is stored as JPEG" if lossy.lossy else "shows JPEG's quantisation in its pixels"
    yield _warn("jpeg", f"{lossy.name} {how}, {clean.name} does not: the distance measures that too")


def _reference(samples: Survey, reference: Survey, task: Task) -> Iterator[Finding]:
    if samples.brings_statistics and not reference.brings_statistics:
        text = f"{samples.name} brings mu and sigma, as references do, and {reference.name} does not"
        yield _refuse("swapped", f"{text}; swap the arguments")
    elif samples.brings_statistics:
        yield _warn("statistics-in-samples", f"{samples.name} brings mu and sigma; they are ignored, its images count")
    if reference.brings_statistics:
        return
    ten = reference.count == ADM_IMAGES
    what = " (ADM's 10,000 images serve precision and recall; its FID uses the whole training set)" if ten else ""
    text = f"{reference.name} has no mu and sigma{what}"
    if task.reference_statistics and ten:
        advice = "take the file that has them, or make one of all training images"
        yield _refuse("reference-statistics", f"{text}; {advice}")
    elif task.reference_statistics or ten:
        yield _warn("reference-statistics", f"{text}: the distance is to its {reference.count} images")


def _labels(samples: Survey, reference: Survey | None, task: Task) -> Iterator[Finding]:
    if task.classes is None or task.classes < 2:
        return
    if samples.labels is None:
        yield _warn("labels-missing", f"{samples.name} has no labels; whether its classes are balanced is not known")
        return
    outside = (samples.labels < 0) | (samples.labels >= task.classes)
    if outside.any():
        i = int(np.argmax(outside))
        text = f"{samples.name}: label {samples.labels[i]} of image {i} is outside the {task.classes} classes"
        yield _refuse("labels-outside", f"{text}; are they labels of another data set?")
        return
    counts = np.bincount(samples.labels, minlength=task.classes)
    low, high = int(counts.min()), int(counts.max())
    span = f"{samples.name}: {low} to {high} images a class ({task.classes} classes)"
    if task.label_policy == "balanced":
        if high - low > 1:
            yield _warn("labels-uneven", f"{span}, though the labels were to be balanced")
        return
    chance = _chance(counts, np.full(task.classes, 1 / task.classes))
    if chance < UNEVEN_P and reference is not None and reference.labels is not None:  # its own shares may be uneven
        inside = reference.labels[(reference.labels >= 0) & (reference.labels < task.classes)]
        real = np.bincount(inside, minlength=task.classes)
        if not (counts[real == 0].any() or not real.any()):
            chance = _chance(counts[real > 0], real[real > 0] / real.sum())
    if chance < UNEVEN_P:
        yield _warn("labels-uneven", f"{span}: chance makes them so uneven once in {1 / max(chance, 1e-300):.0e} draws")


def _chance(counts: np.ndarray, shares: np.ndarray) -> float:
    """p-value of Pearson's chi-square test of class counts (K,) against shares (K,); 1 below 1 expected a class."""
    from scipy.special import chdtrc

    expected = counts.sum() * shares
    if len(counts) < 2 or expected.min() < 1:
        return 1.0
    return float(chdtrc(len(counts) - 1, ((counts - expected) ** 2 / expected).sum()))
