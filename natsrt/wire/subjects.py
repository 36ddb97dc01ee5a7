"""The names on the wire: tokens, subjects, queue groups and buckets, protocol version 1.

Rules:

1. Every name that the user chooses (agent type, key, part of a topic type, source) becomes tokens that consist of
   ``[A-Za-z0-9_=-]`` only. Such a token is valid in a NATS subject and in a JetStream KV key. So a name cannot inject
   a wildcard, another token, or a CR LF, which would end the protocol line: the rest would be read as a command.
2. Different names have different subjects, and the names can be read back from the subject. A token over 200 bytes is
   the only exception. It is replaced by a hash; the value is then sent in the body and must hash to that token.
3. A subject that cannot be sent raises ``ValueError`` before anything is sent. nats-server closes a connection whose
   protocol line is too long, and nats-py does not recover from that.

Theory of operation. ``enc(s)`` writes ``""`` as ``=``, bytes in ``[A-Za-z0-9_-]`` unchanged, and every other byte of
the UTF-8 text as ``=`` and two upper-case hex digits. So ``=`` is always either followed by two hex digits or the whole
token, and ``=H``, which starts a hash, can never be the encoding of a value.

A topic type is split at every ``.`` (which is dropped) and after every ``:`` (which remains at the end of its part). To
join the parts, a part that ends in ``:`` is followed directly by the next one, and any other part by a ``.``. So the
split is reversible. A prefix that ends on a boundary is a list of complete parts, which a subject wildcard can express
exactly.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from natsrt.errors import ConfigurationError
from natsrt.wire.filters import intersects

__all__ = [
    "MAX_SUBJECT_BYTES",
    "MAX_TOKEN_BYTES",
    "Filter",
    "Subjects",
    "decode_token",
    "encode_text",
    "encode_token",
    "inbox_problem",
    "is_hashed",
    "is_subject_length",
    "plain_prefix",
    "service_problem",
    "taken_problem",
]

MAX_TOKEN_BYTES = 200
"""The longest token that is not replaced by a hash, in bytes of its encoded form."""

MAX_SUBJECT_BYTES = 1024
"""The longest subject that is sent, in bytes, namespace included."""

_CACHE_ENTRIES = 32_768
_CACHED_CHARS = 256  # longer names are not cached, which limits the memory that a full cache takes
_SHOWN_CHARS = 80

_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPED = re.compile(r"(?:[A-Za-z0-9_-]|=[0-9A-F]{2})*")
_ESCAPE = re.compile(rb"=([0-9A-F]{2})")
_HASHED = re.compile(r"=H[0-9a-f]{64}")
_TOPIC_TYPE_CHARS = re.compile(r"[\w\-.:=]*")  # what AutoGen's TopicId allows; \w is Unicode's
_ENCODED_BYTES = tuple(chr(byte) if _PLAIN.fullmatch(chr(byte)) else f"={byte:02X}" for byte in range(256))

_INBOX_PREFIX = re.compile(r"[A-Za-z0-9_=:/@+~-]+(\.[A-Za-z0-9_=:/@+~-]+)*")

_TREES = ("agent", "topic", "natsrt")
_INBOX = "_INBOX"


def encode_text(value: str) -> str:
    """Return ``enc(value)``, of any length: the reversible form that bodies use.

    Raises ValueError if ``value`` contains a lone surrogate, which UTF-8 cannot encode.
    """
    plain = _PLAIN.fullmatch(value)
    if plain:
        return plain.group()  # not `value`: a member of a `str` enumeration is formatted as its name
    if not value:
        return "="
    try:
        encoded = value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{_shown(value)} cannot be a name: it has a lone surrogate at position {error.start}, "
            "which UTF-8 cannot encode"
        ) from error
    return "".join(map(_ENCODED_BYTES.__getitem__, encoded))


def encode_token(value: str) -> str:
    """Return the token for ``value``: ``enc(value)``, or its hash if ``enc(value)`` is over 200 bytes.

    The hash is ``=H`` and the SHA-256 of the UTF-8 value in 64 lower-case hex digits. The value must then be sent in
    the body. Raises ValueError as `encode_text` does.
    """
    return _cached_token(value) if len(value) <= _CACHED_CHARS else _token(value)


def decode_token(token: str) -> str:
    """Return the value for which `encode_text` returns ``token``, of any length.

    Raises ValueError with the reason for any token that `encode_text` does not return: hashes, malformed escapes,
    bytes that are not UTF-8, and escapes of characters that need no escape (a name with two spellings would have two
    subjects).
    """
    if _PLAIN.fullmatch(token):
        return token
    if token == "=":
        return ""
    if not token or not _ESCAPED.fullmatch(token):
        raise ValueError(f"{_shown(token)} is not an encoded name: {_what_is_malformed(token)}")
    try:
        value = _ESCAPE.sub(lambda escape: bytes.fromhex(escape[1].decode()), token.encode()).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{_shown(token)} is not an encoded name: its bytes are not UTF-8") from error
    spelling = encode_text(value)
    if spelling != token:
        raise ValueError(f"{_shown(token)} is not an encoded name: {_shown(value)} must be written {_shown(spelling)}")
    return value


def is_hashed(token: str) -> bool:
    """True if ``token`` is a hash, so that the value is only in the body of the message."""
    return _HASHED.fullmatch(token) is not None


def inbox_problem(prefix: str, namespace: str) -> str:
    """Why ``prefix`` cannot be that of a user's reply subjects, as words that follow its name; empty if it can.

    Who has it may subscribe to all below it. So it has no subject of natsrt below it, in this namespace or without one,
    and is in none of their trees, to whose subjects no worker replies. The server's subjects begin with ``$``.
    """
    if not _INBOX_PREFIX.fullmatch(prefix):
        return "must be subject tokens of letters, digits and _-=:/@+~, joined by dots, without wildcards"
    for tree in (f"{root}{tree}" for root in dict.fromkeys(("", namespace and f"{namespace}.")) for tree in _TREES):
        if _is_below(prefix, tree) or _is_below(tree, prefix):
            return f"must not be {prefix!r}: natsrt's own subjects are below {tree}, and its user could read them"
    return ""


def service_problem(pattern: str, namespaces: Iterable[str], inboxes: Iterable[str]) -> str:
    """Why no service can have the subjects of ``pattern``, as words that follow it; empty if one can.

    A service takes the requests there. So it has none of the server's subjects, which begin with ``$``, and none that
    is in use in another way: see `taken_problem`.
    """
    if pattern.startswith("$"):
        return "is a subject of the server, whose subjects begin with $"
    return taken_problem(pattern, namespaces, inboxes)


def taken_problem(pattern: str, namespaces: Iterable[str], inboxes: Iterable[str]) -> str:
    """Why a plain subscription cannot have the subjects of ``pattern``, as words that follow it; empty if it can.

    ``pattern`` may not match a subject of natsrt in one of ``namespaces``, nor an inbox: one below ``_INBOX``, which is
    the prefix of clients that have no other one, or below one of the prefixes ``inboxes``.
    """
    roots = dict.fromkeys(name and f"{name}." for name in namespaces)
    for tree in (f"{root}{tree}" for root in roots for tree in _TREES):
        if intersects(pattern, tree) or intersects(pattern, f"{tree}.>"):
            return f"is a subject of natsrt, or includes some: those are {tree} and all below it"
    for prefix in dict.fromkeys((_INBOX, *inboxes)):
        if intersects(pattern, prefix) or intersects(pattern, f"{prefix}.>"):
            return f"is a subject for replies, or includes some: those are {prefix} and all below it"
    return ""


def _is_below(subject: str, tree: str) -> bool:
    return f"{subject}.".startswith(f"{tree}.")


def plain_prefix(prefix: str) -> str:
    """Return the text with which topic types must start to match a ``TypePrefixSubscription`` for ``prefix``.

    This is ``prefix`` itself, except that ``news.*``, the form used in an older guide, means ``news.``. (AutoGen's
    ``is_match`` takes the ``*`` literally and never matches, so compare with this text instead.)

    Raises ValueError, with the spelling that was probably meant, if no topic type can start with ``prefix``.
    """
    text = prefix[:-1] if prefix.endswith(".*") else prefix
    spelled = _TOPIC_TYPE_CHARS.fullmatch(text)
    if spelled:
        return spelled.group()
    possible = _TOPIC_TYPE_CHARS.match(prefix.strip())
    meant = possible.group() if possible else ""
    everything = "" if meant else ", which means every topic"
    raise ValueError(
        f"no topic type can start with {_shown(prefix)}: a prefix is plain text of letters, digits and _ - . : = "
        f"without wildcards; write {_shown(meant)}{everything}"
    )


@dataclass(frozen=True, slots=True)
class Filter:
    """The NATS subject to subscribe to for one AutoGen subscription.

    If ``exact`` is True, the subject matches exactly the topics of the subscription. If it is False, it also matches
    other topics, and the subscriber must also call the subscription's ``is_match``.
    """

    subject: str
    exact: bool


@dataclass(frozen=True, slots=True)
class Subjects:
    """All names of one namespace.

    ``namespace`` is one token of ``[A-Za-z0-9_-]``, at most 200 bytes. It is put before every subject, followed by
    ``.``, and before every bucket and stream, followed by ``_``. With ``""`` there is no such prefix. Queue groups have
    no prefix, because NATS scopes them by their subjects. Namespaces separate names, not users; to separate users,
    use NATS permissions or accounts.

    Raises ConfigurationError for any other namespace, and for namespaces whose subjects would mix with those of an
    application without a namespace.
    """

    namespace: str = ""
    _root: str = field(init=False, repr=False, compare=False)
    _topics: str = field(init=False, repr=False, compare=False)
    _no_reply: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.namespace:
            _check_namespace(self.namespace)
        root = f"{self.namespace}." if self.namespace else ""
        object.__setattr__(self, "_root", root)
        object.__setattr__(self, "_topics", f"{root}topic.")
        object.__setattr__(self, "_no_reply", ("$", *(f"{root}{tree}." for tree in _TREES)))

    def agent(self, agent_type: str) -> str:
        """The subject of calls to any agent of ``agent_type``: ``agent.<type>``."""
        return f"{self._root}agent.{encode_token(agent_type)}"

    def instance(self, agent_type: str, key: str) -> str:
        """The subject of calls to one agent, on the worker that owns it: ``agent.<type>.<key>``."""
        return f"{self._root}agent.{encode_token(agent_type)}.{encode_token(key)}"

    def topic(self, topic_type: str, source: str) -> str:
        """The subject of events on a topic: ``topic.<type tokens>.<source>``.

        Strings that AutoGen's ``TopicId`` refuses have a subject too. Raises ValueError if the subject would be over
        1,024 bytes, or if a string contains a lone surrogate.
        """
        subject = f"{self._topics}{_type_tokens(topic_type)}.{encode_token(source)}"
        if len(subject) > MAX_SUBJECT_BYTES:
            raise _too_long(f"topic type {_shown(topic_type)} with source {_shown(source)}", subject)
        return subject

    def parse_topic(self, subject: str, *, topic_type: str | None = None, source: str | None = None) -> tuple[str, str]:
        """Return topic type and source of an event from its ``subject``: the reverse of `topic`.

        ``topic_type`` and ``source`` are the values in the event's body, None if the body has none. The subject
        decides, because the server checks permissions on it: a value in the body is needed only where the subject has
        a hash, and it must always agree with the subject. This method does not check whether AutoGen's ``TopicId``
        accepts the type.

        Raises ValueError if `topic` never returns ``subject``, if the body has no value for a hash, or if a value in
        the body does not agree with the subject.
        """
        if not subject.startswith(self._topics):
            raise ValueError(f"{_shown(subject)} is not the subject of a topic: it does not start with {self._topics}")
        if len(subject) > MAX_SUBJECT_BYTES:
            raise _too_long("the event", subject)
        type_tokens, dot, source_token = subject[len(self._topics) :].rpartition(".")
        if not dot:
            raise ValueError(f"{_shown(subject)} is not the subject of a topic: it has no source after the topic type")
        return (
            _agreed("topic type", _read_type(type_tokens), topic_type, _type_tokens, type_tokens),
            _agreed("source", _read_token(source_token), source, encode_token, source_token),
        )

    def type_filter(self, topic_type: str) -> Filter:
        """The filter of ``TypeSubscription(topic_type)``: that type with any source.

        Raises ValueError as `topic` does.
        """
        return self._checked_filter(f"{_type_tokens(topic_type)}.*", True, "topic type", topic_type)

    def instance_type_filter(self, topic_type: str, key: str) -> Filter:
        """The filter of ``TypeSubscription(topic_type)`` for the one agent with ``key``: that type with source ``key``.

        Raises ValueError as `topic` does.
        """
        return Filter(self.topic(topic_type, key), True)

    def prefix_filter(self, prefix: str) -> Filter:
        """The filter of ``TypePrefixSubscription(prefix)``.

        | prefix | subject | exact |
        |---|---|---|
        | (empty) | ``topic.*.>`` | yes |
        | ``news.``, also written ``news.*`` | ``topic.news.*.>`` | yes |
        | ``worker:`` | ``topic.worker=3A.*.>`` | yes |
        | ``ord`` | ``topic.*.>`` | no |
        | ``a.b.or`` | ``topic.a.b.*.>`` | no |

        The ``*`` matches one more token of the type, and the ``>`` matches the rest of the type and the source. Without
        the ``*`` the subject would also match the topic ``news`` itself, whose source is the next token. Complete parts
        of the prefix that are hashed are compared by their hash. A prefix that ends inside a part does not determine
        the token of that part. The filter then ends at the boundary before that part and is not exact.

        Raises ValueError if no topic type can start with ``prefix`` (see `plain_prefix`), or if the subject would be
        over 1,024 bytes.
        """
        *complete, rest = _split(plain_prefix(prefix))
        tokens = "".join(f"{encode_token(part)}." for part in complete)
        return self._checked_filter(f"{tokens}*.>", not rest, "prefix", prefix)

    @property
    def everything(self) -> str:
        """The subject that matches every topic."""
        return f"{self._topics}*.>"

    def worker(self, worker_id: str) -> str:
        """The subject on which callers and workers ask one worker about calls."""
        return f"{self._root}natsrt.worker.{encode_token(worker_id)}"

    def peer(self, worker_id: str) -> str:
        """The subject on which other workers ask one worker: ``natsrt.peer.<worker_id>``. Callers need not reach it."""
        return f"{self._root}natsrt.peer.{encode_token(worker_id)}"

    @property
    def view(self) -> str:
        """The subject on which any worker tells what it sees in the registry, for those who may not read the bucket.

        It is outside the registry's feed, which callers hear: they would learn one another's reply subjects.
        """
        return f"{self._root}natsrt.view"

    @property
    def blobs(self) -> str:
        """The subject on which any worker reads and deletes blobs, for those who may send no requests to JetStream."""
        return f"{self._root}natsrt.blobs"

    def asks_tasks(self, agent_type: str) -> str:
        """The subject on which workers tell about tasks of an agent type, to those who may send no requests to
        JetStream."""
        return f"{self._root}natsrt.tasks.{encode_token(agent_type)}"

    def blob(self, blob_id: str, chunk: str) -> str:
        """The subject of the chunks of payloads that are sent by reference: ``natsrt.blob.<id>.<chunk>``.

        Both may be wildcards.
        """
        return f"{self._root}natsrt.blob.{blob_id}.{chunk}"

    def memory(self, name: str, session: str | None = None) -> str:
        """The subject of what a session remembers: ``natsrt.memory.<name>.<session>``; None: of all sessions.

        ``name`` is that of the stream, one token.
        """
        return f"{self._root}natsrt.memory.{name}.{'>' if session is None else encode_token(session)}"

    def remembered(self, name: str, session: str | None = None) -> str:
        """The subject on which the server tells what it has stored on that of `memory`."""
        return f"{self._root}natsrt.remembered.{name}.{'>' if session is None else encode_token(session)}"

    def control(self, agent_type: str, key: str | None = None) -> str:
        """The subject for metadata, state and activation of a type; with ``key``, of one agent.

        It is outside ``agent.>``, so that permission to call agents does not include permission to control them.
        """
        subject = f"{self._root}natsrt.control.{encode_token(agent_type)}"
        return subject if key is None else f"{subject}.{encode_token(key)}"

    def control_at(self, agent_type: str, worker_id: str) -> str:
        """The control subject of a keyed type's agents on one worker: ``natsrt.control.<type>.at.<worker_id>``."""
        return f"{self._root}natsrt.control.{encode_token(agent_type)}.at.{encode_token(worker_id)}"

    @property
    def cancel(self) -> str:
        """The subject on which every cancellation is broadcast."""
        return f"{self._root}natsrt.cancel"

    def again(self, stream: str) -> str:
        """The start of the subjects, without the last dot, on which events of a stream are stored once more for one
        agent type."""
        return self.own("again", stream)

    def later(self, stream: str) -> str:
        """The start of the subjects, without the last dot, of what a stream publishes at a later time."""
        return self.own("later", stream)

    def own(self, kind: str, stream: str) -> str:
        """The start of the subjects of one ``kind`` that a stream of events has beside its topics; ``*``: of all."""
        return f"{self._root}natsrt.{kind}.{stream}"

    def delayed(self, stream: str, message_id: str, subject: str) -> str:
        """The subject on which a stream keeps an event with ``message_id`` that it publishes later on ``subject``.

        Raises ValueError if it would be over 1,024 bytes.
        """
        topic = subject.removeprefix(self._topics)
        later = f"{self.later(stream)}.event.{encode_token(message_id)}.{topic}"
        if len(later) > MAX_SUBJECT_BYTES:
            raise _too_long(f"a delayed event with id {_shown(message_id)} on {subject}", later)
        return later

    def all_delayed(self, stream: str, subject: str) -> str:
        """The filter of all events that a stream publishes later on ``subject``, which may have wildcards."""
        return f"{self.later(stream)}.event.*.{subject.removeprefix(self._topics)}"

    def reminder(self, stream: str, agent_type: str, key: str, name: str) -> str:
        """The subject on which a stream keeps the reminder ``name`` of an agent.

        Raises ValueError if it would be over 1,024 bytes, or if the key or the name has over 200 bytes: there is no
        body that could say what they are.
        """
        tokens = (encode_token(agent_type), encode_token(key), encode_token(name))
        subject = f"{self.reminders(stream)}.{'.'.join(tokens)}"
        for what, value, token in zip(("agent type", "key", "name"), (agent_type, key, name), tokens, strict=True):
            if is_hashed(token):
                raise ValueError(
                    f"the {what} {_shown(value)} of a reminder takes more than {MAX_TOKEN_BYTES} bytes of its subject"
                )
        if len(subject) > MAX_SUBJECT_BYTES:
            raise _too_long(f"the reminder {_shown(name)} of {_shown(f'{agent_type}/{key}')}", subject)
        return subject

    def reminders(self, stream: str) -> str:
        """The start of the subjects of all reminders that a stream keeps, without the last dot."""
        return f"{self.later(stream)}.reminder"

    def task(self, kind: str, agent_type: str, key: str, message_id: str) -> str:
        """The subject on which the ``result`` or the ``progress`` (``kind``) of a task is kept.

        Raises ValueError if it would be over 1,024 bytes.
        """
        tokens = ".".join(encode_token(value) for value in (agent_type, key, message_id))
        subject = f"{self.tasks}.{kind}.{tokens}"
        if len(subject) > MAX_SUBJECT_BYTES:
            raise _too_long(f"the task {_shown(f'{agent_type}/{key}/{message_id}')}", subject)
        return subject

    def all_tasks(self, kind: str, agent_type: str | None) -> str:
        """The filter of the ``result`` or the ``progress`` (``kind``) of all tasks of an agent type; None: of all."""
        return f"{self.tasks}.{kind}.{'*' if agent_type is None else encode_token(agent_type)}.*.*"

    def told(self, subject: str) -> str:
        """The subject on which the server tells what was stored on ``subject``, one of `task`."""
        return f"{self.tasks_told}{subject.removeprefix(self.tasks)}"

    @property
    def tasks(self) -> str:
        """The start of the subjects on which results and progress of tasks are kept, without the last dot."""
        return f"{self._root}natsrt.task"

    @property
    def tasks_told(self) -> str:
        """The start of the subjects on which the server tells what was stored there, without the last dot."""
        return f"{self._root}natsrt.told"

    def dead_letter(self, agent_type: str, stream: str, sequence: int) -> str:
        """The subject of the dead letter of an event that ``agent_type`` could not handle."""
        return f"{self.dead}.{encode_token(agent_type)}.{stream}.{sequence}"

    @property
    def attempts(self) -> str:
        """The start of the subjects on which attempts to handle events are counted, without the last dot."""
        return f"{self._root}natsrt.attempts"

    @property
    def dead(self) -> str:
        """The start of the subjects of dead letters, without the last dot."""
        return f"{self._root}natsrt.dead"

    @property
    def registry_feed(self) -> str:
        """The subject prefix under which the server republishes committed changes of the registry."""
        return f"{self._root}natsrt.registry"

    def bucket(self, name: str) -> str:
        """The name of a bucket or stream: ``<namespace>_<name>``, without a namespace ``name`` itself."""
        return f"{self.namespace}_{name}" if self.namespace else name

    def queue(self, agent_type: str, key: str | None = None) -> str:
        """The queue group in which the workers of a type share messages; with ``key``, the holders of one agent."""
        group = encode_token(agent_type)
        return group if key is None else f"{group}.{encode_token(key)}"

    def is_reserved(self, subject: str) -> bool:
        """True if a worker must refuse to send a reply, or an acceptance (``acceptto``), to ``subject``.

        The caller chooses these subjects, but the worker publishes to them with the worker's permissions. A caller that
        may publish only to ``agent.public`` could name ``agent.admin``, a control subject, a topic or ``$JS.API…``. The
        worker would then publish there, with its own permissions, a text that the caller partly determines. So subjects
        in this namespace's trees and subjects of the server are refused. A subject over 1,024 bytes is refused too:
        with the worker's headers its protocol line can exceed the limit of the server, which then closes the worker's
        connection. The trees of other namespaces are not known here. Use permissions to keep a worker out of them.

        (Acknowledgements of JetStream messages go to ``$JS.ACK…`` and are not replies in this sense.)
        """
        return subject.startswith(self._no_reply) or (
            len(subject) > MAX_SUBJECT_BYTES // 4  # characters take four bytes at most
            and not is_subject_length(subject)
        )

    def _checked_filter(self, tokens: str, exact: bool, what: str, value: str) -> Filter:
        subject = f"{self._topics}{tokens}"
        if len(subject) > MAX_SUBJECT_BYTES:
            raise _too_long(f"{what} {_shown(value)}", subject)
        return Filter(subject, exact)


