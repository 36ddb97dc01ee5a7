"""The durable consumers of a worker: one for each hosted agent type and each stream of events that it subscribes to.

All workers of a type pull from the same consumer, which is named by the type. It remembers which events the type has
handled, and stays when all workers stop: they get what was stored meanwhile when they start again.

The filters of a consumer follow the type's subscriptions in the registry's view, but only grow. A subscription can
vanish from the view because the worker that declared it has died, and a filter that is removed and added again skips
the events between. An event that no subscription takes any more is acknowledged without being handled.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

from natsrt.agents.declarations import Declarations
from natsrt.agents.hosted_type import HostedType
from natsrt.background import end_tasks
from natsrt.errors import ConfigurationError, NatsrtError
from natsrt.hosting.durable_settlement import DurableParts, DurableSettlement, Puller
from natsrt.hosting.feeder import Feeder, FeederParts
from natsrt.hosting.pinned_consumer import feeding
from natsrt.hosting.task_settlement import TaskSettlement
from natsrt.jetstream.consumers import START_ALL, START_NOW, ConsumerConfig, Consumers
from natsrt.jetstream.domains import Domain
from natsrt.jetstream.registry.registry import RegistryListener
from natsrt.jetstream.streams import events_name, topic_filter
from natsrt.observe.first import FirstIsWarning
from natsrt.options import Options
from natsrt.reminder_types import REMINDER_TOPICS
from natsrt.retry_types import RetryOptions
from natsrt.task_types import TASK_TOPICS
from natsrt.wire.filters import common, widest
from natsrt.wire.retry_subjects import stored_again
from natsrt.wire.subjects import Subjects, encode_token

logger: logging.Logger = logging.getLogger("natsrt.hosting")

_SIGNS_IN_WAIT: Final = 3
"""How often within ``ack_wait`` the server is told that events are held."""

_AGENT_TYPE: Final = "natsrt_agent_type"
"""The key in a consumer's metadata with its agent type, which its name has in the encoding of subjects."""
_CLOCKS_DIFFER: Final = 2.0
"""Seconds by which the clocks of a worker and of the server may differ."""
_MEASURED_EVERY: Final = 30.0
"""Seconds between two counts of the dead letters, and of the events that wait for a later attempt."""


