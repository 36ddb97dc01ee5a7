"""The tests of a matrix of permissions, for the modules that have one: see `tests.support.permission_matrix`.

Such a module has a global ``MATRIX`` and a class ``TestEachPermission``, derived from `MatrixTests`. Its other tests
may use the fixture ``matrix`` of ``tests/conftest.py``, the server with the users of all cases.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import ClassVar

import pytest

from natsrt.embedded import EmbeddedServer
from tests.support.permission_matrix import Matrix, Use
from tests.support.permission_scene import Scene


class MatrixTests:
    """Each permission is necessary, and all of them are sufficient."""

    before: ClassVar[Use | None] = None
    """Prepares the scene of each use that is to succeed; None: nothing does."""
    before_failing: ClassVar[Use | None] = None
    """Prepares the scene of each use that is to fail; None: nothing does."""

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Make one test of each permission, and one of each use."""
        tests: Matrix = metafunc.module.MATRIX
        if "permission" in metafunc.fixturenames:
            metafunc.parametrize(("user", "permission"), list(tests.needed_for), ids=tests.ids)
        elif "number" in metafunc.fixturenames:
            metafunc.parametrize(("user", "number"), tests.numbers)

    @pytest.fixture
    def tests(self, request: pytest.FixtureRequest) -> Matrix:
        """The matrix of the module."""
        found: Matrix = request.module.MATRIX
        return found

    def test_each_permission_has_a_use_that_needs_it(self, tests: Matrix) -> None:
        assert set(tests.permissions) == set(tests.needed_for)

    @pytest.mark.slow
    async def test_without_a_permission_its_use_fails(
        self, tests: Matrix, matrix: EmbeddedServer, user: str, permission: str
    ) -> None:
        if (prepare := type(self).before_failing) is not None:
            async with AsyncExitStack() as stack:
                await prepare(Scene(matrix.url, tests.case_of(user, permission), stack))
        await tests.fails_without(matrix, user, permission)

    async def test_with_its_permissions_each_use_succeeds(
        self, tests: Matrix, matrix: EmbeddedServer, user: str, number: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        await tests.succeeds(matrix, user, number, caplog, before=type(self).before)
