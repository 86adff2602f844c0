"""The figures of scale: every published value against results/published, and what a study of one's own adds."""

import csv
import dataclasses
import io
import math
from importlib import resources

import pytest

from harness import registry
from reports.charts import Mark, model_styles, to_csv
from reports.drawing import draw
from reports.figures import figures, published_records
from reports.figures_gflops import missing_law_note
from reports.figures_study import DIT
from reports.figures_training import _SIZE_ORDER
from reports.points import usual_sampling
from results.records import Sampling, Training


def named(records, name):
    return next((figure for figure in figures(records) if figure.name == name), None)


def rows_of(figure):
    return list(csv.DictReader(io.StringIO(to_csv(figure))))


def printed(table, column):
    """(row of the table) -> text, straight from the packaged file."""
    file = resources.files("results").joinpath("published", f"{table.lower().replace(' ', '-')}.csv")
    rows = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))
    return {row["row"]: row["value"] for row in rows if row["column"] == column}


def series(figure):
    return [each for panel in figure.panels for each in panel.series]


def trained(record, steps):
    training = record.training
    return dataclasses.replace(
        record, training=dataclasses.replace(training, steps=steps, images=128 * steps, gflops=3.0 * record.gflops * 128 * steps)
    )  # fmt: skip


@pytest.fixture
def lengths(study):
    """The study evaluated after 400 and 800 steps."""
    return [trained(record, steps) for record in study for steps in (400, 800)]


FIDS, GFLOPS, PARAMS = (printed("Table 4", name) for name in ("FID-50K (no guidance)", "Flops (G)", "Params (M)"))
AT_400K = {row for row in FIDS if ", 256x256, 400K, adaLN-Zero" in row}


def check_details(row):
    """A row of a figure's CSV that quotes Table 4."""
    name = row["source"].removeprefix("Table 4: ")
    assert float(row["value"]) == float(FIDS[name]) and float(row["gflops"]) == float(GFLOPS[name])
    assert float(row["params"]) == 1e6 * float(PARAMS[name])
    return name


@pytest.mark.parametrize(
    "name", ["figure-2", "figure-5", "figure-6", "figure-8", "figure-9", "figure-12", "scaling-law"]
)
def test_published_values_are_those_of_the_paper(name):
    figure = named(published_records(), name)
    rows = rows_of(figure)
    details = [row for row in rows if row["source"].startswith("Table 4")]
    found = {check_details(row) for row in details}
    if name == "figure-5":
        assert found == {
            f"DiT-XL/2, 256x256, 400K, {block}" for block in ("adaLN-Zero", "in-context", "cross-attention", "adaLN")
        }
    elif name in ("figure-9", "figure-12"):
        assert found >= AT_400K and {f"DiT-XL/2, 256x256, {n}K, adaLN-Zero" for n in (2352, 7000)} <= found
        for row in details:
            steps, batch = float(row["training_steps"]), 256
            assert float(row["training_gflops"]) == pytest.approx(float(row["gflops"]) * steps * batch * 3)
    else:
        assert found == AT_400K and len(AT_400K) == 12
    others = [row for row in rows if row["provenance"] == "published" and row not in details]
    columns = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "Precision", "recall": "Recall"}
    for row in others:
        table, _, place = row["source"].partition(": ")
        assert float(row["value"]) == float(printed(table, columns[row["metric"]])[place])
    assert bool(others) == (name in ("figure-2", "figure-12"))


def test_points_without_a_logarithm_leave_a_note_where_they_leave_no_law():
    def marked(*values):
        return [(None, Mark(x=10.0 * (i + 1), y=value)) for i, value in enumerate(values)]

    assert missing_law_note(marked(4, 3, 0, -1, 2)) == [
        "no power law: 2 of 5 points are at or below 0 and have no logarithm"
    ]
    assert missing_law_note(marked(4, 3)) == missing_law_note(marked(4, 0)) == []  # too few whatever their values


def test_correlation_and_law_of_the_paper():
    figure = named(published_records(), "figure-8")
    assert len(figure.panels) == 1 and "-0.93 [-0.98, -0.76] (12 models)" in figure.panels[0].note
    assert "Gflops^-0.36 [-0.46, -0.27]" in figure.panels[0].note
    assert figure.panels[0].x.scale == "log"


