"""The products of metrics on a pretended GPU."""

import numpy as np
from pretended_cuda import DEVICE, PretendedDevice

from evaluators import products
from evaluators.products import product
from evaluators.statistics import Moments


def test_on_a_device_no_tensors_of_two_meet():
    with PretendedDevice() as gpu, products._multiplied_by(DEVICE):
        Moments(4).update(np.ones((7, 4), np.float32)).finish()
        assert product(np.ones((3, 4)), np.ones((5, 4)).T).shape == (3, 5)
    assert not gpu.mixed and sum(gpu.launches.values()) >= 2, gpu.summary()
