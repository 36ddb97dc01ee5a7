"""``natsrt doctor``: what is wrong, and what to do.

Nothing is changed, and nobody is disturbed: what is published to try a permission is delivered to nobody
(``Nats-Trace-Only``) or refused by the stream (an impossible expected sequence).
"""

from __future__ import annotations

import asyncio
import logging
import platform
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from typing import Any, Literal

import click
import nats.errors
import nats.js.errors
import orjson
from nats.js import api
from nats.nuid import NUID

from natsrt.errors import NatsrtError, PermissionDenied
from natsrt.jetstream.agent_bucket import AGENTS_BUCKET
from natsrt.jetstream.agent_records import AgentRecords
from natsrt.jetstream.registry.bucket import REGISTRY_BUCKET, RegistryBucket
from natsrt.jetstream.registry.entries import HEARTBEAT, WorkerEntry
from natsrt.jetstream.registry.follow import Follower
from natsrt.jetstream.registry.view import View
from natsrt.options import Options
from natsrt.transport.connection import Connection
from natsrt.transport.probe import TRACE_DEST, TRACE_ONLY
from natsrt.version import VERSION
from natsrt.wire.subjects import Subjects

from .agents import gather_answers
from .connecting import Connecting, connects
from .exits import Exit
from .health import judge, read_json
from .output import as_json as print_json
from .output import json_option, line, table
from .owners import Survey

Level = Literal["ok", "warning", "problem", "skipped"]

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}
_OLDEST_SERVER = (2, 11)
_RECOMMENDED_PAYLOAD = 1024 * 1024
_WARNED_PAYLOAD = 8 * 1024 * 1024
_SLOW_ROUND_TRIP_MS = 100.0
_CLOCK_TOLERANCE = 2.0
_LONGEST_EVICTION = 10.0
_REQUEST_SECONDS = 2.0
_LIST_AT_MOST = 5
_NEVER_STORED = {"Nats-Expected-Last-Sequence": str(2**63)}
"""Headers with which a stream refuses a message."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``advice`` says what to do; empty where there is nothing to do."""

    check: str
    level: Level
    text: str
    advice: str = ""


@dataclass(slots=True)
class _Patient:
    """What is examined, and what was found."""

    connection: Connection
    options: Options
    subjects: Subjects
    findings: list[Finding] = field(default_factory=list)
    denied: set[tuple[str, str]] = field(default_factory=set)

    def found(self, check: str, level: Level, text: str, advice: str = "") -> None:
        self.findings.append(Finding(check, level, text, advice))

    @property
    def stream(self) -> str:
        return f"KV_{self.subjects.bucket(REGISTRY_BUCKET)}"

    async def request(self, subject: str) -> dict[str, Any] | None:
        """The JSON answer to an empty request; None without one."""
        try:
            reply = await self.connection.client.request(subject, b"", timeout=_REQUEST_SECONDS)
            answer = orjson.loads(reply.data)
        except (nats.errors.Error, TimeoutError, orjson.JSONDecodeError):
            return None
        return answer if isinstance(answer, dict) else None


@click.command()
@click.option("--monitor-url", metavar="URL", help="The server's monitoring pages, such as http://127.0.0.1:8222.")
@click.option(
    "--health-url",
    "health_urls",
    metavar="URL",
    multiple=True,
    help="A worker's --health-port, such as http://127.0.0.1:8080; may be given for several.",
)
@json_option
@connects("error")
def doctor(connecting: Connecting, monitor_url: str | None, health_urls: tuple[str, ...], as_json: bool) -> int:
    """Find out what is wrong, and what to do.

    Checks connection, versions, JetStream, permissions, clock, registry, keyed agents, server settings, and what
    workers say of their health.

    Exits with 7 if there is a problem; warnings alone are 0.
    """
    logging.getLogger("natsrt.connection").setLevel(logging.CRITICAL)  # what it warns of is among the findings
    findings = asyncio.run(examine(connecting.options(), monitor_url, health_urls))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        rows = [(f.check, f.level, f.text + (f"\n→ {f.advice}" if f.advice else "")) for f in findings]
        table(("CHECK", "RESULT", "FINDING"), rows, _STYLES)
        problems = sum(finding.level == "problem" for finding in findings)
        line("\nno problems" if not problems else f"\n{problems} problem{'s' if problems > 1 else ''}")
    return Exit.PROBLEMS if any(finding.level == "problem" for finding in findings) else Exit.OK


