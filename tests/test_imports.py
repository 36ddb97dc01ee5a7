"""What importing natsrt costs, and that nothing is missing which is imported late."""

from __future__ import annotations

import subprocess
import sys

TOOL_MODULES = 'sorted(m for m in sys.modules if m.startswith(("autogen_core.models", "autogen_core.tool")))'


def run(program: str) -> list[str]:
    """The lines that a program prints in a Python process of its own."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


def test_importing_natsrt_imports_neither_the_models_nor_the_tools_of_autogen() -> None:
    assert run(f"import sys, natsrt\nprint({TOOL_MODULES})") == ["[]"]


def test_a_tool_result_is_known_to_a_process_that_never_imported_its_class() -> None:
    program = """
from natsrt.wire.serialization import JSON, Serialization
serialization = Serialization()
print(serialization.is_known("FunctionExecutionResult"), serialization.content_type_of("FunctionExecutionResult"))
payload = b'{"content":"4","name":"add","call_id":"1","is_error":false}'
result = serialization.decode("FunctionExecutionResult", JSON, payload)
from autogen_core.models import FunctionExecutionResult
print(result == FunctionExecutionResult(content="4", name="add", call_id="1", is_error=False))
"""
    assert run(program) == ["True application/json", "True"]


def test_a_tool_agents_exception_arrives_as_itself_in_a_process_that_never_imported_its_class() -> None:
    program = """
from natsrt.wire.failures import ErrorTypes
data = (b'{"type":"autogen_core.tool_agent._tool_agent.ToolNotFoundException","message":"",'
        b'"args":[],"fields":{"call_id":"1","content":"there is none","name":"add"}}')
error = ErrorTypes().rebuild(data, agent=None, worker_id=None)
from autogen_core.tool_agent import ToolNotFoundException
print(type(error) is ToolNotFoundException, error.call_id, error.name)
"""
    assert run(program) == ["True 1 add"]


def test_a_name_from_the_wire_imports_nothing_that_it_names() -> None:
    program = """
import sys
from natsrt.wire.failures import ErrorTypes
data = b'{"type":"autogen_core.code_executor.Nothing","message":"","args":[],"fields":{}}'
error = ErrorTypes().rebuild(data, agent=None, worker_id=None)
print(type(error).__name__, "autogen_core.code_executor" in sys.modules)
"""
    assert run(program) == ["RemoteAgentError False"]
