"""Fixtures of all tests.

Tests of one run share one server and keep apart by namespace (``namespace``). A test that stops, kills or pauses its
server takes ``own_server``. With ``NATSRT_TEST_TAP=1`` a subscription to ``>`` is open beside every test.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

import pytest
import pytest_asyncio

from natsrt.embedded import EmbeddedServer
from tests.support.processes import REPOSITORY, TAP, Processes, start_tap
from tests.support.watchdog import ended_if_it_hangs

FAST = (
    "conformance/",
    "test_awaiting.py",
    "test_import_directions.py",
    "test_mailbox.py",
    "test_options.py",
    "test_owner_cache.py",
    "test_public_api.py",
    "test_serialization.py",
    "test_subjects.py",
    "test_vectors.py",
)
"""Folders and modules of the fast cycle: what covers most in under a minute."""

NOT_FAST = ("conformance/test_classes.py", "conformance/test_lifecycle.py", "conformance/test_unhandled.py")
"""Modules of these folders that start processes, or wait for a second in many tests."""

LONG = (
    "test_soak.py",
    "test_durable_chaos.py",
    "test_durable_clusters.py",
    "test_benchmarks.py",
    "test_cli_worker.py",
    "test_example_chat.py",
    "test_cli_state.py",
    "test_stream_chaos.py",
    "test_streams.py",
    "test_agentchat_teams.py",
    "test_agentchat_remote.py",
    "test_memory.py",
    "test_remote_models.py",
    "test_plain_streams.py",
    "test_questions.py",
    "test_permission_matrix.py",
    "test_no_call_hangs.py",
    "test_far_links.py",
    "test_deadlocks.py",
    "test_keyed_chaos.py",
    "test_permissions.py",
    "test_documents.py",
    "test_cli.py",
    "test_stalls.py",
    "test_jetstream_full.py",
    "test_domains.py",
    "test_chaos_servers.py",
    "test_cli_output.py",
    "test_tls.py",
)
"""The modules that take longest, most of it waiting. They begin first, so that other tests fill their waits."""


STDERR = pytest.StashKey[TextIO]()

GRACE = 60.0
"""Seconds after the time limit of a test until its process is ended."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End the process of a test that does not end, its clean-up included."""
    marker = item.get_closest_marker("timeout")
    limit = float(marker.args[0] if marker else item.config.getini("timeout"))
    with ended_if_it_hangs(item.nodeid, limit + GRACE, item.config.stash[STDERR]):
        return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Let the processes that tests start notice Ctrl-C, also when a shell runs the tests in the background.

    Such a shell lets its commands ignore SIGINT, and their children inherit that. Modules begin in the order of `LONG`,
    not in that of their numbers of tests.
    """
    config.option.loadscopereorder = False
    config.stash[STDERR] = os.fdopen(os.dup(2), "w")  # what pytest captures later goes elsewhere
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None
        module = item.path.relative_to(tests).as_posix()
        if not is_slow and module.startswith(FAST) and not module.startswith(NOT_FAST):
            item.add_marker(pytest.mark.fast)
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.relative_to(tests).as_posix(), len(LONG)))


# The server and the processes belong to no event loop, so the session's loop may start what each test's loop uses.


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    """A running server that all tests share. Do not stop it; use ``namespace``."""
    async with EmbeddedServer(http_port=-1) as shared, _tapped(shared, tmp_path_factory.mktemp("tap")):
        yield shared


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def matrix(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EmbeddedServer]:
    """A server with the users of all cases of ``MATRIX``, the permissions of the test's module."""
    config = request.module.MATRIX.configuration(tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2]))
    async with EmbeddedServer(config=config) as server:
        yield server


@pytest.fixture
async def own_server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    """A running server of this test alone, to be restarted, killed or paused."""
    async with EmbeddedServer(http_port=-1) as own, _tapped(own, tmp_path):
        yield own


@asynccontextmanager
async def _tapped(server: EmbeddedServer, output: Path) -> AsyncIterator[None]:
    if not TAP:
        yield
        return
    processes = Processes(output)
    try:
        tap = await start_tap(processes, server.url)
        yield
        assert tap.running, f"the tap did not last: {tap.describe()}"
    finally:
        processes.close()


@pytest.fixture
def namespace() -> str:
    """A natsrt namespace that no other test uses, valid as one token of subjects, buckets and streams."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts real processes, all of which end with the test."""
    started = Processes(tmp_path)
    try:
        yield started
    finally:
        started.close()


@pytest.fixture(scope="session")
def nats_cli() -> Path:
    """The ``nats`` command. Without it a test is skipped, but fails where CI is set."""
    home = Path.home()
    go_path = Path(os.environ.get("GOPATH") or home / "go")
    places = [
        REPOSITORY / ".bin",
        Path(os.environ.get("GOBIN") or go_path / "bin"),
        go_path / "bin",
        home / "go" / "bin",
    ]
    for path in (None, *map(str, places)):
        if found := shutil.which("nats", path=path):
            return Path(found)
    reason = "the nats CLI is missing: bash .ci/install_nats_cli builds it"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
