"""Batches that are halved where the memory of a GPU does not suffice, with a stage that is full beyond a number of images."""

import numpy as np
import pytest
import torch

from harness.engines.torch.sampling import TorchChain
from harness.errors import RunError

ROWS = 4


class Stage:
    """A stage whose images show their index; a call with more than `capacity` images fails after two rows."""

    evaluations = rows = ROWS

    def __init__(self, capacity):
        self.capacity, self.sizes = capacity, []

    def draw(self, seed, index, y, low_res, advance, rows=(), watch=lambda x0: None):
        self.sizes.append(len(index))
        for k in range(ROWS):
            if k == 2 and len(index) > self.capacity:
                raise torch.OutOfMemoryError("full")
            if k in rows:
                watch((index[:, None, None, None] / 200 + k / 100).expand(-1, 1, 2, 2))
            advance()
        return (index[:, None, None, None] / 100).expand(-1, 1, 2, 2)


def drawn(images, capacity, fill, count):
    """(images, predicted images of the first `count` at rows 0 and 3, calls of `advance`, images of each call of the stage)."""
    stage, advanced = Stage(capacity), []
    chain = TorchChain([stage], None, seed=0, uint8_rule="dit", device=torch.device("cpu"), fill=fill)
    index = np.arange(images)
    found, predicted = chain.trajectory(index, 0 * index, (0, 3), count, lambda: advanced.append(1))
    return found, predicted, len(advanced), stage.sizes


@pytest.mark.parametrize("fill", [None, 8, 64])
@pytest.mark.parametrize("images", [1, 3, 8, 33])
def test_the_images_are_those_of_a_large_memory(images, fill):
    for count in (0, 1, images):
        expected, rows, *_ = drawn(images, 10**6, None, count)
        for capacity in (1, 2, 3, 40):
            found, predicted, advanced, sizes = drawn(images, capacity, fill, count)
            assert advanced == ROWS and sizes[-1] <= capacity
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(predicted, rows)


def test_one_image_that_does_not_fit_is_one_line():
    with pytest.raises(RunError, match="too small to sample one image"):
        drawn(5, 0, 8, 0)
