"""Names on the wire: the vectors, which any implementation can run, and properties over hostile strings."""

from __future__ import annotations

import enum
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from autogen_core import TopicId
from hypothesis import example, given, settings
from hypothesis import strategies as st

from natsrt.errors import ConfigurationError
from natsrt.wire.subjects import (
    MAX_SUBJECT_BYTES,
    MAX_TOKEN_BYTES,
    Filter,
    Subjects,
    decode_token,
    encode_text,
    encode_token,
    is_hashed,
    plain_prefix,
)

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors" / "subjects.json").read_text("utf-8"))

SUBJECTS = Subjects()

UNTIMED = settings(deadline=None)  # a busy machine is no failure


def cases(function: str) -> pytest.MarkDecorator:
    """Parametrise ``case`` with the vectors of one function."""
    listed = VECTORS[function]
    return pytest.mark.parametrize("case", listed, ids=[f"{function}-{number}" for number in range(len(listed))])


def subjects_of(case: dict[str, Any]) -> Subjects:
    return Subjects(case.get("namespace", ""))


def matches(pattern: str, subject: str) -> bool:
    """Whether a NATS subscription to ``pattern`` receives ``subject``."""
    wanted, tokens = pattern.split("."), subject.split(".")
    for position, token in enumerate(wanted):
        if token == ">":
            return len(tokens) > position
        if position == len(tokens) or token not in ("*", tokens[position]):
            return False
    return len(wanted) == len(tokens)


def is_valid_subject(subject: str) -> bool:
    """Whether NATS takes ``subject`` literally: printable, no empty token, no wildcard."""
    return re.fullmatch(r"[!-~]+", subject) is not None and not {"", "*", ">"} & set(subject.split("."))


HOSTILE = [
    "",
    "*",
    ">",
    ".",
    "..",
    ":",
    "=",
    "=H",
    "=41",
    "a b",
    "a\r\nPUB x 0\r\n\r\n",
    "\x00",
    "$JS.API.>",
    "ž😀",
    "x" * 10_000,
    " " * 10_000,
    "." * 10_000,
    "=H" + "0" * 64,
]

any_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text("a.:=*>H3A2E \r\n", max_size=12),
    st.builds(str.__mul__, st.sampled_from(["a", "é", " ", "a:", "b."]), st.integers(60, 260)),
    st.sampled_from(HOSTILE),
)
topic_types = st.one_of(
    st.from_regex(r"[\w\-.:=]{1,30}", fullmatch=True),
    st.text("ab.:=", min_size=1, max_size=10),
    st.builds("{}{}{}".format, st.text("a.:"), st.sampled_from(["q" * 201, "q" * 201 + ":", "é" * 40]), st.text("a.:")),
)
prefixes_and_types = st.one_of(
    topic_types.flatmap(lambda name: st.tuples(st.integers(0, len(name)).map(lambda end: name[:end]), st.just(name))),
    st.tuples(topic_types, topic_types),
    st.tuples(topic_types, topic_types).map(lambda pair: (pair[0], pair[0] + pair[1])),
)


# The vectors


@cases("encode_text")
def test_text_is_encoded_as_the_vectors_say_and_decoded_again(case: dict[str, Any]) -> None:
    assert encode_text(case["value"]) == case["text"]
    assert decode_token(case["text"]) == case["value"]


@cases("encode_token")
def test_tokens_are_encoded_as_the_vectors_say(case: dict[str, Any]) -> None:
    assert encode_token(case["value"]) == case["token"]
    assert is_hashed(case["token"]) is case["hashed"]


