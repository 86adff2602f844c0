"""Each command, program and file that the documentation and README show is run, or says above it why it cannot be."""

import dataclasses
import glob
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from blocks import ROOT, blocks_of, pages
from click.testing import CliRunner

from evaluators.features import Features
from harness import registry
from harness.cli import group
from harness.conformance.checks import QUICK

# What a block may need; anything else is run.
NEEDS = (
    "a GPU", "a download", "a package index", "eight GPUs", "eight devices", "hours", "ImageNet", "minutes", "slurm",
    "the Inception graph", "the released weights", "two downloads",
)  # fmt: skip
LANGUAGES = {"sh", "python", "toml", "text", "bibtex"}
FAST = {"precision": "float32", "micro_batch": 8}  # not measured
DEFAULTS = {"run": {**FAST, "report": False}, "train": FAST}
SMALL = {
    "dit-xs-2": {"depth": 1, "width": 48},
    "dit-xs-4": {"depth": 1, "width": 48},
    "adm-xs": {"width": 32},
    "adm-u-xs": {"width": 32},
}
FIGURE = {
    "png": b"any",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'></svg>",
    "pdf": b"any",
}  # drawn by other tests


def name_of(page):
    return str(page.relative_to(ROOT))


class MeanPixels:
    """In the place of the built-in network, which other tests run: this test is about commands, not numbers."""

    dim = 8

    def __init__(self, spec, device):
        self.name, self.description, self.sha256 = spec.name, spec.description, "00" * 32

    def __call__(self, images):
        rows = images.reshape(len(images), self.dim, -1).mean(axis=2, dtype=np.float32)
        return Features(pooled=rows, logits=rows / 50)


class Session:
    """The folder in which all pages are run, one after the other, with small networks that are trained for 4 steps."""

    def __init__(self, folder):
        self.folder = folder
        self.cache = folder / "cache"
        self.ran = {}

    def shrink(self):
        for name, smaller in SMALL.items():
            spec = registry.backbones.get(name)
            registry.backbones._items[name] = dataclasses.replace(spec, defaults={**spec.defaults, **smaller})
        for name in ("digits", "digits-4"):
            protocol = registry.protocols.get(name)
            registry.protocols._items[name] = dataclasses.replace(
                protocol,
                samples=100,
                recipe=dataclasses.replace(protocol.recipe, steps=4, batch=8),
                sampling=dataclasses.replace(protocol.sampling, steps=(2, 3)),
            )

    def run(self, page):
        """Run a page once; whoever asks again hears of the same failure."""
        if page not in self.ran:
            self.ran[page] = None
            try:
                Page(self, page).run()
            except BaseException as error:
                self.ran[page] = error
        if self.ran[page] is not None:
            raise self.ran[page]


class Page:
    def __init__(self, session, page):
        self.session, self.page = session, page
        self.names = {"__name__": "page"}
        self.output = ""

    def run(self):
        for block in blocks_of(self.page):
            if block.needs:
                continue
            if block.is_output:
                self.check_output(block)
            elif block.file:
                path = Path(block.file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                exec(compile(block.text, block.where, "exec"), self.names)
            elif block.language == "sh":
                self.output = ""
                for words in commands(block.text):
                    self.command(words, block)

    def command(self, words, block):
        words = [each for word in words for each in (sorted(glob.glob(word)) or [word])]  # noqa: PTH207
        if words[:3] == ["pip", "install", "-e"]:
            self.install(Path(words[3]))
            return
        assert words[0] == "harness", f"{block.where}: {words[0]} is no command of the harness: say what it needs"
        done = CliRunner().invoke(group, words[1:], default_map=DEFAULTS)
        self.output += done.output
        if done.exception and not (isinstance(done.exception, SystemExit) and done.exception.code == 0):
            raise AssertionError(f"{block.where}: {shlex.join(words)}: {done.exception}\n{done.output}")

    def install(self, package):
        """What pip does with a package in this process: its folder on the path, and its entry points known."""
        about = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
        source = package / "src" if (package / "src").exists() else package
        name = about["project"]["name"]
        information = source / f"{name.replace('-', '_')}-{about['project']['version']}.dist-info"
        information.mkdir(exist_ok=True)
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {about['project']['version']}\n"
        )
        (information / "entry_points.txt").write_text(
            "".join(
                f"[{which}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
                for which, points in about["project"]["entry-points"].items()
            )
        )
        sys.path.insert(0, str(source.resolve()))
        forget()
        self.session.shrink()
        for each in registries():
            assert not list(each) or not each.problems, each.problems

    def check_output(self, block):
        """Every line of the block is in what was printed, in this order."""
        rest = " ".join(self.output.split())
        for line in filter(None, (" ".join(line.split()) for line in block.text.splitlines())):
            match = re.search(".*?".join(map(re.escape, line.split("..."))), rest)
            assert match, f"{block.where}: not printed: {line}\n{self.output}"
            rest = rest[match.end() :]


