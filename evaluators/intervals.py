"""Error bars: the delete-block jackknife.

A sample set is split into 20 blocks (fewer below 20 samples), and the metric is computed again without each of them.
The spread of those values estimates the standard error of the metric (Shao and Tu, "The Jackknife and Bootstrap", 1995,
sec. 2.3). A bootstrap would be wrong here: drawing with replacement puts duplicates into the set, which shifts Frechet
distances and nearest-neighbour metrics.

Blocks must be drawn as the samples were. Where every class has the same number of images by design, every block has the
same number of each, too: else the spread between blocks holds the difference between classes, which the set does not have,
and intervals were 7 to 10 times too wide. Where images are copies of each other, they share a block: they are one draw.

The interval is of the sampling noise at this number of samples and with this reference: it covers the mean of the
estimator over sample sets of the same size, not its value for infinitely many samples.
"""

from dataclasses import dataclass

import numpy as np

BLOCKS = 20
FEWEST_BLOCKS = 5  # below it, Student's t makes the interval wider than the classes do
FEW = 10  # samples on one side of a share, below which a binomial interval is used


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric's value on all N samples and, for the error bar, without each block.

    left_out: float64 (B,), left_out[b] is the metric on the samples outside block b.
    trials: N if the value is a share of the N samples, else None. With fewer than 10 samples on either side of the share
    the jackknife's interval is too narrow, and a binomial interval is used instead.
    half_variance: half the variance of the metric on disjoint halves of the set. It is a lower bound of the variance,
    for a metric whose jackknife variance is far too large (see evaluators/precision_recall.py). None: use the
    jackknife variance alone.
    warning: one line on why the value is doubtful; empty: no doubt.
    """

    value: float
    left_out: np.ndarray
    trials: int | None = None
    half_variance: float | None = None
    warning: str = ""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """low <= value <= high at the requested confidence; without an error bar both are None and method is "none"."""

    low: float | None
    high: float | None
    method: str  # "jackknife-20", "jackknife-20+halves", "clopper-pearson", "jeffreys" or "none"


def assign_blocks(
    n: int,
    blocks: int = BLOCKS,
    *,
    labels: np.ndarray
    | None = None,  # int64 (n,), the classes if they were drawn in equal numbers; None: they were not
    copies: np.ndarray | None = None,  # int64 (n,), equal for copies of one image; None: there are none
) -> np.ndarray:
    """int64 (n,): the block of every sample, which depends on index, labels and copies; block sizes differ by at most 1.

    The assignment is random, because labels often follow the index (i mod classes, or sorted): a regular one would put
    all samples of a class into one block, and the spread between blocks would measure the classes instead of the noise.
    numpy guarantees RandomState's stream.

    labels: if their counts differ by at most 1 and each class has FEWEST_BLOCKS images or more, each block has as many
    images of a class as any other, up to remainders; there may then be fewer blocks. Else they have no effect.
    copies: copies have one block, and block sizes differ more; an image with more copies than half a block is taken for what
    a collapsed generator draws again and again, and its copies for samples.
    """
    if copies is not None:
        units, first, unit_of = _units(copies, max(n // (2 * blocks), 1))
        if units < n:
            return assign_blocks(units, blocks, labels=None if labels is None else labels[first])[unit_of]
    random = np.random.RandomState(20)
    if labels is None:
        return random.permutation(n) % min(blocks, n)
    _, label, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(counts) < 2 or counts.max() - counts.min() > 1 or counts.min() < min(FEWEST_BLOCKS, blocks):
        return random.permutation(n) % min(blocks, n)
    blocks = _even_blocks(int(counts.min()), blocks)
    # Sorted by class, the classes and the rows of each in random order, and dealt to the blocks in turns.
    order = np.lexsort((random.permutation(n), random.permutation(len(counts))[label]))
    block = np.empty(n, np.int64)
    block[order] = np.arange(n) % blocks
    return block


def one_hots(block: np.ndarray) -> list[np.ndarray]:
    """[(N, B) one-hot of the blocks], and one of the blocks that would be used without labels and copies if those differ.

    The last is for the value of a metric that is made of sums over blocks: its last bits then do not depend on how the
    samples were drawn. The first is for the error bar.
    """
    plain = assign_blocks(len(block))
    both = [block] if np.array_equal(block, plain) else [block, plain]
    return [np.eye(int(each.max()) + 1)[each] for each in both]


def independent(copies: np.ndarray, blocks: int = BLOCKS) -> int:
    """The number of samples that `assign_blocks` takes for independent draws: copies of an image are one."""
    return _units(copies, max(len(copies) // (2 * blocks), 1))[0]


def _even_blocks(count: int, blocks: int) -> int:
    """The number of blocks, from half of `blocks` up to it, in which `count` images of a class are spread most evenly.

    A remainder of r images is in r of B blocks, with variance r / B (1 - r / B); relative to the count / B images of a block
    it is what is left of the difference between classes.
    """

    def unevenness(number: int) -> tuple[float, int]:
        share = count % number / number
        return share * (1 - share) * number, -number

    most = min(blocks, count)
    return min(range(max(most // 2, 1), most + 1), key=unevenness)


def _units(copies: np.ndarray, most: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(number of units, index of the first row of each, int64 (n,) the unit of each row): rows with equal `copies` are one.

    most: an image of more copies than this is as many units as it has copies.
    """
    _, image, counts = np.unique(copies, return_inverse=True, return_counts=True)
    # a key for each row: the image, or, for images with too many copies, a number of its own
    own = np.where(counts[image] > most, len(counts) + np.arange(len(copies)), image)
    _, first, unit_of = np.unique(own, return_index=True, return_inverse=True)
    order = np.argsort(first)  # units in the order of their first rows, whatever the values of `copies`
    rank = np.empty(len(first), np.int64)
    rank[order] = np.arange(len(first))
    return len(first), first[order], rank[unit_of]


