"""Model clients in other processes: workers host a model, and agents anywhere use it as a ``ChatCompletionClient``.

`host_model` makes a model client an agent type. `RemoteChatCompletionClient` is a model client that calls it. It needs
no extra. See docs/models.md.
"""

from natsrt.contrib.models.client import RemoteChatCompletionClient, RemoteModelConfig
from natsrt.contrib.models.hosted import ModelAgent, host_model
from natsrt.contrib.models.messages import DescribeModel, ModelBusy, ModelDescription, ModelRequest, ModelStarted

__all__ = [
    "DescribeModel",
    "ModelAgent",
    "ModelBusy",
    "ModelDescription",
    "ModelRequest",
    "ModelStarted",
    "RemoteChatCompletionClient",
    "RemoteModelConfig",
    "host_model",
]
