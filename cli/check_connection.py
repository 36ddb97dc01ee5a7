"""Checks of `natsrt doctor`: the connection, versions, the clock, permissions, and the server's settings."""

from __future__ import annotations

import asyncio
import platform
import time
from datetime import datetime
from functools import partial
from importlib.metadata import version
from typing import cast

from nats.nuid import NUID

from natsrt.jetstream.domains import Domain
from natsrt.jetstream.registry.entries import HEARTBEAT
from natsrt.jetstream.registry.registry import BUCKET
from natsrt.transport.probe import TRACE_DEST, TRACE_ONLY
from natsrt.version import VERSION

from .check_jetstream import found_usage
from .health import read_json
from .patient import REQUEST_SECONDS, Level, Patient, allowing, refused
from .role_check import RoleCheck

_OLDEST_SERVER = (2, 11)
"""The first version with a time to live per message and with message tracing."""
_SAFE_SERVER = (2, 12, 6)
"""The first version that checks where a message's header has its trace delivered to: see docs/security.md."""
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
_NEVER_STORED = {"Nats-Expected-Last-Sequence": str(2**63)}
"""Headers of a message that every stream refuses, since no stream has such a sequence."""


async def check_connection(patient: Patient) -> None:
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


def judge_server_version(server: tuple[int, int, int]) -> tuple[Level, str]:
    """What is wrong with a server of this version; an empty text if nothing is."""
    if server[:2] < _OLDEST_SERVER:
        needed = ".".join(map(str, _OLDEST_SERVER))
        return "problem", (
            f"natsrt needs {needed} or later, which has message tracing and a time to live for each message: update "
            "the server"
        )
    if server < _SAFE_SERVER:
        needed = ".".join(map(str, _SAFE_SERVER))
        return "warning", (
            f"before {needed} a server does not check where the header Nats-Trace-Dest of a message leads, so whoever "
            "may publish anything can write to every stream of the account: update the server"
        )
    return "ok", ""


def check_versions(patient: Patient) -> None:
    server = patient.connection.client.connected_server_version
    running = (server.major, server.minor, server.patch)
    level, advice = judge_server_version(running)
    patient.found("server version", level, f"nats-server {'.'.join(map(str, running))}", advice)
    packages = ", ".join(f"{package} {version(package)}" for package in ("nats-py", "autogen-core"))
    patient.found("client versions", "ok", f"natsrt {VERSION}, {packages}, Python {platform.python_version()}")


def check_payload(patient: Patient) -> None:
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


async def check_clock(patient: Patient) -> None:
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
            allowing(patient),
        )
        return
    offset = datetime.fromisoformat(server["time"]).timestamp() - here
    text = f"the server's clock is {abs(offset):.3f} s {'ahead of' if offset > 0 else 'behind'} this machine's"
    if abs(offset) > _CLOCK_TOLERANCE:
        advice = "set both by NTP: natsrt works, but times in traces and tables do not agree"
        patient.found("clock", "warning", text, advice)
    else:
        patient.found("clock", "ok", text)


async def check_permissions(patient: Patient) -> None:
    """Try the permissions of callers and of workers. The server reports each violation before it answers a ping."""
    subjects, nonce = patient.subjects, f"doctor-{NUID().next().decode()}"
    agent, worker, topic = subjects.agent(nonce), subjects.worker(nonce), subjects.topic(nonce, nonce)
    inbox = f"{patient.options.inbox_prefix}.{nonce}"
    domain = Domain(patient.options.jetstream_domain)
    # On subjects that may have subscribers, only the trace report is delivered, to a subject that has none.
    unseen = {TRACE_DEST: agent, TRACE_ONLY: "true"}
    to_call = await refused(
        patient,
        publish={agent: {}, worker: {}},
        subscribe={f"{inbox}.*": "", f"{subjects.registry_feed}.>": ""},
    )
    to_call += await refused(patient, publish={topic: unseen, subjects.cancel: unseen}, subscribe={})
    if to_call:
        advice = "every natsrt program needs these: see the users in nats.conf"
        patient.found("permission to call", "problem", f"refused: {', '.join(to_call)}", advice)
    else:
        patient.found("permission to call", "ok", "calls, events and the registry's changes")
    queue = subjects.queue(nonce)
    to_host = await refused(
        patient,
        publish={
            inbox: {},
            subjects.peer(nonce): {},
            domain.publish(f"$KV.{subjects.bucket(BUCKET)}.{HEARTBEAT}.{nonce}"): _NEVER_STORED,
        },
        subscribe={
            agent: queue,
            subjects.type_filter(nonce).subject: queue,
            worker: "",
            subjects.peer(nonce): "",
            subjects.cancel: "",
            subjects.control(nonce): queue,
            "$SRV.PING": "",
        },
    )
    if to_host:
        text = f"refused: {', '.join(to_host)}"
        patient.found("permission to host", "warning", text, "a user that hosts agents needs these: see nats.conf")
    else:
        patient.found("permission to host", "ok", "agents, topics, control, heartbeats and monitoring")


async def check_role(patient: Patient, role: RoleCheck) -> None:
    """Compare the permissions in force with those of a role."""
    answer = await patient.request("$SYS.REQ.USER.INFO")
    if "data" in (answer or {}):
        level, text, advice = role.told((answer or {})["data"].get("permissions") or {})
    else:
        nobody = f"doctor-{NUID().next().decode()}"
        reports = patient.subjects.worker(nobody)
        level, text, advice = await role.tried(partial(refused, patient), nobody, reports, sorted(patient.types))
    patient.found(f"permissions of {role.user.name}", cast(Level, level), text, advice)


async def check_server_settings(patient: Patient, monitor_url: str | None) -> None:
    if monitor_url is None:
        text = "a client cannot read ping_interval and ping_max"
        patient.found("server settings", "skipped", text, "use --monitor-url, if the server has monitoring pages")
        return
    url = f"{monitor_url.rstrip('/')}/varz"
    try:
        settings = await asyncio.to_thread(read_json, url, REQUEST_SECONDS)
        interval, pings = settings["ping_interval"] / 1e9, settings["ping_max"]
        jetstream = settings.get("jetstream", {})
        config, stats = jetstream.get("config") or {}, jetstream.get("stats") or {}
        store_dir = config.get("store_dir", "")
        usage = {
            "server: max_file_store": (stats.get("storage", 0), config.get("max_storage", 0)),
            "server: max_memory_store": (stats.get("memory", 0), config.get("max_memory", 0)),
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        patient.found("server settings", "warning", f"{url} cannot be read: {error}", "check --monitor-url")
        return
    text = f"the server sends messages to a frozen worker for up to {interval * (pings + 1):g} s"
    if interval * (pings + 1) > _LONGEST_EVICTION:
        advice = "set ping_interval: 3s and ping_max: 2 in nats.conf: calls to a frozen worker fail for that long"
        patient.found("server settings", "warning", text, advice)
    else:
        patient.found("server settings", "ok", text)
    found_usage(patient, {name: (used, limit) for name, (used, limit) in usage.items() if limit > 0})
    if store_dir.startswith("/tmp/"):
        advice = "set jetstream { store_dir } in nats.conf: files below /tmp are lost at a reboot"
        patient.found("server settings", "warning", f"JetStream stores in {store_dir}", advice)