class DurableConsumers(RegistryListener):
    """The durable consumers of one worker, by agent type and stream."""

    def __init__(
        self, parts: DurableParts, feeding_parts: FeederParts, subjects: Subjects, declarations: Declarations
    ) -> None:
        self._parts = parts
        self._feeding = feeding_parts
        self._workers: set[str] = set()
        """The workers that the registry's view had lately."""
        parts.registry.add_listener(self)
        self._subjects = subjects
        self._declarations = declarations
        self._reminders = events_name(subjects, REMINDER_TOPICS.name)
        self._tasks = events_name(subjects, TASK_TOPICS.name)
        """The streams of reminders and of tasks. A type also gets what was due before it had a worker."""
        self._of_type: dict[str, dict[str, Puller]] = {}
        self._since: dict[tuple[str, str], datetime] = {}
        """Since when types are to get events of streams that they do not pull from yet."""
        self._ended: set[Puller] = set()
        """Those that do not pull any more, and hold events whose handlers still run."""
        self._signs: asyncio.Task[None] | None = None
        self._measuring: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._tasks_waiting: int | None = None
        self._first = FirstIsWarning()

    # -- lifecycle -----------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Pull no more, and give back what was not started. Events whose handlers run are held until `close`."""
        present = [settlement for of_type in self._of_type.values() for settlement in of_type.values()]
        self._of_type.clear()
        await asyncio.gather(*map(self._end, present))
        await self._feeding.task_answers.stop()

    async def close(self) -> None:
        """Hold nothing any more. What was not settled is delivered again after ``ack_wait``."""
        await self.stop()  # another worker's question may have begun to serve a type again meanwhile
        tasks = [task for task in (self._signs, self._measuring, self._sweeping) if task is not None]
        await end_tasks(*tasks)
        self._signs = self._measuring = self._sweeping = None
        self._ended.clear()
        await self._parts.dead_letters.stop()
        await self._parts.later.stop()
        await self._feeding.tasks.stop()

    @property
    def retries_waiting(self) -> int | None:
        """Number of events that wait for a later attempt when it was last counted; None: that is not known."""
        return self._parts.later.measured

    @property
    def tasks_waiting(self) -> int | None:
        """Number of tasks that no worker held when they were last counted; None: that is not known."""
        return self._tasks_waiting

    @property
    def settlements(self) -> Collection[Puller]:
        """Those that pull."""
        return self._parts.settlements

    async def apply(self, hosted: HostedType) -> None:
        """Pull what the type's subscriptions want, according to the present view.

        Raises `ConfigurationError` for a type that cannot handle events of durable topics, and as `Pull.start` does.
        """
        if not self._parts.registry.view.durable and hosted.agent_type not in self._of_type:
            return
        wanted = dict(self._wanted(hosted))
        if wanted:
            _refuse_unsupported(hosted, wanted)
        self._warn_of_custom(hosted)
        self._give_up(hosted.agent_type, wanted)
        present = self._of_type.setdefault(hosted.agent_type, {})
        for stream in [stream for stream in present if stream not in wanted]:
            await self._end(present.pop(stream))
        for stream, filters in wanted.items():
            config = self._config(hosted, stream, filters)
            settlement = present.get(stream)
            if settlement is None:
                settlement = self._puller(hosted, stream, config)
                self._since.setdefault((hosted.agent_type, stream), datetime.now(UTC))
                await settlement.start()
                del self._since[hosted.agent_type, stream]
                present[stream] = settlement
                if stream == self._tasks:
                    await self._feeding.task_answers.serve(hosted.agent_type)
                self._parts.settlements.add(settlement)
                self._give_signs()
            elif settlement.config != config:
                await settlement.configure(config)
        if not present:
            del self._of_type[hosted.agent_type]

    def _puller(self, hosted: HostedType, stream: str, config: ConsumerConfig) -> Puller:
        retries, again = retry_options(self._parts.options, hosted.agent_type), self._subjects.again(stream)
        start = START_ALL if stream in (self._reminders, self._tasks) else hosted.start_from
        if start == START_NOW and (since := self._since.get((hosted.agent_type, stream))) is not None:
            # An earlier attempt failed, perhaps because the stream was not made yet.
            start = since - timedelta(seconds=_CLOCKS_DIFFER)
        if hosted.keyed is None and stream == self._tasks:
            return TaskSettlement(
                self._feeding.tasks, self._parts, hosted, stream, config, retries, start=start, again=again
            )
        if hosted.keyed is None:
            return DurableSettlement(self._parts, hosted, stream, config, retries, start=start, again=again)
        return Feeder(self._parts, self._feeding, hosted, stream, config, retries, start=start, again=again)

    def view_changed(self) -> None:
        """Called when the registry's view has changed: the feeder of a keyed type may be gone."""
        workers = set(self._parts.registry.view.workers)
        if not self._workers <= workers:
            for puller in self._parts.settlements:
                if isinstance(puller, Feeder):
                    puller.look_after()
        self._workers = workers  # also while there is no feeder here: those that are there then may go later

    async def has_waiting(self) -> bool:
        """True if a stream has an event for a type of this worker that was not delivered yet, or if one is held here.

        An event that was delivered, and waits for its next attempt, does not count.
        """
        for settlement in list(self._parts.settlements):
            # What was delivered before the server's answer has been taken in when that comes.
            if settlement.holds or await self._undelivered(settlement) or settlement.holds:
                return True
        return False

    async def _undelivered(self, settlement: Puller) -> int | None:
        """How many events of the stream the consumer has not delivered yet. None if the server does not say."""
        domain = Domain(self._parts.options.jetstream_domain)
        try:
            info = await Consumers(self._parts.connection, domain, settlement.stream).info(settlement.config.name)
        except NatsrtError as error:
            logger.debug("whether events of %s wait is not known: %s", settlement.stream, error)
            return None
        return None if info is None else int(info["num_pending"])

    async def end(self, agent_type: str) -> None:
        """Pull no more for a type that is no longer hosted. What its running handlers have is still settled."""
        await self._feeding.task_answers.end(agent_type)
        self._give_up(agent_type, ())
        await asyncio.gather(*map(self._end, self._of_type.pop(agent_type, {}).values()))

    def _give_up(self, agent_type: str, wanted: Collection[str]) -> None:
        """Try no more to pull from other streams than these."""
        for key in [key for key in self._since if key[0] == agent_type and key[1] not in wanted]:
            del self._since[key]

    async def _end(self, settlement: Puller) -> None:
        self._parts.settlements.discard(settlement)
        self._ended.add(settlement)
        await settlement.stop()

    # -- what is held --------------------------------------------------------------------------------------------

    def _give_signs(self) -> None:
        if self._signs is None:
            # In a context of its own: this may be called in that of a handler.
            context = contextvars.Context()
            work = self._sign_regularly()
            self._signs = asyncio.get_running_loop().create_task(work, name="natsrt held events", context=context)
            self._measuring = asyncio.get_running_loop().create_task(
                self._measure_regularly(), name="natsrt what waits", context=contextvars.Context()
            )
            self._sweeping = asyncio.get_running_loop().create_task(
                self._parts.payloads.run(), name="natsrt payloads of events", context=contextvars.Context()
            )

    async def _measure_regularly(self) -> None:
        while True:
            await self._parts.box.measure()
            await self._parts.later.measure(
                [(stream, agent_type) for agent_type, of_type in self._of_type.items() for stream in of_type]
            )
            await self._measure_tasks()
            await asyncio.sleep(_MEASURED_EVERY)

    async def _measure_tasks(self) -> None:
        """Count the tasks that wait for a worker. Does not fail."""
        waiting: int | None = None
        for settlement in [one for one in self._parts.settlements if one.stream == self._tasks]:
            undelivered = await self._undelivered(settlement)
            if undelivered is not None:
                waiting = (waiting or 0) + undelivered
        self._tasks_waiting = waiting

    async def _sign_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._parts.options.ack_wait / _SIGNS_IN_WAIT)
            for settlement in (*self._parts.settlements, *self._ended):
                settlement.still_held()
            self._ended = {settlement for settlement in self._ended if settlement.holds}

    # -- what is wanted ------------------------------------------------------------------------------------------

    def _wanted(self, hosted: HostedType) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The streams from which a type is to get events, and the filters of its subscriptions there."""
        subscribed = list(self._subscribed(hosted))
        for entry in self._parts.registry.view.durable.values():
            patterns = [topic_filter(self._subjects, pattern) for pattern in entry.patterns]
            filters = widest(
                shared
                for subject in subscribed
                for pattern in patterns
                if (shared := common(subject, pattern)) is not None
            )
            if filters:
                yield entry.stream, filters

    def _subscribed(self, hosted: HostedType) -> Iterator[str]:
        for rule in hosted.rules:
            if rule.kind != "custom":
                with contextlib.suppress(ValueError):  # no subject can express it, which `Subscriptions` logs
                    yield rule.subject(self._subjects)

    def _config(self, hosted: HostedType, stream: str, filters: Sequence[str]) -> ConsumerConfig:
        config = ConsumerConfig(
            name=encode_token(hosted.agent_type),
            filter_subjects=(*filters, *stored_again(self._subjects, stream, hosted.agent_type)),
            ack_wait=self._parts.options.ack_wait,
            description=f"natsrt: events for {'' if hosted.keyed is None else 'keyed '}agent type {hosted.agent_type}",
            keeps_filters=True,
            more={"metadata": {_AGENT_TYPE: hosted.agent_type}},
        )
        return config if hosted.keyed is None else feeding(config)

    def _warn_of_custom(self, hosted: HostedType) -> None:
        """Custom subscriptions are objects of one process. A consumer is shared by all workers, now and later."""
        for subscription in self._declarations.custom(hosted.agent_type):
            logger.log(
                self._first.level(hosted.agent_type, subscription.id),
                "the subscription %s of agent type %s gets no events of durable topics: only TypeSubscription and "
                "TypePrefixSubscription do",
                type(subscription).__qualname__,
                hosted.agent_type,
            )


def retry_options(options: Options, agent_type: str) -> RetryOptions:
    """How the events of an agent type are tried again: the settings, and what ``retries`` says of the type."""
    general = RetryOptions(
        retry_delay=options.retry_delay, retry_delay_max=options.retry_delay_max, max_deliver=options.max_deliver
    )
    return replace(general, **options.retries.get(agent_type, {}))


def _refuse_unsupported(hosted: HostedType, wanted: Mapping[str, Sequence[str]]) -> None:
    """Raise `ConfigurationError` if the type cannot handle events of durable topics."""
    filters = ", ".join(subject for subjects in wanted.values() for subject in subjects)
    if hosted.has_instances_only:
        problem = "has registered instances only, which cannot share a consumer: register a factory for it"
        raise ConfigurationError("durable", f"agent type {hosted.agent_type!r} {problem} (it subscribes to {filters})")
