"""Exceptions that are written for the wire and rebuilt: what handlers and ``except`` clauses read arrives."""

from __future__ import annotations

import asyncio
import builtins
import enum
import json
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import BaseModel, ValidationError

import natsrt
from natsrt import errors
from natsrt.wire.failures import FULL, SHORT, SHORTEST, ErrorTypes, Limits, describe, is_refusal

READ: tuple[str, ...] = (
    "errno",
    "strerror",
    "filename",
    "filename2",
    "characters_written",
    "name",
    "path",
    "msg",
    "lineno",
    "offset",
)
READ += ("text", "end_lineno", "end_offset", "encoding", "object", "start", "end", "reason")


def sent(error: BaseException, types: ErrorTypes | None = None, limits: Limits = FULL, **changes: Any) -> Any:
    """The exception that a caller gets for ``error``. A change of None removes a member of the data."""
    types = types or ErrorTypes()
    data = json.loads(describe(error, with_traceback=True, types=types, limits=limits).payload) | changes
    data = {name: value for name, value in data.items() if value is not None}
    return types.rebuild(orjson.dumps(data), agent="a/k", worker_id="w")


def raised(cause: Callable[[], object]) -> BaseException:
    try:
        cause()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def attributes(error: BaseException) -> dict[str, Any]:
    found = {name: getattr(error, name, None) for name in READ}
    return {name: value for name, value in found.items() if value is not None}


class Color(enum.Enum):
    RED = 1


BLOCKED = BlockingIOError(11, "would block", 7)
BUILTIN: list[BaseException] = [
    raised(Path("no/such/file").open),
    raised(lambda: Path("no/such").stat()),
    PermissionError(13, "Permission denied", "some/secret"),
    OSError(18, "Invalid cross-device link", "a", None, "b"),
    OSError("only a text"),
    OSError(),
    ConnectionResetError(104, "reset"),
    BLOCKED,
    TimeoutError(),
    raised(lambda: __import__("no_such_module")),
    ImportError("cannot import", name="n", path="p.py"),
    raised(lambda: eval("undefined_name")),
    raised(lambda: "".no_such),  # type: ignore[attr-defined]
    raised(lambda: compile("a b", "f.py", "exec")),
    raised(lambda: compile("if 1:\nx", "f.py", "exec")),
    SyntaxError("only a text"),
    raised(lambda: b"a\xff".decode()),
    raised(lambda: "a\ud800".encode()),
    raised(lambda: "aé".encode("ascii")),
    UnicodeTranslateError("ab", 0, 1, "not translatable"),
    KeyError("missing", 3),
    KeyError(None),
    ZeroDivisionError("division by zero"),
    ValueError(),
]


@pytest.mark.parametrize("error", BUILTIN, ids=lambda error: f"{type(error).__name__}: {error}")
def test_a_built_in_exception_keeps_its_class_its_text_and_its_attributes(error: BaseException) -> None:
    got = sent(error)
    assert type(got) is type(error)
    assert str(got) == str(error)
    assert attributes(got) == attributes(error)
    assert not hasattr(got, "obj") or got.obj is None


def test_every_built_in_exception_class_keeps_its_class_if_only_its_text_is_sent() -> None:
    known = [c for c in vars(builtins).values() if isinstance(c, type) and issubclass(c, Exception)]
    groups = (StopIteration, StopAsyncIteration, BaseExceptionGroup)
    for cls in {cls for cls in known if not issubclass(cls, groups)}:
        data = {"type": f"builtins.{cls.__name__}", "message": "no lamps"}
        got = ErrorTypes().rebuild(orjson.dumps(data), agent=None, worker_id=None)
        assert type(got) is cls
        assert "no lamps" in str(got)


