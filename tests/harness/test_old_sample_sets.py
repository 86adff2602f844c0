"""Sample sets of sidecar schema 1 with their runs and records (tests/data/schema-1): read, reported, found, continued."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from harness.cli import group
from harness.engines.interfaces import DeviceInfo
from harness.errors import UserError
from harness.io.files import sha256_file, write_json
from harness.pipeline import sample, sample_system
from harness.pipeline.sidecar import read_fields, upgrade_v1
from harness.planning.request import request_of_run
from harness.runs.run import open_run
from harness.runs.sample_set import BATCH, default_decoder
from harness.runs.samples import read_samples, read_sidecar
from harness.systems.binding import LoadedSystem, Source
from harness.systems.spec import System
from results.store import load

DATA = Path(__file__).resolve().parents[1] / "data" / "schema-1"
SETS = [path.parent for path in sorted(DATA.rglob("samples.npz"))]
TABLES = sorted(DATA.glob("tables/*.csv"))
# of table-verdicts, since then
RENAMED_COLUMNS = {"rival_": "opponent_"}
NEW_COLUMNS = {"sampling_gflops", "opponent_sampling_gflops"}
# by the rule of ties, which since then compares all systems at once and gives equal shares the noise of their intervals
OF_TIES = {"fd_mark", "largest_tie"}


def of(folder):
    return str(folder.relative_to(DATA / "runs"))


def known(value):
    """Without what is None, at every depth."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: known(each) for name, each in value.items() if each is not None}
    return value


def test_the_data_holds_every_kind_of_sidecar():
    sidecars = [read_sidecar(folder / "samples.npz") for folder in SETS]
    assert {each["schema"] for each in sidecars} == {1}
    runs = [each for each in sidecars if "run" in each["identity"]]
    assert len(runs) >= 4 and len(sidecars) - len(runs) >= 2 and len(TABLES) >= 2
    assert {each["identity"]["run"]["framework"] for each in runs} == {"torch", "jax"}
    assert any("decoder" in each["identity"] for each in runs)


@pytest.mark.parametrize("folder", SETS, ids=of)
def test_an_old_sidecar_says_what_the_old_reader_said(folder):
    path = folder / "samples.npz"
    expected = json.loads((folder / "expected.json").read_text())
    assert known(read_fields(path, sha256_file(path)).arguments()) == known(expected)
    old = read_sidecar(path)
    new = upgrade_v1(old)
    assert new["schema"] == 2 and {**old, **new} == {**new, "compute": old["compute"], **_trained(old)}


def test_samples_without_a_sidecar_are_what_they_were():
    path = DATA / "runs" / "external" / "noisy.npz"
    expected = json.loads(path.with_name("expected.json").read_text())
    assert known(read_fields(path, sha256_file(path)).arguments()) == known(expected)


def _trained(sidecar):
    return {"trained": sidecar["trained"]} if "trained" in sidecar else {}


@pytest.mark.parametrize("folder", SETS, ids=of)
def test_the_records_of_old_samples_keep_their_ids(folder):
    path = folder / "samples.npz"
    fields = read_fields(path, sha256_file(path))
    files = [each for each in (folder / "records.jsonl", folder.parents[1] / "records.jsonl") if each.exists()]
    records = [each for each in load(files).records if each.sampling.samples_sha256 == fields.sampling.samples_sha256]
    assert records
    for record in records:
        again = dataclasses.replace(record, **fields.arguments())
        assert (again.id, again.identity_sha256) == (record.id, record.identity_sha256)


def test_a_report_of_old_records_has_the_same_tables(tmp_path, monkeypatch):
    monkeypatch.chdir(DATA)
    monkeypatch.setattr("reports.report.figures", lambda *records_and_folders: ())  # they take most of a report's time
    result = CliRunner().invoke(group, ["report", "--results", "runs", "--out", str(tmp_path / "report")])
    assert result.exit_code == 0, (result.exception, result.output)
    assert [path.name for path in sorted((tmp_path / "report").glob("table-*.csv"))] == [each.name for each in TABLES]
    for path in TABLES:
        header, rest = path.read_text().split("\n", 1)
        for old, new in RENAMED_COLUMNS.items():
            header = header.replace(old, new)
        found, expected = (
            [
                {name: value for name, value in row.items() if name not in NEW_COLUMNS | OF_TIES}
                for row in csv.DictReader(text.splitlines())
            ]
            for text in ((tmp_path / "report" / path.name).read_text(), f"{header}\n{rest}")
        )
        assert found == expected and [list(row) for row in found] == [list(row) for row in expected], path.name


class Remembered:
    """A sampler that gives the images of a sample set, and remembers which were asked for."""

    def __init__(self, samples, evaluations):
        self._samples, self.evaluations, self.asked = samples, evaluations, []

    def draw(self, index, labels, advance):
        assert np.array_equal(labels, self._samples.labels[index])
        self.asked += index.tolist()
        return np.array(self._samples.images[index])


class Engine:
    """A backend without a framework, whose sampler is `sampler`."""

    def __init__(self, sampler):
        self.make_sampler = self.make_chain = lambda *things, **settings: sampler

    def resolve_device(self, device):
        return DeviceInfo(None, "cpu", "the tests")


class Decoder:
    """A decoder by its identity, which decodes nothing."""

    def __init__(self, identity):
        self.identity = identity

    def compute(self, side):
        return SimpleNamespace(gflops=1.0)


