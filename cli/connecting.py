"""The options that commands share, and the runtime that is made from them."""

from __future__ import annotations

import functools
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import click

from natsrt.errors import ConfigurationError
from natsrt.options import Options
from natsrt.options.sources import ENVIRONMENT_PREFIX, NATS_ENVIRONMENT
from natsrt.runtime import NatsAgentRuntime

from .env_file import env_file_option
from .exits import Exit, reporting
from .logs import log_options, log_to_stderr
from .output import OutputClosed

_FLAGS: Mapping[str, tuple[str, str, str]] = {
    "servers": ("--server", "URL", "Server, or several with commas ($NATS_URL)."),
    "context": ("--context", "NAME", "Context of the nats CLI ($NATS_CONTEXT)."),
    "creds": ("--creds", "FILE", "Credentials file ($NATS_CREDS)."),
    "user": ("--user", "USER", "User name ($NATS_USER)."),
    "password": ("--password", "PASSWORD", "Password ($NATS_PASSWORD)."),
    "token": ("--token", "TOKEN", "Token ($NATS_TOKEN)."),
    "nkey_seed_file": ("--nkey", "FILE", "User NKEY seed file ($NATS_NKEY)."),
    "tls_ca": ("--tlsca", "FILE", "CA certificates to check the server's certificate with ($NATS_CA)."),
    "tls_cert": ("--tlscert", "FILE", "Client certificate ($NATS_CERT)."),
    "tls_key": ("--tlskey", "FILE", "Private key of the client certificate ($NATS_KEY)."),
    "tls_first": ("--tlsfirst", "", "Begin with the TLS handshake ($NATSRT_TLS_FIRST)."),
    "namespace": ("--namespace", "NAME", "natsrt namespace ($NATSRT_NAMESPACE)."),
    "inbox_prefix": ("--inbox-prefix", "SUBJECT", "Prefix of reply subjects ($NATSRT_INBOX_PREFIX)."),
    "jetstream_domain": ("--js-domain", "DOMAIN", "JetStream domain of the registry ($NATSRT_JETSTREAM_DOMAIN)."),
    "connect_timeout": ("--timeout", "DURATION", "How long to wait for answers: 5, 500ms, 1m30s ($NATS_TIMEOUT)."),
}
"""The connection settings that have a flag, by field of `Options`: flag, placeholder of its value, help.

A flag without a placeholder has no value, and sets the field to true.
"""

_VARIABLES: Mapping[str, list[str]] = {
    field: [variable for variable, other in NATS_ENVIRONMENT.items() if other == field]
    for field in NATS_ENVIRONMENT.values()
}
"""The variables of the ``nats`` CLI, by field of `Options`."""


@dataclass(frozen=True, slots=True)
class Connecting:
    """The connection options of one command line.

    ``given`` has their texts by field of `Options`; ``config`` is the path of a settings file, None for none.
    ``env_files`` says where the variables stand that ``--env-file`` has added to the environment, by name.
    """

    given: Mapping[str, str]
    config: str | None
    env_files: Mapping[str, str]
    log_level: str
    log_format: str

    @property
    def timeout(self) -> str | None:
        """The text of ``--timeout``; None if it was not given."""
        return self.given.get("connect_timeout")

    def options(self, **more: Any) -> Options:
        """All settings, from the command line, the environment, a file and a context.

        Raises:
            ConfigurationError: A setting is wrong. One from the command line is named by its flag.
        """
        try:
            return Options.load(config=self.config, **{**self.given, **more})
        except ConfigurationError as error:
            raise self.named(error) from None

    def named(self, error: ConfigurationError) -> ConfigurationError:
        """The error, with the setting named as the user gave it: by its flag, or by the place of its variable."""
        if error.setting in self.given:
            return ConfigurationError(_FLAGS[error.setting][0], error.problem)
        # Files are read when the runtime connects; their errors name the field.
        variables = (ENVIRONMENT_PREFIX + error.setting.upper(), *_VARIABLES.get(error.setting, ()))
        name = next((variable for variable in variables if os.environ.get(variable)), error.setting)
        if name in self.env_files:
            name = f"{self.env_files[name]}: {name}"
        return error if name == error.setting else ConfigurationError(name, error.problem)

    def arguments(self) -> list[str]:
        """The same options as arguments for another ``natsrt`` command, which inherits this process's environment."""
        arguments = []
        for field, value in self.given.items():
            flag, metavar, _ = _FLAGS[field]
            arguments += [flag, value] if metavar else [flag]
        if self.config is not None:
            arguments += ["--config", self.config]
        return [*arguments, "--log-level", self.log_level, "--log-format", self.log_format]

    @asynccontextmanager
    async def runtime(self, **more: Any) -> AsyncIterator[NatsAgentRuntime]:
        """A started runtime that hosts nothing."""
        async with NatsAgentRuntime(options=self.options(**more)) as runtime:
            yield runtime


def basics(log_level: str = "warning") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``--debug`` and the options of the log, log to standard error, and print an error as one line."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
        @log_options(log_level)
        @functools.wraps(command)
        def run(debug: bool, log_level: str, log_format: str, **parameters: Any) -> Any:
            log_to_stderr(log_level, log_format)
            with reporting(debug):
                try:
                    return command(log_level=log_level, log_format=log_format, **parameters)
                except OutputClosed:
                    return Exit.OK

        return run

    return decorate


def connects(log_level: str = "warning") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options of a command that connects. The command gets a `Connecting` as its first argument."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def run(
            config: str | None, env_files: Mapping[str, str], log_level: str, log_format: str, **parameters: Any
        ) -> Any:
            given = {field: parameters.pop(field) for field in _FLAGS}
            given = {field: value for field, value in given.items() if value is not None}
            connecting = Connecting(given, config, env_files, log_level, log_format)
            try:
                return command(connecting, **parameters)
            except ConfigurationError as error:
                raise connecting.named(error) from error

        decorated = env_file_option(basics(log_level)(run))
        decorated = click.option("--config", metavar="FILE", help="Settings file, TOML or YAML ($NATSRT_CONFIG).")(
            decorated
        )
        for field, (flag, metavar, text) in reversed(list(_FLAGS.items())):
            names = ("-s", flag) if field == "servers" else (flag,)
            kind: dict[str, Any] = {"metavar": metavar} if metavar else {"flag_value": "true"}
            decorated = click.option(*names, field, **kind, help=text)(decorated)
        return decorated

    return decorate
