"""What an exception keeps, and how it is put together again without calling its class.

The attributes of an exception are in two places: those that Python code sets are in its dictionary, and those of
built-in classes, such as ``OSError.filename``, in *slots*. Both are sent as ``fields``. When an exception is rebuilt,
no code of its class runs except ``__str__``, which must work.
"""

from __future__ import annotations

import inspect
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any, Final, TypeVar

import orjson

from natsrt.errors import CannotDecode, NatsrtError

T = TypeVar("T")

_NAME, _MODULE = type.__dict__["__qualname__"], type.__dict__["__module__"]
_ARGS, _DICT = BaseException.__dict__["args"], BaseException.__dict__["__dict__"]
_STRERROR = OSError.__dict__["strerror"]
_IMPORTED_FROM: Final = "name_from"
"""The field of ImportError with which Python 3.12 imports the module ``name`` when it shows the exception."""
_UNICODE = (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError)
_NOT_FIELDS = (
    vars(AttributeError)["obj"],  # any object of the worker
    vars(SyntaxError)["print_file_and_line"],
    vars(BaseExceptionGroup)["message"],  # its argument
    vars(BaseExceptionGroup)["exceptions"],  # sent as exceptions
    *filter(None, [vars(ImportError).get(_IMPORTED_FROM)]),
)
"""Slots that are not sent as fields."""
_SYNTAX_FIELDS: Final[Mapping[str, type]] = {
    "filename": str,
    "text": str,
    "lineno": int,
    "end_lineno": int,
    "offset": int,
    "end_offset": int,
}
"""Fields of a SyntaxError, from which a traceback shows the line and marks the place, without checking them."""
_LAST_COLUMN: Final = 65_536
"""The last place in a line that a SyntaxError may have. Python writes a mark for each character of the place."""
_HEAP_TYPE: Final = 1 << 9
"""The flag of classes that were made by a class statement."""
_REPR: Final = "repr"


class ReprText(str):
    """The ``repr`` of a value that could not be sent, in place of the value. Its own ``repr`` is the text itself."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def class_name(cls: type) -> str:
    """The qualified name of a class, even if its metaclass has attributes that raise."""
    return str(_NAME.__get__(cls))


def qualified_name(cls: type[BaseException]) -> str:
    return f"{_MODULE.__get__(cls)}.{class_name(cls)}"


def read(get: Callable[[], T], default: T) -> T:
    """What ``get`` returns; ``default`` if it raises. An exception's class can make any attribute raise anything."""
    try:
        return get()
    except BaseException:
        return default


def carried(text: str) -> str:
    """``text`` with each character that UTF-8 cannot encode written as its escape, such as ``\\udc80``."""
    return text.encode("utf-8", "backslashreplace").decode()


def cut(text: str, longest: int) -> str:
    """``text`` of at most ``longest`` characters; if it had more, it ends in an ellipsis."""
    return text if len(text) <= longest else f"{text[:longest]}…"


# -- values ----------------------------------------------------------------------------------------------------------


def encode_value(value: Any, longest: int) -> Any:
    """``value`` as JSON, in at most about ``longest`` characters. A value that JSON cannot represent is its ``repr``.

    Texts that are too long are cut. Never raises.
    """
    if issubclass(type(value), str):
        text = cut(str.__str__(value), longest)
        if carried(text) == text:
            return text
        return {"$type": _REPR, "value": cut(str.__repr__(text), longest)}  # it has a lone surrogate
    if (exact := read(lambda: _exact(value, longest), None)) is not None or value is None:
        return exact
    text = read(lambda: repr(value), f"<{class_name(type(value))}>")
    return {"$type": _REPR, "value": carried(cut(str(text), longest))}


def _exact(value: Any, longest: int) -> Any:
    """An equal value of JSON's types; None if there is none, or if it is too long."""
    if not issubclass(type(value), int | float | list | dict) or _is_repr(value):
        return None
    written = orjson.dumps(value)
    exact = orjson.loads(written)
    return exact if len(written) <= longest and exact == value else None


def decode_value(value: Any) -> Any:
    """The value that `encode_value` has written."""
    return ReprText(value["value"]) if _is_repr(value) else value


def _is_repr(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) == 2
        and value.get("$type") == _REPR
        and isinstance(value.get("value"), str)
    )


# -- taking apart ----------------------------------------------------------------------------------------------------