def test_a_law_of_eleven_dits_predicts_the_twelfth(record):
    records = published_records()
    rest = [each for each in records if not (each.source.table == "Table 4" and each.backbone == "dit-l-4")]
    rows = {row["line"]: row for row in named(rest, "scaling-law").rows if row["provenance"] == "fit"}
    assert rows["dit-l-4"]["low"] < 45.64 < rows["dit-l-4"]["high"] and rows["dit-l-4"]["shows"] == "prediction"
    assert "dit-xs-4" not in rows  # outside the range of the points, which show no floor
    texts = [mark.text for each in series(named(rest, "scaling-law")) for mark in each.marks]
    assert "DiT-L/4" in texts and not any("extrapolated" in text for text in texts)
    (panel,) = named(rest, "scaling-law").panels
    assert "outside the range of the points are not predicted" in panel.note and "scatter by" in panel.note
    few = [
        each for each in records if each.source.table != "Table 4" or each.backbone in ("dit-s-8", "dit-b-8", "dit-l-8")
    ]
    assert named(few, "scaling-law") is None


def test_a_law_with_a_floor_is_extrapolated(record):
    """And one on a floor that the points cannot show says that it does not fit."""
    names = ("dit-s-8", "dit-s-4", "dit-b-8", "dit-b-4", "dit-l-8", "dit-l-4", "dit-xl-4", "dit-s-2", "dit-b-2")
    costs = [0.1 * 2.2**index for index in range(len(names))]
    noise = (1.01, 0.99, 1.0, 1.01, 0.99, 1.01, 1.0, 0.99, 1.0)
    records = [
        record(value=(5 + 20 * cost**-0.7) * each, system=name, gflops=cost)
        for name, cost, each in zip(names, costs, noise, strict=True)
    ]
    figure = named(records, "scaling-law")
    (panel,) = figure.panels
    assert "the law rests on its floor" in panel.note and "dashed: 4.9" in panel.note
    assert {row["shows"] for row in figure.rows if row["provenance"] == "fit"} >= {"extrapolation"}
    (panel,) = named(records[::2], "scaling-law").panels
    assert "the points bend away from the law" in panel.note and "not predicted" in panel.note


def test_a_study_stands_in_panels_of_its_own(lengths):
    records = [*lengths, *published_records()]
    for name in ("figure-2", "figure-8", "figure-9"):
        for panel in named(records, name).panels:
            assert len({each.provenance for each in panel.series if each.provenance != "fit"}) == 1
    nine = list(named(lengths, "figure-9").panels)
    assert [{each.label: len(each.marks) for each in panel.series} for panel in nine] == [
        {"dit-xs-2": 2, "dit-xs-4": 2, "unet-small": 2}
    ]
    by_id = {each.id: each for each in lengths}
    for each in nine[0].series:
        for mark in each.marks:
            own = [by_id[record_id] for record_id in mark.record_ids]
            assert {record.training.gflops for record in own} == {mark.x} and len(own) == 2
            assert {record.sampling.steps for record in own} == {50}  # the most that all have
    six = named(lengths, "figure-6")
    assert [panel.title for panel in six.panels] == ["DiT-XS, patches differ"]
    eight = named(lengths, "figure-8")
    assert {row["training_steps"] for row in eight.rows} == {800} and "800 training steps" in eight.panels[0].note
    assert {panel.title for panel in named(lengths, "figure-12").panels} == {
        f"{metric} {way}" for metric in ("FD-1K", "KD", "Precision") for way in ("over training", "against Gflops")
    }
    assert named(lengths, "figure-5") is None and named(lengths, "scaling-law") is None


def test_what_may_share_a_panel_with_the_paper_does(imagenet):
    ours = imagenet(
        "fid", 60.0, system="dit-s-2", backbone="dit-s-2", gflops=6.06, params=33_000_000,
        sampling=dataclasses.replace(imagenet("fid", 1.0).sampling, guidance_scale=None, guidance_channels=None),
        training=Training(steps=400_000, gflops=6.06 * 3 * 256 * 400_000, batch=256),
    )  # fmt: skip
    figure = named([ours, *published_records()], "figure-8")
    assert len(figure.panels) == 1 and "(12 models)" in figure.panels[0].note
    assert {each.provenance for each in figure.panels[0].series} == {"fit", "published", "measured"}
    other = dataclasses.replace(ours, evaluation=dataclasses.replace(ours.evaluation, suite="clean"))
    assert len(named([other, *published_records()], "figure-9").panels) == 2


