"""Figures for tests of the page: curves of records, and every other kind of series."""

from reports.charts import Axis, Figure, Mark, Panel, Series
from results import paper


def curves(records) -> Figure:
    lines = {}
    for record in records:
        if record.metric == "fd":
            lines.setdefault((record.system, record.training.seed), []).append(record)
    series = []
    for (system, seed), members in sorted(lines.items()):
        members.sort(key=lambda record: record.sampling.steps)
        marks = [
            Mark(
                x=each.sampling.gflops_per_image, y=each.value, low=each.low, high=each.high, record_ids=(each.id,),
                text=str(each.sampling.steps),
            )
            for each in members
        ]  # fmt: skip
        label = f"{system}, seed {seed}"
        series.append(Series(label=label, model=system, kind="line", provenance="measured", marks=tuple(marks)))
    x = Axis(title="Sampling compute", unit="Gflops per image", scale="log")
    panel = Panel(heading="digits", x=x, y=Axis(title="FD-1K", better="lower"), series=tuple(series))
    return Figure(name="figure-10", title="Sampling compute against sample quality", panels=(panel,), rows=())


def bubbles() -> Figure:
    table = [record for record in paper.records() if record.source.table == "Table 4" and record.resolution == 256]
    common = {"provenance": "published", "label": ""}
    bubbles = [
        Series(
            model=each.backbone, kind="bubbles", **common,
            marks=(Mark(x=each.gflops, y=each.value, size=each.params, text=each.backbone, record_ids=(each.id,)),),
        )
        for each in table
    ]  # fmt: skip
    along = [10 ** (index / 5) for index in range(12)]
    fit = Series(
        label="power law", model="", kind="fit", provenance="fit", marks=tuple(Mark(x=x, y=99 / x) for x in along)
    )
    edges = tuple(Mark(x=x, y=99 / x, low=70 / x, high=130 / x) for x in along)
    band = Series(label="power law", model="", kind="band", provenance="fit", marks=edges)
    bars = [
        Series(
            model=each.backbone, kind="bars", **common,
            marks=(Mark(x=index, y=each.value, text=each.backbone, record_ids=(each.id, table[0].id)),),
        )
        for index, each in enumerate(table[:6])
    ]  # fmt: skip
    quality = Axis(title="FID-50K", better="lower", scale="log")
    steps = tuple(
        Mark(x=step, y=1 / (1 + step), low=0.0, high=9.0, facts=(("step", str(step)),)) for step in range(200)
    )
    loss = Series(label="loss of a run", model="dit-s-2", kind="line", provenance="measured", marks=steps)
    panels = (
        Panel(heading="imagenet", x=Axis(title="Gflops", scale="log"), y=quality, series=(*bubbles, fit, band)),
        Panel(heading="bars", x=Axis(title="Model", scale="names"), y=Axis(title="FID-50K"), series=tuple(bars)),
        Panel(heading="loss", x=Axis(title="Step"), y=Axis(title="Loss"), series=(loss,)),
    )
    return Figure(name="figure-2", title="Quality and compute", panels=panels, rows=())
