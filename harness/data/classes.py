"""Classes as people give them: a number, or a name that the data set has for it."""

from __future__ import annotations

from collections.abc import Sequence

from harness.errors import UserError
from harness.registry import unknown


def read_classes(texts: Sequence[str], names: Sequence[Sequence[str]], num_classes: int) -> tuple[int, ...]:
    """The labels of the classes `texts`, without repetition, in their order.

    names: of each class, in the order of labels, as of `DatasetSpec.class_names`; empty: there are none. Upper and lower
    case are the same. Raises UserError for a number outside 0 to num_classes - 1, and for a name that no class has.
    """
    labels = {name.lower(): label for label, known in enumerate(names[:num_classes]) for name in known}
    found = []
    for text in texts:
        if text.isascii() and text.isdigit():  # a number comes first: a name that is another number cannot be meant
            label = int(text) if len(text) < 10 else num_classes
            if label >= num_classes:
                raise UserError(f"--classes: class {text} is outside 0 to {num_classes - 1}")
        elif text.lower() in labels:
            label = labels[text.lower()]
        else:
            known = labels or [f"the numbers 0 to {num_classes - 1}"]
            raise UserError(f"--classes: {unknown('class', text, known)}")
        found.append(label)
    return tuple(dict.fromkeys(found))


def display_name(label: int, names: Sequence[Sequence[str]]) -> str:
    """A class in the form of the paper's figures, "golden retriever" (207); its number where it has no name."""
    known = names[label] if label < len(names) else ()
    return f'"{known[0]}" ({label})' if known else str(label)
