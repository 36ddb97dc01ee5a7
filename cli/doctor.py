"""``natsrt doctor``: checks an installation and suggests what to do.

It changes nothing and disturbs no agent. A message that is published to test a permission is not delivered
(``Nats-Trace-Only``), or the stream refuses it (an impossible expected sequence).
"""

from __future__ import annotations

import asyncio
import logging
import platform
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from typing import Any, Literal, TypeVar

import click
import nats.errors
import nats.js.errors
import orjson
from nats.js import api
from nats.nuid import NUID

from natsrt.background import end_tasks
from natsrt.errors import NatsrtError, PermissionDenied, SubscriptionRefused
from natsrt.jetstream.agent_bucket import AGENTS_BUCKET
from natsrt.jetstream.agent_records import AgentRecords
from natsrt.jetstream.registry.entries import FEED, HEARTBEAT, WorkerEntry
from natsrt.jetstream.registry.registry import BUCKET, Registry
from natsrt.jetstream.registry.view import View
from natsrt.options import Options
from natsrt.transport.connection import Connection, Refusal
from natsrt.transport.probe import TRACE_DEST, TRACE_ONLY
from natsrt.version import VERSION
from natsrt.wire.subjects import Subjects

from .asking import gather_answers
from .connecting import Connecting, connects
from .exits import CommandFailed, Exit
from .health import judge, read_json
from .output import as_json as print_json
from .output import json_option, line, table
from .owner_finder import Survey

Level = Literal["ok", "warning", "problem", "skipped"]
T = TypeVar("T")

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}
_OLDEST_SERVER = (2, 11)
"""The first version with a time to live per message and with message tracing."""
_RECOMMENDED_PAYLOAD = 1024 * 1024
"""Bytes: nats-server's own default of max_payload."""
_WARNED_PAYLOAD = 8 * 1024 * 1024
"""Bytes above which nats-server itself advises against a max_payload."""
_SLOW_ROUND_TRIP_MS = 100.0
"""Milliseconds above which the distance to the server is worth a warning."""
_CLOCK_TOLERANCE = 2.0
"""Seconds by which the clocks may differ before it is worth a warning."""
_LONGEST_EVICTION = 10.0
"""Seconds within which a server should drop a frozen client; with natsrt's nats.conf it takes up to 9."""
_REQUEST_SECONDS = 2.0
"""Seconds to wait for the server's answer to a request."""
_WITHOUT_JETSTREAM = "the server runs without JetStream, which natsrt needs for its registry"
_ENABLE_JETSTREAM = (
    "start the server with `nats-server -js` or add a `jetstream` block to nats.conf: natsrt keeps its registry there; "
    "if natsrt has its own account, enable it for that"
)
_OPERATOR = "or use an operator's user: see docs/permissions.md"
"""Advice for checks that need more permissions than workers and callers have."""
_LIST_AT_MOST = 5
"""Items that a finding lists by name."""
_WORKERS = f"{FEED}.worker."
"""Start of the keys of workers."""
_NEVER_STORED = {"Nats-Expected-Last-Sequence": str(2**63)}
"""Headers of a message that every stream refuses, since no stream has such a sequence."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. ``advice`` says what to do; empty if nothing needs to be done."""

    check: str
    level: Level
    text: str
    advice: str = ""


