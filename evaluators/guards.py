"""Guards: checks of samples and reference that refuse meaningless evaluations and warn about doubtful ones.

`collect_image_stats` reads every image once; `check` compares the statistics of two sets with what the suite expects,
and returns findings. An input is refused if it certainly makes the number wrong or meaningless and the user can fix it.
A warning is about an input that may be the true output of a bad model, or an unusual data set. GUARDS has the rule and
the reason of each guard by name. Other checks are elsewhere: arrays that are not uint8 or have channels first
(`harness.images.source`), features that are not finite (`evaluators.reference.extract`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from evaluators.jpeg_traces import JpegTraces
from harness.errors import UserError
from harness.images.source import ImageSource, from_batches
from harness.registry import unknown

logger = logging.getLogger(__name__)

BATCH = 256
TRACE_BLOCKS = 1024  # 8 x 8 blocks of each batch that enter the JPEG test and the histogram
MAX_DUPLICATES = 0.01  # share of the images; Fashion-MNIST (60,000 images) and the digits (1,797) have no duplicates
MAX_CONSTANT = 0.5  # share of the images, as the next two
MAX_COPIES = 0.01
MIN_SWAPPED = 0.5
UNEVEN_P = 1e-6  # p-value below which random labels are called uneven
ADM_IMAGES = 10_000  # images in ADM's reference batches of ImageNet 64, 128 and 256 (512 has 1,000)

GUARDS = {
    "too-few": "refused: fewer images than a metric's minimum; its estimate is then mostly bias",
    "name-of-count": "refused: fewer images than a name promises (FID-50K: 50,000); FID falls with N, so the name misleads",
    "duplicates": "refused when fewer distinct images are left than a metric needs, or only one; else a warning above 1 %"
    " (and twice the reference's share): a generator may collapse, but equal noise in every process looks the same",
    "constant": "refused when more than half are one flat colour (a failed decoding); else a warning, because a single"
    " black image is often a NaN",
    "unit-range": "refused: no value above 1; pixels in [0, 1] were cast to uint8",
    "signed-range": "refused: only 0, 1 and 255; pixels in [-1, 1] were cast to uint8. Only 0 and 255 is a warning, unless"
    " the reference has only these values as well, as bilevel images have",
    "half-range": "a warning: all but 0.1 % of the values lie in one half of 0..255, and the reference's do not; a missing"
    " scaling, or a model whose images are too dark",
    "jpeg": "refused: samples stored as JPEG against a lossless reference; save them without loss. A warning: traces of"
    " JPEG in the pixels, or a reference stored as JPEG, which may be the only one",
    "same-images": "refused: samples and reference are the same images; the distance is 0 by construction",
    "swapped": "refused: half of the reference is among the samples, or only the samples have mu and sigma",
    "copies": "a warning: more than 1 % of the samples are images of the reference",
    "statistics-in-samples": "a warning: the samples have mu and sigma, which ADM's evaluator would use instead of pixels",
    "resolution": "refused: samples and reference differ in height, width or channels; resizing one changes the number",
    "reference-statistics": "refused: 10,000 images without mu and sigma where the suite takes these from the file: ADM's"
    " images for precision and recall. A warning for another number of images, or another suite",
    "labels-missing": "a warning: the protocol has classes and the samples have no labels, so their balance is unknown",
    "labels-outside": "refused: a label outside the protocol's classes",
    "labels-uneven": "a warning: class counts of balanced labels differ by more than 1, or random labels are less even"
    " than chance makes them once in a million draws (chi-square); FID compares class shares as well",
}
# guards that the user cannot waive: without them no number can be computed, or it has no meaning
NEVER_ALLOWED = ("too-few", "resolution", "labels-outside")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of a guard that fired.

    name: a key of GUARDS. level: "refuse" or "warn". text: one line that says what is wrong and what to do.
    """

    name: str
    level: str
    text: str

    def __post_init__(self) -> None:
        assert self.name in GUARDS and self.level in ("refuse", "warn"), self


