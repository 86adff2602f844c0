"""The digits, read without importing scikit-learn."""

import subprocess
import sys

import numpy as np
from sklearn.datasets import load_digits

from harness.data import digits


def test_the_file_is_what_scikit_learn_reads(monkeypatch):
    ours, theirs = digits.load(), load_digits()
    np.testing.assert_array_equal(ours.images[..., 0], np.rint(theirs.images / 16 * 255))
    np.testing.assert_array_equal(ours.labels, theirs.target)
    monkeypatch.setattr(digits, "FILE", digits.FILE.with_name("moved.csv.gz"))  # in another version
    assert digits.load().sha256 == ours.sha256


def test_the_package_is_not_imported():
    """It would be most of the time in which a command starts."""
    text = "import sys; from harness.data import digits; digits.load(); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"
