"""Every example runs as it is, with a server of its own, and prints what it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from natsrt.embedded import EmbeddedServer
from tests.support.processes import REPOSITORY, Processes

EXAMPLES = REPOSITORY / "examples"
TESTS = REPOSITORY / "tests"

OUTPUT: dict[str, list[str]] = {
    "one_call.py": ["42 / 4 = 10.5", "1 / 0 raised ZeroDivisionError: division by zero"],
    "publish_subscribe.py": [
        "archivist for berlin read: Home team wins",
        "archivist for berlin read: NATS speaks AutoGen",
        "engineer for berlin read: NATS speaks AutoGen",
    ],
    "several_workers.py": ["300 answers from 3 processes", "one process was killed: 300 answers from 2 processes"],
    "keyed_agents.py": [
        "300 deposits: 60 accounts, each in one of 3 processes",
        "one process was killed meanwhile: its accounts now live in the 2 others",
        "each acknowledged deposit is in the balance, and no deposit is in it twice",
    ],
    "tasks.py": [
        "3 tasks are stored, and who submitted them has ended",
        "the worker was killed while the first task was running",
        "TO BE OR NOT TO BE",
        "THAT IS THE QUESTION",
        "WHETHER TIS NOBLER",
    ],
    "web_service.py": [
        'GET /shouter/hello: HTTP/1.1 200 OK: {"text": "HELLO"}',
        "GET /nobody/hello: HTTP/1.1 404 UnknownAgentType: "
        '{"error": "agent type \'nobody\' is unknown; registered types: shouter"}',
    ],
    "tracing.py": [
        "lamp is on its way",
        "send agent.shop",
        "  receive agent.shop",
        "    process agent.shop",
        "      publish topic.shipped.default",
        "        receive topic.shipped.default",
        "          process agent.ledger",
    ],
    "fastapi_service.py": [
        'GET /shout/hello: 200 {"text":"HELLO"}',
        'GET /ask/nobody: 404 {"error":"UnknownAgentType"}',
        'GET /readyz: 200 {"ready":true,"reasons":[]}',
    ],
    "agent_chat.py": [
        "user: How many lamps are there?",
        "clerk: 7 pieces of lamp",
        "buyer: That is enough. DONE",
        "stopped: Text 'DONE' mentioned",
    ],
    "nats_service.py": ["the service takes: name", "Take an umbrella: it rains in Bergen."],
    "remote_model.py": [
        "calm ",
        "5 tokens",
        "one worker was killed: 20 poems from the other",
        "The sea is calm tonight.",
    ],
    "ask_human.py": ["paper: not ordered", "a piano: not ordered"],
    "group_chat.py": [
        "user: A story about a lighthouse, please.",
        "writer: A lighthouse dreams of trains.",
        "editor: Lovely. Who waits for whom?",
        "writer: Each night a lighthouse waits for one.",
        "editor: I approve.",
    ],
    "shared_memory.py": [
        "two processes add facts, and a third one knows them",
        "both were killed; who comes later has the same facts in the same order: True",
        "assistant: Hello, Ada!",
        "from the cache: A messaging system.",
    ],
    "without_natsrt.py": [
        "'to be or not': 4 words",
        "'it takes its time': 4 words",
        "refused: a counter takes Text, not Number",
        "no worker hosts nobody",
        "event on topic.text.somewhere: 3 words",
    ],
}

NEEDS = {
    "agent_chat.py": ["autogen_agentchat", "autogen_ext"],
    "fastapi_service.py": ["fastapi", "uvicorn", "httpx"],
    "group_chat.py": ["autogen_ext"],
    "remote_model.py": ["autogen_agentchat", "autogen_ext"],
    "shared_memory.py": ["autogen_agentchat", "autogen_ext"],
}
"""What examples import beside natsrt and its dependencies."""


@pytest.mark.parametrize("name", OUTPUT)
async def test_the_example_runs_and_prints_what_it_should(name: str, processes: Processes, tmp_path: Path) -> None:
    for module in NEEDS.get(name, []):
        pytest.importorskip(module, reason=f"{name} needs {module}: pip install 'natsrt[examples]'")
    # An empty variable counts as not set. It starts elsewhere, so that nothing depends on the current directory.
    example = processes.python(EXAMPLES / name, env={"NATS_URL": ""}, cwd=tmp_path)
    assert await example.wait(timeout=50) == 0, example.describe()
    printed = example.stdout.splitlines()
    missing = [line for line in OUTPUT[name] if line not in printed]
    assert not missing, example.describe()
    assert example.stderr == ""


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*OUTPUT, "local_server.py"}
    packages = {path.parent.name for path in EXAMPLES.glob("*/__main__.py")}
    assert {f"test_example_{name}.py" for name in packages} == {path.name for path in TESTS.glob("test_example_*.py")}


async def test_examples_use_the_server_that_nats_url_names(
    server: EmbeddedServer, namespace: str, processes: Processes
) -> None:
    example = processes.python(EXAMPLES / "one_call.py", env={"NATS_URL": server.url, "NATSRT_NAMESPACE": namespace})
    assert await example.wait(timeout=30) == 0, example.describe()
    assert "42 / 4 = 10.5" in example.stdout
