"""How commands end: exit codes, and one line on standard error instead of a traceback."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import click

from natsrt.errors import (
    AgentNotServed,
    CallTimeout,
    ConfigurationError,
    JetStreamRequired,
    NatsrtError,
    NoLiveWorker,
    PermissionDenied,
    RegistryUnavailable,
    ServerUnreachable,
    StateUnavailable,
    StreamUnavailable,
    SubscriptionNotServed,
    SubscriptionRefused,
    TaskUnknown,
    TlsFailed,
    UnknownAgent,
    UnknownAgentType,
)

from .output import OutputFailed, note


class Exit(IntEnum):
    """The exit codes; `MEANINGS` says what each is for."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_CONNECTED = 3
    UNKNOWN_AGENT = 4
    TIMEOUT = 5
    REMOTE_ERROR = 6
    PROBLEMS = 7
    CUT_SHORT = 8
    STUCK = 9
    INTERRUPTED = 130


MEANINGS = {
    Exit.OK: "success; also after Ctrl-C or SIGTERM, for commands that run until then",
    Exit.FAILED: "a failure that has no exit code of its own",
    Exit.USAGE: "a wrong option, setting, module or name",
    Exit.NOT_CONNECTED: "no server, access denied, or no JetStream or registry",
    Exit.UNKNOWN_AGENT: "the agent, or what else was named, is unknown, or no live worker hosts the agent",
    Exit.TIMEOUT: "no answer, no result, or no worker to wait for, in time",
    Exit.REMOTE_ERROR: "the agent answered with an error",
    Exit.PROBLEMS: "problems were found",
    Exit.CUT_SHORT: "a worker stopped before all its handlers had finished",
    Exit.STUCK: "a worker stopped, but threads or tasks of its agents did not end",
    Exit.INTERRUPTED: "interrupted by Ctrl-C",
}


class CommandFailed(Exception):
    """A failure of the command itself. Its text is shown to the user: one line, or a few."""

    def __init__(self, text: str, code: Exit = Exit.FAILED) -> None:
        self.code = code
        super().__init__(text)


_CODES: tuple[tuple[tuple[type[NatsrtError], ...], Exit], ...] = (
    ((ConfigurationError,), Exit.USAGE),
    (
        (
            ServerUnreachable,
            PermissionDenied,
            SubscriptionRefused,
            JetStreamRequired,
            RegistryUnavailable,
            StateUnavailable,
            StreamUnavailable,
        ),
        Exit.NOT_CONNECTED,
    ),
    ((UnknownAgentType, UnknownAgent, NoLiveWorker, TaskUnknown), Exit.UNKNOWN_AGENT),
    ((AgentNotServed, CallTimeout, SubscriptionNotServed), Exit.TIMEOUT),
)


def exit_code(error: BaseException) -> Exit:
    """The exit code of an error; `Exit.REMOTE_ERROR` for any error that an agent answered with."""
    if isinstance(error, CommandFailed):
        return error.code
    if is_remote(error):
        return Exit.REMOTE_ERROR
    return next((code for classes, code in _CODES if isinstance(error, classes)), Exit.FAILED)


_OPTIONS = {
    "turn tls_first off": "leave --tlsfirst (NATSRT_TLS_FIRST) out",
    "set tls_first": "use --tlsfirst (NATSRT_TLS_FIRST=true)",
    "tls_hostname": "NATSRT_TLS_HOSTNAME",
    "tls_ca": "--tlsca (NATS_CA)",
    "tls_cert": "--tlscert (NATS_CERT)",
    "tls_key": "--tlskey (NATS_KEY)",
}
"""How errors of TLS name the settings, and how the command line does."""
_SETTING = re.compile("|".join(rf"\b{words}\b" for words in _OPTIONS))


def _with_options(text: str) -> str:
    """The text of an error of TLS, with the options and variables of the command line in the place of settings."""
    return _SETTING.sub(lambda found: _OPTIONS[found[0]], text)


def is_remote(error: BaseException) -> bool:
    """Whether an agent answered with this error."""
    return hasattr(error, "natsrt_remote")


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Print an expected error as one line, and exit with its code. With ``debug``, print its traceback first."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, CommandFailed | NatsrtError | OutputFailed) and not is_remote(error):
            raise
        if debug:
            note("".join(traceback.format_exception(error)).rstrip(), "error")
        note(f"natsrt: {answered(error)}", "error")
        raise click.exceptions.Exit(exit_code(error)) from error


def answered(error: BaseException) -> str:
    """The text of an error; if an agent answered with it, also which one."""
    remote = getattr(error, "natsrt_remote", None)
    if remote is None:
        return _with_options(str(error)) if isinstance(error, TlsFailed | PermissionDenied) else str(error)
    # The text of a NatsrtError says what happened. The text of another class may be a bare value, as with KeyError.
    text = str(error) if isinstance(error, NatsrtError) else f"{type(error).__name__}: {error}"
    worker = f" on worker {remote.worker_id}" if remote.worker_id else ""
    return f"{text} (answered by {remote.agent}{worker})"
