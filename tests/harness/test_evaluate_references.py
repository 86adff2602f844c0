"""`harness evaluate --reference`: which statistics are used, without a protocol, and of statistics alone."""

import json
import zipfile

import numpy as np
import pytest
import tiny_suite
from reference_calls import arrays, edited, facts, harness, made_pictures, reference, refused, seen_by_network

from evaluators.frechet import frechet_distance
from evaluators.statistics import statistics
from harness.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def suites():
    with tiny_suite.registered():
        yield


@pytest.fixture(scope="module")
def pictures():
    return made_pictures()


@pytest.fixture
def source(tmp_path, pictures):
    np.savez(tmp_path / "source.npz", arr_0=pictures[0], arr_1=pictures[1])
    return tmp_path / "source.npz"


TASK = """
name = "pictures"
dataset = "npz"
resolution = 8
num_classes = 7
input_size = 8
in_channels = 3
samples = 100
suite = "tiny"
"""


@pytest.fixture
def judged(tmp_path, pictures):
    """A call of `harness evaluate` for samples that are not the reference's."""
    samples = np.random.RandomState(5).randint(40, 240, (120, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=samples, arr_1=np.arange(120) % 7)
    (tmp_path / "task.toml").write_text(TASK)
    count = iter(range(100))

    def call(*more):
        out = tmp_path / f"records-{next(count)}.jsonl"
        done = harness(
            "evaluate", tmp_path / "samples.npz", "--protocol", tmp_path / "task.toml", "--json", "--out", out, *more
        )
        if done.exit_code:
            return done
        return {each["metric"]: each for each in json.loads(done.stdout)["records"]}

    call.samples = samples
    return call


def test_evaluation_takes_the_stored_statistics_and_names_the_reference(tmp_path, source, pictures, judged):
    said = facts(reference(source, tmp_path / "r.npz", "--images", 100, "--json"))
    records = judged("--reference", tmp_path / "r.npz")
    own, whole = statistics(seen_by_network(judged.samples).pooled), statistics(seen_by_network(pictures[0]).pooled)
    assert records["fd"]["value"] == pytest.approx(frechet_distance(own, whole), rel=1e-9)  # not of the 100 kept
    assert records["fd"]["evaluation"]["reference_sha256"] == said["reference_sha256"]
    kept = arrays(tmp_path / "r.npz")["arr_0"]
    np.savez(tmp_path / "kept.npz", arr_0=kept, arr_1=arrays(tmp_path / "r.npz")["arr_1"])
    bare = judged("--reference", tmp_path / "kept.npz")
    assert bare["precision"]["value"] == records["precision"]["value"]  # of the 100 kept
    assert bare["fd"]["value"] != records["fd"]["value"]


def test_a_reference_of_all_images_is_the_images(tmp_path, source, judged):
    facts(reference(source, tmp_path / "r.npz", "--json"))
    stored, bare = judged("--reference", tmp_path / "r.npz"), judged("--reference", source)
    for metric in ("fd", "precision"):
        assert stored[metric]["value"] == bare[metric]["value"]
        assert stored[metric]["evaluation"] == bare[metric]["evaluation"]


def test_statistics_of_another_network_are_refused_before_anything_is_seen(tmp_path, source, judged):
    facts(reference(source, tmp_path / "r.npz", "--json", suite="tiny-other"))
    before = tiny_suite.Projection.seen
    message = refused(judged("--reference", tmp_path / "r.npz"))
    assert "holds statistics of tiny-other" in message and "harness data reference --suite" in message
    assert tiny_suite.Projection.seen == before


def test_an_edited_file_is_refused(tmp_path, source, pictures, judged):
    facts(reference(source, tmp_path / "r.npz", "--images", 100, "--json"))
    moved = edited(tmp_path / "r.npz", tmp_path / "moved.npz", mu=np.zeros(6))
    assert "mu and sigma do not match the hash" in refused(judged("--reference", moved))
    other = edited(tmp_path / "r.npz", tmp_path / "other.npz", arr_0=pictures[0][:100])
    assert "its images do not match the hash" in refused(judged("--reference", other))
    for text in ("no JSON", "{}", '{"reference": {"format": 2}}', '{"reference": {"format": 1}}'):
        broken = edited(tmp_path / "r.npz", tmp_path / "broken.npz", about=np.array(text))
        assert "its metadata (array about) cannot be read" in refused(judged("--reference", broken))
    damaged = bytearray((tmp_path / "r.npz").read_bytes())
    with zipfile.ZipFile(tmp_path / "r.npz") as archive:
        place = archive.getinfo("sigma.npy").header_offset
    damaged[place + 300] ^= 1
    (tmp_path / "damaged.npz").write_bytes(damaged)
    assert "cannot be read" in refused(judged("--reference", tmp_path / "damaged.npz"))


# Without a protocol ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(tmp_path):
    """A call of `harness evaluate` with suite tiny and a reference, and without a protocol; returns its result."""
    count = iter(range(100))

    def call(samples, given, *more):
        out = tmp_path / f"compared-{next(count)}.jsonl"
        return harness(
            "evaluate", samples, "--reference", given, "--suite", "tiny", "--json", "--out", out, *more
        )  # fmt: skip

    return call


def by_metric(done):
    return {each["metric"]: each for each in facts(done)["records"]}


def test_without_a_protocol_sizes_and_classes_are_those_of_the_files(tmp_path, source, judged, compared):
    with_protocol = judged("--reference", source)
    records = by_metric(compared(tmp_path / "samples.npz", source))
    for metric in ("fd", "precision"):
        ours, theirs = records[metric], with_protocol[metric]
        assert ours["value"] == theirs["value"] and ours["evaluation"] == theirs["evaluation"]
        assert (ours["protocol"], ours["dataset"], ours["resolution"], ours["n"]) == ("none", "source", 8, 120)
        assert "protocol_version" not in ours and (theirs["protocol"], theirs["protocol_version"]) == ("pictures", "1")
    sidecar = {"images": 120, "shape": [8, 8, 3], "sha256": "0", "identity": {"protocol": "no such"}}
    (tmp_path / "samples.json").write_text(json.dumps(sidecar))
    assert "no such" in refused(compared(tmp_path / "samples.npz", source))  # a sidecar names one


@pytest.mark.parametrize(
    ("side", "labels"),
    [
        ((8, 8), np.arange(120) * 8 + 40),  # of 1,000 classes
        ((16, 12), None),
        ((8, 8), np.full(120, -1)),
        ((8, 8), np.linspace(0, 1, 120)),
        ((8, 8), np.zeros((120, 10), np.int64)),
    ],
)
def test_other_sizes_and_labels_as_adms_evaluator_takes_them(side, labels, tmp_path, compared):
    images = np.random.RandomState(6).randint(40, 240, (260, *side, 3)).astype(np.uint8)
    given = {} if labels is None else {"arr_1": labels}
    np.savez(tmp_path / "s.npz", arr_0=images[:120], **given)
    np.savez(tmp_path / "r.npz", arr_0=images[120:], arr_1=np.ones((140, 3), np.float32))
    record = by_metric(compared(tmp_path / "s.npz", tmp_path / "r.npz"))["fd"]
    own, other = (statistics(seen_by_network(part).pooled) for part in (images[:120], images[120:]))
    assert record["value"] == pytest.approx(frechet_distance(own, other), rel=1e-9)
    assert (record["protocol"], record["dataset"], record["resolution"]) == ("none", "r", side[0])


def test_a_reference_in_a_folder_has_the_whole_name_of_the_folder(tmp_path, compared):
    images = np.random.RandomState(6).randint(40, 240, (260, 8, 8, 3)).astype(np.uint8)
    (tmp_path / "cfg-1.5").mkdir()
    np.savez(tmp_path / "s.npz", arr_0=images[:120])
    np.savez(tmp_path / "cfg-1.5" / "0.npz", arr_0=images[120:])
    assert by_metric(compared(tmp_path / "s.npz", tmp_path / "cfg-1.5"))["fd"]["dataset"] == "cfg-1.5"


def test_from_python_without_a_protocol_and_the_command_that_repeats_it(tmp_path, source, judged, compared):
    from harness import evaluate
    from reports.commands import reproduction

    result = evaluate(samples=tmp_path / "samples.npz", reference=source, suite="tiny")
    by_command = by_metric(compared(tmp_path / "samples.npz", source))
    assert {each.metric: each.id for each in result.records} == {key: each["id"] for key, each in by_command.items()}
    (command,) = reproduction(result.records[0]).commands
    assert "--reference REFERENCE_FILE" in command and "--protocol" not in command


def test_a_reference_of_another_size_is_refused(tmp_path, source, compared):
    np.savez(tmp_path / "s.npz", arr_0=np.random.RandomState(6).randint(0, 256, (120, 16, 16, 3)).astype(np.uint8))
    assert "use a reference of the samples' resolution" in refused(compared(tmp_path / "s.npz", source))


# Statistics alone -----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path, pictures):
    """A file of mu and sigma without images, of all pictures."""
    own = statistics(seen_by_network(pictures[0]).pooled)
    np.savez(tmp_path / "stats.npz", mu=own.mean, sigma=own.covariance)
    return tmp_path / "stats.npz"


@pytest.mark.parametrize("protocol", [False, True])
def test_statistics_alone_give_what_they_can_and_the_rest_is_named(
    protocol, tmp_path, source, judged, compared, alone, caplog
):
    whole = judged("--reference", source)
    records = judged("--reference", alone) if protocol else by_metric(compared(tmp_path / "samples.npz", alone))
    assert list(records) == ["fd"]
    assert records["fd"]["value"] == pytest.approx(whole["fd"]["value"], rel=1e-9)
    assert records["fd"]["low"] < records["fd"]["value"] < records["fd"]["high"]
    reference_hash = records["fd"]["evaluation"]["reference_sha256"]
    assert len(reference_hash) == 64 and reference_hash != whole["fd"]["evaluation"]["reference_sha256"]
    assert "stats.npz holds statistics and no images; left out: precision" in caplog.text


def test_statistics_alone_where_they_cannot_be_used(tmp_path, judged, compared, alone):
    samples = tmp_path / "samples.npz"
    for suite, message in (
        ("efficientnet-lite0-96:fd", "does not say of which network"),
        ("torch-fidelity", "--inception"),
    ):
        assert message in refused(compared(samples, alone, "--suite", suite)), suite
    with pytest.raises(UserError, match="all metrics of suite tiny need images"):
        tiny_suite.made("tiny", ("precision", "kid")).without_reference_images(spatial=True)
    said = refused(compared(samples, alone, "--neighbours", tmp_path / "n.png"))
    assert "--neighbours shows training images" in said and "name them with --data" in said
    broken = tmp_path / "broken.npz"
    for arrays_, message in (
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "which has 6 features"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "is not finite"),
    ):
        np.savez(broken, **arrays_)
        assert message in refused(compared(samples, broken))
    assert "it can only be a reference" in refused(compared(alone, alone))
