"""Agents that could not be made or loaded on this worker. Another worker may be able to.

Its database may be down here, or its state may have been stored by a version of its class that this worker does not
have. The worker then gives the agent up, and declines to claim it for a while, which doubles with each failure. It
tries again at once if no other worker can own the agent.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from autogen_core import AgentId

_FIRST_PAUSE = 1.0
"""Seconds for which an agent is declined after its first failure."""
_LONGEST_PAUSE = 60.0
_MOMENT = 0.5
"""Seconds between two attempts to make an agent that all workers decline."""
_REMEMBER_AT_MOST = 10_000
"""Agents that are remembered at most. The oldest are dropped first."""


class NotMade(Exception):
    """The agent's factory, or its ``load_state``, raised ``error``."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        super().__init__(str(error))


class _Failure(NamedTuple):
    error: Exception
    until: float
    pause: float


class UnmadeAgents:
    """The agents that failed on this worker lately. Times are those of the event loop, in seconds."""

    def __init__(self) -> None:
        self._failures: OrderedDict[AgentId, _Failure] = OrderedDict()

    def failed(self, agent_id: AgentId, error: Exception, now: float) -> None:
        """The agent could not be made or loaded."""
        before = self._failures.pop(agent_id, None)
        pause = _FIRST_PAUSE if before is None else min(2 * before.pause, _LONGEST_PAUSE)
        self._failures[agent_id] = _Failure(error.with_traceback(None), now + pause, pause)
        if len(self._failures) > _REMEMBER_AT_MOST:
            self._failures.popitem(last=False)

    def try_again(self, agent_id: AgentId, now: float) -> bool:
        """Decline the agent no more. Returns False if it was not to be declined, or has failed a moment ago.

        If it fails again, the pause is the next longer one all the same.
        """
        failure = self._failures.get(agent_id)
        if failure is None or now - (failure.until - failure.pause) < _MOMENT:
            return False
        self._failures[agent_id] = failure._replace(until=now)
        return True

    def made(self, agent_id: AgentId) -> None:
        """The agent was made and loaded."""
        self._failures.pop(agent_id, None)

    def error(self, agent_id: AgentId, now: float) -> Exception | None:
        """The error of the last failure, if the agent is to be declined; None if it is to be tried."""
        failure = self._failures.get(agent_id)
        return None if failure is None or now >= failure.until else failure.error
