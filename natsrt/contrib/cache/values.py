"""Values of a cache, as JSON. What is read is equal to what was stored, or it is refused when it is stored.

``{"value": …}``: JSON values are as they are. A Pydantic model is ``{"$model": NAME, "fields": …}``, and a dict with a
key that begins with ``$`` is ``{"$dict": …}``. A model is read only as one of the classes that the store was given:
nothing is imported by a name from the bucket.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from natsrt.contrib.exact_json import check_keys, dump, is_scalar, too_deep
from natsrt.errors import CannotDecode, CannotSerialize

_VALUE: Final = "a value of a cache"


def _why(error: Exception) -> str:
    """What is wrong, without what Pydantic quotes of the value."""
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['type']}"
    return f"{type(error).__name__}: {error}"[:300]


def class_name(cls: type) -> str:
    """The name under which the instances of a class are stored."""
    return f"{cls.__module__}.{cls.__qualname__}"


class Values:
    """Writes and reads the values of a cache, whose models are of the classes ``types``.

    Raises TypeError if one of these is no class of Pydantic models.
    """

    def __init__(self, types: Iterable[type[BaseModel]]) -> None:
        self._types: dict[str, type[BaseModel]] = {}
        for cls in types:
            if not isinstance(cls, type) or not issubclass(cls, BaseModel):
                raise TypeError(f"types must be classes of Pydantic models; {cls!r:.80} is none")
            self._types[class_name(cls)] = cls

    def encode(self, value: Any) -> bytes:
        """The body of a value.

        Raises:
            CannotSerialize: It would not be read as it is.
        """
        try:
            body = {"value": self._encoded("the value", value)}
        except RecursionError:
            raise too_deep(type(value).__name__, "it") from None
        return dump(type(value).__name__, body)

    def _encoded(self, where: str, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, BaseModel):
            return self._encoded_model(where, value)
        if kind is dict:
            check_keys("dict", where, value)
            items = {key: self._encoded(f"{where}[{key!r:.60}]", item) for key, item in value.items()}
            return {"$dict": items} if any(key.startswith("$") for key in items) else items
        if kind is list:
            return [self._encoded(f"{where}[{index}]", item) for index, item in enumerate(value)]
        if is_scalar(kind.__name__, where, value):
            return value
        raise CannotSerialize(
            kind.__name__,
            f"{where} is a {kind.__name__}; a cache keeps what JSON has, Pydantic models, and lists and dicts of these",
        )

    def _encoded_model(self, where: str, model: BaseModel) -> dict[str, Any]:
        name = class_name(type(model))
        if self._types.get(name) is not type(model):
            raise CannotSerialize(name, f"the store does not know this class: NatsCacheStore(types=[{name}])")
        try:
            fields = json.loads(model.model_dump_json(by_alias=True))
            read = self._model(name, fields)
        except ValueError as error:  # also Pydantic's own
            raise CannotSerialize(name, f"{where} cannot be read from its own JSON: {_why(error)}") from None
        if read != model:
            raise CannotSerialize(name, f"{where} would be read as something else: a field changes its type in JSON")
        return {"$model": name, "fields": fields}

    def decode(self, body: bytes) -> Any:
        """The value of a body.

        Raises:
            CannotDecode: It is no such body, or has a model of a class that the store was not given.
        """
        try:
            return self._decoded(json.loads(body)["value"])
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CannotDecode(_VALUE, _why(error), body) from None

    def _decoded(self, said: Any) -> Any:
        if isinstance(said, list):
            return [self._decoded(item) for item in said]
        if not isinstance(said, dict):
            return said
        if "$model" in said:
            return self._model(said["$model"], said["fields"])
        items = said.get("$dict", said)
        return {key: self._decoded(item) for key, item in items.items()}

    def _model(self, name: Any, fields: Any) -> BaseModel:
        cls = self._types.get(name)
        if cls is None:
            raise ValueError(f"the store does not know the class {name!r:.100}: name it in types")
        return cls.model_validate_json(json.dumps(fields))
