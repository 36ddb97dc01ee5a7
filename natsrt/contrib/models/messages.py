"""What travels between `RemoteChatCompletionClient` and the worker that hosts the model.

Tools and output types travel as schemas. The worker makes objects of them again, because model clients want objects:
`NamedTool` and `model_of_schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, cast

from autogen_core import CancellationToken
from autogen_core.models import LLMMessage
from autogen_core.tools import Tool, ToolSchema
from pydantic import BaseModel, RootModel
from pydantic_core import PydanticSerializationError, to_jsonable_python

from natsrt.errors import NatsrtError

KEY: Final = "default"
"""The key of the agents: there is one model client on each worker."""
ToolChoice = Literal["auto", "required", "none"]


class OutputSchema(BaseModel):
    """A Pydantic model that a result is to follow: the name of the class, and its JSON schema."""

    name: str
    json_schema: dict[str, Any]


class ModelRequest(BaseModel):
    """The arguments of ``create`` and ``create_stream`` of a ``ChatCompletionClient``.

    The reply to it is a stream: a `ModelStarted`, tokens as ``str`` if ``stream`` is True, and a ``CreateResult``.
    """

    messages: list[LLMMessage]
    tools: list[dict[str, Any]] = []
    tool_choice: ToolChoice | dict[str, Any] = "auto"
    """A schema is that of the one tool to be called."""
    json_output: bool | OutputSchema | None = None
    extra_create_args: dict[str, Any] = {}
    stream: bool = False


class ModelStarted(BaseModel):
    """The worker has the request. It is the first item, so the worker notices when the caller disappears."""


class DescribeModel(BaseModel):
    """Asks for a `ModelDescription`."""


class ModelDescription(BaseModel):
    """What a model client says of itself."""

    model_info: dict[str, Any]
    max_tokens: int | None
    """The tokens that remain for an empty conversation; None if the client cannot say it."""


class ModelBusy(NatsrtError):
    """The worker runs as many generations of a model as it may, and as many wait as may. ``model`` is its agent type.

    The request was not started.
    """

    code = 429

    def __init__(self, model: str, running: int, waiting: int) -> None:
        self.model = model
        self.running = running
        self.waiting = waiting
        super().__init__(f"the model {model!r} is busy: {running} generations run on this worker, and {waiting} wait")


# -- writing -----------------------------------------------------------------------------------------------------------


def schema_of(tool: Tool | ToolSchema) -> dict[str, Any]:
    """The schema of a tool, as JSON values. Raises TypeError if ``tool`` is neither a tool nor a schema."""
    schema = tool.schema if isinstance(tool, Tool) else tool
    if not isinstance(schema, Mapping) or "name" not in schema:
        raise TypeError(f"a tool must be an autogen_core.tools.Tool or a ToolSchema with a name, not {tool!r:.100}")
    try:
        return cast(dict[str, Any], to_jsonable_python(schema))
    except (PydanticSerializationError, RecursionError, ValueError) as error:
        raise TypeError(f"the schema of the tool {schema['name']!r:.60} is not JSON: {error}") from None


def choice_of(choice: object) -> ToolChoice | dict[str, Any]:
    """The argument ``tool_choice``, as it travels. Raises ValueError."""
    if isinstance(choice, Tool):
        return schema_of(choice)
    if choice in ("auto", "required", "none"):
        return choice
    raise ValueError(f"tool_choice must be 'auto', 'required', 'none' or a tool, not {choice!r:.100}")


def output_of(json_output: object) -> bool | OutputSchema | None:
    """The argument ``json_output``, as it travels. Raises ValueError."""
    if json_output is None or isinstance(json_output, bool):
        return json_output
    if isinstance(json_output, type) and issubclass(json_output, BaseModel):
        return OutputSchema(name=json_output.__name__, json_schema=json_output.model_json_schema())
    raise ValueError(f"json_output must be None, a bool or a subclass of pydantic.BaseModel, not {json_output!r:.100}")


# -- reading -----------------------------------------------------------------------------------------------------------


def model_of_schema(output: OutputSchema) -> type[BaseModel]:
    """A Pydantic model with this name and this JSON schema, for model clients that want a class.

    It accepts any JSON: it has the schema, not the checks of the class that the caller has.
    """

    class Described(RootModel[Any]):
        @classmethod
        def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return output.json_schema

    Described.__name__ = Described.__qualname__ = output.name
    return Described


class NamedTool:
    """A tool that the model is told to call. The worker has its schema only: the caller runs it."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = schema

    @property
    def name(self) -> str:
        return str(self._schema["name"])

    @property
    def description(self) -> str:
        return str(self._schema.get("description", ""))

    @property
    def schema(self) -> ToolSchema:
        return cast(ToolSchema, self._schema)

    def args_type(self) -> type[BaseModel]:
        return model_of_schema(OutputSchema(name=self.name, json_schema=self._schema.get("parameters", {})))

    def return_type(self) -> type[Any]:
        return object

    def state_type(self) -> type[BaseModel] | None:
        return None

    def return_value_as_string(self, value: Any) -> str:
        return str(value)

    async def run_json(
        self, args: Mapping[str, Any], cancellation_token: CancellationToken, call_id: str | None = None
    ) -> Any:
        raise RuntimeError(f"the tool {self.name!r} is in the process of the caller, and cannot be run here")

    async def save_state_json(self) -> Mapping[str, Any]:
        return {}

    async def load_state_json(self, state: Mapping[str, Any]) -> None:
        return None
