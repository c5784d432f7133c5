"""What nodes tell each other through Redis: one line, then a body.

The first line is ASCII: a letter that says what it is, then words. JSON as we
write it holds no line feed, so a body may be several documents, one a line.
Whoever cannot read a message counts it and goes on: nodes of two versions may
meet during a deploy.

======  =====================================  =======================================
letter  words                                  body
======  =====================================  =======================================
``d``   epoch, offset, session or ``-``,       one stored event, without its offset
        commits, mark, origin
``e``   node id                                ephemeral events, one a line
``p``   node id, version                       changes of its members of the room (JSON)
``a``   node id, number                        a question to a node, or to all (JSON)
``r``   node id, number                        the answer (JSON)
``t``   number                                 a probe, to oneself
======  =====================================  =======================================

The session of ``d`` asked for ``echo: false``; ``commits`` counts what the store
has stored, ``mark`` names the run of Redis that did (see ``generation``), and
``origin`` is whoever published it. ``d``, ``e`` and ``p`` come on a
room's live channel, the others on a node's or on everybody's.
"""

from __future__ import annotations

from typing import Final, NamedTuple

DURABLE: Final = b"d"
EPHEMERAL: Final = b"e"
PRESENCE: Final = b"p"
ASK: Final = b"a"
ANSWER: Final = b"r"
PROBE: Final = b"t"


class WireError(Exception):
    """A message that cannot be read; the reason is for the log."""


class Head(NamedTuple):
    """A message taken apart."""

    kind: bytes
    words: list[str]
    body: bytes


def pack(kind: bytes, *words: str | int, body: bytes = b"") -> bytes:
    """One message."""
    return b"%b %b\n%b" % (kind, " ".join(map(str, words)).encode("ascii"), body)


def unpack(payload: bytes) -> Head:
    """Take a message apart. Raises :class:`WireError`."""
    line, separator, body = payload.partition(b"\n")
    try:
        kind, *words = line.decode("ascii").split(" ")
    except UnicodeDecodeError:
        raise WireError("the first line is not ASCII") from None
    if not separator or len(kind) != 1:
        raise WireError("there is no first line")
    return Head(kind.encode(), words, body)
