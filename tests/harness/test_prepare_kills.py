"""`harness data prepare` killed with -9 at random moments: nothing is lost, nothing repeated, the same bytes at the end."""

import errno
import json
import os
import random
import shutil
import signal
import time

import pytest
from command_process import start
from fake_imagenet import as_parquet, make_tree
from PIL import Image

from harness.data import imagenet, prepared
from harness.data.prepare import prepare
from harness.data.verify import verify
from harness.errors import RunError


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def journaled(folder):
    """The units that the journal says are done."""
    journal = folder / "out.partial" / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []
    return [json.loads(line)["unit"] for line in lines if b'"unit"' in line]


def killed_and_continued(words, folder, kills, whole_seconds, seed):
    """Kill the command `kills` times, once in its middle and then at moments spread over its life, then let it end.
    Returns how many units were done at each kill."""
    moments, counts, before = random.Random(seed), [], 0
    while len(counts) < kills:
        process = start(words, folder, 1.0)
        if counts:
            process.join(moments.uniform(0.05, 0.9) * whole_seconds / (1 + kills / 4))
        else:
            while len(journaled(folder)) < 2:
                process.join(0.002)
                assert process.exitcode is None
        if process.exitcode is not None:  # too late: begin anew
            assert process.exitcode == 0, (folder / "output.txt").read_text()[-2000:]
            shutil.rmtree(folder / "out")
            before = 0
            continue
        process.kill()
        process.join(60)
        if process.exitcode != -signal.SIGKILL:  # it ended just then
            continue
        units = journaled(folder)
        assert len(set(units)) == len(units)  # nothing is done twice
        assert len(units) >= before or (folder / "out").exists()  # and nothing is lost
        before = len(units)
        counts.append(before)
    process = start(words, folder, 1.0)
    process.join(300)
    output = (folder / "output.txt").read_text()
    assert process.exitcode == 0, output[-2000:]
    assert "continues after" in output
    return counts


def timed(words, folder):
    folder.mkdir()
    begin = time.monotonic()
    process = start(words, folder, 1.0)
    process.join(300)
    assert process.exitcode == 0, (folder / "output.txt").read_text()[-2000:]
    return time.monotonic() - begin


@pytest.mark.parametrize("kind", ["tree", "parquet"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path, kind):
    source = tmp_path / "tree"
    make_tree(source, 10, 60)
    for place in source.iterdir():
        for path in list(place.iterdir()):
            for copy in "bcd":
                os.link(path, place / f"{path.stem}{copy}.JPEG")
    for path in sorted(source.rglob("*b.JPEG"))[::40]:  # what is told of single files must survive as well
        with Image.open(path) as image:
            picture = image.convert("CMYK")
        path.unlink()
        picture.save(path, "JPEG")
    if kind == "parquet":
        source = as_parquet(source, tmp_path / "hub", 500, 100)
    words = ["data", "prepare", "mine", "--from", source, "--out", "out", "--resolution", "64"]
    seconds = timed(words, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    counts = killed_and_continued(words, tmp_path / "killed", 4, seconds, seed=len(kind))
    print(kind, seconds, counts)
    assert content(tmp_path / "killed" / "out") == content(tmp_path / "whole" / "out")
    assert not list((tmp_path / "killed").glob("*.partial"))
    assert any("CMYK" in note for note in prepared.read_meta(tmp_path / "killed" / "out").notes)
    assert verify(tmp_path / "killed" / "out").holds


def test_a_full_disk_is_a_failure_in_one_line_and_the_command_continues(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    tree = tmp_path / "tree"
    make_tree(tree, 10, 60)

    def made(name):
        return prepare("mine", tree, tmp_path / name, resolution=16).meta

    write, left = os.pwrite, [300]

    def full(*words):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*words)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunError, match="the disk is full") as caught:
        made("out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    monkeypatch.undo()
    meta = made("out")
    assert "continues after 256 of 600 images" in caplog.messages and meta.sha256 == made("same").sha256


@pytest.mark.slow
def test_twenty_kills_of_ten_thousand_images(tmp_path):
    make_tree(tmp_path / "train", 1000, 10, sides=(100, 160))
    words = ["data", "prepare", "imagenet", "--from", tmp_path / "train", "--out", "out", "--resolution", "64"]
    seconds = timed(words, tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    counts = killed_and_continued(words, tmp_path / "killed", 20, seconds, seed=0)
    print(seconds, counts)
    assert content(tmp_path / "killed" / "out") == content(tmp_path / "whole" / "out")
    assert verify(tmp_path / "killed" / "out").holds
    meta = prepared.read_meta(tmp_path / "killed" / "out")
    assert meta.images == 10_000 and meta.classes == imagenet.classes()
