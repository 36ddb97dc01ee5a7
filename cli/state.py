"""``natsrt state``: the stored states of keyed agents."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import IO, Any

import click
import orjson
from autogen_core import AgentId

from natsrt.agents.control import SAVE_STATE
from natsrt.errors import CannotDecode
from natsrt.jetstream.agent_records import Record, RecordChanged

from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .naming import agent_id
from .output import as_json as print_json
from .output import json_option, line, note, table
from .owner_finder import OwnerFinder, Standing, saved_at
from .storing import (
    TRIES,
    encoded,
    find,
    force_option,
    parsed,
    put,
    refuse_nothing,
    refuse_restless,
    refuse_silence,
    state_of,
    stored_states,
)
from .suggesting import Commands
from .transfer import export, import_


@click.group(cls=Commands)
def state() -> None:
    """Show and change the stored states of keyed agents."""


state.add_command(export)
state.add_command(import_)


# -- ls ----------------------------------------------------------------------------------------------------------


@state.command()
@click.argument("agent_type", metavar="[TYPE]", required=False)
@json_option
@connects()
def ls(connecting: Connecting, agent_type: str | None, as_json: bool) -> int:
    """List the stored states, of one agent type or of all.

    Exits with 7 if a record cannot be read.
    """

    async def run() -> tuple[list[Record], list[CannotDecode]]:
        async with connecting.runtime() as runtime:
            runtime.running.records.only_read()
            return await stored_states(runtime.running.records, agent_type)

    stored, damaged = asyncio.run(run())
    if as_json:
        print_json(
            [
                {
                    "type": record.agent.type,
                    "key": record.agent.key,
                    "size_bytes": record.size,
                    "saved_at": saved_at(record),
                    "owner": record.owner,
                }
                for record in stored
            ]
        )
    elif stored:
        rows = [(str(record.agent), record.size, saved_at(record), record.owner or "-") for record in stored]
        table(("AGENT", "BYTES", "SAVED", "OWNER"), rows)
    else:
        note("no state is stored")
    for error in damaged:
        note(f"natsrt: {error}")
    return Exit.PROBLEMS if damaged else Exit.OK


# -- get ---------------------------------------------------------------------------------------------------------


@state.command()
@click.argument("agent", metavar="TYPE/KEY")
@click.option("--live", is_flag=True, help="Ask the worker that has the agent, instead of reading the stored state.")
@connects()
def get(connecting: Connecting, agent: str, live: bool) -> None:
    """Print the stored state of an agent, as JSON.

    A live agent may have a newer state: the options of its type say when the state is stored. Exits with 4 if nothing
    is stored, or, with --live, if no worker has the agent.
    """
    content = asyncio.run(_get(connecting, agent_id(agent), live))
    line(content.decode("utf-8", "backslashreplace"))


async def _get(connecting: Connecting, agent: AgentId, live: bool) -> bytes:
    async with connecting.runtime(call_timeout=connecting.timeout) as runtime:
        if live:
            return await _get_live(OwnerFinder(runtime), agent)
        records = runtime.running.records
        records.only_read()
        record = await records.read(agent)
        content = None if record is None else await state_of(records, record)
        if content is None:
            refuse_nothing(agent)
        return content


async def _get_live(owners: OwnerFinder, agent: AgentId) -> bytes:
    found = await owners.find(agent)
    if found.record is None or found.record.owner is None or found.is_free:
        raise CommandFailed(f"no worker has {agent}; run it without --live to see the stored state", Exit.UNKNOWN_AGENT)
    refuse_silence(found, "run it without --live to see the stored state")
    return orjson.dumps(await owners.ask(agent, found.record.owner, SAVE_STATE))


# -- set ---------------------------------------------------------------------------------------------------------


class _StateFile(click.File):
    """A file to read. The error for JSON in the place of a file name says where JSON may be given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")) and not Path(value).exists():
            self.fail("give a file, or - and the JSON on standard input", param, ctx)
        return super().convert(value, param, ctx)


@state.command("set")
@click.argument("agent", metavar="TYPE/KEY")
@click.argument("file", metavar="FILE|-", type=_StateFile("rb"))
@force_option
@connects()
def set_(connecting: Connecting, agent: str, file: IO[bytes], force: bool) -> None:
    """Replace the state of an agent with a JSON object.

    If a worker has the agent, that worker loads and stores the state. If it does not answer or refuses, --force stores
    the state directly; the worker notices when it next stores or reads the state, and drops its instance.

    \b
    natsrt state set counter/k backup.json
    echo '{"value": 7}' | natsrt state set counter/k -
    """
    try:
        content = encoded(parsed(file.read()))
    except ValueError as error:
        raise CommandFailed(f"{file.name}: {error}", Exit.USAGE) from None
    note(asyncio.run(_set(connecting, agent_id(agent), content, force)))


async def _set(connecting: Connecting, agent: AgentId, content: bytes, force: bool) -> str:
    async with connecting.runtime(call_timeout=connecting.timeout) as runtime:
        through = await put(runtime.running.records, OwnerFinder(runtime), agent, content, force=force)
    how = f", through its owner {through}" if through is not None else ""
    return f"stored {len(content):,} bytes as the state of {agent}{how}"


# -- rm ----------------------------------------------------------------------------------------------------------


@state.command()
@click.argument("agent", metavar="TYPE/KEY")
@click.option("--force", is_flag=True, help="Delete it even if a worker has the agent or the record cannot be read.")
@connects()
def rm(connecting: Connecting, agent: str, force: bool) -> None:
    """Delete the stored state of an agent.

    If a worker has the agent, --force is needed; the worker notices when it next stores the state, and drops its
    instance. Exits with 4 if nothing is stored.
    """
    note(asyncio.run(_remove(connecting, agent_id(agent), force)))


async def _remove(connecting: Connecting, agent: AgentId, force: bool) -> str:
    async with connecting.runtime() as runtime:
        owners = OwnerFinder(runtime)
        for _ in range(TRIES):
            found = await find(owners, agent, force=force)
            if found.record is None:
                refuse_nothing(agent)
            if not force:
                refuse_silence(found, "--force deletes the state without the owner")
                if found.standing is Standing.HOLDS:
                    raise CommandFailed(f"worker {found.record.owner} has {agent}: stop it first, or use --force")
            try:
                await runtime.running.records.remove(found.record)
            except RecordChanged:
                continue
            return f"deleted the stored state of {agent}: {found.record.size:,} bytes"
    refuse_restless(agent)
