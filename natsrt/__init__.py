"""AutoGen agents across processes and machines, with NATS as the only infrastructure."""

from natsrt import errors
from natsrt.errors import *  # noqa: F403  # the whole tree of exceptions is public
from natsrt.options import Options
from natsrt.registration import register
from natsrt.runtime import NatsAgentRuntime, create_distributed_runtime
from natsrt.version import VERSION as __version__

__all__ = [
    "NatsAgentRuntime",
    "Options",
    "__version__",
    "create_distributed_runtime",
    "register",
    *errors.__all__,
]