async def examine(options: Options, monitor_url: str | None, health_urls: Sequence[str]) -> list[Finding]:
    """All checks. Those that need what an earlier one missed are left out."""
    connection = Connection(options, client_name="natsrt doctor")
    patient = _Patient(connection, options, Subjects(options.namespace))
    connection.on_denied(lambda denied: patient.denied.add((denied.operation, denied.subject.lower())))
    for url in health_urls:  # whether or not there is a server
        for level, text, advice in await asyncio.to_thread(judge, url):
            patient.found("health", level, text, advice)
    try:
        await connection.open()
    except PermissionDenied as error:
        patient.found("connection", "problem", str(error), "check --creds, --user and --password, --token or --nkey")
        return patient.findings
    except NatsrtError as error:
        patient.found("connection", "problem", str(error))
        return patient.findings
    try:
        await _check_connection(patient)
        _check_versions(patient)
        _check_payload(patient)
        await _check_clock(patient)
        await _check_permissions(patient)
        if await _check_jetstream(patient):
            await _check_registry(patient)
        await _check_server_settings(patient, monitor_url)
    finally:
        await connection.close()
    return patient.findings


# -- connection, versions, payload, clock ------------------------------------------------------------------------


async def _check_connection(patient: _Patient) -> None:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        await patient.connection.barrier()
        times.append((time.perf_counter() - begun) * 1000)
    text = f"{patient.connection.server}, round trip {min(times):.1f} ms"
    if min(times) > _SLOW_ROUND_TRIP_MS:
        patient.found("connection", "warning", text, "the server is far away: each call takes at least twice that")
    else:
        patient.found("connection", "ok", text)


def _check_versions(patient: _Patient) -> None:
    server = patient.connection.client.connected_server_version
    if (server.major, server.minor) < _OLDEST_SERVER:
        patient.found(
            "server version",
            "problem",
            f"nats-server {server.major}.{server.minor}.{server.patch}",
            f"natsrt needs {_OLDEST_SERVER[0]}.{_OLDEST_SERVER[1]} or later, for messages that expire one by one and "
            "for message tracing: update the server",
        )
    else:
        patient.found("server version", "ok", f"nats-server {server.major}.{server.minor}.{server.patch}")
    packages = ", ".join(f"{package} {version(package)}" for package in ("nats-py", "autogen-core"))
    patient.found("client versions", "ok", f"natsrt {VERSION}, {packages}, Python {platform.python_version()}")


def _check_payload(patient: _Patient) -> None:
    size = patient.connection.max_payload
    text = f"the largest message is {size:,} bytes"
    if size < _RECOMMENDED_PAYLOAD:
        patient.found("max_payload", "warning", text, "set max_payload: 1MB in nats.conf, nats-server's own default")
    elif size > _WARNED_PAYLOAD:
        advice = "nats-server advises against more than 8MB: one large message holds up all others of a connection"
        patient.found("max_payload", "warning", text, advice)
    else:
        patient.found("max_payload", "ok", text)


async def _check_clock(patient: _Patient) -> None:
    """The server's time is in its answer about the user, which needs no system account."""
    before = time.time()
    answer = await patient.request("$SYS.REQ.USER.INFO")
    here = (before + time.time()) / 2
    told = (answer or {}).get("server") or {}
    if "time" not in told:
        patient.found("clock", "skipped", "the server's clock cannot be seen", "allow publishing to $SYS.REQ.USER.INFO")
        return
    offset = datetime.fromisoformat(told["time"]).timestamp() - here
    text = f"the server's clock is {abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} this machine's"
    if abs(offset) > _CLOCK_TOLERANCE:
        advice = "set both by NTP: natsrt works all the same, but times in traces and tables do not fit together"
        patient.found("clock", "warning", text, advice)
    else:
        patient.found("clock", "ok", text)