@pytest.mark.parametrize(
    "argument",
    [uuid.UUID(int=7), Color.RED, ("a", 1), b"\xff", {1, 2}, 2**80, float("inf"), [uuid.UUID(int=1)], {1: 2}, object],
    ids=repr,
)
def test_an_argument_that_json_cannot_represent_arrives_as_its_repr(argument: object) -> None:
    got = sent(KeyError(argument, "x"))
    assert type(got) is KeyError
    assert got.args == (repr(argument), "x")
    assert str(sent(KeyError(argument))) == str(KeyError(argument))


@pytest.mark.parametrize(
    "argument", ["é\n", 1, True, 1.5, None, [1, ["a"]], {"a": {"b": []}}, {"$type": "repr", "value": 1}], ids=repr
)
def test_an_argument_that_json_represents_arrives_as_it_is(argument: object) -> None:
    got = sent(LookupError(argument))
    assert got.args == (argument,)
    assert type(got.args[0]) is type(argument)


def test_a_dictionary_that_looks_like_a_repr_on_the_wire_does_not_become_text() -> None:
    argument = {"$type": "repr", "value": "x"}
    assert sent(LookupError(argument)).args == (repr(argument),)


def test_text_that_utf_8_cannot_encode_arrives_with_escapes() -> None:
    error = ValueError("a\ud800b")
    error.place = "c\udc80"  # type: ignore[attr-defined]
    error.add_note("d\udc80")
    assert json.loads(describe(error, with_traceback=False).payload)["message"] == "a\\ud800b"
    got = sent(error)
    assert [repr(argument) for argument in got.args] == [repr("a\ud800b")]
    assert repr(got.place) == repr("c\udc80")
    assert got.__notes__[0] == "d\\udc80"


UNREADABLE = "the worker sent an error that cannot be read"


