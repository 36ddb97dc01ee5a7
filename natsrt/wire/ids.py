"""The ids that messages name: of calls, of cancellations, of the handlers that wait. All limits of them are here.

Whoever may send a message can put any text there, and a reader may keep it long after the message is gone: a promise
for 15 minutes, a lost copy in the record of an agent. So the length and the number of ids are checked when a message is
read. All functions raise `CannotDecode`.
"""

from __future__ import annotations

from typing import Any, Final

from natsrt.errors import CannotDecode
from natsrt.wire import envelope
from natsrt.wire.envelope import SUPERSEDES_HEADER
from natsrt.wire.subjects import MAX_SUBJECT_BYTES, is_subject_length

MAX_IDS: Final = 1000
"""How many ids a question may name. natsrt names 500 at most."""
MAX_FORMER: Final = 16
"""How many former copies a call may name. A caller sends a call again three times, and so does each worker that
forwards it."""
_MAX_FORMER_CHARS: Final = MAX_FORMER * (MAX_SUBJECT_BYTES + 1)
MAX_CHAIN: Final = 10_000
"""How many parts a chain may have. Each handler that waits adds two."""
_MAX_CHAIN_CHARS: Final = 256 * 1024
"""The longest chain of a message, in characters. A part takes about 25."""


def checked_id(text: str, what: str) -> str:
    """``text``, if it may be an id: it is at most as long as a subject may be. ``what`` names the message."""
    if not is_subject_length(text):
        raise CannotDecode(what, "an id in it is longer than a subject may be, or is no text in UTF-8")
    return text


def ids(data: dict[str, Any], name: str, what: str, at_most: int = MAX_IDS) -> list[str]:
    """The list of ids under ``name`` in the data of a question. ``what`` describes ``data`` in the error."""
    value = data.get(name)
    if isinstance(value, list) and len(value) > at_most:
        raise CannotDecode(what, f"{name} has {len(value):,} ids; at most {at_most:,} are read")
    return [checked_id(text, what) for text in envelope.texts(data, name, what)]


def former_copies(header: str, call_id: str, *, forwarded: bool) -> tuple[str, ...]:
    """The ids in the header ``Natsrt-Supersedes`` of the call ``call_id``.

    A caller names copies that it sent itself: their ids have the same start as its reply subject, up to the last dot. A
    worker that forwards a call, ``forwarded``, names those of the caller, too.
    """
    what = f"the header {SUPERSEDES_HEADER}"
    former = header.split() if len(header) <= _MAX_FORMER_CHARS else None
    if former is None or len(former) > MAX_FORMER:
        raise CannotDecode(what, f"at most {MAX_FORMER} ids are read")
    start = call_id[: call_id.rfind(".") + 1]
    for one in former:
        checked_id(one, what)
        if not forwarded and one[: one.rfind(".") + 1] != start:
            raise CannotDecode(what, "an id in it does not start as the reply subject does, up to the last dot")
    return tuple(one for one in former if one != call_id)


def handlers(chain: str) -> tuple[str, ...]:
    """The parts of a message's chain."""
    if len(chain) > _MAX_CHAIN_CHARS:
        raise CannotDecode("an envelope", f"its chain has over {_MAX_CHAIN_CHARS:,} characters")
    return tuple(chain.split())
