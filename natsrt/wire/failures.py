"""Exceptions on the wire: writes the exception that a handler raised, and rebuilds it for the caller.

A failure is sent as data: class name, text, arguments, fields and traceback. The caller rebuilds only exceptions of
classes that it already knows, with ``__new__`` and the fields. It never calls or imports anything named in the message.
An exception that cannot be rebuilt safely becomes a `RemoteAgentError`.
"""

from __future__ import annotations

import asyncio
import builtins
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any, Final, TypeVar

import orjson
from autogen_core import exceptions as autogen_exceptions

from natsrt import errors
from natsrt.errors import MessageTooLarge, NatsrtError, RemoteAgentError
from natsrt.wire import envelope
from natsrt.wire.exception_parts import (
    build,
    build_group,
    carried,
    class_name,
    cut,
    encode_args,
    encode_value,
    fields_of,
    qualified_name,
    read,
)

SERVICE_ERROR: Final = "Nats-Service-Error"
"""Header with an error's text, as the NATS service protocol defines it (ADR-32)."""
SERVICE_ERROR_CODE: Final = "Nats-Service-Error-Code"
"""Header with an error's number (ADR-32)."""

_LONGEST_HEADER: Final = 512
"""Characters of an error's text in a header."""

CANCELLED: Final = 499
BUSY: Final = 429
"""The code of a refusal: the call was not started, and its caller sends it again."""
_BUSY_HEADER: Final = str(BUSY)
_REPLY_START: Final = b'{"specversion":"1.0","type":"natsrt.reply",'
"""How natsrt's own replies start. They are not searched for errors."""
_ERROR_BYTES: Final = envelope.ERROR.encode()
_UNREADABLE: Final = "the worker sent an error that cannot be read"
_MAX_DEPTH: Final = 20
"""How deep causes and members of groups are nested at most; deeper ones are left out."""

