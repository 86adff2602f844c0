"""The code blocks of Markdown pages, and what the pages say about running them.

A block is run unless the line above it is a sentence in italics that begins with "Needs", which readers see too:

    *Needs ImageNet and a GPU.*

A comment above a block, which readers do not see, makes it cheaper to run: `<!-- test: 800 -> 4; 2k -> 6 -->` replaces text.
The first line `# file: NAME` of a block says that it is a file. A block of language text after `<!-- test: output -->` is what
the commands before it print; "..." stands for anything.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(`{3,})(\S*)(?: \S+)?\s*$")
NEEDS = re.compile(r"^\*(Needs .+)\*$")
COMMENT = re.compile(r"^<!-- test: (.+) -->$")
FILE = re.compile(r"^(?:#|<!--) file: (\S+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, its text as it is run, and what is said about running it."""

    page: Path
    line: int
    language: str
    text: str
    needs: str = ""  # why it cannot be run here
    is_output: bool = False
    file: str = ""  # name of the file that it is; "": it is to be run
    unused: list[str] = field(default_factory=list)  # replacements that replace nothing

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def pages() -> list[Path]:
    """README and the documentation. The first two come first, because other pages go on with their runs."""
    first = [ROOT / "README.md", ROOT / "docs" / "first-steps.md"]
    others = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
    return [*first, *(path for path in others if path not in first)]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in its order. Directives of Sphinx, whose language is in braces, are left out."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found = []
    number = 0
    while number < len(lines):
        fence = FENCE.match(lines[number])
        if not fence:
            number += 1
            continue
        end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == fence[1])
        if not fence[2].startswith("{"):  # a directive
            found.append(_block(page, lines, number, end, fence[2]))
        number = end + 1
    return found


def _block(page: Path, lines: list[str], start: int, end: int, language: str) -> Block:
    needs, comment = "", ""
    for above in reversed([line for line in lines[max(start - 3, 0) : start] if line.strip()]):
        if match := NEEDS.match(above):
            needs = match[1]
        elif match := COMMENT.match(above):
            comment = match[1]
        else:
            break
    text = "\n".join(lines[start + 1 : end]) + "\n"
    unused = []
    if comment and comment != "output":
        for replacement in comment.split("; "):
            old, new = replacement.split(" -> ")
            if old not in text:
                unused.append(old)
            text = text.replace(old, new)
    file = FILE.match(text)
    return Block(page, start + 1, language, text, needs, comment == "output", file[1] if file else "", unused)
