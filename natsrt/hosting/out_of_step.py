"""Holds messages while this worker may not know the subscriptions that are in force.

After a reconnect, and until the registry has been read again, this worker knows the subscriptions of its types as they
were before. A filter with wildcards may bring it an event for one that was added meanwhile. The server gives the event
to one member of the queue group only, so it would be lost if this worker ignored it.

Calls wait if other runtimes may have removed this worker, as after a long loss of its connection. They did not ask it
then for promises about calls that were lost on their way (decision 35). It learns those promises before it is in step
again, and such a call may come before that.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from natsrt.agents.hosted_type import HostedType
from natsrt.agents.inbound import CALL, EVENT, Inbound
from natsrt.hosting.intake import Intake
from natsrt.jetstream.registry.registry import Registry

_LEARNS_WITHIN: Final = 5.0
"""Seconds for which calls wait at most. JetStream may stay away for longer, and calls do not need it."""


class OutOfStep:
    """Decides which messages wait until this worker is in step with the registry again."""

    def __init__(self, registry: Registry, intake: Intake) -> None:
        self._registry = registry
        self._intake = intake
        self._types: set[HostedType] = set()
        """The types of which a message waits. Their later messages wait too, so that the order is kept."""

    def holds(self, inbound: Inbound) -> bool:
        """True if a message that was identified must wait, and then be identified again.

        An event that nobody here subscribed to waits, unless much is waiting already: the intake counts what waits.
        """
        unmatched, away = inbound.kind is EVENT and inbound.key is None, self._registry.away
        if not (unmatched or self._types or away) or self._registry.synced:  # so most messages cost little
            return False
        hosted = inbound.route.hosted
        if hosted in self._types:
            return inbound.kind is EVENT or inbound.kind is CALL
        if not (away and inbound.kind is CALL) and (not unmatched or self._intake.is_half_full):
            return False
        self._types.add(hosted)
        return True

    async def end(self) -> None:
        """Wait until this worker is in step with the registry. Waits end in the order in which they began."""
        if self._registry.away:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LEARNS_WITHIN):
                    await self._registry.in_step()
            self._registry.away = False
        else:
            await self._registry.in_step()
        self._types.clear()