def test_blocks_of_a_study(record):
    blocks = ["dit-xs-2", "dit-xs-2-in-context", "dit-xs-2-adaln"]
    records = [
        trained(record(system=name, value=10.0 + place - steps / 400), steps)
        for place, name in enumerate(blocks)
        for steps in (400, 800)
    ]
    records.append(trained(record(system="dit-xs-2", value=2.0), 1600))  # alone: nothing to compare it with
    (panel,) = named(records, "figure-5").panels
    assert {each.label: [mark.x for mark in each.marks] for each in panel.series} == {
        "adaLN-Zero": [400, 800], "in-context": [400, 800], "adaLN": [400, 800],
    }  # fmt: skip


def test_of_several_recipes_of_a_model_the_longest_training_counts(record):
    def at(system, steps, rate):
        made = trained(record(system=system, value=100.0 - steps / 100), steps)
        return dataclasses.replace(made, training=dataclasses.replace(made.training, learning_rate=rate))

    # Lines are sorted by a hash, so each recipe is once the longer one.
    for long, short in ((1e-3, 1e-4), (1e-4, 1e-3)):
        records = [at("dit-xs-2", 200, long), at("dit-xs-2", 1000, long), at("dit-xs-2", 500, short)]
        records += [at("dit-xs-4", 200, long), at("dit-xs-4", 800, long)]
        (panel,) = named(records, "figure-6").panels
        assert [[m.x for m in each.marks] for each in panel.series if each.model == "dit-xs-4"] == [[200, 800]]


def test_dits_whose_training_steps_are_not_stated_are_in_no_panel_over_steps(record):
    names = ("dit-xs-2", "dit-xs-4", "dit-xs-2-adaln")
    records = [record(system=name, value=10.0 + i, training=Training(seed=0)) for i, name in enumerate(names)]
    made = figures(records)
    assert made and not {"figure-5", "figure-6"} & {figure.name for figure in made}
    for figure in made:
        assert draw(figure, model_styles(records), ("svg",))


def test_models_matched_by_compute_share_a_panel_though_no_training_length(record):
    lengths = {"dit-xs-2": (200, 400), "dit-xs-4": (700, 1400)}
    records = [
        trained(record(system=name, backbone=name, value=100.0 - steps / 100), steps)
        for name, ends in lengths.items()
        for steps in ends
    ]
    (panel,) = named(records, "figure-6").panels
    assert {each.label: [mark.x for mark in each.marks] for each in panel.series} == {
        "DiT-XS/2": [200, 400], "DiT-XS/4": [700, 1400],
    }  # fmt: skip


def test_systems_without_the_usual_setting_keep_their_own(record):
    records = [
        record(system="a", gflops=1.0),
        record(system="b", gflops=2.0),
        record(system="c", gflops=3.0, steps=10),
        trained(record(system="d", gflops=4.0), 900),
    ]
    figure = named(records, "figure-8")
    assert {mark.text for each in series(figure) if each.kind == "points" for mark in each.marks} == {
        "a", "b", "c", "d (900 steps)",
    }  # fmt: skip
    assert "1 of 4 systems at their own most steps" in figure.panels[0].note


@pytest.mark.parametrize(
    ("scale", "channels", "text"),
    [(1.0, None, "no guidance"), (1.0, "classifier", "guidance 1"), (None, "classifier", "guidance, scale not stated")],
)
def test_the_note_on_sampling_names_the_scale_of_a_classifier(record, scale, channels, text):
    made = record(sampling=Sampling(sampler="ddpm", steps=25, guidance_scale=scale, guidance_channels=channels))
    assert usual_sampling([made]) == ([made], f"sampled by ddpm with 25 steps, {text}")


def test_every_figure_can_be_drawn_and_names_what_it_shows(lengths):
    records = [*lengths, *published_records()]
    styles = model_styles(records)
    for figure in figures(lengths):
        svg = draw(figure, styles, ("svg",))["svg"].decode()
        # a budget names its best where it would win again, and none of these would
        named = {"figure-6": ("DiT-XS/2",), "pareto": ("unet-small",), "budget": ()}.get(
            figure.name, ("dit-xs-2", "unet-small")
        )
        assert all(name in svg for name in named), figure.name
        assert figure.title in svg and figure.panels[0].x.text.split(" (")[0] in svg