_TRACEBACK, _NOTES = BaseException.__dict__["__traceback__"], "__notes__"
_CAUSE, _CONTEXT = BaseException.__dict__["__cause__"], BaseException.__dict__["__context__"]
_SUPPRESSED = BaseException.__dict__["__suppress_context__"]
_MEMBERS = BaseExceptionGroup.__dict__["exceptions"]
_TOOL_AGENT: Final = "autogen_core.tool_agent"
_FORBIDDEN = (
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    KeyboardInterrupt,
    SystemExit,
    asyncio.CancelledError,  # sent as the code 499
)
"""Classes that end something else than a call in the process that gets them."""
_DECIDING: Final = (errors.Reject, errors.Retry)
"""Classes whose exceptions decide what becomes of an event. One that is derived from them does so, too, also where it
is not known: its ``base`` is sent."""


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a rebuilt exception was raised. It is stored in ``exception.natsrt_remote``.

    ``traceback`` is None if the worker does not send tracebacks (``send_tracebacks=False``). ``payload`` is the
    exception as it was sent, to be passed on unchanged.
    """

    agent: str | None
    worker_id: str | None
    traceback: str | None
    payload: bytes = field(default=b"", repr=False)


class ErrorTypes:
    """The exception classes that a runtime may rebuild: Python's, AutoGen's, natsrt's, and those that were added."""

    def __init__(self) -> None:
        self._classes: dict[str, type[BaseException]] = {}
        self._names: dict[type[BaseException], str] = {}
        """The names that were given to classes."""
        for module in (builtins, autogen_exceptions, errors):
            self._know(module, Exception)
        self._classes[qualified_name(BaseExceptionGroup)] = BaseExceptionGroup
        for name in errors.__all__:
            self._classes[f"natsrt.{name}"] = getattr(errors, name)
        self._reserved = frozenset(self._classes)

    def _know(self, module: ModuleType, base: type[BaseException]) -> None:
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, base) and not issubclass(value, _FORBIDDEN):
                self._classes.setdefault(qualified_name(value), value)

    def _find(self, name: str) -> type[BaseException] | None:
        if name not in self._classes and name.startswith(f"{_TOOL_AGENT}."):
            # Imported on first use, because it also imports AutoGen's models and tools, which would slow every start.
            # Only this one module is ever imported, whatever class the message names.
            from autogen_core import tool_agent

            self._know(tool_agent, tool_agent.ToolException)
        return self._classes.get(name)

    def add(self, cls: type[BaseException], name: str | None = None) -> None:
        """Allow exceptions of ``cls`` to be rebuilt, under the name of the class and under ``name``.

        Exceptions of this class are sent under ``name``; None: under the name of the class. Raises TypeError if a call
        cannot raise such an exception, and ValueError if ``name`` is empty, the name of another class, or begins with
        ``natsrt.``.
        """
        if not (isinstance(cls, type) and issubclass(cls, BaseException)) or issubclass(cls, _FORBIDDEN):
            raise TypeError(f"{cls!r} is not an exception class that a call can raise")
        own = qualified_name(cls)
        if name is None:
            self._names.pop(cls, None)
        else:
            self._claim(cls, own, name)
        self._classes[own] = cls

    def _claim(self, cls: type[BaseException], own: str, name: str) -> None:
        if not isinstance(name, str) or not name or carried(name) != name:
            raise ValueError(f"the name of an exception class must be text that is not empty, not {name!r}")
        known = self._classes.get(name)
        if name.startswith("natsrt.") and known is not cls:
            raise ValueError(f"{name!r} is not free: names that begin with 'natsrt.' are those of natsrt's own errors")
        if known not in (None, cls) and (name in self._reserved or qualified_name(known) != own):
            raise ValueError(f"{name!r} is the name of {known!r}; give {cls!r} another name")
        self._classes[name] = cls
        self._names[cls] = name

    def name_of(self, cls: type[BaseException]) -> str:
        """The name under which exceptions of ``cls`` are sent."""
        return self._names.get(cls) or qualified_name(cls)

    def rebuild(
        self,
        payload: bytes,
        *,
        agent: str | None,
        worker_id: str | None,
        text: str | None = None,
    ) -> BaseException:
        """Return the exception in the data of a ``natsrt.error``.

        ``text`` is the text in the headers of a plain error. Never raises: if the data cannot be read, the result is a
        `RemoteAgentError` with ``text``, and if a required member is missing, with those that are there.
        """
        try:
            data = orjson.loads(payload)
        except orjson.JSONDecodeError:
            data = None
        is_object = isinstance(data, dict)
        data = data if is_object else {}
        missing = [member for member in ("type", "message") if data.get(member) is None]
        name = "unknown" if "type" in missing else str(data["type"])
        message = str(data["message"]) if "message" not in missing else text or _UNREADABLE
        if missing and is_object and (text is None or len(missing) == 1):
            message = f"{message} (the data of the error has no {' and no '.join(map(repr, missing))})"
        trace = data.get("traceback")
        remote = Remote(agent, worker_id, trace if isinstance(trace, str) else None, b"" if missing else payload)
        if missing:
            exception: BaseException = RemoteAgentError(name, message)
        elif data.get("code") == CANCELLED:
            exception = asyncio.CancelledError(message)
        else:
            exception = self._rebuild(name, message, data, remote, 0)
        read(lambda: setattr(exception, "natsrt_remote", remote), None)
        read(lambda: exception.add_note(_where(remote)), None)
        return exception

    def _rebuild(self, name: str, message: str, data: dict[str, Any], remote: Remote, depth: int) -> BaseException:
        cls, args, fields = self._find(name), data.get("args"), data.get("fields")
        members = self._members(data, remote, depth)
        exception: BaseException | None = None
        try:
            if cls is not None and issubclass(cls, BaseExceptionGroup):
                exception = build_group(cls, message, args, fields, members)
            elif cls is not None:
                exception = build(cls, message, args, fields)
        except Exception:  # __str__ of the class may raise anything
            exception = None
        if exception is None:
            exception = RemoteAgentError(name, message)
            if members:
                _CAUSE.__set__(exception, build_group(BaseExceptionGroup, message, args, None, members))
        cause, context = (self._related(data.get(of), remote, depth) for of in ("cause", "context"))
        if cause is not None:
            _CAUSE.__set__(exception, cause)
        elif context is not None:
            _CONTEXT.__set__(exception, context)
        notes = data.get("notes")
        for note in notes if isinstance(notes, list) else ():
            read(lambda note=note: exception.add_note(note), None)  # type: ignore[misc]
        return exception

    def _related(self, data: Any, remote: Remote, depth: int) -> BaseException | None:
        """A cause, a context or the member of a group; None if it cannot be read, or is nested too deeply."""
        if not isinstance(data, dict) or "type" not in data or "message" not in data or depth >= _MAX_DEPTH:
            return None
        exception = self._rebuild(str(data["type"]), str(data["message"]), data, remote, depth + 1)
        own = Remote(remote.agent, remote.worker_id, None)
        read(lambda: setattr(exception, "natsrt_remote", own), None)
        return exception

    def as_base(self, exception: BaseException) -> BaseException:
        """An exception of an unknown class, rebuilt as the class that decides what becomes of an event and is its base.

        Returns any other exception as it is.
        """
        remote = remote_of(exception)
        if remote is None or not isinstance(exception, RemoteAgentError):
            return exception
        data = orjson.loads(remote.payload)
        base = data.get("base")
        if not isinstance(base, str) or self._find(base) not in _DECIDING:
            return exception
        rebuilt = self._rebuild(base, str(data["message"]), data, remote, 0)
        read(lambda: setattr(rebuilt, "natsrt_remote", remote), None)
        return rebuilt

    def _members(self, data: dict[str, Any], remote: Remote, depth: int) -> list[BaseException]:
        sent = data.get("exceptions")
        members = (self._related(member, remote, depth) for member in (sent if isinstance(sent, list) else ()))
        return [member for member in members if member is not None]


