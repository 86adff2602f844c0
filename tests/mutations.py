"""Accidents that happen to files and values: bits, bytes, cuts and swaps in bytes; other types and numbers in documents."""

import copy


def mutated(data, random):
    """One to four small accidents: bits, bytes, telling numbers, cuts, holes, doubled and swapped spans, zeros.

    random: numpy's RandomState.
    """
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        at, span = int(random.randint(len(data))), int(random.choice((1, 2, 4, 16, 64, 512)))
        kind = random.randint(9)
        if kind == 0:
            data[at] ^= 1 << int(random.randint(8))
        elif kind == 1:
            data[at] = int(random.randint(256))
        elif kind == 2:  # sizes, counts and offsets at their limits
            number = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62)[random.randint(9)]
            width = int(random.choice((1, 2, 4, 8)))
            data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, ("little", "big")[random.randint(2)])
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + span]
        elif kind == 5:
            data[at:at] = data[at : at + span]
        elif kind == 6:
            other = int(random.randint(len(data)))
            data[at : at + span] = data[other : other + span]
        elif kind == 7:
            data[at : at + span] = bytes(len(data[at : at + span]))
        else:
            data[at:at] = random.bytes(span)
    return bytes(data)


def places(table, above=()):
    """The place of every value in a document, as a tuple of keys and indices."""
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def changed(table, place, value):
    """The document with `value` at that place; None removes what is there."""
    table = copy.deepcopy(table)
    inner = table
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return table
