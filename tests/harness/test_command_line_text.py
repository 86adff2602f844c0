"""The command line as one text file: names, defaults and help of every option, so that a change of it is seen in review.

To accept a change: python tests/harness/test_command_line_text.py > tests/harness/command_line.txt
"""

import subprocess
import sys
from pathlib import Path

import click

from harness.cli import group

TEXT = Path(__file__).with_name("command_line.txt")
WIDTH = 110


def rendered(command: click.Command, name: str, parent: click.Context | None = None) -> str:
    """The help of a command and of the commands below it."""
    context = click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH)
    context.help_option_names = ["-h", "--help"]
    text = f"{command.get_help(context)}\n"
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            text += f"\n{'-' * WIDTH}\n\n{rendered(found, below, context)}"
    return text


def test_the_command_line_is_as_it_was_agreed():
    # In a new process: click keeps the help option of a command that was called before, whatever its names.
    text = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True).stdout
    assert text == TEXT.read_text(encoding="ascii")


if __name__ == "__main__":
    print(rendered(group, "harness"), end="")
