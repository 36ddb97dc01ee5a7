"""Pydantic validators that read a model whose fields natsrt wrote, in whole or in part.

Such a field has to be read by natsrt's codec. The codec runs inside Pydantic's own validation, in the place of what
reads the JSON of the field: the validators of the model and of the field that run *before* get what is in the JSON, as
without natsrt, and those that run *after* get objects. So the schema of the model is copied, with a step instead
of the innermost schema of each such field.

Objects that a codec has built are validated as Python values, and all else as JSON: Pydantic reads a tuple that was
declared as a ``Sequence`` differently in the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic_core import SchemaValidator, core_schema

_Node = dict[str, Any]


class Inner(Protocol):
    """What reads a field apart from its model: a ``SchemaValidator`` or a ``TypeAdapter``."""

    def validate_json(self, data: bytes, /) -> Any: ...

    def validate_python(self, data: Any, /) -> Any: ...


Step = Callable[[Any, Inner], Any]
"""Reads the JSON value of a field. ``Inner`` is how Pydantic reads the field."""


def validator_with(
    cls: type[BaseModel], steps: Mapping[str, Step], extra: Step | None, whole: Callable[[Any], Any]
) -> SchemaValidator:
    """Return a validator of ``cls`` that reads the fields with the names in ``steps`` by these steps.

    ``extra`` reads the values of extra fields; None if there are none. ``whole`` converts an object with all
    fields. It is used instead if the class has a constructor of its own, which reads the fields itself.
    """
    schema: Any = cls.__pydantic_core_schema__
    root = schema["schema"] if schema["type"] == "definitions" else schema
    copy = _Copy(cls, steps, extra, whole, schema.get("definitions", []))
    return copy.validator_of(copy.of(root))


class _Copy:
    """Copies the outer nodes of a model's schema, down to its fields. What is below keeps its identity."""

    def __init__(
        self,
        cls: type[BaseModel],
        steps: Mapping[str, Step],
        extra: Step | None,
        whole: Callable[[Any], Any],
        definitions: list[Any],
    ) -> None:
        self._cls = cls
        self._steps = steps
        self._extra = extra
        self._whole = whole
        self._definitions = definitions
        self._config: Any = None

    def validator_of(self, node: Any, config: Any = None) -> SchemaValidator:
        """A validator of exactly ``node``. By default, Pydantic takes the validator of the class in its place."""
        schema: Any = core_schema.definitions_schema(node, self._definitions) if self._definitions else node
        try:
            return SchemaValidator(schema, config, _use_prebuilt=False)
        except TypeError:
            # Pydantic before 2.11 takes no validators of classes, and does not have the argument.
            return SchemaValidator(schema, config)

    def of(self, node: _Node) -> Any:
        if node["type"] == "definition-ref":
            node = next(found for found in self._definitions if found["ref"] == node["schema_ref"])
        if node["type"] == "model":
            self._config = node.get("config")
        if node["type"] == "model" and node.get("custom_init"):
            return core_schema.no_info_before_validator_function(self._whole, _without_ref(node))
        if node["type"] == "model" and node.get("root_model"):
            return {**_without_ref(node), "schema": self._field("root", node["schema"])}
        if node["type"] == "model-fields":
            return self._fields(node)
        return {**_without_ref(node), "schema": self.of(node["schema"])} if "schema" in node else node

    def _fields(self, node: _Node) -> _Node:
        fields = {
            name: {**field, "schema": self._field(name, field["schema"])} if name in self._steps else field
            for name, field in node["fields"].items()
        }
        changed = {**_without_ref(node), "fields": fields}
        if self._extra is not None:
            changed["extras_schema"] = self._by(self._extra, node.get("extras_schema") or core_schema.any_schema())
        return changed

    def _field(self, name: str, node: _Node) -> Any:
        if name not in self._steps:
            return node
        return self._below(node, functions_of(self._cls, name), self._steps[name])

    def _below(self, node: _Node, functions: int, step: Step) -> Any:
        """``node`` with ``step`` below its default and its outermost validator functions."""
        is_function = node["type"].startswith("function-") and functions > 0
        if "schema" in node and (is_function or node["type"] == "default"):
            return {**_without_ref(node), "schema": self._below(node["schema"], functions - is_function, step)}
        return self._by(step, node)

    def _by(self, step: Step, node: Any) -> Any:
        inner = self.validator_of(node, self._config)
        return core_schema.no_info_plain_validator_function(lambda tree: step(tree, inner))


def functions_of(cls: type[BaseModel], name: str) -> int:
    """The number of validators that decorators of ``cls`` add to the field ``name``."""
    decorators = cls.__pydantic_decorators__
    found = [d.info.fields for d in decorators.field_validators.values()]
    found += [d.info.fields for d in decorators.validators.values()]
    return sum(name in fields or "*" in fields for fields in found)


def _without_ref(node: _Node) -> _Node:
    """A copy that can be changed: references to ``node`` still mean ``node`` itself."""
    return {key: item for key, item in node.items() if key != "ref"}