def _slots(cls: type[BaseException]) -> Mapping[str, Any]:
    """The attributes of exceptions of ``cls`` that are not in their dictionaries: descriptors by name."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base in (BaseException, *_UNICODE):  # a UnicodeError is built from its arguments, which are the same
            continue
        for name, attribute in vars(base).items():
            if isinstance(attribute, MemberDescriptorType | GetSetDescriptorType) and not name.startswith("__"):
                found.setdefault(name, attribute)
    return {name: attribute for name, attribute in found.items() if attribute not in _NOT_FIELDS}


def fields_of(exception: BaseException) -> dict[str, Any]:
    """The attributes of an exception by name: those in its dictionary, and the slots that are set."""
    cls = type(exception)
    slots = {name: read(lambda slot=slot: slot.__get__(exception), None) for name, slot in _slots(cls).items()}  # type: ignore[misc]
    fields = {name: value for name, value in slots.items() if value is not None}
    for name, value in _DICT.__get__(exception).items():
        if not str(name).startswith("__") and name != "natsrt_remote":
            fields[str(name)] = value
    if issubclass(cls, CannotDecode):
        fields.pop("payload", None)  # never sent
    return fields


def encode_args(exception: BaseException, longest: int, most: int) -> list[Any]:
    """The arguments of an exception as JSON: ``most`` of them, of about ``longest`` characters each."""
    args: list[Any] = list(_ARGS.__get__(exception))
    if issubclass(type(exception), BaseExceptionGroup):
        return [encode_value(argument, longest) for argument in args[:1]]  # its members are sent as exceptions
    encoded = [encode_value(argument, longest) for argument in args[:most]]
    if issubclass(type(exception), _UNICODE):
        place = _place_of_object(type(exception))
        if len(encoded) > place and isinstance(args[place], str | bytes):
            part = args[place][:longest]
            raw = part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass")
            encoded[place] = {"$type": "bytes", "value": b64encode(raw).decode()}
    return encoded


def _place_of_object(cls: type[BaseException]) -> int:
    """Which argument of a UnicodeError is the text or the bytes that could not be converted."""
    return 0 if issubclass(cls, UnicodeTranslateError) else 1


# -- putting together ------------------------------------------------------------------------------------------------


def build(cls: type[BaseException], message: str, args: Any, fields: Any) -> BaseException:
    """An exception of ``cls`` from its ``args`` and ``fields``, as they came; None stands for ones that did not come.

    Without arguments, the message is the only one. A field that is not there is None, if it is a field of natsrt's
    exceptions. Raises any exception if there can be no such exception.
    """
    args = [message] if not isinstance(args, list) else [decode_value(argument) for argument in args]
    fields = fields if isinstance(fields, dict) else {}
    if issubclass(cls, _UNICODE):
        exception = _unicode_error(cls, message, args)
        _fill(exception, message, fields)
        return exception
    static = cls
    while static.__flags__ & _HEAP_TYPE and static.__base__ is not None:
        static = static.__base__  # the class whose __new__ is not Python code
    exception = static.__new__(cls, *args)
    if not _ARGS.__get__(exception):
        _ARGS.__set__(exception, tuple(args))
    _fill(exception, message, fields)
    if isinstance(exception, OSError) and exception.strerror is None and message not in str(exception):
        # Its text is made of the file name, the number and this text.
        _STRERROR.__set__(exception, message)
    str(exception)
    return exception


def build_group(
    cls: type[BaseException], message: str, args: Any, fields: Any, members: Sequence[BaseException]
) -> BaseException:
    """A group of ``members``. Raises as `build` does, also if there are none."""
    text = args[0] if isinstance(args, list) and args and isinstance(args[0], str) else message
    group: BaseException = BaseExceptionGroup.__new__(cls, text, members)  # type: ignore[type-var]
    _fill(group, message, fields if isinstance(fields, dict) else {})
    str(group)
    return group


def _fill(exception: BaseException, message: str, fields: Mapping[str, Any]) -> None:
    """Set the fields of an exception. One that its class does not accept is left out."""
    cls, slots, own = type(exception), _slots(type(exception)), _DICT.__get__(exception)
    if issubclass(cls, NatsrtError):
        own.update(_declared(cls))
    if "msg" in slots and "msg" not in fields:  # of ImportError and SyntaxError, which make their texts from it
        read(lambda: slots["msg"].__set__(exception, message), None)
    for name, value in fields.items():
        decoded = decode_value(value)
        if not _may_be_shown(cls, name, decoded):
            continue
        if name in slots:
            read(lambda slot=slots[name], decoded=decoded: slot.__set__(exception, decoded), None)  # type: ignore[misc]
        elif not name.startswith("__") and not _is_method(cls, name):
            own[name] = decoded


def _is_method(cls: type[BaseException], name: str) -> bool:
    """True if a field of this name would hide a method, such as ``add_note``."""
    return inspect.isroutine(inspect.getattr_static(cls, name, None))


def _may_be_shown(cls: type[BaseException], name: str, value: object) -> bool:
    """False for a field with which the exception's traceback could not be shown, or would import a module."""
    if issubclass(cls, ImportError):
        return name != _IMPORTED_FROM
    kind = _SYNTAX_FIELDS.get(name) if issubclass(cls, SyntaxError) else None
    if kind is None or value is None:
        return True
    if isinstance(value, int) and name.endswith("offset"):
        return -1 <= value <= _LAST_COLUMN
    return isinstance(value, kind)


def _declared(cls: type[NatsrtError]) -> Mapping[str, Any]:
    """The fields of one of natsrt's exceptions, with the values that they have if they are not sent.

    They are the arguments of its constructor, except a text that is made of others.
    """
    arguments = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {
        argument.name: None if argument.default is argument.empty else argument.default
        for argument in arguments
        if argument.kind is argument.POSITIONAL_OR_KEYWORD and argument.name != "text"
    }


def _unicode_error(cls: type[BaseException], message: str, args: list[Any]) -> BaseException:
    """A UnicodeDecodeError, UnicodeEncodeError or UnicodeTranslateError.

    Their texts read the object at the position that they name, without a check, so the positions are checked here.
    """
    base = next(base for base in _UNICODE if issubclass(cls, base))
    decodes, place = base is UnicodeDecodeError, _place_of_object(base)
    whole = list(args)
    if len(whole) > place and isinstance(whole[place], dict) and whole[place].get("$type") == "bytes":
        raw = b64decode(whole[place]["value"], validate=True)
        whole[place] = raw if decodes else raw.decode("utf-8", "surrogatepass")
    kinds = [str] * place + [bytes if decodes else str, int, int, str]
    fits = len(whole) == len(kinds) and all(map(isinstance, whole, kinds))
    if not fits or not all(0 <= position < 2**62 for position in whole[place + 1 : place + 3]):
        whole = ["unknown"] * place + [b"" if decodes else "", 0, 0, message]
    exception: BaseException = base.__new__(cls, *whole)
    base.__init__(exception, *whole)  # type: ignore[arg-type]
    return exception