# -- permissions -------------------------------------------------------------------------------------------------


async def _check_permissions(patient: _Patient) -> None:
    """Try what callers and what workers need. The server answers each violation, in order, before a round trip."""
    subjects, nonce = patient.subjects, f"doctor-{NUID().next().decode()}"
    agent, worker, topic = subjects.agent(nonce), subjects.worker(nonce), subjects.topic(nonce, nonce)
    inbox = f"{patient.options.inbox_prefix}.{nonce}"
    # Where somebody may listen, only the report of the trace is delivered: to a subject where nobody does.
    unseen = {TRACE_DEST: agent, TRACE_ONLY: "true"}
    to_call = await _refused(
        patient,
        publish={agent: {}, worker: {}},
        subscribe={f"{inbox}.*": "", subjects.cancel: "", f"{subjects.registry_feed}.>": ""},
    )
    to_call += await _refused(patient, publish={topic: unseen, subjects.cancel: unseen}, subscribe={})
    if to_call:
        advice = "without these no natsrt program works: see the users in nats.conf"
        patient.found("permission to call", "problem", f"refused: {', '.join(to_call)}", advice)
    else:
        patient.found("permission to call", "ok", "calls, events and the registry's changes")
    queue = subjects.queue(nonce)
    to_host = await _refused(
        patient,
        publish={inbox: {}, f"$KV.{subjects.bucket(REGISTRY_BUCKET)}.{HEARTBEAT}.{nonce}": _NEVER_STORED},
        subscribe={
            agent: queue,
            subjects.type_filter(nonce).subject: queue,
            worker: "",
            subjects.control(nonce): queue,
            "$SRV.PING": "",
        },
    )
    if to_host:
        text = f"refused: {', '.join(to_host)}"
        patient.found("permission to host", "warning", text, "a user who hosts agents needs these: see nats.conf")
    else:
        patient.found("permission to host", "ok", "agents, topics, control, heartbeats and monitoring")


async def _refused(patient: _Patient, *, publish: dict[str, dict[str, str]], subscribe: dict[str, str]) -> list[str]:
    """What the server refuses of these: subjects to publish to with headers, and to subscribe to in queue groups."""
    patient.denied.clear()
    connection = patient.connection
    interests = [
        await connection.subscribe(subject, lambda _: None, queue=queue) for subject, queue in subscribe.items()
    ]
    try:
        for subject, headers in publish.items():
            await connection.publish(subject, b"", headers=dict(headers) or None)
        await connection.barrier()
    finally:
        for interest in interests:
            await connection.unsubscribe(interest)
    tried = [("publish to", subject) for subject in publish] + [("subscribe to", subject) for subject in subscribe]
    return [f"{operation} {subject}" for operation, subject in tried if (operation, subject.lower()) in patient.denied]


# -- JetStream and the registry ----------------------------------------------------------------------------------


async def _check_jetstream(patient: _Patient) -> bool:
    """Whether there is JetStream."""
    problem: str
    patient.denied.clear()
    try:
        async with asyncio.timeout(_REQUEST_SECONDS):
            account = await patient.connection.jetstream.account_info()
    except nats.js.errors.APIError as error:
        problem = error.description or "JetStream is not enabled"
    except (nats.errors.Error, TimeoutError) as error:
        problem = str(error) or "JetStream does not answer"
    else:
        _found_storage(patient, account)
        return True
    if any(subject.startswith("$js.") for _, subject in patient.denied):
        patient.found("JetStream", "problem", "this user may not ask for it", "allow publishing to $JS.API.INFO")
    else:
        advice = "start the server with `nats-server -js` or add a `jetstream` block to nats.conf, where natsrt keeps "
        patient.found(
            "JetStream", "problem", problem, f"{advice}its registry; in an account of its own, enable it there"
        )
    return False