@dataclass(frozen=True, kw_only=True)
class GuardContext:
    """What the suite and the protocol expect of the samples.

    minimum: fewest images, by metric. names: of metrics, suite, protocol and row, which are searched for counts such as
    FID-50K. classes: number of classes; None: unconditional. label_policy: "random", "balanced" or None (unknown).
    reference_statistics: whether the suite expects mu and sigma in the reference's file, not only uses them if they are
    there. reference_is_file: not a data set, which never has mu and sigma. allow: names of GUARDS that the user waives; their refusals become warnings. Raises UserError for a name that
    does not exist or cannot be waived.
    """

    minimum: Mapping[str, int] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    classes: int | None = None
    label_policy: str | None = None
    reference_statistics: bool = False
    reference_is_file: bool = True
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.allow:
            if name not in GUARDS:
                raise UserError(unknown("guard", name, GUARDS))
            if name in NEVER_ALLOWED:
                raise UserError(f"guard {name!r} cannot be waived: {GUARDS[name]}")


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageStats:
    """Statistics of the pixels of a set of images, collected in one pass."""

    name: str
    count: int
    shape: tuple[int, int, int]  # H, W, C
    labels: np.ndarray | None  # int64 (N,)
    lossy: bool  # some images were stored with loss (JPEG)
    extra_arrays: tuple[str, ...]  # names of other arrays in the file
    notes: tuple[str, ...]  # those of the `ImageSource`
    sha256: str | None  # of shape and pixels; None: not known
    hashes: np.ndarray  # int64 (N,), equal for equal images; comparable within one process only
    distinct: int  # number of distinct images
    constant: int  # number of images of one flat colour
    first_constant: int | None  # index of the first of them
    lowest: int  # smallest pixel value
    highest: int  # largest pixel value
    only_0_1_255: bool  # no other values than these, as after a cast of [-1, 1] to uint8
    has_ones: bool  # if only_0_1_255: whether 1 is one of the values; otherwise without meaning
    histogram: np.ndarray  # int64 (256,): first-channel values of some images, spread over the set
    jpeg_traces: bool  # the pixels show traces of JPEG

    @property
    def has_statistics(self) -> bool:
        """Whether the file holds mu and sigma."""
        return {"mu", "sigma"} <= set(self.extra_arrays)


