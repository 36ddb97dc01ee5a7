"""The envelope attributes of the messages that one runtime sends."""

from __future__ import annotations

from autogen_core import AgentId, CancellationToken, TopicId
from nats.nuid import NUID

from natsrt.observe.metrics import Counters
from natsrt.transport.calls import Calls
from natsrt.transport.cancellation import Cancellations
from natsrt.wire import envelope
from natsrt.wire.envelope import attribute, message_names, quote
from natsrt.wire.serialization import Encoded
from natsrt.wire.subjects import encode_text, is_hashed


def milliseconds(timeout: float) -> str:
    """Return the attribute ``timeout`` for a number of seconds."""
    return str(max(0, round(timeout * 1000)))


def unhashed(subject: str, topic: TopicId) -> str:
    """Return the attributes with the topic's type and source, if the subject contains only their hashes."""
    tokens = subject.split(".")
    attributes = f",{attribute('topicsource', topic.source)}" if is_hashed(tokens[-1]) else ""
    if any(is_hashed(token) for token in tokens[:-1]):
        attributes += f",{attribute('topictype', topic.type)}"
    return attributes


class MessageAttributes:
    """Writes envelope attributes as JSON text, for `natsrt.wire.envelope.encode`."""

    def __init__(self, calls: Calls, cancellations: Cancellations, counters: Counters) -> None:
        self._calls = calls
        self._cancellations = cancellations
        self._counters = counters
        self._id_prefix = NUID().next().decode()
        self._of_types: dict[tuple[str, str | None], str] = {}

    def next_id(self) -> str:
        """Return a new message id. `Counters.sent` must have been increased for the message before."""
        return f"{self._id_prefix}-{self._counters.sent:x}"

    def message(
        self, message_id: str, sender: AgentId | None, encoded: Encoded, token: CancellationToken | None
    ) -> str:
        """Return the attributes that both calls and events have: id, source, class, and the id of ``token``.

        ``sender`` is None if no agent sends the message. ``token`` is None if there is no cancellation token.
        """
        source = '"/"' if sender is None else quote(f"{sender.type}/{encode_text(sender.key)}")
        named = encoded.type_name, encoded.class_name
        of_type = self._of_types.get(named)
        if of_type is None:
            of_type = self._of_types[named] = message_names(*named)
        attributes = f'"id":{quote(message_id)},"source":{source},{of_type}'
        return attributes if token is None else f'{attributes},"cancelid":"{self._cancellations.id_of(token)}"'

    def call(self, agent: AgentId, timeout: float | None = None) -> str:
        """Return the attributes that a call has in addition to those of `message`, with a leading comma.

        ``timeout`` is for how many seconds its caller waits; None: without a deadline.
        """
        attributes = (
            f',"subject":"{encode_text(agent.key)}","acceptto":"{self._calls.accept_to}",{envelope.FEATURES_ATTRIBUTE}'
        )
        return attributes if timeout is None else f'{attributes},"timeout":"{milliseconds(timeout)}"'

    def question(self, agent: AgentId) -> str:
        """Return the attributes of a question or control message about an agent."""
        return f"{attribute('id', self.next_id())},{attribute('source', envelope.NO_AGENT)}{self.call(agent)}"