def remote_of(exception: BaseException) -> Remote | None:
    """Where an exception was raised that was sent; None if it was raised here, or cannot be passed on."""
    remote = read(lambda: getattr(exception, "natsrt_remote", None), None)
    return remote if isinstance(remote, Remote) and remote.payload else None


def sent_by(exception: BaseException, agent: str | None) -> dict[str, Any] | None:
    """The data of an exception as ``agent`` has sent it; None if it is not one that this agent sent."""
    remote = remote_of(exception)
    if agent is None or remote is None or remote.agent != agent:
        return None
    data: dict[str, Any] = orjson.loads(remote.payload)
    return data


def sent_name(exception: BaseException, agent: str) -> str | None:
    """The name of the class of an exception that ``agent`` has sent, without the module. None as for `sent_by`."""
    data = sent_by(exception, agent)
    return None if data is None else str(data["type"]).rpartition(".")[2]


def _where(remote: Remote) -> str:
    """The note that says where a rebuilt exception was raised."""
    where = f"raised by agent {remote.agent} on worker {remote.worker_id}"
    return f"{where}\n{remote.traceback}" if remote.traceback else where


# -- writing ---------------------------------------------------------------------------------------------------------


def header_text(text: str) -> str:
    """``text`` in a form that a header can have for clients in any language: one line of printable ASCII.

    It is the first line that is not blank; empty if there is none. Other characters become ``?``. What is longer than
    512 characters is cut, and ends in three dots.
    """
    line = next(filter(None, (" ".join(line.split()) for line in text.splitlines())), "")
    if len(line) > _LONGEST_HEADER:
        line = f"{line[: _LONGEST_HEADER - 3]}..."
    return "".join(char if char.isascii() and char.isprintable() else "?" for char in line)


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception ready to be sent: ``payload`` for the body, ``code`` and ``text`` for the headers."""

    payload: bytes
    code: int
    text: str

    @property
    def headers(self) -> dict[str, str]:
        return {SERVICE_ERROR: header_text(self.text) or "error", SERVICE_ERROR_CODE: str(self.code)}


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of an exception is sent. ``text`` and ``value`` are in characters.

    ``text`` is for the text, the traceback and each note, and ``value`` for each argument and field. ``values`` is the
    maximum number of arguments, of fields and of notes, and ``exceptions`` that of causes and members of groups.
    """

    text: int
    value: int
    values: int
    exceptions: int


