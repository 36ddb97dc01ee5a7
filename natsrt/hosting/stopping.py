"""Stops the handler of a call whose caller is gone, in steps.

Its cancellation token is set, what it sends raises `StreamAbandoned`, and its task is cancelled a moment later. The
token is its own: it follows that of the call, whose other copies are not cancelled with it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from autogen_core import CancellationToken, MessageContext

from natsrt.agents.inbound import Inbound
from natsrt.errors import StreamAbandoned
from natsrt.transport.cancellation import Cancellations

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_WITHIN: Final = 0.25
"""Seconds between the cancellation of a handler's token and that of its task."""


class Stopping:
    """Stops one handler, if that is still needed."""

    def __init__(self, inbound: Inbound) -> None:
        self._inbound = inbound
        self._token = CancellationToken()
        self._follows: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Cancelled when the token of the call is; done when the handler has ended."""
        self._timer: asyncio.TimerHandle | None = None
        self.is_abandoned: bool = False
        """True if the handler is to stop, because nobody wants what it sends."""
        self.ended_at: float | None = None
        """When the handler ended, by the event loop's clock; None before that."""

    def __str__(self) -> str:
        return f"{self._inbound.agent_type}/{self._inbound.key}"

    def follow(self, context: MessageContext, cancellations: Cancellations) -> None:
        """Give the handler a token of its own, which is cancelled when that of its call is."""
        call_token, context.cancellation_token = context.cancellation_token, self._token
        if call_token.is_cancelled():
            self._cancel_token()
        self._follows.add_done_callback(lambda follows: self._cancel_token() if follows.cancelled() else None)
        cancellations.link(call_token, self._follows)

    def _cancel_token(self) -> None:
        try:
            self._token.cancel()
        except Exception:  # raised by a callback that the user added
            logger.exception("a callback of a cancellation token failed")

    @property
    def may_send(self) -> bool:
        """True while somebody wants what the handler sends."""
        return not self.is_abandoned and self.ended_at is None

    def require_caller(self) -> None:
        """Raise `StreamAbandoned` if nobody wants what the handler sends."""
        if not self.may_send:
            raise StreamAbandoned(str(self), None if self.ended_at is None else "its handler has ended")

    def reported(self, error: BaseException) -> BaseException:
        """The error with which the call ends whose handler has raised ``error``."""
        if self.is_abandoned and isinstance(error, asyncio.CancelledError):
            return StreamAbandoned(str(self))
        return error

    def abandon(self, *, stops: bool = True) -> bool:
        """Stop the handler; or only note that nobody wants what it sends, if not ``stops``.

        Returns False if it has ended, or is abandoned.
        """
        if not self.may_send:
            return False
        self.is_abandoned = True
        if not stops:
            return True
        self._timer = asyncio.get_running_loop().call_later(_WITHIN, self._inbound.cancel)
        self._cancel_token()
        return True

    def end(self) -> None:
        """The handler has ended."""
        self.ended_at = asyncio.get_running_loop().time()
        if not self._follows.done():
            self._follows.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