@pytest.fixture
def again(tmp_path, monkeypatch):
    """A copy of a sample set with its run, and a function that gives its command once more: path and images asked for."""

    def make(folder):
        side = read_sidecar(folder / "samples.npz")
        identity = side["identity"]
        sampler = Remembered(read_samples(folder / "samples.npz"), side["evaluations"])
        for module in (sample, sample_system):
            monkeypatch.setattr(module, "get_backend", lambda framework: Engine(sampler))
            monkeypatch.setattr(module, "write_grid_beside", lambda path: None)
        monkeypatch.setattr(sample, "device_of", lambda run, group: "the tests")
        call = of_run if "run" in identity else of_system
        return call(folder, identity, tmp_path, monkeypatch), sampler

    return make


def named_batch(identity):
    """The batch size where the command named one; None where it left it to the harness."""
    return None if identity["batch"] == BATCH else identity["batch"]


def of_run(folder, identity, tmp_path, monkeypatch):
    copy = shutil.copytree(folder.parents[1], tmp_path / "run")
    run, step, drawn = open_run(copy), identity["training_steps"], identity["sampling"]
    weights = {"sha256": identity["checkpoint_sha256"], "bytes": 1}
    state = {"schema": 1, "step": step, "seconds": 1.0, "files": {"ema.safetensors": weights}}
    write_json(run.ema_checkpoint(step) / "state.json", state)  # the weights themselves are too large to be kept
    verified = SimpleNamespace(part=lambda name: run.ema_checkpoint(step) / name, state=state)
    monkeypatch.setattr(sample.checkpoints, "verify", lambda path, hashes: verified)
    settings = {
        name: drawn[name] for name in ("sampler", "eta", "guidance_scale", "guidance_channels", "label_policy", "seed")
    }
    request = request_of_run(run, sampling={**settings, "steps": (drawn["steps"],)}, samples=identity["count"])
    decoder = Decoder(identity["decoder"]) if "decoder" in identity else None
    assert default_decoder(run) == identity.get("decoder")
    call = lambda: sample.sample_run(  # noqa: E731
        run, request, step, drawn["steps"], precision=drawn["precision"], batch=named_batch(identity), decoder=decoder
    )
    return copy / "samples" / folder.name, call


def of_system(folder, identity, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "systems" / folder.name)
    sources = {
        name: Source(path=Path(name), sha256=each["sha256"], run=each["run"], steps=each["training_steps"])
        for name, each in identity["weights"].items()
    }
    loaded = LoadedSystem(system=System.from_dict(identity["system"]), sources=sources, decoder=None)
    drawn = identity["sampling"]
    call = lambda: sample_system.sample_system(  # noqa: E731
        loaded, folder=tmp_path / "systems", count=identity["count"], seed=drawn["seed"], precision=drawn["precision"],
        batch=named_batch(identity), device=None,
    )  # fmt: skip
    return copy, call


@pytest.mark.parametrize("folder", SETS, ids=of)
def test_a_finished_sample_set_is_found(folder, again):
    (copy, call), sampler = again(folder)
    before = (copy / "samples.json").read_bytes()
    assert call() == copy / "samples.npz"
    assert sampler.asked == [] and (copy / "samples.json").read_bytes() == before


@pytest.mark.parametrize("folder", SETS, ids=of)
def test_a_sample_set_that_was_interrupted_is_continued(folder, again):
    """From the shards that are there: one a batch, under the names that they had then."""
    (copy, call), sampler = again(folder)
    old, samples = read_sidecar(copy / "samples.npz"), read_samples(folder / "samples.npz")
    for name in ("samples.npz", "samples.json"):
        (copy / name).unlink()
    batch, count = old["identity"]["batch"], len(samples.images)
    half = batch if batch < count else 0
    (copy / "shards").mkdir()
    if half:
        np.save(copy / "shards" / "shard-00000000.npy", samples.images[:half])
    assert call() == copy / "samples.npz"
    assert sampler.asked == list(range(half, count))
    assert (copy / "samples.npz").read_bytes() == (folder / "samples.npz").read_bytes()
    new = read_sidecar(copy / "samples.npz")
    assert new["schema"] == 2 and new["identity"] == old["identity"] and new["evaluations"] == old["evaluations"]
    assert (new["drawn"]["seconds"] is None) == bool(half) and not (copy / "shards").exists()


def places(data, below=()):
    """The path of every value in JSON data."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield (*below, key)
        yield from places(data[key], (*below, key))


@pytest.mark.parametrize("folder", SETS, ids=of)
def test_what_an_old_sidecar_leaves_out_is_not_made_up(folder, tmp_path):
    """Without any one value, or with null or a list in its place, it is refused in one line, or means the same or less."""
    shutil.copy(folder / "samples.npz", tmp_path)
    sidecar = read_sidecar(folder / "samples.npz")
    complete = known(read_fields(folder / "samples.npz", sidecar["sha256"]))
    stated = {"training": ("batch", "learning_rate", "images"), "sampling": ("eta", "guidance_scale", "clip_denoised")}
    for place in places(sidecar):
        for change in ("left out", None, []):
            changed = json.loads(json.dumps(sidecar))
            *outer, last = place
            holder = changed
            for key in outer:
                holder = holder[key]
            if change == "left out":
                del holder[last]
            else:
                holder[last] = change
            (tmp_path / "samples.json").write_text(json.dumps(changed))
            try:
                found = known(read_fields(tmp_path / "samples.npz", sidecar["sha256"]))
            except UserError as error:
                assert "\n" not in str(error)
                continue
            for part, names in stated.items():
                for name in names:
                    value = found.get(part, {}).get(name)
                    assert value in (None, complete.get(part, {}).get(name)), (place, change, name, value)
