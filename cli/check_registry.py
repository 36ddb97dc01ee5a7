"""Checks of `natsrt doctor`: the registry, the workers in it, and keyed agents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

import nats.errors
import nats.js.errors

from natsrt.errors import NatsrtError, PermissionDenied
from natsrt.jetstream.agent_bucket import AGENTS_BUCKET, agents_bucket
from natsrt.jetstream.agent_records import AgentRecords
from natsrt.jetstream.registry.entries import FEED, HEARTBEAT, WorkerEntry
from natsrt.jetstream.registry.registry import BUCKET, Registry
from natsrt.jetstream.registry.store import registry_bucket
from natsrt.jetstream.registry.view import View

from .asking import gather_answers, other_workers
from .check_durable import check_durable
from .check_jetstream import ENABLE_JETSTREAM, WITHOUT_JETSTREAM, check_bucket, check_room
from .check_streams import check_blobs, check_records, check_results
from .exits import CommandFailed
from .owner_finder import Survey
from .patient import LIST_AT_MOST, OPERATOR, Level, Patient, allowing

_WORKERS = f"{FEED}.worker."
"""Start of the keys of workers."""


async def check_registry(patient: Patient) -> None:
    if patient.role is not None and not patient.role.user.is_runtime:
        patient.found("registry", "skipped", "a client is not told what is in it", OPERATOR)
        return
    bucket = patient.subjects.bucket(BUCKET)
    try:
        info = await patient.ask(patient.connection.jetstream.stream_info(f"KV_{bucket}"))
    except nats.js.errors.NotFoundError:
        patient.found("registry", "ok", f"the bucket {bucket} does not exist yet: the first natsrt program creates it")
        await _check_other_registries(patient, ())
        return
    except nats.js.errors.ServiceUnavailableError as error:
        patient.found("JetStream", "problem", error.description or WITHOUT_JETSTREAM, ENABLE_JETSTREAM)
        return
    except PermissionDenied as denied:
        if denied.operation != "publish to":
            _found_registry_problem(patient, str(denied))
            return
        text = f"refused: this user may not read {bucket}; callers need not, since workers tell them what is in it"
        patient.found("registry bucket", "skipped", text, allowing(patient))
    except (NatsrtError, nats.errors.Error, TimeoutError) as error:
        _found_registry_problem(patient, str(error) or "no answer")
        return
    else:
        usable = check_bucket(patient, "registry bucket", registry_bucket(patient.subjects, patient.options), info)
        await check_room(patient, info)
        if not usable:
            return
    try:
        async with _open_registry(patient) as registry:
            patient.found(
                "registry",
                "ok",
                f"{len(registry.view.workers)} live workers, {len(registry.view.hosts)} hosted agent types, "
                f"{len((await registry.known()).keys() - registry.view.hosts.keys())} known without a worker",
            )
            patient.types.update(await registry.known(), registry.view.hosts)
            _check_entries(patient, registry.view)
            await _check_workers(patient, registry)
            await registry.catch_up()
            await _check_other_registries(patient, registry.view.workers)
            await _check_keyed_agents(patient, registry.view)
            await check_blobs(patient)
            await check_durable(patient, registry.view)
            await check_results(patient, registry.view)
            await check_records(patient)
    except NatsrtError as error:
        _found_registry_problem(patient, str(error))


def _found_registry_problem(patient: Patient, text: str) -> None:
    advice = "see `nats stream info` for it, and the server's log"
    if patient.denied:
        advice = allowing(patient)
    patient.found("registry", "problem", f"KV_{patient.subjects.bucket(BUCKET)} cannot be read: {text}", advice)


@asynccontextmanager
async def _open_registry(patient: Patient) -> AsyncIterator[Registry]:
    """The registry as a runtime reads it. Unlike a runtime, it removes no stale entries."""

    registry = Registry(patient.connection, patient.subjects, patient.options, peers=None)
    await registry.open()
    try:
        yield registry
    finally:
        await registry.close()


def _check_entries(patient: Patient, view: View) -> None:
    """Name the entries that cannot be read. Everybody ignores them."""
    unreadable = sorted(view.unreadable.items(), key=lambda one: (not one[0].startswith(_WORKERS), one))
    workers = sum(key.startswith(_WORKERS) for key, _ in unreadable)  # all are listed: nobody sees these workers
    shown = max(workers, LIST_AT_MOST)
    for key, problem in unreadable[:shown]:
        advice = (
            "every natsrt program ignores it: correct the program that wrote it (docs/PROTOCOL.md, Registry), or "
            f"delete it with `nats kv del {patient.subjects.bucket(BUCKET)} {key}`"
        )
        patient.found("registry entry", "problem", f"{key}: {problem}", advice)
    if (more := len(unreadable) - shown) > 0:
        patient.found("registry entry", "problem", f"{more} more entries cannot be read")


async def _check_other_registries(patient: Patient, listed: Collection[str]) -> None:
    """Look for workers that use another registry of the namespace, as in another JetStream domain."""
    others = await other_workers(patient.connection, patient.subjects, patient.options, listed)
    if not others:
        return
    domain = patient.options.jetstream_domain or patient.connection.client.jetstream_domain
    where = f"JetStream domain {domain!r}" if domain else "a JetStream without a domain"
    names = ", ".join(sorted(others)[:LIST_AT_MOST]) + (" and others" if len(others) > LIST_AT_MOST else "")
    patient.found(
        "other registries",
        "problem",
        f"{names}: answer, and are not in this registry, which is in {where}: there is another one",
        "keyed agents could live twice: set jetstream_domain alike for all programs of the namespace, or give each "
        "side of the leaf node a namespace (docs/operations.md, Leaf nodes)",
    )


async def _check_workers(patient: Patient, registry: Registry) -> None:
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
        answered = worker_id in answers
        beats = await registry.has_heartbeat(worker_id) if registry.reads_bucket else answered
        healthy += beats and answered
        if not beats or not answered:
            patient.found("worker", *_diagnosis(worker, beats, answered))
    if healthy:
        shown = "have a heartbeat and answer" if registry.reads_bucket else "answer"
        patient.found("workers", "ok", f"{healthy} of {len(workers)} {shown}")


def _diagnosis(worker: WorkerEntry, beats: bool, answered: bool) -> tuple[Level, str, str]:
    who = f"{worker.worker_id} (process {worker.pid} on {worker.hostname})"
    if answered:
        advice = f"allow its user to publish to $KV.….{HEARTBEAT}.>, and see its log"
        return "problem", f"{who} answers, but sends no heartbeat", advice
    if beats:
        advice = "it stopped, froze or was killed a moment ago, or may not subscribe to its subject; try again in 10 s"
        return "warning", f"{who} has a heartbeat, but does not answer", advice
    return "warning", f"{who} is stale: no heartbeat and no answer", "any natsrt program removes its entries"


async def _check_keyed_agents(patient: Patient, view: View) -> None:
    """Check the owners of keyed agents, and that their records can be read. States, maybe gigabytes, are not read."""
    bucket = patient.subjects.bucket(AGENTS_BUCKET)
    try:
        info = await patient.ask(patient.connection.jetstream.stream_info(f"KV_{bucket}"))
        check_bucket(patient, "agents' bucket", agents_bucket(patient.subjects, patient.options), info)
        await check_room(patient, info)
        records = AgentRecords(patient.connection, patient.subjects, patient.options)
        records.only_read()
        survey = await Survey.of(records)
    except nats.js.errors.NotFoundError:
        if view.keyed:
            text = f"the bucket {bucket} and its states are gone: {', '.join(sorted(view.keyed))} start without state"
            patient.found("keyed agents", "problem", text, "restore them from an export with `natsrt state import`")
        return
    except (NatsrtError, nats.errors.Error, TimeoutError) as error:
        if patient.denied:
            text = f"refused: this user may not read {bucket}"
            patient.found("keyed agents", "skipped", text, allowing(patient))
        else:
            patient.found("keyed agents", "warning", f"{bucket} cannot be read: {error}")
        return
    text = f"records: {survey.agents:,}; states: {survey.with_state:,} of {survey.state_bytes:,} bytes in all"
    patient.found("keyed agents", "ok", text)
    if gone := survey.owned_by_others_than(view.workers):
        owners = ", ".join(f"{worker_id} ({count:,})" for worker_id, count in gone.most_common(LIST_AT_MOST))
        advice = "the next message for such an agent moves it to a live worker; a state that was not stored is lost"
        patient.found("keyed agents", "warning", f"owned by workers that are gone: {owners}", advice)
    if survey.damaged:
        text = "; ".join(str(error) for error in survey.damaged[:LIST_AT_MOST])
        advice = (
            "calls to these agents fail: store a new state with `natsrt state set --force`, or delete the record with "
            f"`natsrt state rm --force`, or by its key with `nats kv del {bucket}`"
        )
        patient.found("keyed agents", "problem", f"damaged: {len(survey.damaged):,}: {text}", advice)