def registries():
    return [each for each in vars(registry).values() if isinstance(each, registry.Registry)]


def forget():
    """Let the registries read the entry points anew."""
    importlib.invalidate_caches()
    registry._entry_points.cache_clear()
    for each in registries():
        each._items.clear()
        each._owners.clear()
        each.problems.clear()
        each._loaded = False


def commands(text):
    """The words of each command of a block of shell, without comments."""
    joined = text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """The pages' folder; the registries are as before when all pages are done."""
    for each in registries():
        each.names()  # loads it
    before = [(each, dict(vars(each))) for each in registries()]
    for each, state in before:
        state.update({name: value.copy() for name, value in vars(each).items() if isinstance(value, (dict, list))})
    session = Session(tmp_path_factory.mktemp("documents"))
    session.shrink()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(session.folder)  # as of a program that lies there
        patch.setattr("evaluators.features.efficientnet_lite0.load", MeanPixels)
        patch.setattr("reports.render_pool.draw", lambda figure, styles: FIGURE)
        patch.setattr("reports.render_pool.RenderPool._start", lambda self, wanted: None)
        patch.setattr("harness.runs.provenance._versions", dict)
        patch.setattr("harness.runs.provenance._commit", lambda: None)
        patch.setattr("harness.conformance.suite.ALL", {"torch": QUICK, "jax": QUICK})
        yield session
    registry._entry_points.cache_clear()
    for each, state in before:
        vars(each).update(state)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_what_a_page_shows_runs(page, session, monkeypatch):
    monkeypatch.chdir(session.folder)
    monkeypatch.setenv("HARNESS_CACHE", str(session.cache))
    for each in (*pages()[:2], page):
        session.run(each)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_blocks_are_in_form(page):
    """Also those that are not run: flags exist, TOML and Python can be read, and the reason is one of the known ones."""
    for block in blocks_of(page):
        assert block.language in LANGUAGES, f"{block.where}: language {block.language!r}"
        assert not block.unused, f"{block.where}: {block.unused} is not in the block"
        if block.needs:
            reason = block.needs.removeprefix("Needs ")
            assert reason.startswith(NEEDS), f"{block.where}: {reason}"
        if block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "python":
            compile(block.text, block.where, "exec")
        elif block.language == "sh":
            for words in commands(block.text):
                if "harness" in words:
                    check_flags(words[words.index("harness") + 1 :], block)


def check_flags(words, block):
    command, name = group, "harness"
    while words and hasattr(command, "get_command"):
        with command.make_context(name, [], resilient_parsing=True) as context:
            name, *words = words
            command = command.get_command(context, name)
            assert command is not None, f"{block.where}: no command {name}"
    with command.make_context(name, [], resilient_parsing=True) as context:
        context.resilient_parsing = False
        command.make_parser(context).parse_args(list(words))


def test_a_wrong_block_fails(tmp_path, session, monkeypatch):
    """What the tests above rely on: an unknown flag, an unknown reason, output that is not printed, a command that fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("blocks.ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    for text in (
        "```sh\nharness list samplers --jsn\n```\n",
        "```sh\nharness lst\n```\n",
        "*Needs patience.*\n\n```sh\nharness list samplers\n```\n",
        "```toml\n[a\n```\n",
        "<!-- test: 8 -> 4 -->\n```sh\nharness list samplers\n```\n",
    ):
        page.write_text(text)
        with pytest.raises(Exception, match=r".") as failed:
            test_blocks_are_in_form(page)
        assert not isinstance(failed.value, OSError), failed.value
    for text in (
        "```sh\nharness run --backbone dit-xs-3\n```\n",
        "```sh\nharness list samplers\n```\n<!-- test: output -->\n```text\nddpn\n```\n",
        "```sh\nharness list samplers\n```\n<!-- test: output -->\n```text\nheun\nddpm\n```\n",
        "```python\nassert False\n```\n",
        "```sh\nmake test\n```\n",
    ):
        page.write_text(text)
        with pytest.raises(AssertionError):
            Page(session, page).run()
    page.write_text("```sh\nharness list samplers\n```\n<!-- test: output -->\n```text\nddpm ...\nheun\n```\n")
    Page(session, page).run()
