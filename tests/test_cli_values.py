"""Values of options that no command can use: a line that says so, and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import pytest
from autogen_core import TopicId
from natsrt_cli.moments import Duration, Moment, Time, due
from natsrt_cli.naming import TOPIC_PREFIX

from natsrt.wire.times import FIRST, LAST
from tests.programs import odd_values
from tests.support.cli import natsrt
from tests.support.processes import REPOSITORY, Processes
from tests.test_dead_letters import TOPIC, Desk, Job, Place, place

__all__ = ["place"]

FAR = "5000000d"
"""A duration that began before the times that servers know, and before Python's."""
BEYOND = "99999999999999999999"
"""More than 64 bits."""


@pytest.mark.parametrize("value", ["1e300", "nan", "inf", "-1", BEYOND])
def test_every_number_duration_and_time_of_every_command_is_checked(value: str) -> None:
    """What has some of these values for a reason is in the program."""
    command = [sys.executable, "-m", odd_values.__name__, value]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60.0, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) > 60 and {"publish", "submit", "replay", "tail", "dlq", "topics"} <= {
        result["line"][0] for result in results
    }
    for result in results:
        assert (result["code"], result["raised"]) == (2, None), result
        assert value in result["printed"] and "Traceback" not in result["printed"], result


@pytest.mark.parametrize("command", [("ls",), ("redrive",), ("export",), ("rm", "--yes")])
@pytest.mark.parametrize("name", ["a b", "", "a:b"])
async def test_dead_letters_of_what_is_no_agent_type_are_not_looked_for(command: tuple[str, ...], name: str) -> None:
    refused = await natsrt("dlq", *command, "--type", name)
    assert (refused.code, refused.stdout) == (2, "")
    assert f"{name!r} is not an agent type" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--agents", "a b", "'a b' is not an agent type"),
        ("--topics", "a b", "no topic type can start with 'a b'"),
        ("--inbox", ">", "--inbox '>' must be subject tokens"),
        ("--inbox", "topic.x", "--inbox 'topic.x' must not be 'topic.x': natsrt's own subjects"),
    ],
)
async def test_what_nothing_can_pass_on_is_not_recorded(option: str, value: str, said: str) -> None:
    refused = await natsrt("record", "--to", "x", option, value)
    assert (refused.code, refused.stdout) == (2, "")
    assert said in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("command", [("publish", "orders.new"), ("submit", "writer")])
@pytest.mark.parametrize(
    ("when", "said"),
    [
        (
            ("--delay", "1e10"),
            "'1e10' is not a duration such as 60, 90s or 5m, a number of seconds greater than 0",
        ),
        (("--delay", "8e9"), "--delay must end by 2262-04-11T00:00:00Z, the last time that servers know"),
        (("--at", "2300-01-01T00:00:00Z"), "--at must be 2262-04-11T00:00:00Z at the latest"),
        (("--at", "2300-01-01"), "'2300-01-01' has no time zone"),
        (("--at", "soon"), "'soon' is not a time such as"),
        (("--at", "2100-01-01T00:00:00Z", "--delay", "1h"), "give --delay or --at, not both"),
    ],
)
async def test_times_that_servers_do_not_know_are_refused(
    command: tuple[str, ...], when: tuple[str, ...], said: str
) -> None:
    refused = await natsrt(*command, "{}", *when)
    assert (refused.code, refused.stdout) == (2, "")
    assert said in refused.stderr and "Traceback" not in refused.stderr


def test_durations_may_have_units_of_days_and_weeks() -> None:
    given = {"60": 60.0, "90s": 90.0, "1h30m": 5400.0, "250ms": 0.25, "7d": 7 * 86400.0, "1w": 7 * 86400.0, "1us": 1e-6}
    assert {text: Duration().convert(text, None, None) for text in given} == given
    for wrong in ("", "0", "0s", "-1s", "soon", "5 parsecs", "9" * 400 + "d", "9" * 400):
        with pytest.raises(click.BadParameter, match="is not a duration such as"):
            Duration().convert(wrong, None, None)
    with pytest.raises(click.BadParameter, match="a number of seconds from 5 to"):
        Duration(5).convert("4s", None, None)


def test_moments_are_cut_to_the_times_that_servers_know() -> None:
    moment = Moment()
    for past in (FAR, "9" * 400 + "d", "0001-01-01", "0001-01-01T00:00:00+14:00", "1969-01-01"):
        assert moment.convert(past, None, None) == FIRST.timestamp()
    for future in ("2300-01-01", "9999-12-31T23:59:59-12:00"):
        assert moment.convert(future, None, None) == LAST.timestamp()
    ago = datetime.now(UTC) - timedelta(hours=1)
    assert moment.convert("1h", None, None) == pytest.approx(ago.timestamp(), abs=30.0)


def test_a_time_is_due_as_it_was_given() -> None:
    at = Time().convert("2100-01-01T09:00:00+01:00", None, None)
    assert due(None, at) == datetime(2100, 1, 1, 8, tzinfo=UTC)
    assert due(None, None) is None
    assert TOPIC_PREFIX.convert("news.*", None, None) == "news."


async def test_there_is_no_dead_letter_with_an_id_that_no_stream_can_have(place: Place) -> None:
    await place.worker(Desk(), "jobs")
    for command in ("show", "redrive", "rm"):
        for number in (BEYOND, str(2**64), str(2**64 - 1)):
            ended = await place.run("dlq", command, number)
            assert (ended.code, f"there is no dead letter {number}" in ended.stderr) == (4, True), ended


async def test_history_can_begin_at_any_time(place: Place, processes: Processes) -> None:
    desk = Desk(broken=False)
    worker = await place.worker(desk, "jobs")
    for number in range(3):
        await worker.publish_message(Job(number), TOPIC)
    for since in (FAR, "0001-01-01"):
        shown = await place.run("tail", "--since", since, "--count", "3", "--json")
        assert [json.loads(line)["sequence"] for line in shown.stdout.splitlines()] == [1, 2, 3]
        replayed = await place.run("replay", "work.", "--to", "jobs", "--since", since, "--until", "0001-01-02")
        assert (replayed.code, "replayed: 0 events" in replayed.stderr) == (0, True)
    replayed = await place.run("replay", "work.", "--to", "jobs", "--since", FAR)
    assert (replayed.code, "replayed: 3 events" in replayed.stderr) == (0, True)
    for moment in ("2300-01-01", "9999-12-31"):
        replayed = await place.run("replay", "work.", "--to", "jobs", "--since", moment)
        assert (replayed.code, "replayed: 0 events" in replayed.stderr) == (0, True)
    connection: Any = ("--server", place.server.url, "--namespace", place.namespace)
    tail = processes.natsrt("tail", "--since", "2300-01-01", "--json", *connection)
    await tail.wait_for_line("listening on")
    await worker.publish_message(Job(8), TOPIC)
    await worker.publish_message(Job(9), TopicId("not.durable", "s"))
    await tail.wait_for_line('"number":9')
    assert '"sequence"' not in tail.stdout
