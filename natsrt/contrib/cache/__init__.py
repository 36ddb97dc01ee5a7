"""`NatsCacheStore`: a cache that many processes share. See docs/memory.md."""

from natsrt.contrib.cache.store import NatsCacheStore, NatsCacheStoreConfig

__all__ = ["NatsCacheStore", "NatsCacheStoreConfig"]
