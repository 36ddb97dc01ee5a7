"""The check of `natsrt doctor` of the stream of the payloads that are sent by reference."""

from __future__ import annotations

import nats.errors
import nats.js.errors

from natsrt.errors import NatsrtError
from natsrt.jetstream.stream_settings import described, remedy, wrong_settings
from natsrt.jetstream.streams import BLOBS, MAKE_BLOBS_AGAIN, blobs_stream
from natsrt.jetstream.usage import of_stream

from .check_jetstream import found_usage
from .patient import Patient, allowing


async def check_blobs(patient: Patient) -> None:
    """Check the stream if there is one: it is made on first use."""
    stream = patient.subjects.bucket(BLOBS)
    try:
        info = await patient.ask(patient.connection.jetstream.stream_info(stream))
    except nats.js.errors.NotFoundError:
        return
    except (NatsrtError, nats.errors.Error, TimeoutError) as error:
        if patient.denied:
            text = f"refused: this user may not ask for the stream {stream}"
            patient.found("large payloads", "skipped", text, allowing(patient))
        else:
            patient.found("large payloads", "warning", f"the stream {stream} cannot be read: {error}")
        return
    if wrong := wrong_settings(info.config, blobs_stream(patient.subjects, patient.options)):
        text = described(stream, wrong)
        patient.found("large payloads", "problem", text, remedy(stream, wrong, MAKE_BLOBS_AGAIN))
    else:
        text = f"the stream {stream} has {info.state.bytes:,} bytes in {info.state.messages:,} chunks"
        patient.found("large payloads", "ok", text)
    found_usage(patient, of_stream(info))