def _found_storage(patient: _Patient, account: api.AccountInfo) -> None:
    limit, used = account.limits.max_storage, account.storage
    text = f"enabled; {used:,} bytes stored" + (f" of {limit:,}" if limit > 0 else "")
    if 0 < limit < used * 10 / 9:
        patient.found("JetStream", "warning", text, "the account's storage is nearly full: raise max_store")
    else:
        patient.found("JetStream", "ok", text)


async def _check_registry(patient: _Patient) -> None:
    bucket = patient.subjects.bucket(REGISTRY_BUCKET)
    patient.denied.clear()
    try:
        info = await patient.connection.jetstream.stream_info(patient.stream)
    except nats.js.errors.NotFoundError:
        patient.found("registry", "ok", f"the bucket {bucket} is not there yet: the first natsrt program makes it")
        return
    except (nats.errors.Error, TimeoutError) as error:
        _found_registry_problem(patient, str(error) or "no answer")
        return
    _check_bucket(patient, bucket, info)
    try:
        async with _read_registry(patient) as (view, stored):
            patient.found(
                "registry",
                "ok",
                f"{len(view.workers)} live workers, {len(view.hosts)} hosted agent types, "
                f"{len({*view.known} - {*view.hosts})} known without a worker",
            )
            await _check_workers(patient, view, stored)
            await _check_keyed_agents(patient, view)
    except NatsrtError as error:
        _found_registry_problem(patient, str(error))


def _found_registry_problem(patient: _Patient, text: str) -> None:
    refused = ", ".join(sorted(f"{operation} {subject}" for operation, subject in patient.denied))
    advice = (
        f"allow this user to {refused}" if refused else "look at `nats stream info` for it, and at the server's log"
    )
    patient.found("registry", "problem", f"{patient.stream} cannot be read: {text}", advice)


def _check_bucket(patient: _Patient, bucket: str, info: api.StreamInfo) -> None:
    config = info.config
    missing = [
        name
        for name, there in (
            ("republish", config.republish is not None),
            ("allow_direct", config.allow_direct),
            ("allow_msg_ttl", config.allow_msg_ttl),
        )
        if not there
    ]
    if missing:
        advice = f"`nats kv del {bucket}` while no worker runs; the next one makes it as it must be"
        patient.found("registry bucket", "problem", f"{bucket} is without {', '.join(missing)}", advice)
        return
    replicas = config.num_replicas or 1
    text = f"{bucket}, {info.state.messages:,} entries, {replicas} replica{'s' if replicas > 1 else ''}"
    if replicas == 1 and len(patient.connection.client.servers) > 1:
        advice = (
            f"it is lost with its server: `nats stream edit {patient.stream} --replicas 3`, and set registry_replicas"
        )
        patient.found("registry bucket", "warning", text, advice)
    else:
        patient.found("registry bucket", "ok", text)


@asynccontextmanager
async def _read_registry(patient: _Patient) -> AsyncIterator[tuple[View, RegistryBucket]]:
    """The registry as a runtime sees it, and its bucket. Unlike a runtime, this removes no dead workers."""
    bucket = RegistryBucket(patient.connection, patient.subjects, patient.options)
    follower = Follower(patient.connection, bucket, patient.options)
    await follower.open()
    try:
        yield follower.view, bucket
    finally:
        await follower.close()


async def _check_workers(patient: _Patient, view: View, stored: RegistryBucket) -> None:
    workers = dict(view.workers)
    if not workers:
        return
    answers = await gather_answers(patient.connection, patient.options, "PING", workers)
    healthy = 0
    for worker_id, worker in sorted(workers.items()):
        beats, answered = await stored.has_heartbeat(worker_id), worker_id in answers
        healthy += beats and answered
        if not beats or not answered:
            patient.found("worker", *_diagnosis(worker, beats, answered))
    if healthy:
        patient.found("workers", "ok", f"{healthy} of {len(workers)} have a heartbeat and answer")


