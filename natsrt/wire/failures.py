"""Exceptions on the wire: writes the exception that a handler raised, and rebuilds it for the caller.

A failure is sent as data: class name, text, arguments, fields and traceback. The caller rebuilds only exceptions of
classes that it already knows, with ``__new__`` and the fields. It never calls or imports anything named in the message.
An exception that cannot be rebuilt safely becomes a `RemoteAgentError`.
"""

from __future__ import annotations

import asyncio
import builtins
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any, Final, TypeVar

import orjson
from autogen_core import exceptions as autogen_exceptions

from natsrt import errors
from natsrt.errors import NatsrtError, RemoteAgentError

SERVICE_ERROR: Final = "Nats-Service-Error"
"""Header with an error's text, as the NATS service protocol defines it (ADR-32)."""
SERVICE_ERROR_CODE: Final = "Nats-Service-Error-Code"
"""Header with an error's number (ADR-32)."""

CANCELLED: Final = 499
BUSY: Final = 429
"""The code of a refusal: the call was not started, and its caller sends it again."""
_MAX_TEXT = 16_384  # characters, for the text and for the traceback
_SHORT = 1000
"""Characters of the text of an exception that is too large to be sent."""

T = TypeVar("T")

_TRACEBACK = BaseException.__dict__["__traceback__"]
_TOOL_AGENT: Final = "autogen_core.tool_agent"
_FORBIDDEN = (StopIteration, StopAsyncIteration, GeneratorExit)


@dataclass(frozen=True, slots=True)
class Remote:
    """Where a rebuilt exception was raised. It is stored in ``exception.natsrt_remote``.

    ``traceback`` is None if the worker does not send tracebacks (``send_tracebacks=False``).
    """

    agent: str | None
    worker_id: str | None
    traceback: str | None


_NAME, _MODULE = type.__dict__["__qualname__"], type.__dict__["__module__"]


def class_name(cls: type) -> str:
    """The qualified name of a class, even if its metaclass has attributes that raise."""
    return str(_NAME.__get__(cls))


def qualified_name(cls: type[BaseException]) -> str:
    return f"{_MODULE.__get__(cls)}.{class_name(cls)}"