@dataclass(slots=True)
class _Patient:
    """The connection that is examined, and the findings so far."""

    connection: Connection
    options: Options
    subjects: Subjects
    findings: list[Finding] = field(default_factory=list)
    denied: set[tuple[str, str]] = field(default_factory=set)
    refusal: Refusal | None = None
    no_inbox: Refusal | None = None
    """The refusal of an inbox: without one, no answer comes."""
    refused: asyncio.Event = field(default_factory=asyncio.Event)

    def found(self, check: str, level: Level, text: str, advice: str = "") -> None:
        self.findings.append(Finding(check, level, text, advice))

    @property
    def stream(self) -> str:
        return f"KV_{self.subjects.bucket(BUCKET)}"

    def deny(self, denied: Refusal) -> None:
        """Note what the server refuses."""
        self.denied.add((denied.operation, denied.subject))
        if denied.operation == "subscribe to" and denied.subject.startswith(f"{self.options.inbox_prefix}."):
            self.no_inbox = denied
        self.refusal = denied
        self.refused.set()

    async def ask(self, request: Coroutine[Any, Any, T]) -> T:
        """The result of a request. Raises the server's refusal as soon as it comes, since no answer comes then."""
        self.denied.clear()
        self.refused.clear()
        if self.no_inbox is not None:
            request.close()
            self.deny(self.no_inbox)
            raise self.no_inbox
        asking, refused = asyncio.ensure_future(request), asyncio.ensure_future(self.refused.wait())
        try:
            await asyncio.wait({asking, refused}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done() and self.refusal is not None:
                raise self.refusal
            return await asking
        finally:
            await end_tasks(asking, refused)

    async def request(self, subject: str) -> dict[str, Any] | None:
        """The JSON object that answers an empty request; None if there is no such answer."""
        try:
            reply = await self.ask(self.connection.client.request(subject, b"", timeout=_REQUEST_SECONDS))
            answer = orjson.loads(reply.data)
        except (NatsrtError, nats.errors.Error, TimeoutError, orjson.JSONDecodeError):
            return None
        return answer if isinstance(answer, dict) else None


@click.command()
@click.option(
    "--monitor-url", metavar="URL", help="URL of the server's monitoring pages, such as http://127.0.0.1:8222."
)
@click.option(
    "--health-url",
    "health_urls",
    metavar="URL",
    multiple=True,
    help="URL of a worker's --health-port, such as http://127.0.0.1:8080. May be given several times.",
)
@json_option
@connects("error")
def doctor(connecting: Connecting, monitor_url: str | None, health_urls: tuple[str, ...], as_json: bool) -> int:
    """Check the installation and suggest fixes.

    Checks the connection, versions, JetStream, permissions, the clock, the registry, keyed agents, server settings, and
    the health that workers report.

    Exits with 7 if there is a problem, and with 0 if there are only warnings.
    """
    logging.getLogger("natsrt.connection").setLevel(logging.CRITICAL)  # the findings have its warnings
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
    """Run all checks. After a failed check, those that depend on it are skipped."""
    connection = Connection(options, client_name="natsrt doctor")
    patient = _Patient(connection, options, Subjects(options.namespace))
    connection.on_denied(patient.deny)
    for url in health_urls:  # they need no server
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
        if (said := connection.server_error) is not None and not said.lower().startswith("permissions violation"):
            patient.found("server", "problem", f"it says {said!r}", "see the limits in docs/operations.md")
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
        patient.found("connection", "warning", text, "the server is far away: each call takes at least twice that time")
    else:
        patient.found("connection", "ok", text)


def _check_versions(patient: _Patient) -> None:
    server = patient.connection.client.connected_server_version
    if (server.major, server.minor) < _OLDEST_SERVER:
        patient.found(
            "server version",
            "problem",
            f"nats-server {server.major}.{server.minor}.{server.patch}",
            f"natsrt needs {_OLDEST_SERVER[0]}.{_OLDEST_SERVER[1]} or later, which has message tracing and a "
            "time to live for each message: update the server",
        )
    else:
        patient.found("server version", "ok", f"nats-server {server.major}.{server.minor}.{server.patch}")
    packages = ", ".join(f"{package} {version(package)}" for package in ("nats-py", "autogen-core"))
    patient.found("client versions", "ok", f"natsrt {VERSION}, {packages}, Python {platform.python_version()}")


def _check_payload(patient: _Patient) -> None:
    size = patient.connection.max_payload
    text = f"the largest message is {size:,} bytes"
    if size < _RECOMMENDED_PAYLOAD:
        patient.found(
            "max_payload", "warning", text, "set max_payload in nats.conf: 8MB, or at least 1MB, nats-server's default"
        )
    elif size > _WARNED_PAYLOAD:
        advice = "nats-server advises against more than 8MB: a large message delays all others of its connection"
        patient.found("max_payload", "warning", text, advice)
    else:
        patient.found("max_payload", "ok", text)


async def _check_clock(patient: _Patient) -> None:
    """Compare the clocks. The server's answer about the user has its time, and needs no system account."""
    before = time.time()
    answer = await patient.request("$SYS.REQ.USER.INFO")
    here = (before + time.time()) / 2
    server = (answer or {}).get("server") or {}
    if "time" not in server:
        patient.found(
            "clock",
            "skipped",
            f"{'refused: ' if patient.denied else ''}the server's clock cannot be read",
            f"allow this user to {_refusals(patient) or 'publish to $SYS.REQ.USER.INFO'}, {_OPERATOR}",
        )
        return
    offset = datetime.fromisoformat(server["time"]).timestamp() - here
    text = f"the server's clock is {abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} this machine's"
    if abs(offset) > _CLOCK_TOLERANCE:
        advice = "set both by NTP: natsrt works, but times in traces and tables do not agree"
        patient.found("clock", "warning", text, advice)
    else:
        patient.found("clock", "ok", text)


# -- permissions -------------------------------------------------------------------------------------------------


async def _check_permissions(patient: _Patient) -> None:
    """Try the permissions of callers and of workers. The server reports each violation before it answers a ping."""
    subjects, nonce = patient.subjects, f"doctor-{NUID().next().decode()}"
    agent, worker, topic = subjects.agent(nonce), subjects.worker(nonce), subjects.topic(nonce, nonce)
    inbox = f"{patient.options.inbox_prefix}.{nonce}"
    # On subjects that may have subscribers, only the trace report is delivered, to a subject that has none.
    unseen = {TRACE_DEST: agent, TRACE_ONLY: "true"}
    to_call = await _refused(
        patient,
        publish={agent: {}, worker: {}},
        subscribe={f"{inbox}.*": "", subjects.cancel: "", f"{subjects.registry_feed}.>": ""},
    )
    to_call += await _refused(patient, publish={topic: unseen, subjects.cancel: unseen}, subscribe={})
    if to_call:
        advice = "every natsrt program needs these: see the users in nats.conf"
        patient.found("permission to call", "problem", f"refused: {', '.join(to_call)}", advice)
    else:
        patient.found("permission to call", "ok", "calls, events and the registry's changes")
    queue = subjects.queue(nonce)
    to_host = await _refused(
        patient,
        publish={inbox: {}, f"$KV.{subjects.bucket(BUCKET)}.{HEARTBEAT}.{nonce}": _NEVER_STORED},
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
        patient.found("permission to host", "warning", text, "a user that hosts agents needs these: see nats.conf")
    else:
        patient.found("permission to host", "ok", "agents, topics, control, heartbeats and monitoring")


async def _refused(patient: _Patient, *, publish: dict[str, dict[str, str]], subscribe: dict[str, str]) -> list[str]:
    """The operations that the server refuses; ``publish``: headers by subject, ``subscribe``: queue by subject."""
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
    return [f"{operation} {subject}" for operation, subject in tried if (operation, subject) in patient.denied]


def _refusals(patient: _Patient) -> str:
    """What the server has refused since the last request began."""
    return ", ".join(sorted(f"{operation} {subject}" for operation, subject in patient.denied))


# -- JetStream and the registry ----------------------------------------------------------------------------------


async def _check_jetstream(patient: _Patient) -> bool:
    """Check JetStream. Returns whether it is available."""
    problem: str
    try:
        async with asyncio.timeout(_REQUEST_SECONDS):
            account = await patient.ask(patient.connection.jetstream.account_info())
    except (PermissionDenied, SubscriptionRefused):
        text = "refused: this user may not read its account information; workers and callers need not"
        patient.found("JetStream", "skipped", text, f"allow this user to {_refusals(patient)}, {_OPERATOR}")
        return True
    except nats.js.errors.APIError as error:
        problem = error.description or _WITHOUT_JETSTREAM
    except (nats.errors.Error, TimeoutError) as error:
        problem = str(error) or "JetStream does not answer"
    else:
        _found_storage(patient, account)
        return True
    patient.found("JetStream", "problem", problem, _ENABLE_JETSTREAM)
    return False


def _found_storage(patient: _Patient, account: api.AccountInfo) -> None:
    limit, used = account.limits.max_storage, account.storage
    text = f"enabled; {used:,} bytes stored" + (f" of {limit:,}" if limit > 0 else "")
    if 0 < limit < used * 10 / 9:
        patient.found("JetStream", "warning", text, "the account's storage is nearly full: raise max_store")
    else:
        patient.found("JetStream", "ok", text)


async def _check_registry(patient: _Patient) -> None:
    bucket = patient.subjects.bucket(BUCKET)
    try:
        info = await patient.ask(patient.connection.jetstream.stream_info(patient.stream))
    except nats.js.errors.NotFoundError:
        patient.found("registry", "ok", f"the bucket {bucket} does not exist yet: the first natsrt program creates it")
        return
    except nats.js.errors.ServiceUnavailableError as error:
        patient.found("JetStream", "problem", error.description or _WITHOUT_JETSTREAM, _ENABLE_JETSTREAM)
        return
    except (NatsrtError, nats.errors.Error, TimeoutError) as error:
        _found_registry_problem(patient, str(error) or "no answer")
        return
    _check_bucket(patient, bucket, info)
    try:
        async with _open_registry(patient) as registry:
            patient.found(
                "registry",
                "ok",
                f"{len(registry.view.workers)} live workers, {len(registry.view.hosts)} hosted agent types, "
                f"{len((await registry.known()).keys() - registry.view.hosts.keys())} known without a worker",
            )
            _check_entries(patient, registry.view)
            await _check_workers(patient, registry)
            await _check_keyed_agents(patient, registry.view)
    except NatsrtError as error:
        _found_registry_problem(patient, str(error))


def _found_registry_problem(patient: _Patient, text: str) -> None:
    advice = "see `nats stream info` for it, and the server's log"
    if patient.denied:
        advice = f"allow this user to {_refusals(patient)}"
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
        advice = f"run `nats kv del {bucket}` while no worker runs; the next worker creates it with the right settings"
        patient.found("registry bucket", "problem", f"{bucket} lacks {', '.join(missing)}", advice)
        return
    replicas = config.num_replicas or 1
    text = f"{bucket}, {info.state.messages:,} entries, {replicas} replica{'s' if replicas > 1 else ''}"
    if replicas == 1 and len(patient.connection.client.servers) > 1:
        advice = (
            f"it is lost with its server: run `nats stream edit {patient.stream} --replicas 3`, set registry_replicas"
        )
        patient.found("registry bucket", "warning", text, advice)
    else:
        patient.found("registry bucket", "ok", text)


@asynccontextmanager
async def _open_registry(patient: _Patient) -> AsyncIterator[Registry]:
    """The registry as a runtime reads it. Unlike a runtime, it removes no stale entries."""

    registry = Registry(patient.connection, patient.subjects, patient.options, peers=None)
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


def _check_entries(patient: _Patient, view: View) -> None:
    """Name the entries that cannot be read. Everybody ignores them."""
    unreadable = sorted(view.unreadable.items(), key=lambda one: (not one[0].startswith(_WORKERS), one))
    workers = sum(key.startswith(_WORKERS) for key, _ in unreadable)  # all are listed: nobody sees these workers
    shown = max(workers, _LIST_AT_MOST)
    for key, problem in unreadable[:shown]:
        advice = (
            "every natsrt program ignores it: correct the program that wrote it (docs/PROTOCOL.md, Registry), or "
            f"delete it with `nats kv del {patient.subjects.bucket(BUCKET)} {key}`"
        )
        patient.found("registry entry", "problem", f"{key}: {problem}", advice)
    if (more := len(unreadable) - shown) > 0:
        patient.found("registry entry", "problem", f"{more} more entries cannot be read")


async def _check_workers(patient: _Patient, registry: Registry) -> None:
    workers = dict(registry.view.workers)
    if not workers:
        return
    try:
        answers = await gather_answers(patient.connection, patient.subjects, patient.options, "PING", workers)
    except CommandFailed as refused:
        patient.found("workers", "skipped", str(refused))
        return
    healthy = 0
    for worker_id, worker in sorted(workers.items()):
        beats, answered = await registry.has_heartbeat(worker_id), worker_id in answers
        healthy += beats and answered
        if not beats or not answered:
            patient.found("worker", *_diagnosis(worker, beats, answered))
    if healthy:
        patient.found("workers", "ok", f"{healthy} of {len(workers)} have a heartbeat and answer")


def _diagnosis(worker: WorkerEntry, beats: bool, answered: bool) -> tuple[Level, str, str]:
    who = f"{worker.worker_id} (process {worker.pid} on {worker.hostname})"
    if answered:
        advice = f"allow its user to publish to $KV.….{HEARTBEAT}.>, and see its log"
        return "problem", f"{who} answers, but sends no heartbeat", advice
    if beats:
        advice = "it stopped, froze or was killed a moment ago, or may not subscribe to its subject; try again in 10 s"
        return "warning", f"{who} has a heartbeat, but does not answer", advice
    return "warning", f"{who} is stale: no heartbeat and no answer", "any natsrt program removes its entries"


# -- keyed agents ------------------------------------------------------------------------------------------------


async def _check_keyed_agents(patient: _Patient, view: View) -> None:
    """Check the owners of keyed agents, and that their records can be read. States, maybe gigabytes, are not read."""
    bucket = patient.subjects.bucket(AGENTS_BUCKET)
    try:
        await patient.ask(patient.connection.jetstream.stream_info(f"KV_{bucket}"))
        survey = await Survey.of(AgentRecords(patient.connection, patient.subjects, patient.options))
    except nats.js.errors.NotFoundError:
        if view.keyed:
            text = f"the bucket {bucket} and its states are gone: {', '.join(sorted(view.keyed))} start without state"
            patient.found("keyed agents", "problem", text, "restore them from an export with `natsrt state import`")
        return
    except (NatsrtError, nats.errors.Error, TimeoutError) as error:
        if refused := _refusals(patient):
            advice = f"allow this user to {refused}, {_OPERATOR}"
            patient.found("keyed agents", "skipped", f"refused: this user may not read {bucket}", advice)
        else:
            patient.found("keyed agents", "warning", f"{bucket} cannot be read: {error}")
        return
    text = f"records: {survey.agents:,}; states: {survey.with_state:,} of {survey.state_bytes:,} bytes in all"
    patient.found("keyed agents", "ok", text)
    if gone := survey.owned_by_others_than(view.workers):
        owners = ", ".join(f"{worker_id} ({count:,})" for worker_id, count in gone.most_common(_LIST_AT_MOST))
        advice = "the next message for such an agent moves it to a live worker; a state that was not stored is lost"
        patient.found("keyed agents", "warning", f"owned by workers that are gone: {owners}", advice)
    if survey.damaged:
        text = "; ".join(str(error) for error in survey.damaged[:_LIST_AT_MOST])
        advice = (
            "calls to these agents fail: store a new state with `natsrt state set --force`, or delete the record with "
            f"`natsrt state rm --force`, or by its key with `nats kv del {bucket}`"
        )
        patient.found("keyed agents", "problem", f"damaged: {len(survey.damaged):,}: {text}", advice)


# -- server settings ---------------------------------------------------------------------------------------------


async def _check_server_settings(patient: _Patient, monitor_url: str | None) -> None:
    if monitor_url is None:
        text = "a client cannot read ping_interval and ping_max"
        patient.found("server settings", "skipped", text, "use --monitor-url, if the server has monitoring pages")
        return
    url = f"{monitor_url.rstrip('/')}/varz"
    try:
        settings = await asyncio.to_thread(read_json, url, _REQUEST_SECONDS)
        interval, pings = settings["ping_interval"] / 1e9, settings["ping_max"]
        store_dir = (settings.get("jetstream", {}).get("config") or {}).get("store_dir", "")
    except (OSError, ValueError, LookupError, TypeError) as error:
        patient.found("server settings", "warning", f"{url} cannot be read: {error}", "check --monitor-url")
        return
    text = f"the server sends messages to a frozen worker for up to {interval * (pings + 1):g} s"
    if interval * (pings + 1) > _LONGEST_EVICTION:
        advice = "set ping_interval: 3s and ping_max: 2 in nats.conf: calls to a frozen worker fail for that long"
        patient.found("server settings", "warning", text, advice)
    else:
        patient.found("server settings", "ok", text)
    if store_dir.startswith("/tmp/"):
        advice = "set jetstream { store_dir } in nats.conf: files below /tmp are lost at a reboot"
        patient.found("server settings", "warning", f"JetStream stores in {store_dir}", advice)