def _diagnosis(worker: WorkerEntry, beats: bool, answered: bool) -> tuple[Level, str, str]:
    who = f"{worker.worker_id} (process {worker.pid} on {worker.hostname})"
    if answered:
        advice = f"its user must be allowed to publish to $KV.….{HEARTBEAT}.>; look at its log"
        return "problem", f"{who} answers, but has no heartbeat", advice
    if beats:
        advice = "it stopped, froze or was killed a moment ago, or may not subscribe to $SRV.PING; look again in 10 s"
        return "warning", f"{who} has a heartbeat, but does not answer", advice
    return "warning", f"{who} is stale: no heartbeat and no answer", "any natsrt program removes its entries"


# -- keyed agents ------------------------------------------------------------------------------------------------


async def _check_keyed_agents(patient: _Patient, view: View) -> None:
    """Who owns them, and whether their records can be read. States are not read: there may be gigabytes."""
    bucket = patient.subjects.bucket(AGENTS_BUCKET)
    patient.denied.clear()
    try:
        await patient.connection.jetstream.stream_info(f"KV_{bucket}")
        survey = await Survey.of(AgentRecords(patient.connection, patient.subjects, patient.options))
    except nats.js.errors.NotFoundError:
        if view.keyed:
            text = f"the bucket {bucket} is gone, with what was stored: {', '.join(sorted(view.keyed))} start anew"
            patient.found("keyed agents", "problem", text, "restore it: `natsrt state import` stores an export again")
        return
    except (NatsrtError, nats.errors.Error, TimeoutError) as error:
        refused = ", ".join(sorted(subject for _, subject in patient.denied))
        advice = f"to see them, this user must be allowed to publish to {refused}" if refused else ""
        patient.found("keyed agents", "warning", f"{bucket} cannot be read: {error}", advice)
        return
    text = f"records: {survey.agents:,}; states: {survey.with_state:,} of {survey.state_bytes:,} bytes in all"
    patient.found("keyed agents", "ok", text)
    if gone := survey.owned_by_others_than(view.workers):
        owners = ", ".join(f"{worker_id} ({count:,})" for worker_id, count in gone.most_common(_LIST_AT_MOST))
        advice = "the next message for each moves it to a live worker; what its owner had not stored is lost"
        patient.found("keyed agents", "warning", f"owned by workers that are gone: {owners}", advice)
    if survey.damaged:
        text = "; ".join(str(error) for error in survey.damaged[:_LIST_AT_MOST])
        advice = (
            "calls to these agents fail: store a state anew with `natsrt state set --force`, or delete them with "
            f"`natsrt state rm --force`, or by their keys with `nats kv del {bucket}`"
        )
        patient.found("keyed agents", "problem", f"damaged: {len(survey.damaged):,}: {text}", advice)


# -- server settings ---------------------------------------------------------------------------------------------


async def _check_server_settings(patient: _Patient, monitor_url: str | None) -> None:
    if monitor_url is None:
        text = "ping_interval and ping_max cannot be seen by a client"
        patient.found("server settings", "skipped", text, "give --monitor-url, if the server has monitoring pages")
        return
    url = f"{monitor_url.rstrip('/')}/varz"
    try:
        settings = await asyncio.to_thread(read_json, url, _REQUEST_SECONDS)
        interval, pings = settings["ping_interval"] / 1e9, settings["ping_max"]
        store_dir = (settings.get("jetstream", {}).get("config") or {}).get("store_dir", "")
    except (OSError, ValueError, LookupError, TypeError) as error:
        patient.found("server settings", "warning", f"{url} cannot be read: {error}", "check --monitor-url")
        return
    text = f"a frozen worker is sent messages for up to {interval * (pings + 1):g} s"
    if interval * (pings + 1) > _LONGEST_EVICTION:
        advice = "set ping_interval: 1s and ping_max: 2 in nats.conf: calls to a frozen worker fail for that long"
        patient.found("server settings", "warning", text, advice)
    else:
        patient.found("server settings", "ok", text)
    if store_dir.startswith("/tmp/"):
        advice = "set jetstream { store_dir } in nats.conf: what is below /tmp is lost at a reboot"
        patient.found("server settings", "warning", f"JetStream stores in {store_dir}", advice)
