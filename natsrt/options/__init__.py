"""The settings of a runtime: their meaning, their defaults and where they come from.

Sources, the highest first: arguments in code or on the command line; the environment; a configuration file; a NATS
context; the defaults. In the environment ``NATSRT_<FIELD>`` stands above the variables of the ``nats`` CLI
(``NATS_URL``, ``NATS_CREDS``, …).

Rules:

- One source decides *how* to authenticate. A credential of another kind in a lower source is left out: a token in code
  beats ``NATS_CREDS``. Parts of one kind complete each other: the user from a file, the password from the environment.
  Within one source two kinds are an error.
- A user in a server URL belongs to that URL: it goes when a higher source names other servers. It is taken out of the
  URL at once, so ``servers`` holds no secret, and it applies to every server of the list.
- Nothing is left out in silence: an unknown name, a missing file or a value that cannot be used is a
  `ConfigurationError` that names the setting as it was written. Its text never holds a secret.
"""

from natsrt.options.settings import OptionRow, Options, describe_options
from natsrt.options.sources import NATS_ENVIRONMENT

__all__ = ["NATS_ENVIRONMENT", "OptionRow", "Options", "describe_options"]