def is_subject_length(text: str) -> bool:
    """True if ``text`` takes no more bytes than a subject may, which is also the limit of all ids on the wire.

    False for a longer text with a lone surrogate, which UTF-8 cannot encode.
    """
    if len(text) <= MAX_SUBJECT_BYTES // 4 and text.isascii():
        return True
    try:
        return len(text) <= MAX_SUBJECT_BYTES and len(text.encode()) <= MAX_SUBJECT_BYTES
    except UnicodeEncodeError:
        return False


def _check_namespace(namespace: str) -> None:
    if not _PLAIN.fullmatch(namespace):
        raise ConfigurationError(
            "namespace", f"{_shown(namespace)} must be one subject token of letters A-Z a-z, digits, _ and -, or empty"
        )
    if len(namespace) > MAX_TOKEN_BYTES:
        raise ConfigurationError(
            "namespace", f"it takes {len(namespace):,} bytes; at most {MAX_TOKEN_BYTES} are allowed"
        )
    if namespace in (*_TREES, _INBOX):
        raise ConfigurationError(
            "namespace",
            f"{namespace!r} would mix its subjects with those of applications that have no namespace; choose another",
        )


def _token(value: str) -> str:
    token = encode_text(value)
    return token if len(token) <= MAX_TOKEN_BYTES else f"=H{hashlib.sha256(value.encode()).hexdigest()}"