def test_numbers_beyond_all_measure_are_left_out(record):
    huge, training = 10**300, record().training
    odd = [
        record(system="zero", gflops=0.0),
        record(system="negative", gflops=-2.0),
        record(system="large", params=huge),
        record(system="long", training=dataclasses.replace(training, steps=huge)),
        record(system="value", value=1e300, half=None),
        record(system="interval", low=-1e300, high=1e300),
    ]
    plain = [
        record(system=name, value=value, gflops=gflops) for name, value, gflops in (("a", 9.0, 1.0), ("b", 8.0, 2.0))
    ]
    made = figures([*odd, *plain])
    styles = model_styles([*odd, *plain])
    assert {"figure-2", "figure-8", "figure-9", "figure-10", "pareto"} <= {figure.name for figure in made}
    for figure in made:
        if figure.name in ("figure-2", "figure-8", "pareto"):
            assert draw(figure, styles, ("svg",))


def against_gflops(records, name="figure-12"):
    """The note of the first panel of a figure, Figure 12's against Gflops."""
    panels = named(records, name).panels
    return next(panel.note for panel in panels if name != "figure-12" or panel.title.endswith("against Gflops"))


def test_other_metrics_correlate_at_one_training_length(record):
    """A model trained for longer than the others stands in the panel and not in the correlation."""
    values = (("a", 12.0, 1.0), ("b", 9.0, 2.0), ("c", 7.0, 4.0))
    records = [record(system=name, value=value, gflops=gflops) for name, value, gflops in values]
    told = "correlation with log Gflops -0.99 (3 models)"
    assert told in against_gflops(records)
    longer = trained(record(system="d", value=40.0, gflops=8.0), 9000)
    assert told in against_gflops([*records, longer])


@pytest.mark.parametrize("best", [1e-3, 1e-4])
def test_of_several_recipes_of_a_model_the_best_counts(record, best):
    """Whichever recipe that is: of FD the lowest value, of precision the highest, and the note says so."""

    def tuned(metric, value, learning_rate, name="b", gflops=2.0):
        made = record(metric, value, system=name, gflops=gflops)
        return dataclasses.replace(made, training=dataclasses.replace(made.training, learning_rate=learning_rate))

    other = 1e-3 + 1e-4 - best
    ends = [tuned("fd", 12.0, best, "a", 1.0), tuned("fd", 8.0, best, "c", 4.0)]
    both = [tuned("fd", 10.0, best), tuned("fd", 60.0, other)]
    for name in ("figure-8", "figure-12"):
        note = against_gflops([*ends, *both], name)
        assert "correlation with log Gflops -1.00" in note and "(3 models); of a model's several recipes" in note
        assert "(best of 1 to 2): the best of more is better by luck alone" in note
        assert "several recipes" not in against_gflops([*ends, both[0]], name)
    shares = [tuned("precision", 0.4, best, "a", 1.0), tuned("precision", 0.6, best, "c", 4.0)]
    shares += [tuned("precision", 0.5, best), tuned("precision", 0.1, other)]
    assert "correlation with log Gflops 1.00 (3 models)" in against_gflops(shares)


def test_compute_to_a_target_is_that_of_compare(lengths):
    """A model falls from 12 to 6 while its compute doubles: the line is read off, for each target and seed."""
    falling = [
        dataclasses.replace(
            r, value=(12.0 if r.training.steps == 400 else 6.0) * (1 + 0.01 * r.training.seed), low=None, high=None
        )
        for r in lengths
        if r.metric == "fd"
    ]
    figure = named(falling, "time-to-target")
    by_model = {row["line"]: row for row in rows_of(figure) if float(row["target"]) == 8.2}
    gflops = {record.system: record.gflops for record in falling}
    for model, row in by_model.items():
        at_400 = 3 * gflops[model] * 128 * 400
        shares = [math.log(12 * (1 + 0.01 * seed) / 8.2) / math.log(2) for seed in range(2)]
        assert float(row["training_gflops"]) == pytest.approx(at_400 * 2 ** (sum(shares) / 2))
        assert float(row["low"]) < float(row["training_gflops"]) < float(row["high"])
    assert set(by_model) == set(gflops)
    assert named([r for r in falling if r.training.seed == 0], "time-to-target") is None  # never of one run
    assert draw(figure, model_styles(falling))["png"]


def test_every_dit_of_the_registry_is_known_as_one():
    names = [spec.name for spec in registry.backbones if spec.family == "dit"]
    sizes = {match["size"] for name in names if (match := DIT.fullmatch(name))}
    assert len(names) == 84 and all(DIT.fullmatch(name) for name in names)
    assert sizes == set(_SIZE_ORDER)