class ErrorTypes:
    """The exception classes that a runtime may rebuild: Python's, AutoGen's, natsrt's, and those that were added."""

    def __init__(self) -> None:
        self._classes: dict[str, type[BaseException]] = {}
        for module in (builtins, autogen_exceptions, errors):
            self._know(module, Exception)

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

    def add(self, cls: type[BaseException]) -> None:
        """Allow exceptions of ``cls`` to be rebuilt. Raises TypeError if a call cannot raise such an exception."""
        if not (isinstance(cls, type) and issubclass(cls, BaseException)) or issubclass(cls, _FORBIDDEN):
            raise TypeError(f"{cls!r} is not an exception class that a call can raise")
        self._classes[qualified_name(cls)] = cls

    def rebuild(
        self,
        payload: bytes,
        *,
        agent: str | None,
        worker_id: str | None,
        text: str = "the worker sent an error that cannot be read",
    ) -> BaseException:
        """Return the exception in the data of a ``natsrt.error``.

        Never raises: if the data cannot be read, the result is a `RemoteAgentError` with ``text``.
        """
        try:
            data = orjson.loads(payload)
            name, message = str(data["type"]), str(data["message"])
        except (orjson.JSONDecodeError, KeyError, TypeError):
            return RemoteAgentError("unknown", text)
        trace = data.get("traceback")
        remote = Remote(agent, worker_id, trace if isinstance(trace, str) else None)
        exception = self._rebuild(name, message, data)
        try:
            exception.natsrt_remote = remote  # type: ignore[attr-defined]
            where = f"raised by agent {agent} on worker {worker_id}"
            exception.add_note(f"{where}\n{remote.traceback}" if remote.traceback else where)
        except (AttributeError, TypeError):
            pass
        return exception

    def _rebuild(self, name: str, message: str, data: dict[str, Any]) -> BaseException:
        if data.get("code") == CANCELLED:
            return asyncio.CancelledError(message)
        cls = self._find(name)
        args, fields = data.get("args"), data.get("fields")
        if cls is None or not isinstance(args, list) or not isinstance(fields, dict):
            return RemoteAgentError(name, message)
        try:
            exception = cls.__new__(cls, *args)
            exception.args = tuple(args)
            exception.__dict__.update(fields)
            str(exception)
        except Exception:  # __new__ and __str__ of the class may raise anything
            return RemoteAgentError(name, message)
        return exception


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception ready to be sent: ``payload`` for the body, ``code`` and ``text`` for the headers."""

    payload: bytes
    code: int
    text: str

    @property
    def headers(self) -> dict[str, str]:
        line = " ".join(self.text.split()) or "error"
        return {SERVICE_ERROR: line.encode("ascii", "replace").decode()[:512], SERVICE_ERROR_CODE: str(self.code)}


def describe(exception: BaseException, *, with_traceback: bool, refused: bool = False) -> Failure:
    """Return ``exception`` as data. Arguments and fields are sent only if JSON represents all of them exactly.

    ``refused`` is True if the call was not started, so that its caller may send it again. Never raises, because the
    caller must get an answer: a part of the exception that cannot be read is left out.
    """
    text = _text(exception)
    code = BUSY if refused else _read(lambda: _code(exception), 500)
    data: dict[str, Any] = {"type": qualified_name(type(exception)), "message": text, "code": code}
    args = _read(lambda: _exact(list(exception.args)), None)
    fields = _read(lambda: _exact({k: v for k, v in _fields(exception).items() if not k.startswith("__")}), None)
    if args is not None and fields is not None:
        data["args"], data["fields"] = args, fields
    if with_traceback and (trace := _traceback(exception)):
        data["traceback"] = _carried(trace)[-_MAX_TEXT:]
    return Failure(orjson.dumps(data), code, text)


def describe_shortly(exception: BaseException, *, refused: bool = False) -> Failure:
    """Do what `describe` does for an exception that is too large to be sent: its text is cut, and most else left out.

    The class can still be rebuilt if the exception has one argument, and it is text.
    """
    text = _text(exception)
    if len(text) > _SHORT:
        text = f"{text[:_SHORT]}…"
    code = BUSY if refused else _read(lambda: _code(exception), 500)
    data: dict[str, Any] = {"type": qualified_name(type(exception)), "message": text, "code": code}
    if _read(lambda: len(exception.args) == 1 and isinstance(exception.args[0], str), False):
        data["args"], data["fields"] = [text], {}
    return Failure(orjson.dumps(data), code, text)


def traceback_of(exception: BaseException) -> TracebackType | None:
    """The traceback of an exception, whatever attributes its class has."""
    trace: TracebackType | None = _TRACEBACK.__get__(exception)
    return trace


def _traceback(exception: BaseException) -> str:
    """The traceback as text, with causes and notes if they can be read; empty if there is none."""
    trace = traceback_of(exception)
    if trace is None:
        return ""
    return _read(
        lambda: "".join(traceback.format_exception(exception)),
        "".join([*traceback.format_tb(trace), class_name(type(exception))]),
    )


def _read(read: Callable[[], T], default: T) -> T:
    """What ``read`` returns; ``default`` if it raises. An exception's class can make any attribute raise anything."""
    try:
        return read()
    except BaseException:
        return default


def _text(exception: BaseException) -> str:
    def text() -> str:
        found = str(exception)
        if not found and (fields := _fields(exception)):
            found = ", ".join(f"{name}={value!r}" for name, value in fields.items() if not name.startswith("_"))
        return _carried(found)[:_MAX_TEXT]

    return _read(text, "(the text of the exception could not be created)")


def _carried(text: str) -> str:
    """``text`` with each character that UTF-8 cannot encode replaced."""
    return text.encode("utf-8", "replace").decode()


def _fields(exception: BaseException) -> dict[str, Any]:
    return {str(k): v for k, v in vars(exception).items() if k not in ("__notes__", "natsrt_remote", "payload")}


def _code(exception: BaseException) -> int:
    if isinstance(exception, asyncio.CancelledError):
        return CANCELLED
    if not isinstance(exception, NatsrtError):
        return 500
    return 503 if exception.code == BUSY else int(exception.code)  # BUSY: of a call that the handler made


def _exact(value: Any) -> Any:
    """``value`` if JSON represents it exactly, else None."""
    try:
        return value if orjson.loads(orjson.dumps(value)) == value else None
    except (TypeError, ValueError, RecursionError):
        return None
