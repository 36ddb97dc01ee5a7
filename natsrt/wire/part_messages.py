"""The messages of streamed calls beside their parts: what a call asks for, and what its caller tells the worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from natsrt.errors import CannotDecode
from natsrt.wire import envelope
from natsrt.wire.envelope import Envelope, attribute
from natsrt.wire.ids import MAX_IDS, checked_id
from natsrt.wire.part_flow import Progress, Window

MOST_ITEMS: Final = 65_536
"""The largest window, in items."""
STREAM_HEADER: Final = "Natsrt-Stream"
"""Header of a plain call that wants every item. Its value is ``1``; if a worker has passed the call on, the subject on
which the client gets the items."""
PART_HEADER: Final = "Natsrt-Part"
"""Header of an item for a plain client: its number, from 1."""
PARTS_HEADER: Final = "Natsrt-Parts"
"""Header of the message that ends the items for a plain client: how many there were."""
ONLY_QUESTIONS: Final = "only"
"""Value of the attribute ``questions``: the caller answers questions, and wants no items."""
_QUESTIONS_TOO: Final = "also"
"""Value of it: the caller answers questions among the items. Without the attribute, it answers none."""
MOST_BYTES: Final = 64 * 1024 * 1024
"""The largest window, in bytes."""
MOST_AWAITED: Final = 500
"""How many calls a caller says at most that its answers wait for. What it says must fit into a message. `MAX_IDS` are
read."""
_WHAT: Final = "the progress of a stream"
_MOST: Final = 2**53
"""More parts than any stream has."""
_DIGITS: Final = len(str(_MOST))


def checked_window(items: Any, size: Any) -> Window:
    """A window of so many items and bytes. Raises ValueError."""
    for name, value, most in (("window", items, MOST_ITEMS), ("window_bytes", size, MOST_BYTES)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} must be a whole number from 1 to {most:,}, not {value!r:.60}")
    return Window(items, size)


def stream_attributes(parts_to: str, window: Window, *, answers: bool, wants_items: bool) -> str:
    """The attributes that a streamed call has beside those of each call, with a leading comma.

    ``parts_to`` is the subject on which its parts arrive. ``answers``: the caller answers questions.
    """
    questions = f',"questions":"{_QUESTIONS_TOO if wants_items else ONLY_QUESTIONS}"' if answers else ""
    return f',{attribute("partsto", parts_to)},"window":"{window.items}","windowbytes":"{window.size}"{questions}'


def read_window(body: Envelope) -> Window:
    """The window of a streamed call. Raises `CannotDecode`."""
    return Window(
        _number_of(body, "window", MOST_ITEMS),
        _number_of(body, "windowbytes", MOST_BYTES),
    )


def number_of_part(body: Envelope) -> int:
    """The number of a part. Raises `CannotDecode`."""
    return _number_of(body, "part", _MOST)


def total_of(body: Envelope) -> int:
    """How many parts a reply says there were; 0 if it says nothing. Raises `CannotDecode`."""
    return 0 if body.text("parts") in (None, "0") else _number_of(body, "parts", _MOST)


def _number_of(body: Envelope, name: str, most: int) -> int:
    text = body.required(name)
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS and int(text) >= 1):
        raise CannotDecode("an envelope", f"{name} must be a whole number from 1, not {text!r:.40}")
    return min(int(text), most)


Awaited = Mapping[str, Sequence[str]]
"""By the numbers of questions: the reply subjects of the calls that their answers wait for."""


def encode_progress(parts_to: str, progress: Progress, *, stop: bool, awaited: Awaited | None = None) -> bytes:
    """The message that tells a worker how far the caller of a stream is. ``stop``: it wants no more parts."""
    data = {"stream": parts_to, "consumed": progress.consumed, "have": progress.have}
    more: dict[str, Any] = {"missing": list(progress.missing) if progress.missing else None, "stop": stop}
    if awaited:
        more["awaited"] = awaited
    return envelope.encode(envelope.MORE, '"id":"more","source":"/"', orjson.dumps(data | more))


def read_progress(data: dict[str, Any]) -> tuple[Progress, bool]:
    """How far the caller of a stream is, and whether it wants no more parts. Raises `CannotDecode`."""
    missing = data.get("missing")
    if missing is not None and not (isinstance(missing, list) and len(missing) == 2):
        raise CannotDecode(_WHAT, "missing must be null, or the first and the last number of a gap")
    numbers = [_whole(data.get("consumed"), "consumed"), _whole(data.get("have"), "have")]
    gap = None if missing is None else (_whole(missing[0], "missing"), _whole(missing[1], "missing"))
    return Progress(numbers[0], numbers[1], gap), data.get("stop") is True


def read_awaited(data: dict[str, Any]) -> Awaited:
    """Which calls the answers to questions wait for. Raises `CannotDecode`."""
    awaited = data.get("awaited")
    if awaited is None:
        return {}
    if not isinstance(awaited, dict) or not all(
        isinstance(calls, list) and all(isinstance(call, str) for call in calls) for calls in awaited.values()
    ):
        raise CannotDecode(_WHAT, "awaited must have a list of reply subjects for each question")
    if max(len(awaited), sum(map(len, awaited.values()))) > MAX_IDS:
        raise CannotDecode(_WHAT, f"awaited names more than {MAX_IDS:,} calls or questions")
    for calls in awaited.values():
        for call in calls:
            checked_id(call, _WHAT)  # other workers are asked about it
    return awaited


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise CannotDecode(_WHAT, f"{name} must be a whole number")
    return value
