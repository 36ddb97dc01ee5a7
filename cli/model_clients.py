"""Model clients, as ``natsrt worker`` finds them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from natsrt.runtime import NatsAgentRuntime


def is_model(found: Any) -> bool:
    """Whether this is a model client."""
    return isinstance(found, _bases())


def is_model_class(cls: type) -> bool:
    """Whether this is a class of model clients."""
    return issubclass(cls, _bases())


def _bases() -> tuple[type, ...]:
    """The class of model clients; none if nothing has imported it, since then there is no object of it."""
    models = sys.modules.get("autogen_core.models")
    return () if models is None else (models.ChatCompletionClient,)


async def host_client(runtime: NatsAgentRuntime, agent_type: str, first: Any, factory: Callable[[], Any]) -> None:
    """Host model clients: ``first``, and those that ``factory`` makes. Raises as `natsrt.contrib.models.host_model`."""
    from natsrt.contrib.models import host_model

    unused = [first]
    await host_model(runtime, agent_type, lambda: unused.pop() if unused else factory())
