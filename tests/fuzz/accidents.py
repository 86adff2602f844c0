"""What can happen to a file, a name or a path on its way into a command."""

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
from mutations import changed, mutated, places
from valid_files import OTHERS


def document(table, draw, dump=json.dumps):
    """Bytes of a document with one to three accidents in its values or in its text."""
    if draw.random() < 0.65:
        for _ in range(draw.choice((1, 1, 2, 3))):
            spots = list(places(table))
            if not spots:
                break
            spot = draw.choice(spots)
            table = draw.choice(
                (
                    lambda t, s=spot: changed(t, s, draw.choice(OTHERS)),
                    lambda t, s=spot: changed(t, s, draw.choice(OTHERS)),
                    lambda t, s=spot: changed(t, s, draw.choice([None, t, list(t), {"x": t}])),
                    lambda t, s=spot: {**t, draw.choice(["x", "", "name", "a\nb", "__class__"]): draw.choice(OTHERS)},
                )
            )(table)
            if not isinstance(table, dict):
                break
    with contextlib.suppress(UnicodeEncodeError):
        data = dump(table).encode("utf-8", "surrogatepass")
        return text_accident(data, draw)
    return b"{}"


def text_accident(data, draw):
    """The bytes of a text with an accident that texts have, or as they are."""
    kind = draw.randrange(16)
    if kind == 0:
        return b"\xef\xbb\xbf" + data
    if kind == 1:
        return data.decode("utf-8", "replace").encode(draw.choice(("utf-16", "utf-32", "utf-16-le")), "replace")
    if kind == 2:
        return data.replace(b"\n", b"\r\n") + b"\xe9\xff"
    if kind == 3:
        return data[: draw.randrange(len(data) + 1)]
    if kind == 4:
        return draw.choice((b"", b"\0" * 9, b"null", b"[]", b"1", b'"x"', b"NaN", b"{}", b"{", b"[[[]]]", b"# x\n"))
    if kind == 5:
        nested = draw.choice((b"[", b'{"a":', b"a.")) * draw.choice((50, 5_000, 200_000))
        return draw.choice((nested, b"a = " + nested, data + nested))
    if kind == 6:  # a number in it becomes a huge one
        digits = [i for i, each in enumerate(data) if chr(each).isdigit()]
        at = draw.choice(digits or [0])
        return data[:at] + draw.choice((b"9" * 30, b"9" * 5000, b"1e999", b"-1", b"0x10", b"NaN")) + data[at + 1 :]
    if kind == 7:  # a key twice
        lines = data.split(b"\n")
        at = draw.randrange(len(lines))
        return b"\n".join([*lines[:at], lines[at], *lines[at:]])
    if kind == 8:
        return mutated(data, np.random.RandomState(draw.randrange(2**31)))
    return data


def name(draw, *known):
    """A word where a name is meant."""
    word = draw.choice(known) if known else "x"
    return draw.choice(
        (
            lambda: word, lambda: word[:-1], lambda: word + word[-1:], lambda: word.upper(), lambda: f" {word} ", lambda: "",
            lambda: "-", lambda: "--", lambda: "-x", lambda: "\u00e9\u4e2d", lambda: "a\nb", lambda: "a\tb", lambda: "../" + word,
            lambda: word + "/", lambda: word + ".toml", lambda: ".toml", lambda: "x" * 5000, lambda: "\udcff" + word, lambda: "%s",
            lambda: "{0}", lambda: "[bold]x[/bold]", lambda: "[/x]", lambda: word + ":", lambda: word + ":1:2:3:4:5:6",
            lambda: ":" + word, lambda: word + "@", lambda: word + "@0", lambda: word + "@-1", lambda: word + "@1e9", lambda: "nan",
            lambda: "inf", lambda: "-1", lambda: "0", lambda: "1e400", lambda: "9" * 30, lambda: "9" * 5000, lambda: "0x10",
            lambda: "1_0", lambda: "\u0665", lambda: "1,,2", lambda: ",", lambda: "1,2,3", lambda: "=", lambda: word + "=", lambda: "=" + word,
            lambda: word + "=1", lambda: word + "==" + word, lambda: "true", lambda: "None", lambda: "*", lambda: "(", lambda: "\\",
            lambda: "$HOME", lambda: "~", lambda: "a;b", lambda: "a|b", lambda: "1x1", lambda: "0x0", lambda: "1e9x1", lambda: "4x", lambda: "0.1-0.8",
            lambda: "0.8-0.1", lambda: "1.5@0.1-", lambda: "1.5@-", lambda: "1.5@nan-1", lambda: "\x1b[31m", lambda: "\u202e" + word,
        )
    )()  # fmt: skip