_cached_token = lru_cache(maxsize=_CACHE_ENTRIES)(_token)


def _type_tokens(topic_type: str) -> str:
    return _cached_join(topic_type) if len(topic_type) <= _CACHED_CHARS else _encoded_join(topic_type)


def _encoded_join(topic_type: str) -> str:
    return ".".join(map(encode_token, _split(topic_type)))


_cached_join = lru_cache(maxsize=_CACHE_ENTRIES)(_encoded_join)


def _split(topic_type: str) -> list[str]:
    """The parts of a topic type, at least one. The last one never ends in ``:``.

    Raises ValueError if they are so many that no subject has room for them.
    """
    if len(topic_type) > MAX_SUBJECT_BYTES and topic_type.count(".") + topic_type.count(":") > MAX_SUBJECT_BYTES:
        raise ValueError(
            f"{_shown(topic_type)} has too many parts: of the bytes of a subject at most {MAX_SUBJECT_BYTES:,} are sent"
        )
    parts = []
    for piece in topic_type.split("."):
        *closed, last = piece.split(":")
        parts += [f"{part}:" for part in closed]
        parts.append(last)
    return parts


def _join(parts: list[str]) -> str:
    return "".join(part if part.endswith(":") else f"{part}." for part in parts).removesuffix(".")