@pytest.mark.parametrize("more", [{}, {"args": ["no such lamp"]}, {"args": []}], ids=repr)
@pytest.mark.parametrize("fields", [{"filename": "/f"}, {"filename": "/f", "errno": 2}, {"errno": 2}], ids=repr)
def test_the_text_of_an_os_error_has_the_message(fields: dict[str, object], more: dict[str, object]) -> None:
    data = {"type": "builtins.FileNotFoundError", "message": "no such lamp", "fields": fields, **more}
    got = ErrorTypes().rebuild(json.dumps(data).encode(), agent=None, worker_id=None)
    assert type(got) is FileNotFoundError
    assert "no such lamp" in str(got)
    assert {name: getattr(got, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("payload", "text", "kind", "message"),
    [
        (b'{"type":"shop.X"}', None, "shop.X", f"{UNREADABLE} (the data of the error has no 'message')"),
        (
            b'{"type":"shop.X","message":null}',
            "no (418)",
            "shop.X",
            "no (418) (the data of the error has no 'message')",
        ),
        (b'{"message":"no lamps"}', None, "unknown", "no lamps (the data of the error has no 'type')"),
        (b"{}", None, "unknown", f"{UNREADABLE} (the data of the error has no 'type' and no 'message')"),
        (b'{"other":1}', "teapot (418)", "unknown", "teapot (418)"),
        (b"[]", None, "unknown", UNREADABLE),
        (b"x", "teapot (418)", "unknown", "teapot (418)"),
    ],
)
def test_what_there_is_of_an_incomplete_error_is_kept(
    payload: bytes, text: str | None, kind: str, message: str
) -> None:
    got = ErrorTypes().rebuild(payload, agent=None, worker_id=None, text=text)
    assert isinstance(got, errors.RemoteAgentError)
    assert (got.error_type, got.message) == (kind, message)


@pytest.mark.parametrize("cls", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_a_class_that_ends_something_else_than_a_call_is_refused(cls: type[BaseException]) -> None:
    with pytest.raises(TypeError, match=cls.__name__):
        ErrorTypes().add(cls)


def test_numbers_and_texts_of_subclasses_arrive_as_equal_values() -> None:
    class Status(enum.IntEnum):
        GONE = 410

    class Kind(enum.StrEnum):
        RED = "red"

    got = sent(LookupError(Status.GONE, Kind.RED))
    assert got.args == (410, "red")


# -- exceptions of users -----------------------------------------------------------------------------------------------


class Order:
    def __repr__(self) -> str:
        return "Order(7)"


class NeedsKeywords(Exception):
    """Cannot be made from its arguments, as the errors of HTTP clients cannot."""

    def __new__(cls, *args: Any, response: object, body: object) -> NeedsKeywords:
        return super().__new__(cls, *args)

    def __init__(self, message: str, *, response: object, body: object) -> None:
        super().__init__(message)
        self.response = response
        self.body = body


class Slotted(OSError):
    __slots__ = ("slot",)
    slot: int


class FileGone(FileNotFoundError):
    def __init__(self, place: str) -> None:
        super().__init__(2, "gone", place)
        self.place = place


class Shows(Exception):
    def __init__(self, order: object) -> None:
        self.order = order

    def __str__(self) -> str:
        return f"no {self.order}"


class Payload(Exception):
    def __init__(self, payload: str) -> None:
        self.payload = payload
        super().__init__("bad payload")


def test_an_exception_whose_fields_are_no_json_keeps_its_class_and_has_their_repr() -> None:
    types = ErrorTypes()
    types.add(NeedsKeywords)
    got = sent(NeedsKeywords("quota", response=Order(), body={"code": 3}), types)
    assert (type(got), str(got), got.args) == (NeedsKeywords, "quota", ("quota",))
    assert (got.response, repr(got.response), got.body) == ("Order(7)", "Order(7)", {"code": 3})


def test_exceptions_of_users_keep_slots_fields_and_what_built_in_classes_keep() -> None:
    types = ErrorTypes()
    for cls in (Slotted, FileGone, Shows, Payload):
        types.add(cls)
    slotted = Slotted(5, "io", "f")
    slotted.slot = 9
    got = sent(slotted, types)
    assert (type(got), got.slot, got.errno, got.filename, str(got)) == (Slotted, 9, 5, "f", str(slotted))
    got = sent(FileGone("here"), types)
    assert (type(got), got.errno, got.filename, got.place, str(got)) == (
        FileGone,
        2,
        "here",
        "here",
        str(FileGone("here")),
    )
    assert str(sent(Shows(Order()), types)) == "no Order(7)"
    assert sent(Payload("p"), types).payload == "p"


def test_a_field_from_the_wire_does_not_hide_a_method() -> None:
    got = sent(ValueError("bad"), fields={"add_note": 1, "with_traceback": "x", "reason": "r"})
    got.add_note("still works")
    assert (type(got), got.reason, callable(got.with_traceback)) == (ValueError, "r", True)


def test_an_exception_whose_text_cannot_be_made_from_what_was_sent_is_a_remote_agent_error() -> None:
    types = ErrorTypes()
    types.add(Shows)
    got = sent(Shows("lamps"), types, fields=None)
    assert (type(got), got.message) == (errors.RemoteAgentError, "no lamps")


def test_a_validation_error_of_pydantic_arrives_with_its_text() -> None:
    class Model(BaseModel):
        number: int

    error = raised(lambda: Model(number="many"))
    types = ErrorTypes()
    types.add(ValidationError)  # only its own module can make one
    for known in (types, ErrorTypes()):
        got = sent(error, known)
        assert isinstance(got, errors.RemoteAgentError)
        assert "number" in got.message


# -- causes, notes, groups ---------------------------------------------------------------------------------------------


def chained(suppress: bool = False) -> BaseException:
    def fail() -> None:
        try:
            raise KeyError("first") from ConnectionError("root")
        except KeyError as error:
            if suppress:
                raise ValueError("second") from None
            raise ValueError("second") from error

    return raised(fail)


def test_causes_arrive_as_exceptions() -> None:
    got = sent(chained())
    cause: Any = got.__cause__
    assert type(got) is ValueError
    assert (type(cause), cause.args) == (KeyError, ("first",))
    assert (type(cause.__cause__), str(cause.__cause__)) == (ConnectionError, "root")
    assert cause.natsrt_remote.agent == "a/k"
    assert "ConnectionError: root" in "".join(traceback.format_exception(got))


def test_a_context_arrives_unless_it_is_suppressed() -> None:
    def fail() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second")  # noqa: B904

    got = sent(raised(fail))
    assert (type(got.__context__), got.__cause__) == (KeyError, None)
    assert sent(chained(suppress=True)).__context__ is None


def test_a_cause_of_a_class_that_is_unknown_arrives_with_its_text() -> None:
    error = ValueError("outer")
    error.__cause__ = Shows("lamps")
    cause = sent(error).__cause__
    assert isinstance(cause, errors.RemoteAgentError)
    assert cause.message == "no lamps"


def test_causes_that_go_round_in_a_circle_end() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert str(sent(one).__cause__) == "other"


def test_a_chain_of_a_thousand_causes_is_cut() -> None:
    outer = ValueError("0")
    inner: BaseException = outer
    for number in range(1, 1000):
        inner.__cause__ = ValueError(str(number))
        inner = inner.__cause__
    got, depth = sent(outer), 0
    while got.__cause__ is not None:
        got, depth = got.__cause__, depth + 1
    assert depth == 20


def test_notes_arrive_and_those_of_natsrt_do_not_pile_up() -> None:
    error = ValueError("x")
    error.add_note("look here")
    got = sent(sent(sent(error)))
    assert [note.splitlines()[0] for note in got.__notes__] == ["look here", "raised by agent a/k on worker w"]


def test_the_members_of_a_group_arrive_as_exceptions() -> None:
    inner = ExceptionGroup("inner", [FileNotFoundError(2, "no", "f"), Shows("lamps")])
    got = sent(ExceptionGroup("outer", [ValueError("a"), inner]))
    assert type(got) is ExceptionGroup
    assert (got.message, str(got)) == ("outer", "outer (2 sub-exceptions)")
    caught: list[Any] = []
    try:
        raise got
    except* ValueError as group:
        caught += group.exceptions
    except* OSError as group:
        caught += group.exceptions
    except* errors.RemoteAgentError as group:
        caught += group.exceptions
    assert [type(each) for each in caught] == [ValueError, ExceptionGroup, ExceptionGroup]
    assert caught[1].exceptions[0].filename == "f"


def test_a_group_with_an_exit_does_not_end_the_caller() -> None:
    got = sent(BaseExceptionGroup("several", [SystemExit(3), asyncio.CancelledError(), ValueError("a")]))
    assert type(got) is ExceptionGroup
    assert [type(each) for each in got.exceptions] == [errors.RemoteAgentError, errors.RemoteAgentError, ValueError]


def test_a_group_of_a_class_that_is_unknown_has_its_members_as_its_cause() -> None:
    class Several(ExceptionGroup[Exception]):
        pass

    error = Several("several", [ValueError("a")])
    got = sent(error)
    assert isinstance(got, errors.RemoteAgentError)
    assert [type(each) for each in got.__cause__.exceptions] == [ValueError]  # type: ignore[union-attr]
    types = ErrorTypes()
    types.add(Several)
    known = sent(error, types)
    assert (type(known), known.message, [type(each) for each in known.exceptions]) == (
        Several,
        "several",
        [ValueError],
    )


def test_a_group_without_members_is_a_remote_agent_error() -> None:
    assert isinstance(sent(ExceptionGroup("several", [ValueError("a")]), exceptions=[]), errors.RemoteAgentError)


# -- sizes -------------------------------------------------------------------------------------------------------------

HUGE = 2_000_000 * "x"


def huge() -> dict[str, BaseException]:
    fields = ValueError("fields")
    fields.order, fields.tree = HUGE, {"a": [HUGE]}  # type: ignore[attr-defined]
    caused = ValueError("cause")
    caused.__cause__ = KeyError(HUGE)
    noted = ValueError("notes")
    noted.add_note(HUGE)
    many = ValueError(*([HUGE[:100_000]] * 100))
    return {
        "text": ValueError(HUGE),
        "bytes": raised(lambda: (HUGE.encode() + b"\xff").decode()),
        "file name": OSError(2, "no", HUGE),
        "group": ExceptionGroup("group", [KeyError(HUGE) for _ in range(1000)]),
        "name of a group": ExceptionGroup(HUGE, [ValueError("a")]),
        "fields": fields,
        "cause": caused,
        "notes": noted,
        "many": many,
        "tuple": KeyError((HUGE,)),
    }


@pytest.mark.parametrize("what", huge())
@pytest.mark.parametrize(("limits", "size"), [(SHORT, 1_000_000), (SHORTEST, 16_000)])
def test_an_exception_of_any_size_is_cut(what: str, limits: Limits, size: int) -> None:
    error = huge()[what]
    assert len(describe(error, with_traceback=True, limits=limits).payload) < size
    assert type(sent(error, limits=limits)) is type(error)


def test_a_traceback_that_python_cannot_format_hides_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> list[str]:
        raise SystemError("AST constructor recursion depth mismatch")  # as Python 3.11 does now and then

    try:
        raise ValueError("bad")
    except ValueError as raised:
        error = raised
    monkeypatch.setattr(traceback, "format_exception", fails)
    assert "test_failures.py" in json.loads(describe(error, with_traceback=True).payload)["traceback"]
    monkeypatch.setattr(traceback, "format_tb", fails)
    described = json.loads(describe(error, with_traceback=True).payload)
    assert (described["message"], described["traceback"]) == ("bad", "ValueError")


def test_members_that_are_left_out_are_counted_in_a_note() -> None:
    got = sent(ExceptionGroup("group", [ValueError(str(n)) for n in range(250)]))
    assert len(got.exceptions) == 100
    assert got.__notes__[0] == "150 more exceptions of this group were not sent"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", errors.__all__)
def test_every_public_error_is_known_under_both_names_and_needs_no_more_than_a_text(name: str) -> None:
    for full in (f"natsrt.{name}", f"natsrt.errors.{name}"):
        data = orjson.dumps({"type": full, "message": "no lamps"})
        got: Any = ErrorTypes().rebuild(data, agent=None, worker_id=None)
        assert type(got) is getattr(natsrt, name, getattr(errors, name))
        assert "no lamps" in str(got)
    if isinstance(got, errors.UndeliveredCall):
        assert got.recipient is None
    if isinstance(got, errors.CannotDecode):
        assert got.payload == b""


def test_an_exception_class_can_have_a_name_that_does_not_depend_on_python() -> None:
    types = ErrorTypes()
    types.add(Shows, "shop.OutOfStock")
    written = json.loads(describe(Shows("lamps"), with_traceback=False, types=types).payload)
    assert written["type"] == "shop.OutOfStock"
    assert type(sent(Shows("lamps"), types)) is Shows
    assert type(sent(Shows("lamps"), types, type=f"{__name__}.Shows")) is Shows
    group = sent(ExceptionGroup("g", [Shows("lamps")]), types)
    assert type(group.exceptions[0]) is Shows

    class Special(Shows):
        pass

    assert json.loads(describe(Special("x"), with_traceback=False, types=types).payload)["type"].endswith("Special")


def test_the_name_of_another_class_cannot_be_given() -> None:
    types = ErrorTypes()
    types.add(Shows, "shop.OutOfStock")
    for name in (
        "shop.OutOfStock",
        "builtins.ValueError",
        "natsrt.WorkerBusy",
        "natsrt.errors.WorkerBusy",
        "natsrt.Mine",
        "",
        5,
    ):
        with pytest.raises(ValueError, match="name"):
            types.add(Payload, name)  # type: ignore[arg-type]
    assert isinstance(sent(Payload("x"), types), errors.RemoteAgentError)


def test_a_class_that_is_defined_again_takes_the_name_over() -> None:
    def defined() -> type[Exception]:
        return type("Again", (Exception,), {"__module__": "cell"})

    types = ErrorTypes()
    for _ in range(2):
        cls = defined()
        types.add(cls, "shop.Again")
        assert type(sent(cls("x"), types)) is cls


# -- hostile and odd data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        {"args": 5, "fields": [], "notes": 7, "cause": "x", "context": 5, "exceptions": 3},
        {"args": None, "fields": None, "notes": [5, "a"], "cause": {}, "exceptions": [{}, 5]},
        {"fields": {"__class__": 5, "__dict__": 1, "__notes__": 2, "__traceback__": 3, "args": "x"}},
        {"args": [{"$type": "repr", "value": 5}, {"$type": "bytes"}]},
        {"args": [1, 2, 3, 4, 5, 6, 7, 8]},
        {"args": ["utf-8", {"$type": "bytes", "value": "_"}, 0, 1, "x"]},
        {"args": ["utf-8", {"$type": "bytes", "value": "/w=="}, -5, -4, "x"]},
        {"args": ["utf-8", "text", 2**63, 2**63, "x"]},
        {"fields": {"start": -1, "end": "x", "object": 3, "errno": [], "characters_written": "x", "message": 4}},
    ],
    ids=repr,
)
def test_data_of_any_kind_is_an_exception_of_its_class_or_a_remote_agent_error(data: dict[str, Any]) -> None:
    types = ErrorTypes()
    for name in sorted(types._classes):
        body = orjson.dumps({"type": name, "message": "no lamps", **data})
        got = types.rebuild(body, agent=None, worker_id=None)
        assert type(got) is types._classes[name] or isinstance(got, errors.RemoteAgentError | OSError), name
        assert isinstance(str(got) + repr(got), str)
        assert got.natsrt_remote is not None  # type: ignore[attr-defined]