FULL: Final = Limits(text=16_384, value=1_048_576, values=1000, exceptions=100)
MEDIUM: Final = Limits(text=8000, value=2000, values=50, exceptions=10)
SHORT: Final = Limits(text=1000, value=1000, values=20, exceptions=10)
SHORTEST: Final = Limits(text=200, value=100, values=3, exceptions=1)
"""Without the traceback. As JSON in ASCII, an exception then takes less than the headers of a stored message may, and
fits where ``max_payload`` is very low."""
CUTS: Final = (FULL, MEDIUM, SHORT, SHORTEST)
"""Each cuts more than the one before: the first one with which a message can be sent is used."""

_STANDARD: Final = ErrorTypes()
T = TypeVar("T")


def describe(
    exception: BaseException,
    *,
    with_traceback: bool,
    refused: bool = False,
    types: ErrorTypes = _STANDARD,
    limits: Limits = FULL,
    agent: str | None = None,
) -> Failure:
    """Return ``exception`` as data. A value that JSON cannot represent exactly is sent as its ``repr``.

    ``refused`` is True if the call was not started, so that its caller may send it again. ``types`` has the names of
    classes; ``limits`` says what is cut. If ``agent`` has sent the exception, it is described as this agent did, also
    if its class is not known here. Never raises, because the caller must get an answer: a part of the exception that
    cannot be read is left out.
    """
    sent = sent_by(exception, agent)
    if sent is None:
        data = _Writer(types, limits).data(exception, 0)
        if (base := _base(type(exception))) is not None:
            data["base"] = base
        code = BUSY if refused else read(lambda: _code(exception), 500)
        trace = _traceback(exception)
    else:
        data = sent if limits is FULL else _shortened(sent, _Writer(types, limits).data(exception, 0), limits)
        code = sent["code"] if isinstance(sent.get("code"), int) else 500
        trace = str(sent.get("traceback") or "")
    data["code"] = code
    data.pop("traceback", None)
    if with_traceback and limits is not SHORTEST and trace:
        data["traceback"] = carried(trace)[-limits.text :]
    return Failure(orjson.dumps(data), code, str(data["message"]))


def describe_within(
    exception: BaseException,
    pack: Callable[[Failure], T],
    *,
    with_traceback: bool,
    refused: bool = False,
    types: ErrorTypes = _STANDARD,
    agent: str | None = None,
) -> T:
    """Return what ``pack`` makes of ``exception`` as data. Each time it raises `MessageTooLarge`, more is cut.

    The other arguments are as for `describe`. Raises `MessageTooLarge` if nothing more can be cut.
    """
    too_large: MessageTooLarge | None = None
    for limits in CUTS:
        failure = describe(
            exception, with_traceback=with_traceback, refused=refused, types=types, limits=limits, agent=agent
        )
        try:
            return pack(failure)
        except MessageTooLarge as refusal:
            too_large = refusal
    assert too_large is not None
    raise too_large


def _base(cls: type[BaseException]) -> str | None:
    """The name of the deciding class that ``cls`` is derived from; None if it is derived from none, or is one."""
    return next((qualified_name(base) for base in _DECIDING if issubclass(cls, base) and cls is not base), None)