@cases("decode_token")
def test_tokens_that_nothing_encodes_to_are_refused(case: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not an encoded name: "):
        decode_token(case["token"])


@cases("namespace")
def test_namespaces_are_taken_or_refused_as_the_vectors_say(case: dict[str, Any]) -> None:
    if "invalid" in case:
        with pytest.raises(ConfigurationError) as caught:
            Subjects(case["namespace"])
        assert caught.value.setting == "namespace"
    else:
        assert Subjects(case["namespace"]).namespace == case["namespace"]


@cases("agent")
def test_agent_subjects_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    assert subjects_of(case).agent(case["type"]) == case["subject"]


@cases("instance")
def test_instance_subjects_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    assert subjects_of(case).instance(case["type"], case["key"]) == case["subject"]


@cases("queue")
def test_queue_groups_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    assert subjects_of(case).queue(case["type"], case["key"]) == case["queue"]


@cases("control")
def test_control_subjects_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    assert subjects_of(case).control(case["type"], case["key"]) == case["subject"]


@cases("control_at")
def test_control_subjects_of_one_worker_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    assert subjects_of(case).control_at(case["type"], case["worker_id"]) == case["subject"]


@cases("worker")
def test_worker_subjects_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    assert subjects_of(case).worker(case["worker_id"]) == case["subject"]


@cases("fixed")
def test_fixed_subjects_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    subjects = subjects_of(case)
    assert subjects.everything == case["everything"]
    assert subjects.cancel == case["cancel"]
    assert subjects.registry_feed == case["registry_feed"]


@cases("bucket")
def test_buckets_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    assert subjects_of(case).bucket(case["name"]) == case["bucket"]


@cases("topic")
def test_topic_subjects_are_those_of_the_vectors_and_parse_back(case: dict[str, Any]) -> None:
    subjects = subjects_of(case)
    if "invalid" in case:
        with pytest.raises(ValueError, match=r"takes [\d,]+ bytes; at most 1,024"):
            subjects.topic(case["type"], case["source"])
    else:
        subject = subjects.topic(case["type"], case["source"])
        assert subject == case["subject"]
        parsed = subjects.parse_topic(subject, topic_type=case["type"], source=case["source"])
        assert parsed == (case["type"], case["source"])


@cases("parse_topic")
def test_topic_subjects_are_parsed_or_refused_as_the_vectors_say(case: dict[str, Any]) -> None:
    subjects = subjects_of(case)
    claims = {"topic_type": case["claimed_type"], "source": case["claimed_source"]}
    if "invalid" in case:
        with pytest.raises(ValueError):
            subjects.parse_topic(case["subject"], **claims)
    else:
        assert subjects.parse_topic(case["subject"], **claims) == (case["type"], case["source"])


@cases("type_filter")
def test_type_filters_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    if "invalid" in case:
        with pytest.raises(ValueError, match=r"takes [\d,]+ bytes"):
            subjects_of(case).type_filter(case["type"])
    else:
        assert subjects_of(case).type_filter(case["type"]) == Filter(case["subject"], case["exact"])


@cases("instance_type_filter")
def test_type_filters_of_instances_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    if "invalid" in case:
        with pytest.raises(ValueError, match=r"takes [\d,]+ bytes"):
            subjects_of(case).instance_type_filter(case["type"], case["key"])
    else:
        found = subjects_of(case).instance_type_filter(case["type"], case["key"])
        assert found == Filter(case["subject"], case["exact"])


@cases("prefix_filter")
def test_prefix_filters_are_those_of_the_vectors_or_refused_with_the_right_spelling(case: dict[str, Any]) -> None:
    if "invalid" in case:
        with pytest.raises(ValueError) as caught:
            subjects_of(case).prefix_filter(case["prefix"])
        if case["meant"] is not None:
            assert f"write '{case['meant']}'" in str(caught.value)
            subjects_of(case).prefix_filter(case["meant"])
    else:
        assert subjects_of(case).prefix_filter(case["prefix"]) == Filter(case["subject"], case["exact"])


@cases("is_reserved")
def test_reserved_reply_subjects_are_those_of_the_vectors(case: dict[str, Any]) -> None:
    assert subjects_of(case).is_reserved(case["subject"]) is case["reserved"]


# Properties of tokens


@given(any_text)
@UNTIMED
def test_every_text_is_reversible(value: str) -> None:
    assert decode_token(encode_text(value)) == value


@given(any_text)
@UNTIMED
def test_every_token_is_valid_in_a_subject_and_as_a_kv_key(value: str) -> None:
    token = encode_token(value)
    assert is_valid_subject(token) and "." not in token
    assert re.fullmatch(r"[-/_=.a-zA-Z0-9]+", token)
    assert len(token) <= MAX_TOKEN_BYTES
    assert is_hashed(token) is (len(encode_text(value)) > MAX_TOKEN_BYTES)


@given(any_text, any_text)
@UNTIMED
def test_different_values_have_different_tokens(one: str, other: str) -> None:
    assert (encode_token(one) == encode_token(other)) is (one == other)
    assert (encode_text(one) == encode_text(other)) is (one == other)


@given(st.one_of(st.text(), st.text("=Hah4123CE", max_size=8)))
@UNTIMED
def test_whatever_decodes_is_the_one_spelling_of_its_value(token: str) -> None:
    try:
        value = decode_token(token)
    except ValueError as error:
        assert "is not an encoded name" in str(error)
    else:
        assert encode_text(value) == token


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "the empty name is written '='"),
        ("ab=3d", "the = at position 2 is not followed by two upper-case hex digits"),
        ("a.b", "'.' at position 1"),
        ("=41", "'A' must be written 'A'"),
        ("=FF", "its bytes are not UTF-8"),
        ("=H" + "0" * 64, "it is a hash"),
    ],
)
def test_a_malformed_token_is_refused_with_what_is_wrong_with_it(token: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        decode_token(token)


@pytest.mark.parametrize("value", ["a\ud800", "\udfff" * 300])
def test_lone_surrogates_are_refused_with_their_position(value: str) -> None:
    for refuse in (encode_text, encode_token, SUBJECTS.agent, SUBJECTS.type_filter):
        with pytest.raises(
            ValueError, match=f"lone surrogate at position {value.index(value[-1])}, which UTF-8 cannot"
        ):
            refuse(value)
    with pytest.raises(ValueError, match="lone surrogate"):
        SUBJECTS.topic("news", value)
    with pytest.raises(ValueError, match="lone surrogate"):
        SUBJECTS.parse_topic(f"topic.news.{encode_token('x' * 201)}", source=value)


def test_members_of_string_enumerations_are_encoded_by_their_value() -> None:
    class Name(str, enum.Enum):  # noqa: UP042 - unlike a StrEnum's, its members do not format as their values
        NEWS = "news"
        TECH = "news.tech"

    assert SUBJECTS.agent(Name.NEWS) == "agent.news"
    assert SUBJECTS.topic(Name.TECH, Name.NEWS) == "topic.news.tech.news"
    assert SUBJECTS.prefix_filter(Name.NEWS).subject == "topic.*.>"
    assert type(encode_text(Name.NEWS)) is str


# Properties of subjects


def topic_or_none(subjects: Subjects, topic_type: str, source: str) -> str | None:
    try:
        return subjects.topic(topic_type, source)
    except ValueError as error:
        assert f"at most {MAX_SUBJECT_BYTES:,} are sent" in str(error)
        return None


@given(any_text, any_text, st.sampled_from(["", "prod"]))
@UNTIMED
def test_every_topic_has_a_valid_subject_that_parses_back_or_is_refused(kind: str, source: str, namespace: str) -> None:
    subjects = Subjects(namespace)
    subject = topic_or_none(subjects, kind, source)
    if subject is None:
        return
    assert is_valid_subject(subject)
    assert len(subject) <= MAX_SUBJECT_BYTES
    assert matches(subjects.everything, subject)
    assert subjects.is_reserved(subject)
    assert subjects.parse_topic(subject, topic_type=kind, source=source) == (kind, source)
    if "=H" not in subject:
        assert subjects.parse_topic(subject) == (kind, source)


@given(any_text, any_text, any_text, any_text)
@UNTIMED
def test_different_topics_have_different_subjects(kind: str, source: str, other_kind: str, other_source: str) -> None:
    one, other = topic_or_none(SUBJECTS, kind, source), topic_or_none(SUBJECTS, other_kind, other_source)
    if one is not None and other is not None:
        assert (one == other) is ((kind, source) == (other_kind, other_source))


@given(any_text, any_text)
@UNTIMED
def test_a_claim_can_only_repeat_or_reveal_what_the_subject_says(claimed_type: str, claimed_source: str) -> None:
    hashed = encode_token("x" * 201)
    for subject in ("topic.a.b", f"topic.{hashed}.b", f"topic.a.{hashed}", f"topic.{hashed}.{hashed}"):
        try:
            parsed = SUBJECTS.parse_topic(subject, topic_type=claimed_type, source=claimed_source)
        except ValueError:
            continue
        assert SUBJECTS.topic(*parsed) == subject


@given(st.one_of(st.text("atopic.=:3A2EH*>", max_size=20).map("topic.{}".format), st.text()))
@UNTIMED
def test_whatever_subject_parses_is_the_one_subject_of_its_topic(subject: str) -> None:
    try:
        topic_type, source = SUBJECTS.parse_topic(subject)
    except ValueError:
        return
    assert SUBJECTS.topic(topic_type, source) == subject


@given(any_text, any_text)
@UNTIMED
def test_every_agent_has_valid_subjects_of_its_own_outside_the_other_trees(agent_type: str, key: str) -> None:
    subjects = Subjects("n" * MAX_TOKEN_BYTES)
    made = [
        subjects.agent(agent_type),
        subjects.instance(agent_type, key),
        subjects.control(agent_type),
        subjects.control(agent_type, key),
        subjects.worker(key),
    ]
    assert len(set(made)) == len(made)
    for subject in made:
        assert is_valid_subject(subject)
        assert len(subject) <= MAX_SUBJECT_BYTES
        assert subjects.is_reserved(subject)
        assert not matches(subjects.everything, subject)
    assert [matches(f"{subjects.namespace}.agent.>", subject) for subject in made] == [True, True, False, False, False]
    assert is_valid_subject(subjects.queue(agent_type, key))


def test_agents_whose_type_and_key_join_to_the_same_text_have_different_subjects() -> None:
    assert SUBJECTS.instance("a.b", "c") != SUBJECTS.instance("a", "b.c")
    assert SUBJECTS.queue("a.b") != SUBJECTS.queue("a", "b")


# Properties of filters


@given(any_text, any_text, any_text)
@UNTIMED
def test_a_type_filter_receives_every_source_of_its_type_and_nothing_else(kind: str, other: str, source: str) -> None:
    subject = topic_or_none(SUBJECTS, other, source)
    if topic_or_none(SUBJECTS, kind, "s") is None or subject is None:
        return
    found = SUBJECTS.type_filter(kind)
    assert found.exact
    assert matches(found.subject, subject) is (kind == other)
    own = topic_or_none(SUBJECTS, kind, source)
    assert own is None or matches(found.subject, own)


@given(prefixes_and_types, any_text)
@example(("ord", "ord"), "s")
@example(("", "."), "s")
@example(("worker:.x", "worker:.xy"), "")
@example(("a:.b", "a:b"), "s")
@example(("a.:b", "a.:"), "s")
@example(("q" * 150, "q" * 201), "s")
@example(("q" * 201 + ".", "q" * 201 + "."), "s")
@settings(UNTIMED, max_examples=500)
def test_a_prefix_filter_misses_no_matching_topic_and_an_exact_one_receives_no_other(
    prefix_and_type: tuple[str, str], source: str
) -> None:
    prefix, topic_type = prefix_and_type
    subject = topic_or_none(SUBJECTS, topic_type, source)
    if subject is None:
        return
    found = SUBJECTS.prefix_filter(prefix)
    if topic_type.startswith(prefix):
        assert matches(found.subject, subject)
    elif found.exact:
        assert not matches(found.subject, subject)


def test_all_short_names_parse_back_and_meet_exactly_the_filters_they_should() -> None:
    names = ["".join(letters) for length in range(5) for letters in itertools.product(".:a", repeat=length)]
    topics = {(name, source): SUBJECTS.topic(name, source) for name in names for source in ("", "a", ".", ":")}
    assert len(set(topics.values())) == len(topics)
    for topic, subject in topics.items():
        assert SUBJECTS.parse_topic(subject) == topic
    for prefix in names:
        found = SUBJECTS.prefix_filter(prefix)
        assert found.exact is (prefix == "" or prefix[-1] in ".:")
        for (name, _source), subject in topics.items():
            if found.exact or name.startswith(prefix):
                assert matches(found.subject, subject) is name.startswith(prefix)


@given(topic_types)
@UNTIMED
def test_every_prefix_of_a_topic_type_that_autogen_takes_is_possible(topic_type: str) -> None:
    TopicId(topic_type, "s")
    for end in range(0, len(topic_type) + 1, 1 + len(topic_type) // 20):
        assert plain_prefix(topic_type[:end]) == topic_type[:end]


@given(st.text())
@UNTIMED
def test_a_prefix_is_refused_only_if_autogen_takes_no_topic_type_that_starts_with_it(prefix: str) -> None:
    try:
        text = plain_prefix(prefix)
    except ValueError as error:
        assert "write '" in str(error)
        with pytest.raises(ValueError):
            TopicId(prefix + "a", "s")
    else:
        TopicId(text + "a", "s")


def test_a_topic_too_long_to_send_is_refused_with_its_length() -> None:
    with pytest.raises(ValueError, match=r"source 's' takes 1,211 bytes; at most 1,024 are sent"):
        SUBJECTS.topic("a." * 601 + "a", "s")


def test_a_topic_type_with_more_parts_than_any_subject_is_refused_before_it_is_taken_apart() -> None:
    subjects = Subjects()
    for use in (subjects.type_filter, subjects.prefix_filter, lambda text: subjects.topic(text, "s")):
        for text in ("." * 1_000_000, "a:" * 1_000_000):
            with pytest.raises(ValueError, match="too many parts"):
                use(text)
    assert subjects.type_filter("x" * 1_000_000).exact  # one part, which is hashed
