"""What went wrong with events. Nobody waits for them, so errors are kept until the runtime stops, as in AutoGen."""

from __future__ import annotations

from natsrt.options import Options


class EventErrors:
    """The first error of an event in one runtime."""

    def __init__(self, options: Options) -> None:
        self._ignored = options.ignore_unhandled_exceptions
        self._first: BaseException | None = None

    def record(self, error: BaseException) -> None:
        """An event could not be handled, or not be delivered."""
        if not self._ignored and self._first is None:
            self._first = error

    def take(self) -> BaseException | None:
        """Return the first error, once. None if there was none, or if ``ignore_unhandled_exceptions`` is on."""
        error, self._first = self._first, None
        return error
