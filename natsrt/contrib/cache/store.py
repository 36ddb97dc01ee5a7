"""`NatsCacheStore`: AutoGen's `CacheStore` over a KV bucket.

The protocol is synchronous, and so may be called from a running event loop, which it blocks meanwhile. The connection
therefore lives in an event loop of its own, in a thread that the first use starts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import CancelledError
from types import TracebackType
from typing import Any, ClassVar, Final, Self, TypeVar

from autogen_core import CacheStore, Component, ComponentType
from autogen_core.models import CreateResult
from pydantic import BaseModel, ImportString, TypeAdapter, ValidationError

from natsrt import Options
from natsrt.contrib.cache.loop_thread import LoopThread
from natsrt.contrib.cache.values import Values, class_name
from natsrt.contrib.servers import ServersConfig, config_of, settings_of
from natsrt.errors import CannotDecode, ConfigurationError, ServerUnreachable
from natsrt.storage import CacheBucket, Storage, check_limits

logger: logging.Logger = logging.getLogger("natsrt.cache")

T = TypeVar("T")
R = TypeVar("R")

_TYPES: Final[tuple[type[BaseModel], ...]] = (CreateResult,)
_IMPORTED: Final[TypeAdapter[Any]] = TypeAdapter(ImportString[Any])
_OVER: Final = 1.0
"""Seconds beyond ``timeout`` after which an operation is given up that has not found out by itself what is wrong."""
_CLOSE_WITHIN: Final = 3.0
"""Seconds to close the connection in order."""


class NatsCacheStoreConfig(ServersConfig):
    """The configuration of a `NatsCacheStore`. It has no credentials."""

    name: str = "default"
    ttl: float | None = None
    max_bytes: int | None = None
    timeout: float = 5.0
    types: list[str] | None = None
    """Names of classes with their modules, which are imported. None: the default."""


class NatsCacheStore(CacheStore[T], Component[NatsCacheStoreConfig]):
    """A cache in a KV bucket of JetStream, which many processes share.

    Values are Pydantic models of the classes ``types``, what JSON has, and lists and dicts of these. They are read as
    they were stored, type for type. It may be used from any thread, in a running event loop too, and in forked
    children. It connects when it is first used.

    Args:
        servers: One URL or a list of URLs. None: see ``options``.
        namespace: natsrt's namespace. None: see ``options``.
        context: The name of a context of the ``nats`` CLI. None: see ``options``.
        jetstream_domain: The JetStream domain of the bucket. None: see ``options``.
        options: All settings of the connection, which the arguments before override. None: those of `Options.load`.
        name: The end of the bucket's name, ``natsrt_cache_<name>``.
        ttl: Seconds, 1 or more, after which a value that this store sets expires, rounded up to whole seconds. None:
            it does not.
        max_bytes: Size of the bucket; the oldest values go first. None: without a limit.
        timeout: Seconds within which each operation must succeed, connecting included.
        types: The classes of the models among the values, by which they are read too. By default those that AutoGen's
            ``ChatCompletionCache`` stores.

    Raises:
        ConfigurationError: A setting, a name or a limit is wrong.
        TypeError: One of ``types`` is no class of Pydantic models.
    """

    component_type: ClassVar[ComponentType] = "cache_store"
    component_config_schema: type[NatsCacheStoreConfig] = NatsCacheStoreConfig
    component_provider_override: ClassVar[str | None] = "natsrt.contrib.cache.NatsCacheStore"

    def __init__(
        self,
        servers: str | Sequence[str] | None = None,
        *,
        namespace: str | None = None,
        context: str | None = None,
        jetstream_domain: str | None = None,
        options: Options | None = None,
        name: str = "default",
        ttl: float | None = None,
        max_bytes: int | None = None,
        timeout: float = 5.0,
        types: Sequence[type[BaseModel]] = _TYPES,
    ) -> None:
        check_limits(name, max_bytes=max_bytes)
        for setting, seconds, least in (("ttl", ttl, 1.0), ("timeout", timeout, 0.1)):
            is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if seconds is not None and not (is_number and least <= seconds <= 1e9):
                raise ConfigurationError(setting, f"must be {least:g} to 1,000,000,000 seconds, not {seconds!r:.60}")
        self._options = settings_of(options, servers, namespace, context, jetstream_domain)
        self._values = Values(types)
        self._types = list(types)
        self._name = name
        self._ttl = ttl
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._lock = threading.Lock()
        """Held while the thread is started or ended."""
        self._worker: _Worker | None = None
        self._end: weakref.finalize[[], Any] | None = None
        """Ends the worker when the store is closed, collected, or the interpreter exits."""
        self._closed = False
        _stores.add(self)

    # -- CacheStore --------------------------------------------------------------------------------------------------

    def get(self, key: str, default: T | None = None) -> T | None:
        """The value of ``key``; ``default`` if there is none, or it has expired, or cannot be read.

        What cannot be read, as after a change of a model's class, is logged. The next `set` replaces it.

        Raises:
            ServerUnreachable, StreamUnavailable: There was no answer within ``timeout`` seconds.
            PermissionDenied, JetStreamRequired, ServerTooOld, TlsFailed: The server does not allow it, or cannot do it.
            ValueError: ``key`` has a lone surrogate.
        """
        _check_key(key)
        body = self._run(lambda bucket: bucket.get(key))
        if body is None:
            return default
        try:
            value: T = self._values.decode(body)
        except CannotDecode as error:
            logger.warning("a value in the bucket of the cache %s counts as missing: %s", self._name, error)
            return default
        return value

    def set(self, key: str, value: T) -> None:
        """Store a value. When this returns, all processes get it.

        Raises:
            CannotSerialize: The value would not be read as it is.
            MessageTooLarge: It does not fit into one message of the server, or into ``max_bytes``.
            JetStreamFull: There is no room.
            Others: As `get`. The value may be stored or not.
        """
        _check_key(key)
        body = self._values.encode(value)
        self._run(lambda bucket: bucket.put(key, body, self._ttl))

    # -- opening and closing -----------------------------------------------------------------------------------------

    def close(self) -> None:
        """Disconnect, and end the thread. What is stored stays. Has no effect if closed."""
        with self._lock:
            self._closed = True
            end, self._end, self._worker = self._end, None, None
        if end is not None:
            end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, operation: Callable[[CacheBucket], Awaitable[R]]) -> R:
        with self._lock:
            if self._closed:
                raise RuntimeError("this cache store is closed: make another one")
            worker = self._worker
            if worker is None:
                worker = self._worker = _Worker(self._options, self._name, self._max_bytes, self._timeout)
                self._end = weakref.finalize(self, worker.close)
        return worker.run(operation)

    def _leave_to_parent(self) -> None:
        """In a forked child: the thread, its loop and its connection are the parent's, and are not touched."""
        self._lock = threading.Lock()
        if self._end is not None:
            self._end.detach()
        if self._worker is not None:
            _of_parents.append(self._worker)
        self._end = self._worker = None

    # -- Component ---------------------------------------------------------------------------------------------------

    def _to_config(self) -> NatsCacheStoreConfig:
        return NatsCacheStoreConfig(
            **config_of(self._options),
            name=self._name,
            ttl=self._ttl,
            max_bytes=self._max_bytes,
            timeout=self._timeout,
            types=None if self._types == list(_TYPES) else [class_name(cls) for cls in self._types],
        )

    @classmethod
    def _from_config(cls, config: NatsCacheStoreConfig) -> Self:
        return cls(
            config.servers,
            namespace=config.namespace,
            context=config.context,
            jetstream_domain=config.jetstream_domain,
            name=config.name,
            ttl=config.ttl,
            max_bytes=config.max_bytes,
            timeout=config.timeout,
            types=_TYPES if config.types is None else [_imported(name) for name in config.types],
        )


