"""Checks of `natsrt doctor`: JetStream, its limits, and the settings of natsrt's buckets."""

from __future__ import annotations

import asyncio

import nats.errors
import nats.js.errors
from nats.js import api

from natsrt.errors import NatsrtError, PermissionDenied, SubscriptionRefused
from natsrt.jetstream.buckets import purge
from natsrt.jetstream.limits import limit_reached
from natsrt.jetstream.requests import NOBODYS_KEY
from natsrt.jetstream.stream_settings import described, remedy, wrong_settings
from natsrt.jetstream.usage import Usage, of_account, of_stream

from .patient import Patient, allowing
from .usage import judge_usage

WITHOUT_JETSTREAM = "the server runs without JetStream, which natsrt needs for its registry"
ENABLE_JETSTREAM = (
    "start the server with `nats-server -js` or add a `jetstream` block to nats.conf: natsrt keeps its registry there; "
    "if natsrt has its own account, enable it for that"
)


async def check_jetstream(patient: Patient) -> bool:
    """Check JetStream. Returns whether it is available."""
    problem: str
    try:
        async with asyncio.timeout(patient.answer_within):
            account = await patient.ask(patient.connection.jetstream.account_info())
    except (PermissionDenied, SubscriptionRefused):
        text = "refused: this user may not read its account information; workers and callers need not"
        patient.found("JetStream", "skipped", text, allowing(patient))
        return True
    except nats.js.errors.APIError as error:
        problem = error.description or WITHOUT_JETSTREAM
    except (nats.errors.Error, TimeoutError) as error:
        problem = str(error) or "JetStream does not answer"
    else:
        _found_storage(patient, account)
        return True
    patient.found("JetStream", "problem", problem, ENABLE_JETSTREAM)
    return False


def _found_storage(patient: Patient, account: api.AccountInfo) -> None:
    limit, used = account.limits.max_storage, account.storage
    text = f"enabled; {used:,} bytes stored" + (f" of {limit:,}" if limit > 0 else "")
    patient.found("JetStream", "ok", text)
    found_usage(patient, of_account(account))


def found_usage(patient: Patient, usage: Usage) -> None:
    for level, text, advice in judge_usage(usage):
        patient.found("limits", level, text, advice)


async def check_room(patient: Patient, info: api.StreamInfo) -> None:
    """Compare a bucket with its limits, and see whether the server can write it: a purge, here of nothing, tells."""
    found_usage(patient, of_stream(info))
    stream = info.config.name or ""
    bucket = stream.removeprefix("KV_")
    try:
        await patient.ask(purge(patient.connection.jetstream, stream, f"$KV.{bucket}.{NOBODYS_KEY}"))
    except nats.js.errors.APIError as error:
        if (limit := limit_reached(error)) is not None:
            patient.found("limits", "problem", f"{bucket} cannot be written: {error.description}", limit.text)
    except (NatsrtError, nats.errors.Error, TimeoutError):  # this user may not purge
        pass


def check_bucket(patient: Patient, check: str, wanted: api.KeyValueConfig, info: api.StreamInfo) -> bool:
    """Check a bucket's settings. Returns whether natsrt uses it."""
    config, bucket = info.config, wanted.bucket
    if wrong := wrong_settings(config, wanted):
        patient.found(check, "problem", described(bucket, wrong), remedy(f"KV_{bucket}", wrong))
        return False
    replicas = config.num_replicas or 1
    text = f"{bucket}, {info.state.messages:,} entries, {replicas} replica{'s' if replicas > 1 else ''}"
    advice = []
    if replicas == 1 and len(patient.connection.client.servers) > 1:
        advice.append(
            f"it is lost with its server: run `nats stream edit KV_{bucket} --replicas 3`, set registry_replicas"
        )
    if config.storage == api.StorageType.MEMORY:
        text += ", in memory"
        advice.append("it is lost when its server restarts: make it with storage file")
    if 0 < (config.max_msg_size or -1) < patient.connection.max_payload:
        text += f", max_msg_size {config.max_msg_size:,}"
        advice.append(f"what is larger is refused: run `nats stream edit KV_{bucket} --max-msg-size=-1`")
    if advice:
        patient.found(check, "warning", text, "; ".join(advice))
    else:
        patient.found(check, "ok", text)
    return True
