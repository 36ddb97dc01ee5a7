"""Subjects of JetStream: in the JetStream of the account, or in another domain, such as the hub's for a leaf node.

With a domain, ``$JS.API.STREAM.INFO.X`` is ``$JS.<domain>.API.STREAM.INFO.X``, and an entry is published to
``$JS.<domain>.API.$KV.<bucket>.<key>``, from which the domain's servers remove what stands before ``$KV``. Entries are
stored, and read, under ``$KV.<bucket>.<key>``.
"""

from __future__ import annotations


class Domain:
    """The JetStream domain of one runtime. ``name`` None: that of the account where it is connected."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self._api = "$JS.API" if name is None else f"$JS.{name}.API"

    def api(self, request: str) -> str:
        """The subject of a request, which is given without ``$JS.API.``."""
        return f"{self._api}.{request}"

    def publish(self, subject: str) -> str:
        """The subject to publish an entry to that is stored under ``subject``."""
        return subject if self.name is None else f"{self._api}.{subject}"

    def plain(self, subject: str) -> str:
        """A subject of `api` or `publish`, in any case, as it is without a domain, in lower case."""
        subject, own = subject.lower(), f"{self._api.lower()}."
        if self.name is None or not subject.startswith(own):
            return subject
        rest = subject[len(own) :]
        return rest if rest.startswith("$") else f"$js.api.{rest}"