def _imported(name: str) -> Any:
    try:
        return _IMPORTED.validate_python(name)
    except ValidationError as error:
        raise ConfigurationError("types", f"{name!r:.100} cannot be imported: {error.errors()[0]['msg']}") from None


def _check_key(key: object) -> None:
    if not isinstance(key, str):
        raise TypeError(f"key must be text, not a {type(key).__name__}")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"key must be text that UTF-8 has, without a lone surrogate: {key!r:.60} has one") from error


class _Worker:
    """A thread with a connection to a bucket."""

    def __init__(self, options: Options, name: str, max_bytes: int | None, timeout: float) -> None:
        self._options = options.replace(
            connect_timeout=min(options.connect_timeout, timeout), offline_timeout=timeout, publish_timeout=timeout
        )
        self._name = name
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._opening = asyncio.Lock()
        self._storage: Storage | None = None
        self._bucket: CacheBucket | None = None
        self._thread = LoopThread(f"natsrt cache {name}")

    def run(self, operation: Callable[[CacheBucket], Awaitable[R]]) -> R:
        """The result of an operation on the bucket. Raises natsrt's errors if there is none in time."""
        try:
            return self._thread.run(self._use(operation), self._timeout + _OVER)
        except CancelledError:
            raise RuntimeError("this cache store was closed meanwhile") from None
        except TimeoutError:
            raise ServerUnreachable(self._options.safe_servers, self._timeout, "it does not answer") from None

    async def _use(self, operation: Callable[[CacheBucket], Awaitable[R]]) -> R:
        return await operation(await self._opened())

    async def _opened(self) -> CacheBucket:
        async with self._opening:
            if self._bucket is None:
                storage = Storage(self._options)
                try:
                    await storage.open()
                    bucket = storage.cache(self._name, max_bytes=self._max_bytes)
                    await bucket.open()
                except BaseException:
                    await storage.close()
                    raise
                self._storage, self._bucket = storage, bucket
            return self._bucket

    def close(self) -> None:
        """Disconnect, and end the thread."""
        if self._thread.is_current:
            threading.Thread(target=self.close, name="natsrt cache closes", daemon=True).start()
            return
        try:
            self._thread.run(self._close(), _CLOSE_WITHIN)
        except (TimeoutError, CancelledError):
            logger.debug("the connection of the cache %s was not closed in order", self._name)
        self._thread.stop()

    async def _close(self) -> None:
        async with self._opening:
            storage, self._storage, self._bucket = self._storage, None, None
            if storage is not None:
                await storage.close()


_stores: weakref.WeakSet[NatsCacheStore[Any]] = weakref.WeakSet()
_of_parents: list[_Worker] = []
"""In a forked child: what belongs to its parent. It is kept, so that nothing of it is ever closed here."""


def _in_child() -> None:
    for store in list(_stores):
        store._leave_to_parent()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_in_child)
