"""Which sessions wait for the present code: those whose turns have led to it.

A call that comes back to a session in the middle of its turn would wait for this turn, and the turn for it. natsrt does
not see that, because AgentChat waits over queues. So such a call is refused before it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_waiting: ContextVar[tuple[str, ...]] = ContextVar("natsrt_agentchat_waiting", default=())


def waiting() -> list[str]:
    """The sessions that wait for the present code, as texts, the outermost first."""
    return list(_waiting.get())


def refuse_circle(session: str) -> None:
    """Raise RuntimeError if ``session`` waits for the present code."""
    if session in _waiting.get():
        raise RuntimeError(
            f"{session} is in the middle of a turn that waits for this call, and would take it after that only: "
            f"{' -> '.join((*_waiting.get(), session))}"
        )


@contextmanager
def in_turn(session: str, callers: Sequence[str]) -> Iterator[None]:
    """Let ``session`` wait for what runs in the block, beside those that wait for its turn."""
    token = _waiting.set((*callers, session))
    try:
        yield
    finally:
        _waiting.reset(token)