def collect_image_stats(
    images: ImageSource | np.ndarray,
    *,
    name: str | None = None,
    labels: np.ndarray | None = None,  # int64 (N,), if `images` is an array; an `ImageSource` has its labels
    progress: Callable[[str, int, int | None], None] | None = None,  # (stage, images done, total)
) -> ImageStats:
    """Statistics of all images, read once in batches: about 10 us for an image of 64 x 64 x 3, plus the content hash."""
    if isinstance(images, np.ndarray):
        if len(images) == 0:
            raise UserError(f"{name or 'the images'}: there are no images")
        images = from_batches([images], len(images), labels=labels, name=name or "the images")
    name = name or images.name
    blocks_per_image = max(1, (images.shape[0] // 8) * (images.shape[1] // 8))
    traces, histogram = JpegTraces(), np.zeros(256, np.int64)
    hashes: list[int] = []
    traced: set[int] = set()  # hashes of the images that are in `traces`
    constant, lowest, highest, only_0_1_255, has_ones = 0, 255, 0, True, False
    first_constant: int | None = None
    for batch in images.batches(BATCH):
        pixels = np.ascontiguousarray(batch).reshape(len(batch), -1)  # (n, H*W*C)
        lowest, highest = min(lowest, int(pixels.min())), max(highest, int(pixels.max()))
        only_0_1_255 = only_0_1_255 and int((pixels + np.uint8(1)).max()) <= 2  # 255 becomes 0
        has_ones = has_ones or (only_0_1_255 and bool((pixels == 1).any()))
        # One flat colour: the image equals itself shifted by a pixel. Testing 64 pixels first rules most images out.
        channels = batch.shape[3]
        head = pixels[:, : 64 * channels]
        candidates = np.flatnonzero((head[:, channels:] == head[:, :-channels]).all(axis=1))
        constant_rows = candidates[(pixels[candidates, channels:] == pixels[candidates, :-channels]).all(axis=1)]
        if len(constant_rows) and first_constant is None:
            first_constant = len(hashes) + int(constant_rows[0])
        constant += len(constant_rows)
        batch_hashes = [hash(row.tobytes()) for row in pixels]  # SipHash of 64 bits: equal pixels have equal hashes
        hashes += batch_hashes
        # evenly spaced images, as many as have TRACE_BLOCKS blocks together
        picked = range(0, len(batch), -(-len(batch) * blocks_per_image // TRACE_BLOCKS))
        histogram += np.bincount(batch[picked][..., 0].ravel(), minlength=256)
        # hash -> index in the batch, without images that were added before: copies would look like a comb
        new = {batch_hashes[i]: i for i in picked if batch_hashes[i] not in traced}
        traced.update(new)
        traces.add(batch[sorted(new.values())])
        if progress is not None:
            progress(f"pixel statistics of {name}", len(hashes), images.count)
    all_hashes = np.array(hashes, np.int64)
    height, width, channels = images.shape
    return ImageStats(
        name=name,
        count=len(all_hashes),
        shape=(height, width, channels),
        labels=images.labels,
        lossy=images.lossy,
        extra_arrays=tuple(images.extra_arrays),
        notes=tuple(images.notes),
        sha256=images.sha256() if images.content_known else None,
        hashes=all_hashes,
        distinct=len(np.unique(all_hashes)),
        constant=constant,
        first_constant=first_constant,
        lowest=lowest,
        highest=highest,
        only_0_1_255=only_0_1_255,
        has_ones=has_ones,
        histogram=histogram,
        jpeg_traces=traces.jpeg,
    )


def check(
    samples: ImageStats | ImageSource | np.ndarray,
    reference: ImageStats | ImageSource | np.ndarray | None,
    context: GuardContext,
) -> list[Finding]:
    """All findings, refusals first. reference: None if there is none; guards that need one are then skipped."""
    if not isinstance(samples, ImageStats):
        samples = collect_image_stats(samples, name=None if isinstance(samples, ImageSource) else "the samples")
    if reference is not None and not isinstance(reference, ImageStats):
        reference = collect_image_stats(reference, name=None if isinstance(reference, ImageSource) else "the reference")
    findings = [*_check_counts(samples, context), *_check_content(samples, reference, context)]
    findings += [*_check_range(samples, reference), *_check_labels(samples, reference, context)]
    if reference is not None:
        findings += [*_check_pair(samples, reference), *_check_jpeg(samples, reference)]
        findings += _check_reference(samples, reference, context)
    elif samples.lossy:
        findings.append(_warning("jpeg", f"{samples.name} was stored with loss (JPEG); save PNG files or an npz"))
    findings = [
        _warning(finding.name, f"{finding.text} (allowed)") if finding.name in context.allow else finding
        for finding in findings
    ]
    return sorted(findings, key=lambda finding: finding.level != "refuse")


def enforce(findings: list[Finding]) -> None:
    """Log the warnings, and raise one UserError for the refusals: text of the first, names of the others."""
    for finding in findings:
        if finding.level == "warn":
            logger.warning("%s (%s)", finding.text, finding.name)
    refusals = [finding for finding in findings if finding.level == "refuse"]
    if refusals:
        first = refusals[0]
        others = ", ".join(dict.fromkeys(finding.name for finding in refusals[1:] if finding.name != first.name))
        raise UserError(f"{first.text} ({first.name}{f'; also {others}' if others else ''})")


def _refusal(name: str, text: str) -> Finding:
    return Finding(name=name, level="refuse", text=text)


def _warning(name: str, text: str) -> Finding:
    return Finding(name=name, level="warn", text=text)


def _check_counts(samples: ImageStats, context: GuardContext) -> Iterator[Finding]:
    """Findings of the guards too-few and name-of-count."""
    short = [f"{metric} needs {least}" for metric, least in context.minimum.items() if samples.count < least]
    if short:
        yield _refusal("too-few", f"{samples.name}: {samples.count} images are too few: {', '.join(short)}; draw more")
    for name in context.names:
        promised = re.search(r"(?i)(?<![a-z])s?(?:fid|fd|kid|is|inception)[-_ ]?([0-9]+)k(?![a-z0-9])", name)
        if promised and samples.count < int(promised[1]) * 1000:
            text = f"{samples.name}: {name!r} promises {promised[1]},000 images, there are {samples.count}"
            yield _refusal("name-of-count", f"{text}; draw more, or choose another name")


def _check_content(samples: ImageStats, reference: ImageStats | None, context: GuardContext) -> Iterator[Finding]:
    """Findings of the guards duplicates and constant."""
    needed = max(context.minimum.values(), default=0)  # fewest images that all metrics accept
    reference_duplicates = 0.0 if reference is None else 1 - reference.distinct / reference.count  # share
    for images in (samples, reference) if reference is not None else (samples,):
        duplicates = 1 - images.distinct / images.count  # share
        text = f"{images.name}: only {images.distinct} of {images.count} images are distinct"
        if images is samples:
            hint = "was the same noise drawn in every process or batch?"
        else:
            hint = "make the reference again"
        # `needed <= count`: with fewer images than a metric needs, the finding is too-few
        if images.count > 1 and (
            images.distinct == 1 or (images is samples and images.distinct < needed <= images.count)
        ):
            yield _refusal("duplicates", f"{text}; {hint}")
        elif duplicates > MAX_DUPLICATES and (images is reference or duplicates > 2 * reference_duplicates):
            yield _warning("duplicates", f"{text}; {hint}")
        if images.constant > MAX_CONSTANT * images.count:
            text = f"{images.name}: {images.constant} of {images.count} images are one flat colour"
            yield _refusal("constant", f"{text}; look at image {images.first_constant}: its decoding failed")
        elif images.constant and (
            images is reference
            or reference is None
            or images.constant / images.count > reference.constant / reference.count
        ):
            text = f"{images.name}: {images.constant} of {images.count} images are one flat colour"
            yield _warning("constant", f"{text} (first: image {images.first_constant}); black is often a NaN")


def _check_range(samples: ImageStats, reference: ImageStats | None) -> Iterator[Finding]:
    """Findings of the guards unit-range, signed-range and half-range."""
    for images in (samples, reference) if reference is not None else (samples,):
        if images.lowest == images.highest:
            continue  # all pixels of the set are equal: a finding of constant or duplicates
        if images.highest <= 1:
            yield _refusal(
                "unit-range", f"{images.name}: values are 0 and 1 only; multiply by 255 before the cast to uint8"
            )
        elif images.only_0_1_255 and images.has_ones:
            text = f"{images.name}: values are 0, 1 and 255 only, as when [-1, 1] is cast to uint8"
            yield _refusal("signed-range", f"{text}; scale to 0..255 first")
    if reference is None:
        return
    bilevel = samples.only_0_1_255 and not samples.has_ones and (samples.lowest, samples.highest) == (0, 255)
    if bilevel and not reference.only_0_1_255:
        yield _warning("signed-range", f"{samples.name}: values are 0 and 255 only, the reference's are not")
    half = _half_range(samples)
    # samples for which one of the last two conditions is false have a finding of unit-range, constant or duplicates
    if half and half != _half_range(reference) and samples.highest > 1 and samples.lowest < samples.highest:
        yield _warning(
            "half-range", f"{samples.name}: values lie {half} only, the reference's do not; were they scaled?"
        )


def _half_range(images: ImageStats) -> str | None:
    """The half of 0..255, in words, with all but 0.1 % of the values; None: there is no such half.

    Both halves include 127 and 128, the values of mid-grey.
    """
    total = images.histogram.sum()
    if images.histogram[129:].sum() <= 0.001 * total:
        return "in 0..128"
    return "in 127..255" if images.histogram[:127].sum() <= 0.001 * total else None


def _check_pair(samples: ImageStats, reference: ImageStats) -> Iterator[Finding]:
    """Findings of the guards resolution, same-images, swapped (by images) and copies."""
    if samples.shape != reference.shape:
        text = f"{samples.name} has images {samples.shape}, {reference.name} {reference.shape} (H, W, C)"
        yield _refusal("resolution", f"{text}; use a reference of the samples' resolution")
        return
    if samples.sha256 is not None and samples.sha256 == reference.sha256:
        yield _refusal(
            "same-images", f"{samples.name} and {reference.name} are the same images; name the samples first"
        )
        return
    reference_among_samples = float(np.isin(reference.hashes, samples.hashes).mean())
    samples_among_reference = float(np.isin(samples.hashes, reference.hashes).mean())
    if reference_among_samples >= MIN_SWAPPED:
        text = f"{samples.name} contains {reference_among_samples:.0%} of the images of {reference.name}"
        yield _refusal("swapped", f"{text}; are the arguments swapped, or is it training data?")
    elif samples_among_reference > MAX_COPIES:
        yield _warning(
            "copies", f"{samples_among_reference:.1%} of {samples.name} are images of {reference.name}, pixel by pixel"
        )


def _check_jpeg(samples: ImageStats, reference: ImageStats) -> Iterator[Finding]:
    """Findings of the guard jpeg for samples that have a reference; none if both or neither were ever JPEG."""
    samples_lossy = samples.lossy or samples.jpeg_traces
    reference_lossy = reference.lossy or reference.jpeg_traces
    if samples_lossy == reference_lossy:
        return
    if samples.lossy:
        text = f"{samples.name} is stored as JPEG, {reference.name} is lossless: the distance would measure the JPEG"
        yield _refusal("jpeg", f"{text}; save the samples as PNG files or npz")
        return
    lossy, clean = (samples, reference) if samples_lossy else (reference, samples)
    how = "is stored as JPEG" if lossy.lossy else "shows JPEG's quantisation in its pixels"
    yield _warning("jpeg", f"{lossy.name} {how}, {clean.name} does not: the distance measures that too")


def _check_reference(samples: ImageStats, reference: ImageStats, context: GuardContext) -> Iterator[Finding]:
    """Findings of the guards swapped (by mu and sigma), statistics-in-samples and reference-statistics."""
    if samples.has_statistics and not reference.has_statistics:
        text = f"{samples.name} has mu and sigma, as references do, and {reference.name} does not"
        yield _refusal("swapped", f"{text}; swap the arguments")
    elif samples.has_statistics:
        yield _warning(
            "statistics-in-samples", f"{samples.name} has mu and sigma; they are ignored, its images are used"
        )
    if reference.has_statistics or not context.reference_is_file:
        return
    is_adm = reference.count == ADM_IMAGES
    what = " (ADM's 10,000 images are for precision and recall; its FID uses the whole training set)" if is_adm else ""
    text = f"{reference.name} has no mu and sigma{what}"
    if context.reference_statistics and is_adm:
        advice = "use the file that has them, or make one from all training images"
        yield _refusal("reference-statistics", f"{text}; {advice}")
    elif context.reference_statistics or is_adm:
        yield _warning("reference-statistics", f"{text}: the distance is to its {reference.count} images")


def _check_labels(samples: ImageStats, reference: ImageStats | None, context: GuardContext) -> Iterator[Finding]:
    """Findings of the guards labels-missing, labels-outside and labels-uneven.

    Labels of an unknown policy are tested as random labels.
    """
    if context.classes is None or context.classes < 2:
        return
    if samples.labels is None:
        yield _warning("labels-missing", f"{samples.name} has no labels, so the balance of its classes is not known")
        return
    outside = (samples.labels < 0) | (samples.labels >= context.classes)
    if outside.any():
        i = int(np.argmax(outside))
        text = f"{samples.name}: label {samples.labels[i]} of image {i} is outside the {context.classes} classes"
        yield _refusal("labels-outside", f"{text}; are they labels of another data set?")
        return
    counts = np.bincount(samples.labels, minlength=context.classes)
    low, high = int(counts.min()), int(counts.max())
    span = f"{samples.name}: {low} to {high} images a class ({context.classes} classes)"
    if context.label_policy == "balanced":
        if high - low > 1:
            yield _warning("labels-uneven", f"{span}, but the label policy is balanced")
        return
    p = _chi_square_p(counts, np.full(context.classes, 1 / context.classes))
    # Uneven samples are right if the reference is as uneven: test against its class shares, too. That test does not hold
    # for samples of a class that the reference does not have.
    if p < UNEVEN_P and reference is not None and reference.labels is not None:
        inside = reference.labels[(reference.labels >= 0) & (reference.labels < context.classes)]
        expected = np.bincount(inside, minlength=context.classes)
        if expected.any() and not counts[expected == 0].any():
            p = _chi_square_p(counts[expected > 0], expected[expected > 0] / expected.sum())
    if p < UNEVEN_P:
        yield _warning("labels-uneven", f"{span}: random labels are so uneven once in {1 / max(p, 1e-300):.0e} draws")


def _chi_square_p(counts: np.ndarray, shares: np.ndarray) -> float:
    """p-value of Pearson's chi-square test of class counts (K,) against shares (K,).

    1.0 where the test does not apply: fewer than two classes, or an expected count below 1.
    """
    from scipy.special import chdtrc

    expected = counts.sum() * shares
    if len(counts) < 2 or expected.min() < 1:
        return 1.0
    return float(chdtrc(len(counts) - 1, ((counts - expected) ** 2 / expected).sum()))
