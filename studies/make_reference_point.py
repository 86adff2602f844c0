"""Make a reference convergence point of several seeds: python studies/make_reference_point.py RUN RUN ... --marks 50,100 --out FILE

The runs must differ in their seeds alone. `harness check --convergence RUN` compares other runs with the file; those in
results/reference_points/ are found by backbone and protocol.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.diagnose.convergence import make_reference_point


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--marks", required=True, help="steps at which the loss is kept, as in 50,100")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    arguments = parser.parse_args()
    marks = sorted(int(each) for each in arguments.marks.split(","))
    make_reference_point(arguments.runs, marks).write(arguments.out)


if __name__ == "__main__":
    main()
