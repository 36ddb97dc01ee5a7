"""The registry in pages, as workers tell it to runtimes that may not read the bucket. Pure values: no I/O."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import orjson
from pydantic import TypeAdapter, ValidationError

from natsrt.errors import CannotDecode
from natsrt.jetstream.registry.entries import KnownEntry, encode_entry
from natsrt.jetstream.registry.origin import Origin
from natsrt.jetstream.registry.view import View

_QUESTION: Final = "a question about the registry"
_ANSWER: Final = "a worker's answer about the registry"
_ENTRIES: Final = 500
"""Maximum number of entries in a page."""
_BYTES: Final = 128 * 1024
"""Size of a page in bytes after which it takes no further entry. It is far below the ``max_payload`` of any server."""


class Stored(NamedTuple):
    """One key of the registry."""

    key: str
    revision: int
    value: bytes | None
    """None if the entry was deleted, or has expired."""


class Question(NamedTuple):
    """What a runtime asks a worker. The field names are the names on the wire."""

    want: str
    """`ENTRIES`, `REVISION` or `KNOWN`."""
    after: str = ""
    """The last key, or the last type, of the page before; empty for the first page."""
    revision: int = 0
    """The revision that the view of the answering worker must contain; 0: everything that is committed now."""
    agent_type: str | None = None
    """For `KNOWN`: the only type that is asked for; None for all."""


ENTRIES: Final = "entries"
"""Entries of the view, in the order of their keys."""
REVISION: Final = "revision"
"""Only the revision up to which the view is complete."""
KNOWN: Final = "known"
"""The types that are known, in the order of their names."""


class Page(NamedTuple):
    """A worker's answer."""

    revision: int
    """The revision up to which the worker's view is complete."""
    entries: Sequence[Stored] = ()
    known: Sequence[KnownEntry] = ()
    more: bool = False
    """True if another page follows."""
    origin: Origin | None = None
    """Which registry the worker reads; None if it does not tell, as a worker of an older version."""


class _WireEntry(NamedTuple):
    key: str
    revision: int
    value: dict[str, Any]


class _WirePage(NamedTuple):
    revision: int
    entries: list[_WireEntry] = []
    known: list[KnownEntry] = []
    more: bool = False
    registry: str = ""


_PAGES: Final[TypeAdapter[_WirePage]] = TypeAdapter(_WirePage)
_QUESTIONS: Final[TypeAdapter[Question]] = TypeAdapter(Question)


def read_question(data: object) -> Question:
    """Return a question. Raises `CannotDecode`."""
    try:
        question = _QUESTIONS.validate_python(data)
    except ValidationError as error:
        raise CannotDecode(_QUESTION, str(error.errors(include_input=False)[0]["msg"])) from None
    if question.want not in (ENTRIES, REVISION, KNOWN):
        raise CannotDecode(_QUESTION, f"want must be {ENTRIES}, {REVISION} or {KNOWN}")
    return question


def read_page(data: object) -> Page:
    """Return a worker's answer. Raises `CannotDecode`."""
    try:
        page = _PAGES.validate_python(data)
    except ValidationError as error:
        raise CannotDecode(_ANSWER, str(error.errors(include_input=False)[0]["msg"])) from None
    entries = [Stored(key, revision, orjson.dumps(value)) for key, revision, value in page.entries]
    return Page(page.revision, entries, page.known, page.more, Origin.read(page.registry))


class Pages:
    """Cuts the view of one worker into pages."""

    def __init__(self) -> None:
        self._of: tuple[View, int] | None = None
        self._keys: list[str] = []
        """The keys of a view at one revision, in order. Most questions are about the same one."""

    def entries(self, view: View, after: str, origin: Origin | None = None) -> bytes:
        """Return the data of the answer with the entries whose keys follow ``after``."""
        if self._of is None or self._of[0] is not view or self._of[1] != view.applied:
            self._keys = sorted(view.entries)
            self._of = view, view.applied
        begin = bisect_right(self._keys, after)
        parts: list[bytes] = []
        size = 0
        for key in self._keys[begin : begin + _ENTRIES]:
            revision, entry = view.entries[key]
            parts.append(b"[%b,%d,%b]" % (orjson.dumps(key), revision, encode_entry(entry)))
            size += len(parts[-1])
            if size > _BYTES:
                break
        return _data(view.applied, b'"entries":[%b]' % b",".join(parts), begin + len(parts) < len(self._keys), origin)

    def known(self, revision: int, known: Mapping[str, KnownEntry], after: str) -> bytes:
        """Return the data of the answer with the known types whose names follow ``after``."""
        names = sorted(name for name in known if name > after)
        parts: list[bytes] = []
        size = 0
        for name in names[:_ENTRIES]:
            parts.append(encode_entry(known[name]))
            size += len(parts[-1])
            if size > _BYTES:
                break
        return _data(revision, b'"known":[%b]' % b",".join(parts), len(parts) < len(names))


def revision_data(revision: int, origin: Origin | None = None) -> bytes:
    """Return the data of the answer with a revision only."""
    return b'{"revision":%d%b}' % (revision, _named(origin))


def _data(revision: int, content: bytes, more: bool, origin: Origin | None = None) -> bytes:
    return b'{"revision":%d%b,"more":%b,%b}' % (revision, _named(origin), b"true" if more else b"false", content)


def _named(origin: Origin | None) -> bytes:
    return b"" if origin is None else b',"registry":%b' % orjson.dumps(str(origin))
