"""``natsrt reminders``: what agents are reminded of."""

from __future__ import annotations

import asyncio

import click

from natsrt import Reminder

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .naming import agent_id
from .naming import agent_type as checked_type
from .output import as_json as print_json
from .output import json_option, note, table
from .suggesting import Commands


@click.group(cls=Commands)
def reminders() -> None:
    """Show and remove reminders: messages that agents get at times that were set before."""


# -- ls ----------------------------------------------------------------------------------------------------------


@reminders.command()
@click.argument("agent", metavar="[TYPE[/KEY]]", required=False)
@json_option
@connects()
def ls(connecting: Connecting, agent: str | None, as_json: bool) -> None:
    """List the reminders that are set: of one agent, of one agent type, or of all."""

    async def run() -> list[Reminder]:
        asked = None if agent is None else agent_id(agent) if "/" in agent else checked_type(agent)
        async with connecting.runtime() as runtime:
            return await runtime.reminders(asked)

    found = asyncio.run(run())
    if as_json:
        print_json(
            [
                {
                    "type": one.agent.type,
                    "key": one.agent.key,
                    "name": one.name,
                    "schedule": one.schedule,
                    "timezone": one.timezone,
                    "message_type": one.message_type,
                    "set_at": one.set_at,
                }
                for one in found
            ]
        )
    elif found:
        rows = [
            (
                str(one.agent),
                one.name,
                one.schedule if one.timezone is None else f"{one.schedule} {one.timezone}",
                one.message_type or "-",
                one.set_at.isoformat(timespec="seconds"),
            )
            for one in found
        ]
        table(("AGENT", "NAME", "SCHEDULE", "MESSAGE", "SET"), rows)
    else:
        note("no reminder is set")


# -- rm ----------------------------------------------------------------------------------------------------------


@reminders.command()
@click.argument("agent", metavar="TYPE/KEY")
@click.argument("name")
@connects()
def rm(connecting: Connecting, agent: str, name: str) -> None:
    """Remove a reminder. Exits with 1 if the agent has none with this name."""

    async def run() -> bool:
        of_agent = agent_id(agent)
        async with connecting.runtime() as runtime:
            try:
                return await runtime.forget_reminder(of_agent, name)
            except ValueError as error:
                raise CommandFailed(str(error), Exit.USAGE) from None

    if not asyncio.run(run()):
        raise CommandFailed(f"{agent} has no reminder {name!r}; natsrt reminders ls {agent} lists those that it has")
    note(f"removed the reminder {name!r} of {agent}")
