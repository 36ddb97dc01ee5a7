"""The version of natsrt."""

from importlib.metadata import version

VERSION = version("natsrt")