def place(draw, folder, valid=None):
    """A path, as text, where a file or a folder is meant; `valid` is a file or folder of the kind that is meant."""
    (folder / "places").mkdir(exist_ok=True)
    here = folder / "places" / str(len(list((folder / "places").iterdir())))
    here.mkdir()
    path = here / f"p{draw.randrange(10**6)}"
    suffix = valid.suffix if valid is not None else draw.choice((".npz", ".json", ".png", ".toml", ".pt", ""))
    path = path.with_name(path.name + suffix)
    kind = draw.randrange(40)

    def copied(target):
        target = here / target
        if valid is None or not valid.exists():
            target.write_bytes(b"x" * draw.choice((0, 1, 5000)))
        elif valid.is_dir():
            shutil.copytree(valid, target, dirs_exist_ok=True)
        else:
            shutil.copy(valid, target)
            if valid.with_suffix(".json").exists():
                shutil.copy(valid.with_suffix(".json"), target.with_suffix(".json"))
        return str(target)

    if kind == 0:
        return str(path)
    if kind == 1:
        return str(path / "deeper" / ("x" + suffix))
    if kind == 2:
        return copied(os.fsdecode(b"\xff\xe9 name") + suffix)
    if kind == 3:
        return copied("a\nb" + suffix)
    if kind == 4:
        return str(here / ("x" * 300 + suffix))
    if kind == 5:
        return str(here) + "/x" * 3000 + suffix
    if kind == 6:
        path.symlink_to(path)
        return str(path) + draw.choice(("", "/x"))
    if kind == 7:
        other = here / "other"
        if not other.is_symlink():
            other.symlink_to(path)
        path.symlink_to(other)
        return str(path)
    if kind == 8:
        path.symlink_to(here / "nowhere")
        return str(path)
    if kind == 9:
        path.write_bytes(b"x" * draw.choice((0, 1, 5000)))
        return str(path)
    if kind == 10:
        path.mkdir()
        return str(path)
    if kind == 11:
        path.write_bytes(b"")
        return str(path / ("x" + suffix))
    if kind == 12:
        os.mkfifo(path)
        return str(path)
    if kind == 13:
        with contextlib.chdir(here), contextlib.closing(socket.socket(socket.AF_UNIX)) as door:
            door.bind(path.name)
        return str(path)
    if kind == 14:
        return draw.choice(("/dev/null", "/dev/full", "/dev/zero", "/dev/stdin", "/dev/tty", "/dev/fd/0", "/dev"))
    if kind == 15:
        return draw.choice(
            (
                "/proc/self/x",
                "/sys/x",
                "/proc/self/mem",
                "/proc/self/status",
                "/proc/self/fd",
                "/proc/1/cwd/x",
                "/sys/kernel",
            )
        )
    if kind == 16:
        return copied("plain" + suffix) + draw.choice(("/", "//", "/.", "/..", "/./"))
    if kind == 17:
        return copied(" two  words " + suffix)
    if kind == 18:
        copied("-leading" + suffix)
        return os.path.relpath(here / ("-leading" + suffix), folder)
    if kind == 19:
        return draw.choice(
            ("", ".", "..", "/", "~", "./.", "../..", "-", "--", "-x", "a/..", "//", "*", "[", "?", "**", "[!]")
        )
    if kind == 20:
        return copied("[a]*?" + suffix)
    if kind == 21:
        return copied("a=b,c@d:e" + suffix)
    if kind == 22:
        return draw.choice(("http://x/y.npz", "file:///nowhere/x", "s3://a/b", "C:\\x\\y", "\\\\a\\b", "hf://a/b"))
    if kind == 23:
        return copied("\u00e9\u4e2d\U0001f600" + suffix)
    if kind == 24:
        target = Path(copied("read-only" + suffix))
        target.chmod(0o400 if target.is_file() else 0o500)
        return str(target)
    if kind == 25:
        target = Path(copied("dark" + suffix))
        target.chmod(0)
        return str(target)
    if kind == 26:
        return str(here / "*") + suffix
    if kind == 27:
        return copied("up" + suffix.upper())
    if kind == 28:
        return copied("twice" + suffix + suffix)
    if kind == 29:
        return copied("other" + draw.choice((".txt", ".zip", ".gz", ".tar", ".npy", ".jpg", ".pb", "")))
    if kind == 30:
        return os.path.relpath(copied("relative" + suffix), folder)
    if kind == 31:
        return "../" * 40 + copied("root" + suffix).lstrip("/")
    if kind == 32:
        with path.open("wb") as file:
            file.truncate(draw.choice((1 << 20, 1 << 40)))  # a hole
        return str(path)
    if kind == 33:
        Path(copied("target" + suffix))
        path.symlink_to("target" + suffix)
        return str(path)
    return copied("good" + suffix)