@lru_cache(maxsize=_CACHE_ENTRIES)
def _read_type(tokens: str) -> str | None:
    """The topic type for ``tokens``, None if one of them is a hash. Raises ValueError if no type has these tokens."""
    parts = []
    hashed = False
    for token in tokens.split("."):
        part = _read_token(token)
        if part is None:
            hashed = True
        else:
            parts.append(part)
    if hashed:
        return None
    topic_type = _join(parts)
    spelling = _type_tokens(topic_type)
    if spelling != tokens:
        raise ValueError(f"{_shown(tokens)} are not the tokens of a topic type: {_shown(topic_type)} has {spelling}")
    return topic_type


@lru_cache(maxsize=_CACHE_ENTRIES)
def _read_token(token: str) -> str | None:
    """The value of a token of a subject, None if it is a hash. Raises ValueError if no value has that token."""
    if is_hashed(token):
        return None
    value = decode_token(token)
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError(
            f"the token {_shown(token)} takes {len(token):,} bytes, so its hash {_token(value)} must be used"
        )
    return value


def _agreed(what: str, known: str | None, claim: str | None, encode: Callable[[str], str], tokens: str) -> str:
    """Return the value on which subject and body agree. Raises ValueError if they do not.

    ``known`` is the value from the subject, None if the subject has a hash. ``claim`` is the value from the body, None
    if the body has none.
    """
    if claim is None:
        if known is None:
            raise ValueError(
                f"the subject has only the hash of the {what}, {tokens}, and the body does not give its value"
            )
        return known
    agrees = encode(claim) == tokens if known is None else claim == known
    if not agrees:
        raise ValueError(f"the body's {what} {_shown(claim)} does not agree with the subject, which has {tokens}")
    return claim


def _what_is_malformed(token: str) -> str:
    if not token:
        return "it is empty, and the empty name is written '='"
    if is_hashed(token):
        return "it is a hash, and the value is only in the body of the message"
    valid = _ESCAPED.match(token)
    position = valid.end() if valid else 0
    if token[position] == "=":
        return f"the = at position {position} is not followed by two upper-case hex digits"
    return f"{token[position]!r} at position {position} is neither in [A-Za-z0-9_-] nor written as = and two hex digits"


def _too_long(what: str, subject: str) -> ValueError:
    return ValueError(f"the subject for {what} takes {len(subject):,} bytes; at most {MAX_SUBJECT_BYTES:,} are sent")


def _shown(value: str) -> str:
    """``value`` for an error's text, escaped and cut to a readable length."""
    if len(value) <= _SHOWN_CHARS:
        return ascii(str.__str__(value))
    return f"{ascii(value[:_SHOWN_CHARS])}… ({len(value):,} characters)"
