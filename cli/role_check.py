"""``natsrt doctor --as``: whether a user has the permissions of a role, and no dangerous others.

The server tells a user its permissions if the user may ask; else they are tried, with the subjects that are in use: a
user may have one of them and not the tree around it. What is tried changes nothing: it is sent to subjects on which
nobody listens, or traced instead of delivered, and JetStream refuses the requests to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from natsrt.transport.probe import TRACE_DEST, TRACE_ONLY
from natsrt.wire.filters import covers, intersects

from .declaration import Declaration, User
from .forbidden import forbidden, forms, sample
from .grant import PUBLISH, SUBSCRIBE, Grant, included
from .permissions import grants

_NEVER_STORED = {"Nats-Expected-Last-Sequence": str(2**63)}
"""Headers of a message that every stream refuses, since no stream has such a sequence."""
_SHOWN = 8
"""Permissions that a finding lists."""


class Attempts(Protocol):
    """Publishes and subscribes, and returns the operations that the server refused."""

    async def __call__(
        self, *, publish: dict[str, dict[str, str]], subscribe: dict[str, str], body: bytes
    ) -> list[str]: ...


def told(permissions: Mapping[str, Any], wanted: Iterable[Grant]) -> set[Grant]:
    """Those of ``wanted`` that the permissions, as the server tells them, include as a whole."""
    return {
        grant
        for grant in wanted
        if (not (allow := _list(permissions, grant, "allow")) or any(covers(one, grant.subject) for one in allow))
        and not any(intersects(one, grant.subject) for one in _list(permissions, grant, "deny"))
    }


def touched(permissions: Mapping[str, Any], unwanted: Iterable[Grant], own: Collection[Grant] = ()) -> set[Grant]:
    """Those of ``unwanted`` that the permissions include in part or as a whole, beyond those that ``own`` include."""
    return {
        grant
        for grant in unwanted
        if any(
            intersects(one, grant.subject) and not included(own, grant.operation, one)
            for one in _list(permissions, grant, "allow") or [">"]
        )
        and not any(covers(one, grant.subject) for one in _list(permissions, grant, "deny"))
    }


def _list(permissions: Mapping[str, Any], grant: Grant, which: str) -> list[str]:
    return (permissions.get(grant.operation) or {}).get(which) or []


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of permissions that were tried. ``unknown``: trying them would have disturbed somebody."""

    allowed: set[Grant]
    unknown: set[Grant]


async def tried(attempts: Attempts, wanted: Mapping[Grant, Mapping[str, bool]], report: str) -> Tried:
    """Try permissions, each with subjects that it includes: it is there if the server refuses not all of them.

    A subject's value says whether somebody may listen there: such a one is tried only if the message can be traced
    instead of delivered. ``report`` is a subject on which nobody listens. Requests to JetStream have a body that it
    refuses, and entries of buckets an expected sequence that no stream has.
    """
    found = Tried(set(), set())
    may_trace = not await attempts(publish={report: {}}, subscribe={}, body=b"")
    traced = {TRACE_DEST: report, TRACE_ONLY: "true"} if may_trace else {}
    for grant, subjects in wanted.items():
        if grant.operation == SUBSCRIBE:
            possible: Collection[str] = subjects
            refused = await attempts(publish={}, subscribe=dict.fromkeys(subjects, ""), body=b"")
        else:
            publish = {
                subject: traced
                | _NEVER_STORED  # streams of durable topics capture other subjects than JetStream's, too
                for subject, heard in subjects.items()
                if may_trace or not heard
            }
            possible = publish
            body = b"!" if traced or grant.subject.startswith("$") else b""
            refused = await attempts(publish=publish, subscribe={}, body=body)
        if len(refused) < len(possible):
            found.allowed.add(grant)
        elif len(possible) < len(subjects):
            found.unknown.add(grant)
    return found


class RoleCheck:
    """What a user should be able to do, and what not."""

    def __init__(self, declaration: Declaration, user: User) -> None:
        self.user = user
        self.wanted: list[Grant] = grants(declaration, user)
        self.unwanted: list[Grant] = forbidden(declaration, user)
        self._declaration = declaration

    def needs(self, operation: str, subject: str) -> bool:
        """Whether the user needs a permission that the server refused."""
        return included(self.wanted, operation, subject)

    def told(self, permissions: Mapping[str, Any]) -> tuple[str, str, str]:
        """The finding, from the permissions as the server tells them: level, text and advice."""
        return self.judge(told(permissions, self.wanted), touched(permissions, self.unwanted, self.wanted))

    async def tried(self, attempts: Attempts, nobody: str, report: str, names: Iterable[str]) -> tuple[str, str, str]:
        """The finding, from attempts. ``names``: registered agent types; the rest as for `tried`."""
        wanted = {grant: _wanted(grant, nobody) for grant in self.wanted}
        names = tuple(names)
        unwanted = {grant: forms(self._declaration, self.user, grant, nobody, names) for grant in self.unwanted}
        needed, excess = await tried(attempts, wanted, report), await tried(attempts, unwanted, report)
        return self.judge(needed.allowed, excess.allowed, needed.unknown, excess.unknown, untold=True)

    def judge(
        self,
        allowed: Collection[Grant],
        excess: Collection[Grant],
        unknown: Collection[Grant] = (),
        possible: Collection[Grant] = (),
        *,
        untold: bool = False,
    ) -> tuple[str, str, str]:
        """Level, text and advice of the finding.

        ``unknown`` and ``possible``: wanted and unwanted ones that were neither told nor tried. ``untold``: the server
        did not tell the permissions.
        """
        missing = [grant for grant in self.wanted if grant not in allowed and grant not in unknown]
        text = []
        if missing:
            text.append(f"it lacks permissions: {_named(missing)}")
        if excess:
            dangerous = sorted(excess, key=self.unwanted.index)
            text.append(f"it has permissions that it should not have: {_named(dangerous)}")
        if text:
            advice = "`natsrt auth conf` prints the permissions that it needs, `natsrt auth table` what each is for"
            return "problem", "; ".join(text), advice
        if unknown:
            named = _named([grant for grant in self.wanted if grant in unknown])
            text.append(f"these cannot be tried without disturbing others: {named}")
        if possible:
            text.append(f"these cannot be excluded: {_named([grant for grant in self.unwanted if grant in possible])}")
        if text:
            advice = "compare the server's configuration of this user with what `natsrt auth table` lists"
            return "warning", "; ".join(text), advice
        found = f"all {len(self.wanted)} that it needs, and none of {len(self.unwanted)} dangerous ones"
        if untold:
            found += "; the server does not tell this user its permissions, so that others than were tried cannot be "
            found += "excluded"
        return "ok", found, ""


def _wanted(grant: Grant, nobody: str) -> dict[str, bool]:
    """What a permission that a user needs is tried with."""
    if grant.operation == SUBSCRIBE:
        return {grant.subject: False}
    subject = sample(grant.subject, nobody)
    return {subject: subject == grant.subject and not subject.startswith("$")}


def _named(found: list[Grant]) -> str:
    shown = [f"{'publish' if g.operation == PUBLISH else 'subscribe'} to {g.subject} ({g.why})" for g in found[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(shown) + more
