"""Logging of the commands to standard error, which gives way to what a user's module configures.

Rules:

1. The root logger gets no handler. Instead, the handler of last resort, which Python uses for records that no other
   handler takes, writes them in natsrt's format. So ``logging.basicConfig`` of a user's module is not ignored, as it
   would be if the root logger had a handler; and when the module has added a handler, no line appears twice.
2. AutoGen logs every message at INFO, and watchfiles every change. Their loggers are quiet unless the user's module
   gives the root logger a handler, or gives them a level of their own.
"""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_NOISY = ("autogen_core", "watchfiles")
_QUIET = logging.WARNING - 1
"""The level of quiet loggers. It is not WARNING, so that a level that a user's module has set can be told from it."""


def log_to_stderr(level: str) -> None:
    """Log records of ``level`` and above to standard error until a handler is added to the root logger."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.lastResort = handler
    logging.getLogger().setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(_QUIET)


def give_way() -> None:
    """Call this after code of the user has run: if it has configured logging, natsrt's own levels no longer count."""
    if logging.getLogger().handlers:
        for name in _NOISY:
            if logging.getLogger(name).level == _QUIET:
                logging.getLogger(name).setLevel(logging.NOTSET)
