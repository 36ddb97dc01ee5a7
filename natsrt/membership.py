"""Announces the agent types, instances and subscriptions of a runtime to the other runtimes.

A runtime becomes a *worker* when it hosts its first agent type: it joins the registry, subscribes to its own subject,
and appears as a NATS service. A runtime that only calls and publishes never becomes a worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Sequence

from autogen_core import Subscription

from natsrt.agents.hosted_type import HostedType
from natsrt.assembly import Incoming, Network, Program
from natsrt.errors import NatsrtError, SubscriptionNotServed
from natsrt.jetstream.registry.entries import (
    NOBODY,
    InstanceEntry,
    KnownEntry,
    RegistryEntry,
    Rule,
    SubscriptionEntry,
    WorkerEntry,
)
from natsrt.observe.services import Services
from natsrt.version import VERSION

logger = logging.getLogger("natsrt.hosting")


class Membership:
    """The entries of one runtime in the registry, from its start to its stop."""

    def __init__(
        self,
        program: Program,
        network: Network,
        incoming: Incoming,
        services: Services,
        *,
        name: str,
        worker_id: str,
    ) -> None:
        self._options = program.options
        self._catalog = program.catalog
        self._declarations = program.declarations
        self._connection = network.connection
        self._registry = network.registry
        self._peers = network.peers
        self._incoming = incoming
        self._services = services
        self._name = name
        self._worker_id = worker_id
        self._joined = False

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Announce the hosted types and the subscriptions.

        Raises ValueError if a hosted type is keyed here and not on another worker, or the reverse.
        """
        for hosted in self._catalog:
            self.refuse_mixture(hosted.agent_type, hosted.keyed is not None)
        if any(True for _ in self._catalog):
            await self._join()
        if any(hosted.keyed for hosted in self._catalog):
            await self._incoming.ownership.start()
        entries = [self._entry(subscription) for subscription in self._declarations]
        await self._declare(entries)
        await self._withdraw(self._declarations.unowned.difference(entry.key for entry in entries))

    async def confirm(self) -> None:
        """Wait until every live worker serves the subscriptions that were added to this runtime before its start.

        A worker that does not confirm in time is logged.
        """
        agent_types = {self._entry(subscription).agent_type for subscription in self._declarations}
        confirmations = (self._confirm(agent_type) for agent_type in agent_types)
        for outcome in await asyncio.gather(*confirmations, return_exceptions=True):
            if isinstance(outcome, SubscriptionNotServed):  # a worker that hangs must not prevent the start
                logger.warning("%s", outcome)
            elif outcome is not None:
                raise outcome
        await self._connection.barrier()
        self._connection.check()

    async def drain(self) -> None:
        """Announce that this worker accepts no new messages. Has no effect if this is not a worker or not connected."""
        if self._joined and self._connection.connected:
            try:
                await self._registry.drain()
            except NatsrtError as error:
                logger.warning("could not tell other runtimes that this worker is stopping: %s", error)

    async def stop(self) -> None:
        """Leave the registry. Has no effect if this is not a worker or not connected."""
        if self._joined and self._connection.connected:
            try:
                await self._registry.leave()
            except NatsrtError as error:
                logger.warning("this worker's registry entries remain until other runtimes remove them: %s", error)

    async def _join(self) -> None:
        """Become a worker. Has no effect if this already is one."""
        if self._joined:
            return
        self._joined = True
        self._incoming.intake.watch_stalls()
        try:
            await self._incoming.peer_answers.start()
            await self._services.start()
            await self._connection.barrier()
            self._connection.check()
        except BaseException:
            self._joined = False
            await self._services.stop()
            await self._incoming.peer_answers.stop()
            raise
        await self._registry.join(
            WorkerEntry(self._worker_id, self._name, socket.gethostname(), os.getpid(), time.time(), VERSION)
        )
        await self._registry.declare([entry for hosted in self._catalog for entry in hosted.entries(self._worker_id)])

    # -- agent types ---------------------------------------------------------------------------------------------

    def refuse_mixture(self, agent_type: str, keyed: bool) -> None:
        """Raise ValueError if the type is keyed on another worker and not here, or the reverse.

        The workers of one queue group must agree on which of them has an agent.
        """
        view = self._registry.view
        others = [worker_id for worker_id in view.workers_hosting(agent_type) if worker_id != self._worker_id]
        if any(view.hosts[agent_type][worker_id].keyed != keyed for worker_id in others):
            there, here = ("not keyed", "keyed") if keyed else ("keyed", "not keyed")
            raise ValueError(
                f"The agent type {agent_type!r} is {there} on worker {others[0]}, so it cannot be {here} here."
            )

    async def host(self, hosted: HostedType) -> None:
        """Announce a type, or another instance of a type, that was registered after the start."""
        await self._join()
        if hosted.keyed is not None:
            await self._incoming.ownership.start()
        await self._registry.declare(hosted.entries(self._worker_id))
        moved = self._declarations.of(hosted.agent_type)
        if moved:  # added before the type was hosted; from now on this worker is their declarer
            await self._declare([self._entry(s) for s in moved])
            await self._withdraw([self._entry(s, NOBODY).key for s in moved])
        await self._incoming.subscriptions.serve(hosted.agent_type)

    async def abandon(self, hosted: HostedType, key: str | None = None, *, ended: Sequence[Subscription] = ()) -> None:
        """Stop hosting a type; with ``key``, one instance of it. The registry keeps the message types that it handles.

        The subscriptions in ``ended`` end with the type. Other subscriptions that this runtime added for it remain,
        without a declarer.
        """
        entries: list[RegistryEntry] = [e for e in hosted.entries(self._worker_id) if not isinstance(e, KnownEntry)]
        left: Sequence[Subscription] = ()
        if key is not None and len(hosted.live) > 1:
            entries = [e for e in entries if isinstance(e, InstanceEntry) and e.agent_key == key]
        else:
            await self._incoming.subscriptions.end(hosted.agent_type)
            self._incoming.ownership.leave(hosted.agent_type)
            left = self._declarations.of(hosted.agent_type)
            entries += [self._entry(subscription, self._worker_id) for subscription in (*ended, *left)]
        try:
            await self._declare([self._entry(subscription, NOBODY) for subscription in left])
            await self._withdraw([entry.key for entry in entries])
        except NatsrtError as error:
            logger.warning("registry entries of %s could not be removed: %s", hosted.agent_type, error)

    # -- subscriptions -------------------------------------------------------------------------------------------

    async def subscribe(self, subscription: Subscription) -> None:
        """Store a subscription, and wait until every live worker of its agent type serves it.

        Raises `SubscriptionNotServed` after ``subscription_timeout`` seconds.
        """
        entry = self._entry(subscription)
        await self._declare([entry])
        await self._confirm(entry.agent_type)

    async def forget(self, subscription: Subscription) -> None:
        """Undo a `subscribe` that failed. If the registry cannot be reached, this is logged."""
        try:
            await self._withdraw([self._entry(subscription).key])
        except NatsrtError as error:
            logger.warning("an incomplete subscription could not be removed from the registry: %s", error)

    async def unsubscribe(self, subscription: Subscription, *, stored: Callable[[Subscription], None]) -> None:
        """Remove a subscription of this runtime, and wait until every live worker of its agent type has confirmed it.

        ``stored`` is called when the registry has removed the subscription. From then on it is removed, even if a later
        step fails. Raises `SubscriptionNotServed` after ``subscription_timeout`` seconds.
        """
        entry = self._entry(subscription)
        await self._withdraw([entry.key])
        stored(subscription)
        await self._confirm(entry.agent_type)

    async def unsubscribe_foreign(self, subscription_id: str) -> bool:
        """Remove a subscription that a runtime without the agent type added. Returns False if there is none."""
        for entry in list(self._registry.view.subscriptions()):
            if entry.subscription_id == subscription_id and entry.declarer == NOBODY:
                await self._withdraw([entry.key])
                await self._confirm(entry.agent_type)
                return True
        return False

    def _entry(self, subscription: Subscription, declarer: str | None = None) -> SubscriptionEntry:
        rule = Rule.of(subscription)
        if declarer is None:
            declarer = self._worker_id if rule.agent_type in self._catalog else NOBODY
        return SubscriptionEntry(rule.agent_type, rule.kind, rule.pattern, declarer, subscription.id)

    async def _declare(self, entries: Sequence[SubscriptionEntry]) -> None:
        self._declarations.unowned.update(entry.key for entry in entries if entry.declarer == NOBODY)
        await self._registry.declare(entries)

    async def _withdraw(self, keys: Collection[str]) -> None:
        await self._registry.withdraw(list(keys))
        self._declarations.unowned.difference_update(keys)

    async def _confirm(self, agent_type: str) -> None:
        """Serve the type according to the current view, and wait until every live worker of the type does so too.

        Raises `SubscriptionNotServed` after ``subscription_timeout`` seconds.
        """
        await self._incoming.subscriptions.serve(agent_type)
        others = [w for w in self._registry.view.workers_hosting(agent_type) if w != self._worker_id]
        revision = self._registry.view.applied
        answers = await asyncio.gather(*(self._serves(worker_id, agent_type, revision) for worker_id in others))
        silent = [worker_id for worker_id, serves in zip(others, answers, strict=True) if not serves]
        if silent:
            raise SubscriptionNotServed(agent_type, silent, self._options.subscription_timeout)

    async def _serves(self, worker_id: str, agent_type: str, revision: int) -> bool:
        """True if a worker confirms that it serves the type, or if the worker is gone."""
        if await self._peers.serves(worker_id, agent_type, revision, self._options.subscription_timeout):
            return True
        if worker_id not in self._registry.view.workers:
            return True
        if await self._peers.listens(worker_id):
            return False
        self._registry.suspect(worker_id)  # dead, or reconnecting; after a reconnect it follows the registry again
        return True
