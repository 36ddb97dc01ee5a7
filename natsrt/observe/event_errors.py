"""What went wrong with events. Nobody waits for them, so errors are kept until the runtime stops, as in AutoGen."""

from __future__ import annotations

from natsrt.options import Options


class EventErrors:
    """The first error of an event in one runtime."""

    def __init__(self, options: Options) -> None:
        self._ignored = options.ignore_unhandled_exceptions
        self.first: BaseException | None = None
        """The first error; None if there was none, or if ``ignore_unhandled_exceptions`` is on."""

    def record(self, error: BaseException) -> None:
        """An event could not be handled, or not be delivered."""
        if not self._ignored and self.first is None:
            self.first = error
