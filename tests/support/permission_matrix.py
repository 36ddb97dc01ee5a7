"""Shows that each permission that natsrt generates is necessary, and that all of them are sufficient.

A matrix has the permissions of a declaration, and uses: what users do. With all its permissions a user can do all of
its uses, and the server refuses nothing. Without one of them, the use that needs it fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from natsrt_cli.declaration import Declaration
from natsrt_cli.grant import Grant
from natsrt_cli.permissions import grants

from natsrt.embedded import EmbeddedServer
from tests.support.permission_scene import PROBED, Case, Scene, configuration, in_namespace

WITHIN = 15.0
"""Seconds for one use that is to fail."""
_SUCCEEDS_WITHIN = 30.0
"""Seconds for one that is to succeed."""

Use = Callable[[Scene], Awaitable[None]]


def label(grant: Grant) -> str:
    """A permission in words."""
    return f"{grant.operation} to {grant.subject}"


class Matrix:
    """The permissions, by user, of a declaration, and what needs them. ``name`` begins the names of its namespaces."""

    def __init__(self, declaration: Declaration, permissions: Sequence[tuple[str, Grant]], name: str) -> None:
        self.declaration = declaration
        self.permissions = [(user, label(grant)) for user, grant in permissions]
        self._name = name
        self.uses: dict[str, list[Use]] = {}
        self.needed_for: dict[tuple[str, str], Use] = {}
        """The use that fails without a permission, by the user and the permission."""

    def needs(self, user: str, *permissions: str) -> Callable[[Use], Use]:
        """A use of ``user`` that fails without any one of these permissions."""

        def add(use: Use) -> Use:
            if use not in self.uses.setdefault(user, []):
                self.uses[user].append(use)
            self.needed_for.update({(user, permission): use for permission in permissions})
            return use

        return add

    @property
    def ids(self) -> list[str]:
        """The names of the tests of `needed_for`."""
        return [f"{user} {permission}" for user, permission in self.needed_for]

    @property
    def numbers(self) -> list[tuple[str, int]]:
        """Each use by its user and its number."""
        return [(user, number) for user, uses in self.uses.items() for number in range(len(uses))]

    def case_of(self, user: str, permission: str | None) -> Case:
        """The case in which ``user`` lacks a permission, in a namespace of its own; None: it has all."""
        cases = [*self.permissions, *((one, None) for one in self.declaration.users)]
        declaration = in_namespace(self.declaration, f"{self._name}{cases.index((user, permission))}")
        if permission is None:
            return Case(declaration, user, None)
        place = [label(grant) for grant in grants(self.declaration, self.declaration.users[user])].index(permission)
        return Case(declaration, user, grants(declaration, declaration.users[user])[place])

    def configuration(self, folder: Path) -> Path:
        """Write the configuration of a server that has the users of all cases."""
        cases = [self.case_of(user, permission) for user, permission in self.permissions]
        return configuration(cases + [self.case_of(user, None) for user in self.uses], folder)

    async def fails_without(self, server: EmbeddedServer, user: str, permission: str) -> None:
        """Fail unless the use that needs a permission fails without it."""
        use = self.needed_for[user, permission]
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(WITHIN):
                    await use(Scene(server.url, self.case_of(user, permission), stack))
            except Exception:
                return
        pytest.fail(f"{user} needs no permission to {permission} for: {use.__name__}")

    async def succeeds(
        self,
        server: EmbeddedServer,
        user: str,
        number: int,
        caplog: pytest.LogCaptureFixture,
        before: Use | None = None,
    ) -> None:
        """Fail unless a use succeeds with all permissions of its user. ``before`` prepares its scene; None: nothing."""
        async with AsyncExitStack() as stack:
            scene = Scene(server.url, self.case_of(user, None), stack)
            if before is not None:
                await before(scene)
            async with asyncio.timeout(_SUCCEEDS_WITHIN):
                await self.uses[user][number](scene)
            said = [record.getMessage() for record in caplog.records]
            assert [text for text in said if "not let" in text and not PROBED.search(text)] == []
            assert scene.violations == []


async def delete_streams(scene: Scene, *others: str) -> None:
    """Remove what the use before has left: the streams of the scene's namespace, and ``others``."""
    plain = await scene.client("plain")
    js, namespace = plain.jetstream(), scene.case.declaration.namespace
    for info in await js.streams_info():
        name = info.config.name or ""
        if name in others or namespace in name.removeprefix("KV_").split("_"):
            await js.delete_stream(name)
