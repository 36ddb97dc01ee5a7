"""Bodies, as tests/vectors/envelopes.json has them. (Subjects and messages have vectors and tests of their own.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from natsrt.errors import CannotDecode
from natsrt.wire import envelope

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "envelopes.json").read_text("utf-8"))


def cases(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", VECTORS[kind], ids=lambda case: case["name"])


def bytes_of(case: dict[str, Any], name: str) -> bytes:
    return bytes.fromhex(case[f"{name}_hex"]) if f"{name}_hex" in case else case[name].encode()


@cases("written")
def test_bodies_are_written_as_the_vectors_say(case: dict[str, Any]) -> None:
    attributes = ",".join(envelope.attribute(name, value) for name, value in case["attributes"])
    content_type = case.get("content_type", envelope.JSON_CONTENT)
    assert envelope.encode(case["type"], attributes, bytes_of(case, "payload"), content_type) == bytes_of(case, "body")


@cases("written")
def test_what_was_written_is_read_again(case: dict[str, Any]) -> None:
    read = envelope.decode(bytes_of(case, "body"))
    assert read is not None
    assert read.type == case["type"]
    assert dict(case["attributes"]).items() <= dict(read.attributes).items()
    assert read.payload == bytes_of(case, "payload")
    assert read.text("datacontenttype") == case.get("content_type")


@cases("read")
def test_bodies_are_read_as_the_vectors_say(case: dict[str, Any]) -> None:
    read = envelope.decode(bytes_of(case, "body"))
    assert read is not None
    assert dict(read.attributes) == case["attributes"]
    if "payload_json" in case:
        assert read.json() == case["payload_json"]
    else:
        assert read.payload == bytes_of(case, "payload")


@cases("plain")
def test_plain_bodies_are_left_alone(case: dict[str, Any]) -> None:
    assert envelope.decode(bytes_of(case, "body")) is None


@cases("refused")
def test_broken_bodies_of_ours_are_refused_and_never_plain(case: dict[str, Any]) -> None:
    with pytest.raises(CannotDecode) as raised:
        envelope.decode(bytes_of(case, "body"))
    assert raised.value.payload == bytes_of(case, "body")


@pytest.mark.parametrize("name", ["subjects", "messages", "envelopes"])
def test_every_file_of_vectors_says_what_it_is_about(name: str) -> None:
    vectors = json.loads((Path(__file__).parent / "vectors" / f"{name}.json").read_text("utf-8"))
    assert vectors["about"]
