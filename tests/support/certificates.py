"""Certificates of an authority of one test, and the ``tls`` block of a server that uses them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import trustme

_PAST = datetime(2020, 1, 1, tzinfo=UTC)


class Certificates:
    """PEM files in ``directory``, of two authorities: ``ca.pem``, and ``other.pem`` for strangers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known, self._other = trustme.CA(), trustme.CA()
        self._known.cert_pem.write_to_path(self.path("ca.pem"))
        self._other.cert_pem.write_to_path(self.path("other.pem"))
        self._put("server", self._known.issue_cert("127.0.0.1", "nats.internal"))
        self._put("elsewhere", self._known.issue_cert("elsewhere.example"))
        self._put("old", self._known.issue_cert("127.0.0.1", not_after=_PAST))
        self._put("strange", self._other.issue_cert("127.0.0.1"))
        self._put("client", self._known.issue_cert("client"))
        self._put("old-client", self._known.issue_cert("client", not_after=_PAST))
        self._put("strange-client", self._other.issue_cert("client"))

    def path(self, name: str) -> str:
        return str(self._directory / name)

    def _put(self, name: str, leaf: trustme.LeafCert) -> None:
        leaf.private_key_pem.write_to_path(self.path(f"{name}.key"))
        leaf.cert_chain_pems[0].write_to_path(self.path(f"{name}.pem"))

    def server(self, name: str = "server", *more: str) -> str:
        """The ``tls`` block of a server with this certificate."""
        files = {"cert_file": f"{name}.pem", "key_file": f"{name}.key", "ca_file": "ca.pem"}
        lines = [f'{key}: "{self.path(file)}"' for key, file in files.items()]
        return "tls {\n  " + "\n  ".join([*lines, *more]) + "\n}\n"

    def client(self, name: str = "client") -> dict[str, str]:
        """The settings of a client with this certificate."""
        return {"tls_cert": self.path(f"{name}.pem"), "tls_key": self.path(f"{name}.key")}
