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
from collections.abc import Callable, Sequence
from dataclasses import replace

from autogen_core import ClosureAgent, Subscription

from natsrt.agents.hosted_type import HostedType
from natsrt.assembly import Incoming, Network, Program
from natsrt.background import BackgroundTasks
from natsrt.durable_types import DurableTopics
from natsrt.errors import NatsrtError, RegistryUnavailable, SubscriptionNotServed
from natsrt.jetstream.registry.entries import (
    CANCEL,
    FEATURES,
    NOBODY,
    InstanceEntry,
    KnownEntry,
    RegistryEntry,
    Rule,
    SubscriptionEntry,
    TypeEntry,
    WorkerEntry,
)
from natsrt.jetstream.registry.registry import RegistryListener
from natsrt.jetstream.registry.rivals import Rival, rivals
from natsrt.observe.services import Services
from natsrt.reminder_types import REMINDER_TOPICS, reminder_prefix
from natsrt.task_types import TASK_TOPICS, task_prefix
from natsrt.version import VERSION

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_LOOK_EVERY = 0.02
"""Seconds between two looks whether another worker has withdrawn what it stored at the same moment."""


class Membership(RegistryListener):
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
        self._streams = network.streams
        self._inbox = network.inbox
        self._peers = network.peers
        self._cancellations = network.cancellations
        self._incoming = incoming
        self._services = services
        self._name = name
        self._worker_id = worker_id
        self._joined = False
        self._joining = asyncio.Lock()
        self._taking = asyncio.Lock()
        self._tasks = BackgroundTasks(logger, "listening for cancellations failed")
        self._registry.on_rejoined(self._rejoined)
        self._registry.add_listener(self._declarations)
        self._registry.add_listener(self)

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Announce the hosted types and the subscriptions.

        Raises ValueError as `host` does.
        """
        hosted_types = list(self._catalog)
        if hosted_types:
            entries = self._hosted_entries()
            await self.refuse_rivals(entries)
            await self._join()
            await self._yield_to_rivals(entries)
            for hosted in hosted_types:
                await self._warn_of_shared_closures(hosted)
        if any(hosted.keyed for hosted in hosted_types):
            await self._incoming.ownership.start()
        subscriptions = [self._entry(subscription) for subscription in self._declarations]
        await self._declare(subscriptions)
        await self._learn_promises([hosted.agent_type for hosted in hosted_types])
        stay = {entry.key for entry in subscriptions}
        await self._withdraw([entry for key, entry in self._declarations.unowned.items() if key not in stay])

    async def confirm(self) -> None:
        """Wait until every live worker serves the subscriptions that were added to this runtime before its start, and
        those to topics that it has made durable.

        A worker that does not confirm in time is logged.
        """
        agent_types = {self._entry(subscription).agent_type for subscription in self._declarations}
        agent_types |= self._registry.view.types_taking(self._streams.added)
        confirmations = (self._confirm(agent_type) for agent_type in agent_types)
        for outcome in await asyncio.gather(*confirmations, return_exceptions=True):
            if isinstance(outcome, SubscriptionNotServed):  # a worker that hangs must not prevent the start
                logger.warning("%s", outcome)
            elif outcome is not None:
                raise outcome
        await self._connection.round_trip(self._options.offline_timeout)
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
        await self._tasks.cancel()
        if self._joined and self._connection.connected:
            try:
                await self._registry.leave()
            except NatsrtError as error:
                logger.warning("this worker's registry entries remain until other runtimes remove them: %s", error)

    def view_changed(self) -> None:
        """Workers of older versions announce cancellations to all only, so a caller must hear those of others, too."""
        if not self._cancellations.hears_all and not self._registry.view.all_understand(CANCEL):
            self._tasks.spawn(self._cancellations.listen())

    async def _join(self) -> None:
        """Become a worker. Has no effect if this already is one."""
        async with self._joining:
            if self._joined:
                return
            self._joined = True
            self._incoming.intake.watch_stalls()
            try:
                await self._cancellations.listen()
                await self._incoming.peer_answers.start()
                await self._services.start()
                await self._connection.round_trip(self._options.offline_timeout)
                self._connection.check()
                self._incoming.view_answers.expect()
            except BaseException:
                self._joined = False
                await self._services.stop()
                await self._incoming.peer_answers.stop()
                raise
            await self._registry.join(
                WorkerEntry(
                    self._worker_id,
                    self._name,
                    socket.gethostname(),
                    os.getpid(),
                    time.time(),
                    VERSION,
                    features=FEATURES,
                    inbox=self._inbox.root,
                )
            )
            await self._registry.declare(self._hosted_entries())

    def _hosted_entries(self) -> list[RegistryEntry]:
        """The entries of all hosted types, in the order in which every worker stores them."""
        ordered = sorted(self._catalog, key=lambda hosted: hosted.agent_type)
        return [entry for hosted in ordered for entry in hosted.entries(self._worker_id)]

    # -- agent types ---------------------------------------------------------------------------------------------

    async def refuse_rivals(self, entries: Sequence[RegistryEntry]) -> None:
        """Raise ValueError if a live worker has what excludes one of ``entries``, which this worker wants to store."""
        gone: set[str] = set()
        for rival in rivals(self._registry.view, entries):
            if rival.yields or rival.worker_id in gone:
                continue
            if await self._is_there(rival.worker_id):
                raise ValueError(rival.reason)
            gone.add(rival.worker_id)

    async def refuse_type(self, agent_type: str, *, keyed: bool = False, instance: str | None = None) -> None:
        """Raise ValueError if a type, or an instance of it, cannot be registered here because of other workers.

        ``instance`` is the key of a registered instance; None for a factory.
        """
        wanted: list[RegistryEntry] = [
            TypeEntry(agent_type, self._worker_id, keyed=keyed, instances=instance is not None)
        ]
        if instance is not None:
            wanted.append(InstanceEntry(agent_type, instance, self._worker_id))
        await self._registry.catch_up()
        await self.refuse_rivals(wanted)

    async def host(self, hosted: HostedType) -> None:
        """Announce and serve a type, or another instance of a type, that was registered after the start.

        Raises ValueError if another worker announced what excludes it at the same moment, and was first. `abandon`
        undoes it then.
        """
        entries = hosted.entries(self._worker_id)
        new = [entry for entry in entries if self._registry.view.entry(entry.key) is None]
        await self._join()
        await self._registry.declare(entries)
        await self._yield_to_rivals(new)
        await self._warn_of_shared_closures(hosted)
        if hosted.keyed is not None:
            await self._incoming.ownership.start()
        moved = self._declarations.of(hosted.agent_type)
        if moved:  # added before the type was hosted; from now on this worker is their declarer
            await self._declare([self._entry(s) for s in moved])
            former = [self._declarations.unowned.get(self._entry(s, NOBODY).key) for s in moved]
            await self._withdraw([entry for entry in former if entry is not None])
        await self._learn_promises([hosted.agent_type])
        await self._incoming.subscriptions.serve(hosted.agent_type)

    async def _rejoined(self) -> None:
        """This worker may have been out of the registry, and is there again."""
        await self._learn_promises([hosted.agent_type for hosted in self._catalog])

    async def _learn_promises(self, agent_types: Sequence[str]) -> None:
        """Make the promises of the other workers of these types about calls that were lost and sent again.

        Call it when the registry lists this worker, and before it takes calls of these types. So a caller either asks
        this worker for its promise, or has all promises before this worker asks the others.
        """
        view = self._registry.view
        others = {worker_id for agent_type in agent_types for worker_id in view.workers_hosting(agent_type)}
        asked = [
            self._peers.withdrawn(self._registry.peer_subject(worker_id)) for worker_id in others - {self._worker_id}
        ]
        for promises in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(promises, NatsrtError):
                logger.debug("could not ask a worker for its promises: %s", promises)
            elif isinstance(promises, BaseException):
                raise promises
            elif promises:
                self._incoming.call_log.withdrawn.learn(promises, asyncio.get_running_loop().time())

    async def _yield_to_rivals(self, entries: Sequence[RegistryEntry]) -> None:
        """Look again after ``entries`` were stored: another worker may have stored what excludes them just before.

        Of two workers, the one whose entry was stored later raises ValueError. All workers store entries in one order.
        So if several of two workers exclude one another, the first of them decides, and the other worker will withdraw
        all of its own, as one that yields to a third worker will.
        """
        found: dict[str, list[Rival]] = {}
        for rival in rivals(self._registry.view, entries):
            found.setdefault(rival.worker_id, []).append(rival)
        for worker_id, theirs in found.items():
            until = asyncio.get_running_loop().time() + self._options.subscription_timeout
            while any(rival.came_first for rival in theirs) and await self._is_there(worker_id):
                decides = theirs[0].came_first and not theirs[0].yields
                if decides or asyncio.get_running_loop().time() > until:
                    raise ValueError(next(rival.reason for rival in theirs if rival.came_first))
                await asyncio.sleep(_LOOK_EVERY)
                theirs = [rival for rival in rivals(self._registry.view, entries) if rival.worker_id == worker_id]

    async def _is_there(self, worker_id: str) -> bool:
        """True if a worker that the registry lists listens. If it does not, it is removed unless it comes back."""
        if await self._peers.listens(worker_id):
            return True
        self._registry.suspect(worker_id)
        return False

    async def _warn_of_shared_closures(self, hosted: HostedType) -> None:
        """Warn if another worker hosts a type of AutoGen's ClosureAgent, which collects messages for one program."""
        if hosted.expected_class is None or not issubclass(hosted.expected_class, ClosureAgent):
            return
        for worker_id in self._registry.view.workers_hosting(hosted.agent_type):
            if worker_id != self._worker_id and await self._is_there(worker_id):
                logger.warning(
                    "worker %s hosts the ClosureAgent type %r too: each of the two gets a part of its messages. To get "
                    "all, use a type of a unique name in each runtime, or a namespace for each; or one runtime for all "
                    "sessions, with the session as the key of the agents",
                    worker_id,
                    hosted.agent_type,
                )
                return

    async def abandon(self, hosted: HostedType, key: str | None = None, *, ended: Sequence[Subscription] = ()) -> None:
        """Stop hosting a type; with ``key``, one instance of it. The registry keeps the message types that it handles.

        The subscriptions in ``ended`` end with the type. Other subscriptions that this runtime added for it remain,
        without a declarer.
        """
        entries = [e for e in hosted.entries(self._worker_id) if not isinstance(e, KnownEntry)]
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
            await self._withdraw(entries)
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
            await self._withdraw([self._entry(subscription)])
        except NatsrtError as error:
            logger.warning("an incomplete subscription could not be removed from the registry: %s", error)

    async def unsubscribe(self, subscription: Subscription, *, stored: Callable[[Subscription], None]) -> None:
        """Remove a subscription of this runtime, and wait until every live worker of its agent type has confirmed it.

        ``stored`` is called when the registry has removed the subscription. From then on it is removed, even if a later
        step fails. Raises `SubscriptionNotServed` after ``subscription_timeout`` seconds.
        """
        entry = self._entry(subscription)
        await self._withdraw([entry])
        stored(subscription)
        await self._confirm(entry.agent_type)

    async def unsubscribe_foreign(self, subscription_id: str) -> bool:
        """Remove a subscription that a runtime without the agent type added. Returns False if there is none.

        Equal ones that other runtimes added under other ids remain.
        """
        for entry in list(self._registry.view.subscriptions()):
            theirs = {runtime: given for runtime, given in entry.declared.items() if given == subscription_id}
            if entry.is_shared and theirs:
                await self._withdraw([replace(entry, declarations=theirs)])
                await self._confirm(entry.agent_type)
                return True
        return False

    async def take_reminders(self, agent_type: str) -> None:
        """Have the workers of an agent type take its reminders, now and later. Raises as `take_tasks`."""
        await self._take(agent_type, "reminders", REMINDER_TOPICS, reminder_prefix(agent_type))

    async def take_tasks(self, agent_type: str) -> None:
        """Have the workers of an agent type take its tasks, now and later. Once done, it costs nothing.

        Raises `ValueError` if workers of the type cannot take durable events, `SubscriptionNotServed` after
        ``subscription_timeout`` seconds, `ServerTooOld`, and as `DurableStreams.add`.
        """
        await self._take(agent_type, "tasks", TASK_TOPICS, task_prefix(agent_type))

    async def _take(self, agent_type: str, what: str, topics: DurableTopics, prefix: str) -> None:
        """Subscribe an agent type to topics of natsrt's own, which begin with ``prefix``."""
        # Of no runtime: it stays, whoever was first and whoever hosts the type.
        entry = SubscriptionEntry(agent_type, "prefix", prefix, NOBODY, prefix, {NOBODY: prefix})
        if self._registry.view.durable_stream(prefix) is not None and self._takes(entry):
            return
        async with self._taking:  # what is sent at the same moment waits, and keeps its order
            await self._begin_to_take(agent_type, what, topics, entry)

    def _takes(self, entry: SubscriptionEntry) -> bool:
        return self._registry.view.entry(entry.key) is not None

    async def _begin_to_take(self, agent_type: str, what: str, topics: DurableTopics, entry: SubscriptionEntry) -> None:
        hosts = self._registry.view.hosts.get(agent_type, {}).values()
        if any(entry.instances for entry in hosts):
            raise ValueError(
                f"agent type {agent_type!r} has registered instances only, which get no {what}: register a factory"
            )
        self._streams.require_version(what)
        if not self._registry.reads_bucket:
            raise RegistryUnavailable(
                "write",
                f"agent type {agent_type!r} takes no {what} yet, and this user may send no requests to JetStream. A "
                "runtime that may do so, such as a worker of the type, must be the first one to "
                + (f"call `take_tasks({agent_type!r})`" if topics is TASK_TOPICS else "set a reminder of the type"),
            )
        await self._streams.add(topics)
        if not self._takes(entry):
            await self._registry.declare([entry])
            await self._confirm(agent_type)

    def _entry(self, subscription: Subscription, declarer: str | None = None) -> SubscriptionEntry:
        rule = Rule.of(subscription)
        if declarer is None:
            declarer = self._worker_id if rule.agent_type in self._catalog else NOBODY
        declarations = {self._worker_id: subscription.id} if declarer == NOBODY else {}
        return SubscriptionEntry(rule.agent_type, rule.kind, rule.pattern, declarer, subscription.id, declarations)

    async def _declare(self, entries: Sequence[SubscriptionEntry]) -> None:
        unowned = {entry.key: entry for entry in entries if entry.is_shared}
        if unowned:
            await self._registry.live_as(self._worker_id)
        self._declarations.unowned.update(unowned)
        await self._registry.declare(entries)

    async def _withdraw(self, entries: Sequence[RegistryEntry]) -> None:
        await self._registry.withdraw(entries)
        for entry in entries:
            self._declarations.unowned.pop(entry.key, None)

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
        subject = self._registry.peer_subject(worker_id)
        if await self._peers.serves(subject, agent_type, revision, self._options.subscription_timeout):
            return True
        if worker_id not in self._registry.view.workers:
            return True
        if await self._peers.listens(worker_id):
            return False
        self._registry.suspect(worker_id)  # dead, or reconnecting; after a reconnect it follows the registry again
        return True
