"""The peers that are compared. Each peer is a module with ``ROLES``, which only the peer's own processes import."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from benchmarks.setup import Setup


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A runtime or library that is measured.

    Args:
        name: Name on the command line and in rows.
        title: Description for readers.
        module: Name of the module whose ``ROLES`` contains the roles by name. Every peer has the role ``caller``.
        requires: Names of Python modules that must be installed.
        has_host: Whether a process of the role ``host`` connects caller and worker, instead of the NATS server.
        has_workers: Whether processes of the role ``worker`` host the agents. If not, there are no worker processes.
        many_workers: Whether several workers can host one agent type.
    """

    name: str
    title: str
    module: str
    requires: tuple[str, ...] = ()
    has_host: bool = False
    has_workers: bool = True
    many_workers: bool = True

    def missing(self, setup: Setup) -> str | None:
        """Return the reason why the peer cannot take part in a measurement with ``setup``; None if it can."""
        for module in self.requires:
            if not _is_installed(module):
                return f"not installed: {module}"
        if setup.workers > 1 and not self.many_workers:
            return "one worker per agent type"
        return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


BARE = Peer(name="bare", title="bare nats-py", module="benchmarks.peers.bare")
NATSRT = Peer(name="natsrt", title="natsrt", module="benchmarks.peers.natsrt_peer")
GRPC = Peer(
    name="grpc",
    title="AutoGen's gRPC runtime",
    module="benchmarks.peers.grpc",
    requires=("grpc", "autogen_ext.runtimes.grpc"),
    has_host=True,
    many_workers=False,
)
HTTP = Peer(
    name="http",
    title="the HTTP runtime",
    module="benchmarks.peers.http",
    requires=("autogen_http_runtime",),
    has_host=True,
    many_workers=False,
)
IN_PROCESS = Peer(
    name="in-process",
    title="AutoGen's SingleThreadedAgentRuntime, in one process",
    module="benchmarks.peers.in_process",
    has_workers=False,
    many_workers=False,
)

FASTSTREAM = Peer(
    name="faststream",
    title="FastStream's request-reply over NATS",
    module="benchmarks.peers.faststream_peer",
    requires=("faststream.nats",),
)
RAY = Peer(
    name="ray",
    title="Ray actors",
    module="benchmarks.peers.ray_peer",
    requires=("ray",),
    has_workers=False,
    many_workers=False,
)

PEERS = (BARE, NATSRT, GRPC, HTTP, IN_PROCESS)
"""The peers of all scenarios that compare runtimes: bare NATS and AutoGen's runtimes."""
OTHERS = (FASTSTREAM, RAY)
"""Alternatives to agents. Measured for calls only, and only if the extra ``bench-others`` is installed."""
ALL_PEERS = (*PEERS, *OTHERS)