def _shortened(sent: dict[str, Any], rebuilt: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """The data of an exception that was ``sent``, with less in it: it was ``rebuilt``, perhaps as another class."""
    own = {name: cut(str(sent[name]), limits.text) for name in ("type", "message", "base") if name in sent}
    of_other_class = ("args", "fields") if rebuilt["type"] != own["type"] else ()
    return {name: value for name, value in rebuilt.items() if name not in of_other_class} | own


class _Writer:
    """Writes one exception, and those that belong to it."""

    def __init__(self, types: ErrorTypes, limits: Limits) -> None:
        self._types, self._limits = types, limits
        self._left = limits.exceptions
        """How many more exceptions may be written."""

    def data(self, exception: BaseException, depth: int) -> dict[str, Any]:
        """An exception with what belongs to it, as JSON. Never raises."""
        limits = self._limits
        data: dict[str, Any] = {
            "type": cut(self._types.name_of(type(exception)), limits.text),
            "message": _text(exception, limits.text),
            "args": encode_args(exception, limits.value, limits.values),
            "fields": self._fields(exception),
        }
        notes = _notes(exception)[: limits.values]
        if issubclass(type(exception), BaseExceptionGroup):
            members = _MEMBERS.__get__(exception)
            data["exceptions"] = self._written(members, depth)
            if missing := len(members) - len(data["exceptions"]):
                notes.append(f"{missing} more exceptions of this group were not sent")
        if notes:
            data["notes"] = [carried(cut(note, limits.text)) for note in notes]
        cause = _CAUSE.__get__(exception)
        context = None if _SUPPRESSED.__get__(exception) else _CONTEXT.__get__(exception)
        for name, related in (("cause", cause), ("context", context if cause is None else None)):
            if related is not None and (written := self._written((related,), depth)):
                data[name] = written[0]
        return data

    def _fields(self, exception: BaseException) -> dict[str, Any]:
        limits, nothing = self._limits, dict[str, Any]()
        fields = list(read(lambda: fields_of(exception), nothing).items())[: limits.values]
        return {carried(cut(name, limits.value)): encode_value(value, limits.value) for name, value in fields}

    def _written(self, exceptions: Sequence[BaseException], depth: int) -> list[dict[str, Any]]:
        """Those of the exceptions for which there is room."""
        written = []
        for exception in exceptions if depth < _MAX_DEPTH else ():
            if self._left <= 0:
                break
            self._left -= 1
            written.append(self.data(exception, depth + 1))
        return written


def decode_answer(headers: Mapping[str, str] | None, body: bytes) -> envelope.Envelope | None:
    """Return the envelope of a reply; None for a plain one. Raises `CannotDecode` as `envelope.decode` does.

    The body of a plain error is its data. The ``type`` in it is a class, whose name may begin with ``natsrt.``, too.
    """
    if headers and SERVICE_ERROR in headers:
        try:
            whole = orjson.loads(body)
        except orjson.JSONDecodeError:
            whole = None
        if isinstance(whole, dict) and whole.get("specversion") is None:
            return None
    return envelope.decode(body)


def is_refusal(headers: Mapping[str, str] | None, body: bytes) -> bool:
    """True if a reply says, in its headers or in its body, that the call was not started."""
    if headers is None:
        if body.startswith(_REPLY_START) or _ERROR_BYTES not in body:
            return False
    elif headers.get(SERVICE_ERROR_CODE) == _BUSY_HEADER:
        return True
    plain = headers is not None and SERVICE_ERROR in headers
    try:
        whole = orjson.loads(body)
        error = whole["data"] if whole.get("type") == envelope.ERROR else whole if plain else {}
        return bool(error["code"] == BUSY)
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
        return False


def traceback_of(exception: BaseException) -> TracebackType | None:
    """The traceback of an exception, whatever attributes its class has."""
    trace: TracebackType | None = _TRACEBACK.__get__(exception)
    return trace


def _traceback(exception: BaseException) -> str:
    """The traceback as text, with causes and notes if they can be read; empty if there is none."""
    trace = traceback_of(exception)
    if trace is None:
        return ""
    return read(lambda: "".join(traceback.format_exception(exception)), "") or read(
        lambda: "".join([*traceback.format_tb(trace), class_name(type(exception))]), class_name(type(exception))
    )


def _text(exception: BaseException, longest: int) -> str:
    def text() -> str:
        found = str(exception)
        if not found and (fields := fields_of(exception)):
            found = ", ".join(f"{name}={value!r}" for name, value in fields.items() if not name.startswith("_"))
        return carried(cut(found, longest))

    return read(text, "(the text of the exception could not be created)")


def _notes(exception: BaseException) -> list[str]:
    """The notes of an exception, without the one that says where it was raised."""
    remote = read(lambda: getattr(exception, "natsrt_remote", None), None)
    own = _where(remote) if isinstance(remote, Remote) else None
    notes = read(lambda: vars(exception).get(_NOTES), None)
    return [note for note in notes if isinstance(note, str) and note != own] if isinstance(notes, list) else []


def _code(exception: BaseException) -> int:
    if isinstance(exception, asyncio.CancelledError):
        return CANCELLED
    if not isinstance(exception, NatsrtError):
        return 500
    return 503 if exception.code == BUSY else int(exception.code)  # BUSY: of a call that the handler made
