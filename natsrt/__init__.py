"""AutoGen agents across processes and machines, with NATS as the only infrastructure."""

from natsrt import errors
from natsrt.errors import *  # noqa: F403  # the whole tree of exceptions is public
from natsrt.observe.health import Health
from natsrt.options import Options
from natsrt.registration import register
from natsrt.runtime import NatsAgentRuntime, create_distributed_runtime, runtime_of
from natsrt.version import VERSION as __version__

# isort: split
# Last: the decorator `natsrt.keyed` has the name of the package natsrt/keyed, which the imports above bind.
from natsrt.keyed_types import KeyedOptions, keyed

__all__ = [
    "Health",
    "KeyedOptions",
    "NatsAgentRuntime",
    "Options",
    "__version__",
    "create_distributed_runtime",
    "keyed",
    "register",
    "runtime_of",
    *errors.__all__,
]
