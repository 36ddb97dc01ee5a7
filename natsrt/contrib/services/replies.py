"""Reads the replies of a service: one, or several and an end. Values without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from natsrt.contrib.services.json_types import JsonType
from natsrt.errors import CannotDecode, ServiceError
from natsrt.plain import PART_HEADER, PARTS_HEADER, SERVICE_ERROR, SERVICE_ERROR_CODE

_UNKNOWN_CODE: Final = 500
_DIGITS: Final = 15
"""Of the largest number that is read."""


class RepliesRead:
    """The replies to one request that were read.

    Args:
        subject: The subject of the request, for errors.
        response: The type of the replies.
        stream: True if there are several replies, and an empty message as the end. The end may overtake parts.
    """

    def __init__(self, subject: str, response: JsonType, *, stream: bool) -> None:
        self._subject = subject
        self._what = f"the reply of {subject}"
        self._response = response
        self._stream = stream
        self.count: int = 0
        """How many items were read."""
        self.total: int | None = None if stream else 1
        """How many items there are; None: not known yet."""

    @property
    def is_complete(self) -> bool:
        return self.count == self.total

    def read(self, headers: Mapping[str, str], payload: bytes) -> list[Any]:
        """Read a reply: an item, or none if it is the end.

        Raises:
            ServiceError: It reports an error.
            CannotDecode: It does not fit the type, or shows that others were lost.
        """
        self._require_success(headers)
        if self._stream and not payload and PART_HEADER not in headers:
            self.total = self._total_of(headers)
            return []
        expected = str(self.count + 1)
        if self._stream and headers.get(PART_HEADER, expected) != expected:
            raise CannotDecode(
                self._what, f"its {PART_HEADER} is {headers[PART_HEADER]:.20}, not {expected}: parts were lost"
            )
        item = self._response.decode(payload, self._what)
        self.count += 1
        return [item]

    def missing(self) -> CannotDecode | None:
        """The error if no more replies come; None if the end is missing, too."""
        if self.total is None or not self._stream:
            return None
        return CannotDecode(self._what, f"only {self.count} of its {self.total} parts have arrived")

    def _require_success(self, headers: Mapping[str, str]) -> None:
        """Raise the error that a reply reports in the headers of services (ADR-32), if it does."""
        description, code = headers.get(SERVICE_ERROR), headers.get(SERVICE_ERROR_CODE)
        if description is not None or code is not None:
            number = _number(code)
            raise ServiceError(
                self._subject, _UNKNOWN_CODE if number is None else number, description or "it gives no description"
            )

    def _total_of(self, headers: Mapping[str, str]) -> int:
        total = self.count if PARTS_HEADER not in headers else _number(headers[PARTS_HEADER])
        if total is None or total < self.count:
            raise CannotDecode(
                self._what, f"its {PARTS_HEADER} is {headers[PARTS_HEADER]:.20}, and {self.count} have arrived"
            )
        return total


def _number(text: str | None) -> int | None:
    """The number that a header has; None if it has none."""
    is_number = text is not None and text.isascii() and text.isdigit() and len(text) <= _DIGITS
    return int(text) if text is not None and is_number else None