def block_sums(rows: np.ndarray, block: np.ndarray) -> np.ndarray:
    """float64 (B, ...): sums over the rows (N, ...) of each block."""
    return np.stack([rows[block == b].sum(axis=0, dtype=np.float64) for b in range(int(block.max()) + 1)])


def interval(estimate: Estimate, confidence: float = 0.95) -> Interval:
    """The interval value +- t * se, se^2 = (B - 1) / B * sum_b (left_out_b - mean)^2, t of B - 1 degrees of freedom.

    Exceptions: with `half_variance`, se^2 is a geometric mean of both variances; a share of exactly 0 or 1 has the exact
    binomial interval, and one with fewer than FEW samples on either side that of Jeffreys; if left_out is constant up to
    rounding, there is no interval.
    """
    from scipy.special import betaincinv, stdtrit

    left_out, value, tail = estimate.left_out, estimate.value, (1.0 - confidence) / 2.0
    blocks = len(left_out)
    variance = (blocks - 1) / blocks * float(np.sum((left_out - left_out.mean()) ** 2))
    if estimate.trials is not None and value in (0.0, 1.0):
        width = 1.0 - tail ** (1.0 / estimate.trials)  # Clopper and Pearson (1934) at 0 or N successes
        low, high = (0.0, width) if value == 0.0 else (1.0 - width, 1.0)
        return Interval(low=low, high=high, method="clopper-pearson")
    if estimate.trials is not None and min(value, 1.0 - value) * estimate.trials < FEW:
        # Brown, Cai and DasGupta (2001): the quantiles of the beta distribution with half a success and half a failure more
        hits, misses = value * estimate.trials + 0.5, (1.0 - value) * estimate.trials + 0.5
        low, high = (float(betaincinv(hits, misses, share)) for share in (tail, 1.0 - tail))
        return Interval(low=min(low, value), high=max(high, value), method="jeffreys")
    if blocks < 2 or np.sqrt(variance) <= 1e-12 * abs(value):  # left_out is constant up to rounding
        return Interval(low=None, high=None, method="none")
    method = f"jackknife-{blocks}"
    if estimate.half_variance is not None and estimate.half_variance > 0.0:
        # geometric mean of the two variances; min, so that it is not above the jackknife's
        variance = np.sqrt(variance * min(estimate.half_variance, variance))
        method += "+halves"
    half_width = float(stdtrit(blocks - 1, 1.0 - tail)) * float(np.sqrt(variance))
    return Interval(low=value - half_width, high=value + half_width, method=method)
