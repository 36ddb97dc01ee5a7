"""A short run of the fuzzer, `tests.fuzz`, and its own instruments."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natsrt.errors import CannotDecode
from natsrt.wire.failures import ErrorTypes
from tests.fuzz import trial, worker
from tests.fuzz.mutations import LONGEST, Mutator
from tests.fuzz.readers import HEADERS_END, READERS, Reader, headers_of, joined, parts
from tests.fuzz.trial import Outcome
from tests.support.processes import REPOSITORY

INPUTS = 3000
SEED = 7


def readers() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("reader", READERS.values(), ids=lambda reader: reader.name)


@readers()
def test_whatever_comes_in_is_read_or_refused_with_a_typed_error(reader: Reader) -> None:
    outcome = trial.run(reader, INPUTS, SEED)
    assert outcome.findings == {}
    assert outcome.tried >= INPUTS


@readers()
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_inputs_that_hypothesis_makes_are_read_or_refused(reader: Reader, data: st.DataObject) -> None:
    start = data.draw(st.sampled_from(reader.corpus))
    at, end = (data.draw(st.integers(0, len(start))) for _ in range(2))
    outcome = Outcome()
    trial.try_input(reader, start[:at] + data.draw(st.binary(max_size=20)) + start[end:], outcome)
    assert outcome.findings == {}


async def test_a_running_worker_answers_every_request_whatever_it_is_sent() -> None:
    outcome = await worker.run(1500, SEED)
    assert outcome.findings == {}
    assert outcome.tried == 1500


# -- the instruments -------------------------------------------------------------------------------------------------


def _breaks(given: bytes) -> None:
    if b"!" in given:
        raise LookupError("a finding")
    if b"#" in given:
        bytes(2**26 + 2**20)
    raise CannotDecode("an input", "it is bad")


BROKEN = Reader("broken", [b"what is this?" * 20], _breaks)


def test_another_exception_is_a_finding_and_is_made_as_short_as_it_can_be() -> None:
    outcome = Outcome()
    for text in (b"fine", b"a long text with ! in it", b"! here"):
        trial.try_input(BROKEN, text, outcome)
    ((problem, text),) = outcome.findings.items()
    assert (text, outcome.read, outcome.refused) == (b"! here", 0, 3)
    assert problem.startswith("LookupError at test_fuzz_readers.py:")
    assert trial.shortened(BROKEN, text, problem) == b"!"


def test_too_much_memory_is_a_finding() -> None:
    outcome = Outcome()
    trial.try_input(BROKEN, b"#", outcome, with_memory=True)
    assert list(outcome.findings) == ["it takes too much memory"]


def test_too_much_time_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_SECONDS_AT_MOST", -1.0)
    outcome = Outcome()
    trial.try_input(BROKEN, b"", outcome)
    assert list(outcome.findings) == ["it takes too long"]


def test_the_same_seed_makes_the_same_inputs_and_another_one_others() -> None:
    corpus = READERS["envelope"].corpus
    inputs = [[Mutator(seed, corpus).input() for _ in range(1)] for seed in ("1", "1", "2")]
    many = [[mutator.input() for _ in range(300)] for mutator in (Mutator("1", corpus), Mutator("1", corpus))]
    assert inputs[0] == inputs[1] != inputs[2]
    assert many[0] == many[1]
    assert len(set(many[0])) > 200
    assert max(map(len, many[0])) <= LONGEST


def test_an_input_is_taken_apart_as_it_was_joined() -> None:
    assert parts(joined("a.b", {"X": "y"}, b"body\n")) == ("a.b", {"X": "y"}, b"body\n")
    assert parts(joined("a.b", None, b"body")) == ("a.b", None, b"body")
    assert headers_of(b"NATS/1.0 503" + HEADERS_END) == {"Status": "503"}


def test_the_command_exits_with_0_if_nothing_breaks(tmp_path: object) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "chain", "--inputs", "10"]
    wrong = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "there are envelope, subject" in wrong.stderr
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "entry",
        "server_error",
        "--inputs",
        "200",
        "--seed",
        "3",
        "--no-save",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("seed 3\nentry")
    assert "no findings" in done.stdout


# -- what it found ---------------------------------------------------------------------------------------------------


def test_the_traceback_of_an_exception_can_be_shown_whatever_a_worker_has_sent_as_its_fields() -> None:
    wrong = b'"text":["x"],"offset":"1","end_offset":99999999999,"lineno":{}'
    data = b'{"type":"builtins.SyntaxError","message":"bad","fields":{"filename":"x.py",%b}}' % wrong
    error = ErrorTypes().rebuild(data, agent=None, worker_id=None)
    assert isinstance(error, SyntaxError)
    assert (error.filename, error.text, error.offset, error.end_offset, error.lineno) == ("x.py", *[None] * 4)


def test_an_import_error_names_nothing_that_showing_it_would_import() -> None:
    data = b'{"type":"builtins.ImportError","message":"no","fields":{"name":"antigravity","name_from":"x"}}'
    error = ErrorTypes().rebuild(data, agent=None, worker_id=None)
    assert isinstance(error, ImportError)
    assert error.name == "antigravity"
    assert getattr(error, "name_from", None) is None
