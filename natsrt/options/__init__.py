"""The settings of a runtime: their meaning, their defaults and their sources.

Sources, the highest first: arguments in code or on the command line; the environment; a configuration file; a NATS
context; the defaults. In the environment, ``NATSRT_<FIELD>`` overrides the variables of the ``nats`` CLI
(``NATS_URL``, ``NATS_CREDS``, …).

Rules:

- The highest source with a credential decides *how* to authenticate. Credentials of another kind in lower sources are
  ignored: a token in code overrides ``NATS_CREDS``. Parts of one kind may come from several sources: the user from a
  file, the password from the environment. Two kinds in one source are an error.
- A user in a server URL belongs to that URL: it is ignored when a higher source names other servers. It is removed from
  the URL at once, so that ``servers`` contains no secret, and it is used for every server of the list.
- Nothing else is ignored: an unknown name, a missing file or an unusable value raises a `ConfigurationError`, which
  names the setting as it was written. Its text never contains a secret.
"""

from natsrt.options.settings import OptionRow, Options, describe_options
from natsrt.options.sources import NATS_ENVIRONMENT

__all__ = ["NATS_ENVIRONMENT", "OptionRow", "Options", "describe_options"]
