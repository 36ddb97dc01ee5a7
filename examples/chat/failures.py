"""What the page says when a request is refused, or the team has failed."""

from __future__ import annotations


class Refused(Exception):
    """A request of a browser is refused. The text is for people; ``status`` is the HTTP status."""

    status = 400


class TooManyWaiting(Refused):
    """So many messages wait for the team that no more is accepted."""

    status = 429

    def __init__(self) -> None:
        super().__init__("Too many messages wait for the team. Please wait a moment.")


class AlreadyDecided(Refused):
    """The question is not open any more, or there was none."""

    status = 409

    def __init__(self) -> None:
        super().__init__("This question is not open any more.")


class TooManyRooms(Refused):
    """So many rooms are in use that no other one can be opened."""

    status = 503

    def __init__(self) -> None:
        super().__init__("Too many rooms are open. Please come back later.")


_WORKER = "A worker process ended while it was answering."
_NOBODY = "A member of the team is missing: no worker hosts it now."
_SERVER = "The NATS server did not answer."
_REASONS = {
    "WorkerLost": _WORKER,
    "WorkerStopped": _WORKER,
    "StreamAbandoned": _WORKER,
    "AgentNotServed": _NOBODY,
    "NoLiveWorker": _NOBODY,
    "UnknownAgentType": _NOBODY,
    "ServerUnreachable": _SERVER,
    "StateUnavailable": _SERVER,
    "StateNotSaved": _SERVER,
    "CallTimeout": _SERVER,
}
"""By the name of the class."""


def kind_of(error: Exception) -> str:
    """The name of the class of what went wrong."""
    if type(error) is RuntimeError:  # AgentChat makes one of what a member of a team raises: "WorkerLost: …"
        inner = str(error).partition(":")[0]
        if inner.isidentifier():
            return inner
    return type(error).__name__


def readable(error: Exception) -> str:
    """A line for people. It names no worker, server or agent type."""
    kind = kind_of(error)
    reason = _REASONS.get(kind, f"The team failed with an error of the kind {kind}.")
    return f"{reason} Nothing of this answer counts. Please send your message again."


def for_log(error: Exception) -> str:
    """An error for the log: with the traceback that AgentChat puts into its text, unless it is one that is expected."""
    text = f"{type(error).__name__}: {error}"
    return text.partition("\n")[0] if kind_of(error) in _REASONS else text