def test_the_positions_of_a_unicode_error_are_never_outside_of_its_object() -> None:
    for start, end in ((-5, -4), (-1, 0), (2**62, 2**62 + 1)):
        args = ["utf-8", {"$type": "bytes", "value": "/w=="}, start, end, "x"]
        body = orjson.dumps({"type": "builtins.UnicodeDecodeError", "message": "no lamps", "args": args})
        got: Any = ErrorTypes().rebuild(body, agent=None, worker_id=None)
        assert type(got) is UnicodeDecodeError
        assert (got.object, got.start, got.end, got.reason) == (b"", 0, 0, "no lamps")


def test_data_that_is_nested_very_deeply_is_read() -> None:
    body = b'{"type":"builtins.ValueError","message":"x","cause":' * 300 + b"null" + b"}" * 300
    got = ErrorTypes().rebuild(body, agent=None, worker_id=None)
    assert type(got) is ValueError


@pytest.mark.parametrize(
    ("headers", "body", "refused"),
    [
        (None, b'{"specversion":"1.0","type":"natsrt.error","id":"1","source":"/","data":{"code":429}}', True),
        (None, b'{ "data": {"code": 429.0}, "source":"/", "id":"1", "type":"natsrt.error", "specversion":"1.0"}', True),
        ({"Nats-Service-Error-Code": "429"}, b"", True),
        ({"Nats-Service-Error-Code": "500", "Nats-Service-Error": "x"}, b'{"code":429}', True),
        ({"X": "y"}, b'{"type":"natsrt.error","data":{"code":429}}', True),
        ({"X": "y"}, b'{"code":429}', False),
        (None, b'{"specversion":"1.0","type":"natsrt.error","id":"1","source":"/","data":{"code":500}}', False),
        (None, b'{"specversion":"1.0","type":"natsrt.reply","id":"natsrt.error","data":{"code":429}}', False),
        (None, b'{"type":"other","text":"natsrt.error","data":{"code":429}}', False),
        (None, b"natsrt.error 429", False),
        (None, b'["natsrt.error"]', False),
        (None, b"", False),
    ],
)
def test_a_refusal_is_recognised_in_the_headers_and_in_the_body(
    headers: dict[str, str] | None, body: bytes, refused: bool
) -> None:
    assert is_refusal(headers, body) is refused
