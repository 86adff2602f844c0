"""`harness data fetch` against real servers on the loopback, with small files in the place of the public ones."""

import hashlib
import io
import json
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from file_server import serving

from harness.cli import group
from harness.data import download
from harness.data.fetch import fetch
from harness.data.public_files import FILES, PublicFile
from harness.errors import RunError, UserError

CONTENT = np.random.RandomState(0).bytes(1_500_000)
OTHER = np.random.RandomState(1).bytes(1_500_000)
NAME = "graph.pb"


def published(*urls, content=CONTENT):
    return PublicFile(
        name="graph", file=NAME, summary="", urls=urls, size=len(content), md5=hashlib.md5(content).hexdigest()
    )


def packed(members):
    """A .tgz of (name, content) or TarInfo."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(download, "CHUNK_BYTES", 1 << 14)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_here():
    return sorted(path.name for path in Path().iterdir())


def refused(call, kind=UserError):
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_plain_download_is_checked_and_not_repeated():
    with serving(CONTENT) as server:
        found = fetch(published(server.url))
        assert Path(NAME).read_bytes() == CONTENT and files_here() == [NAME]
        assert (found.verified, found.new, found.bytes) == (True, True, len(CONTENT))
        assert found.sha256 == hashlib.sha256(CONTENT).hexdigest()
        again = fetch(published(server.url))
        assert (again.new, again.sha256) == (False, found.sha256)
        assert server.requests == [(None, None)] and files_here() == [NAME]
        assert fetch(published(server.url), out=Path("there")).path == Path("there")
        Path("folder").mkdir()
        assert fetch(published(server.url), out=Path("folder")).path == Path("folder") / NAME


@pytest.mark.parametrize(
    ("behaviour", "condition"),
    [
        ({"etag": '"one"'}, '"one"'),
        ({"etag": None, "date": "Sat, 05 Dec 2015 00:00:00 GMT"}, "Sat, 05 Dec 2015 00:00:00 GMT"),
        ({"etag": 'W/"weak"', "date": None}, None),  # weak tags are of no use; the length is compared
        ({"etag": None}, None),
    ],
)
def test_what_breaks_off_is_continued_not_repeated(behaviour, condition):
    with serving(CONTENT, break_after=[400_000, 300_000], **behaviour) as server:
        fetch(published(server.url))
        assert Path(NAME).read_bytes() == CONTENT and files_here() == [NAME]
        assert [asked for asked, _ in server.requests] == [None, "bytes=400000-", "bytes=700000-"]
        assert [given for _, given in server.requests] == [None, condition, condition]
        assert server.sent == len(CONTENT)


def test_without_ranges_it_begins_again():
    with serving(CONTENT, ranges=False, break_after=[400_000]) as server:
        fetch(published(server.url))
        assert Path(NAME).read_bytes() == CONTENT and server.sent == len(CONTENT) + 400_000


def test_a_server_that_keeps_breaking_off_ends_in_one_line_and_the_same_command_continues():
    with serving(CONTENT, break_after=[400_000] + [0] * 5) as server:
        message = refused(lambda: fetch(published(server.url)), RunError)
        assert "broke off at 400,000 of 1,500,000 bytes" in message and "same command continues" in message
        assert files_here() == [f"{NAME}.partial", f"{NAME}.partial.json"]
        server.break_after.clear()
        fetch(published(server.url))
        assert server.requests[-1] == ("bytes=400000-", '"one"')
        assert Path(NAME).read_bytes() == CONTENT and server.sent == len(CONTENT) and files_here() == [NAME]


def test_a_file_that_changed_meanwhile_is_fetched_anew():
    for behaviour in ({}, {"etag": None}):
        with serving(CONTENT, break_after=[400_000] + [0] * 5, **behaviour) as server:
            refused(lambda: fetch(published(server.url)), RunError)
            server.break_after.clear()
            server.content, server.etag = OTHER[:-7], server.etag and '"two"'
            fetch(published(server.url, content=OTHER[:-7]))
            assert Path(NAME).read_bytes() == OTHER[:-7]
            Path(NAME).unlink()


def test_a_finished_download_that_was_not_renamed_asks_for_nothing():
    with serving(CONTENT, break_after=[len(CONTENT)]) as server:
        public = published(server.url)
        download.download(server.url, Path(f"{NAME}.partial"), title="", check=lambda *_: None)
        fetch(public)
        assert len(server.requests) == 1 and files_here() == [NAME]


@pytest.mark.parametrize(
    "behaviour", [{"status": [503, 500]}, {"length": False}, {"redirect": "/moved"}, {"pause": 0.01}]
)
def test_busy_silent_moved_and_slow_servers(behaviour):
    with serving(CONTENT, **behaviour) as server:
        fetch(published(server.url))
        assert Path(NAME).read_bytes() == CONTENT and files_here() == [NAME]


def test_a_server_that_says_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with serving(CONTENT, hang=True) as server:
        assert "no answer" in refused(lambda: fetch(published(server.url)))
    assert files_here() == []


def test_the_locked_file_is_kept_for_the_next_address(monkeypatch):
    answers, files = [OTHER, CONTENT], []

    def answer(url, partial, **options):
        files.append(partial.stat().st_ino)
        partial.write_bytes(answers.pop(0))

    monkeypatch.setattr(download, "download", answer)
    assert fetch(published("http://one", "http://two")).new and files_here() == [NAME]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (OTHER, "its md5 is"),
        (OTHER[:-1], "1,499,999 bytes instead of 1,500,000"),
        (b"<html>Sign in</html>", "a web page"),
        (b"", "it is empty"),
        (packed([("else.txt", b"x")]), "graph.pb is not in the archive"),
        (packed([(NAME, OTHER)]), "its md5 is"),
        (packed([(NAME, CONTENT)])[:-50_000], "cannot be read"),
        (b"\x1f\x8b" + OTHER[:1000], "cannot be read"),
    ],
    ids=["other", "short", "page", "empty", "archive without it", "archive of another", "cut archive", "no archive"],
)
def test_wrong_content_is_refused_and_removed(content, message):
    with serving(content) as server:
        said = refused(lambda: fetch(published(server.url)))
        assert message in said and server.url in said
        assert files_here() == []
        server.content = CONTENT  # and the way is free
        fetch(published(server.url))
        assert Path(NAME).read_bytes() == CONTENT


def test_the_member_of_an_archive_and_nothing_else(tmp_path):
    link = tarfile.TarInfo(NAME)
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hosts"
    archive = packed([("../outside", b"x"), ("/absolute", b"x"), (link, b""), (f"./{NAME}", CONTENT), ("more", b"x")])
    work = tmp_path / "a" / "b"
    with serving(archive, break_after=[9000]) as server:
        fetch(published(server.url), out=work / NAME)
    assert (work / NAME).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [NAME]


def test_a_bomb_is_refused(monkeypatch):
    from harness.data import fetch as module

    monkeypatch.setattr(module, "UNPACKED_BYTES", 1 << 22)
    with serving(packed([("zeros", bytes(1 << 23)), (NAME, CONTENT)])) as server:
        assert "unpacks to more" in refused(lambda: fetch(published(server.url)))
    assert files_here() == []


def test_addresses_are_tried_in_turn():
    with serving(b"", status=[404]) as gone, serving(packed([(NAME, CONTENT)])) as archive:
        fetch(published(gone.url, archive.url))
        assert Path(NAME).read_bytes() == CONTENT
    Path(NAME).unlink()
    with serving(b"", status=[404]) as gone, serving(OTHER) as wrong, serving(b"<html>") as page:
        said = refused(lambda: fetch(published(gone.url, wrong.url, page.url)))
    assert "HTTP 404" in said and "its md5 is" in said and "a web page" in said
    assert "Give another address with --url, or copy the file" in said
    assert files_here() == []


def test_offline_it_says_what_to_do():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        said = refused(lambda: fetch(published(address)))
    assert "cannot be reached" in said and f"copy the file from a machine that has it to {NAME}" in said
    assert files_here() == []


@pytest.mark.parametrize("url", ["file:///some/file", "ftp://127.0.0.1/x", "data:,x", "graph.pb", "http:///x", ""])
def test_only_http_is_spoken(url):
    assert "no address" in refused(lambda: fetch(published("http://127.0.0.1:1/x"), url=url))
    assert files_here() == []


def test_a_redirect_leads_to_no_file_of_this_machine():
    Path("secret").write_bytes(CONTENT)
    with serving(CONTENT, redirect=Path("secret").absolute().as_uri()) as server:
        refused(lambda: fetch(published(server.url)))
    assert files_here() == ["secret"]


def test_another_file_in_the_place_is_left_alone():
    Path(NAME).write_bytes(b"mine")
    with serving(CONTENT) as server:
        assert "exists and is not graph.pb" in refused(lambda: fetch(published(server.url)))
        assert server.requests == []
    assert Path(NAME).read_bytes() == b"mine" and files_here() == [NAME]


def batch(**arrays):
    out = io.BytesIO()
    images = np.random.RandomState(2).randint(0, 256, (30, 4, 4, 3)).astype(np.uint8)
    np.savez(out, arr_0=images, mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(2), sigma_s=np.eye(2), **arrays)
    return out.getvalue()


def test_a_batch_without_a_published_hash_is_unverified_but_whole(monkeypatch):
    with serving(batch()) as server:
        monkeypatch.setitem(FILES, "b", PublicFile(name="b", file="b.npz", summary="", urls=(server.url,), start=b"PK"))
        run = lambda *more: CliRunner().invoke(group, ["data", "fetch", "b", *more])  # noqa: E731
        done = run()
        assert done.exit_code == 0, done.exception
        assert "unverified: no published hash" in done.stdout
        assert hashlib.sha256(batch()).hexdigest() in done.stdout
        assert "exists already" in run().stdout
        assert json.loads(run("--json").stdout)["verified"] is False
        Path("b.npz").unlink()
        damaged = bytearray(batch())
        damaged[200] ^= 1  # a pixel
        for content, message in (
            (bytes(damaged), "checksum"), (batch()[:-30], "cannot be read"), (b"no zip at all, no zip", "other bytes")
        ):  # fmt: skip
            server.content = content
            assert message in str(run().exception)
            assert files_here() == []


def test_the_command_names_what_there_is():
    listed = CliRunner().invoke(group, ["data", "fetch"]).stdout
    for each in FILES.values():
        assert each.name in listed and each.file in listed
        assert all(url.endswith((each.file, ".tgz")) for url in each.urls)
    assert "did you mean inception" in str(CliRunner().invoke(group, ["data", "fetch", "incepton"]).exception)


CHILD = """
import sys
from pathlib import Path
from harness.data import download
from harness.data.fetch import fetch
from harness.data.public_files import PublicFile
download.CHUNK_BYTES = 1 << 14
fetch(PublicFile(name="graph", file="graph.pb", summary="", urls=(sys.argv[1],), size=int(sys.argv[2]), md5=sys.argv[3]))
"""


@pytest.mark.parametrize("archive", [False, True])
def test_killed_in_the_middle_it_leaves_no_half_file_and_continues(archive):
    content = packed([(NAME, CONTENT)]) if archive else CONTENT
    words = [sys.executable, "-c", CHILD]
    dice, partial = random.Random(0), Path(f"{NAME}.partial")
    with serving(content, pause=0.005, piece=1 << 14) as server:
        words += [server.url, str(len(CONTENT)), hashlib.md5(CONTENT).hexdigest()]
        for _ in range(3):
            have = partial.stat().st_size if partial.exists() else 0
            target = have + dice.randint(50_000, 300_000)
            process = subprocess.Popen(words)
            while process.poll() is None and not (partial.exists() and partial.stat().st_size >= target):
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert not Path(NAME).exists()
        assert subprocess.run(words, timeout=60).returncode == 0
        assert Path(NAME).read_bytes() == CONTENT and files_here() == [NAME]
        assert len(server.requests) == 4 and all(asked for asked, _ in server.requests[1:])
