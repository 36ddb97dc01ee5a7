"""AutoGen agents across processes and machines, with NATS as the only infrastructure."""

from natsrt import errors
from natsrt.agents.current_delivery import DeliveryInfo, current_delivery
from natsrt.agents.current_task import progress
from natsrt.agents.streaming import ask, emit, streaming
from natsrt.durable_types import DurableTopics
from natsrt.errors import *  # noqa: F403  # the whole tree of exceptions is public
from natsrt.jetstream.dead_letter_box import DeadLetter
from natsrt.jetstream.recorded_stream import RecordedEntry
from natsrt.observe.health import Health
from natsrt.options import Options
from natsrt.registration import register
from natsrt.reminder_types import Reminder
from natsrt.runtime import NatsAgentRuntime, create_distributed_runtime, runtime_of
from natsrt.sending.message_stream import MessageStream
from natsrt.sending.tickets import Ticket
from natsrt.task_types import TaskStatus
from natsrt.version import VERSION as __version__

# isort: split
# Last: the decorator `natsrt.keyed` has the name of the package natsrt/keyed, which the imports above bind.
from natsrt.keyed_types import KeyedOptions, keyed, out_of_turn

__all__ = [
    "DeadLetter",
    "DeliveryInfo",
    "DurableTopics",
    "Health",
    "KeyedOptions",
    "MessageStream",
    "NatsAgentRuntime",
    "Options",
    "RecordedEntry",
    "Reminder",
    "TaskStatus",
    "Ticket",
    "__version__",
    "ask",
    "create_distributed_runtime",
    "current_delivery",
    "emit",
    "keyed",
    "out_of_turn",
    "progress",
    "register",
    "runtime_of",
    "streaming",
    *errors.__all__,
]
