"""The codec of Pydantic models.

A model without polymorphic fields is written and read by Pydantic alone. So is a value of a model that contains other
models, where the result is exact (docs/decisions/0019-plain-models.md). In any other model this module writes the
polymorphic fields, and Pydantic the others; both are read in one validation by Pydantic (``model_reader``). The model's
validators, aliases, strictness and serializers apply in all cases. A field with a validator or serializer function in
its annotation, or with a ``field_serializer``, is written and read by Pydantic.

What Pydantic writes may be read back as something else: in unions, by functions of the model, by settings. Where the
class does not exclude that, what was written is read back and compared (docs/decisions/0029-what-arrives.md).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, RootModel, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation
from pydantic.fields import FieldInfo
from pydantic_core import PydanticSerializationError, SchemaValidator, from_json, to_json

from natsrt.wire.class_codec import ClassCodec, unknown_fields
from natsrt.wire.codecs import ALL_KINDS, TYPE_KEY, VALUE_KEY, Codec, Fault, Refused, Unreadable
from natsrt.wire.exactness import difference, unwritable
from natsrt.wire.exception_parts import cut
from natsrt.wire.model_fields import (
    ABSENT,
    ConstrainedCodec,
    PydanticField,
    changes_values,
    culprit,
    field_codec,
    fields_with_serializers,
    has_mark,
    is_functional,
    is_harmless,
    may_be_left_out,
    runs_functions,
    writes_itself,
)
from natsrt.wire.model_reader import Inner, Step, validator_with

_TYPE_KEY_BYTES = TYPE_KEY.encode()
_NO_VALUE = object()


class ModelCodec(ClassCodec):
    """A Pydantic model."""

    cls: type[BaseModel]

    def compile(self, args: tuple[Any, ...]) -> None:
        cls, config = self.cls, self.cls.model_config
        self._complete()
        self._serializer = cls.__pydantic_serializer__
        self._validator: SchemaValidator = cls.__pydantic_validator__  # type: ignore[assignment]
        self._root = issubclass(cls, RootModel)
        self.kinds: frozenset[type] = ALL_KINDS if self._root else frozenset({dict})
        self._extra = config.get("extra") == "allow"
        self._writes_itself = writes_itself(cls)
        self._compile_keys()
        self._compile_fields()
        self._written_by_alias = all(
            (field.serialization_alias or name) == self._keys.get(name) or field.exclude
            for name, field in cls.model_fields.items()
        )
        self._direct = (
            not self._root and not self._special and not self._extra and (self._written_by_alias or not self._renamed)
        )

    def _complete(self) -> None:
        """Have Pydantic resolve the annotations that it could not resolve when the class was defined."""
        try:
            if not self.cls.__pydantic_complete__:
                self.cls.model_rebuild()
        except PydanticUndefinedAnnotation as error:
            raise Refused(f"the annotations of {self.name} cannot be resolved ({error.name})") from None
        except Exception as error:
            raise Refused(f"Pydantic cannot complete {self.name} ({type(error).__name__})") from None

    def _compile_keys(self) -> None:
        """Determine the keys from which Pydantic reads each field, and the key under which it is written."""
        config = self.cls.model_config
        by_name = bool(config.get("populate_by_name") or config.get("validate_by_name"))
        by_alias = config.get("validate_by_alias", True)
        self._keys: dict[str, str] = {}
        read_from: dict[str, tuple[str, ...]] = {}
        for name, field in self.cls.model_fields.items():
            aliases = _aliases(field) if by_alias else []
            read_from[name] = (*aliases, name) if by_name or not aliases else tuple(aliases)
            if field.exclude:
                continue
            if by_alias and field.validation_alias is not None and not aliases and not by_name:
                raise Refused("its alias is a path, so Pydantic cannot read back what it writes", name)
            self._keys[name] = read_from[name][0]
            if self._keys[name] == TYPE_KEY:
                raise Refused(f'the field name "{TYPE_KEY}" is reserved', name)
        self._readable = frozenset(key for keys in read_from.values() for key in keys)
        self._renamed = {name: key for name, key in self._keys.items() if name != key}

    def _compile_fields(self) -> None:
        """Determine which fields this codec writes and reads itself, and which ones Pydantic carries exactly."""
        self._special: dict[str, Codec] = {}
        self._known: dict[str, Codec] = {}
        """The codecs of the fields in which Pydantic runs no functions and keeps all values."""
        self._fields: dict[str, PydanticField] = {}
        """The fields that Pydantic writes and reads."""
        own = fields_with_serializers(self.cls)
        for name, field in self.cls.model_fields.items():
            if field.exclude:
                continue
            codec = self._codec_or_none(field)
            is_own = name in own or is_functional(field.annotation, field.metadata) or may_be_left_out(field)
            if codec is not None and not is_own and codec.polymorphic:
                self._special[name] = self._known[name] = codec
                continue
            keeps = codec is not None and not is_own and is_harmless(field.annotation, field.metadata)
            check = None
            if codec is not None and keeps and not changes_values(self.cls, field):
                self._known[name], check = codec, codec.plain_check((self,))
            self._fields[name] = PydanticField(self.cls, name, codec, check, self._codecs)

    def _can_be_plain(self, inside: tuple[Codec, ...]) -> bool:
        return (
            not self._root
            and not self._extra
            and self._written_by_alias
            and len(self._known) == len(self.cls.model_fields)
            and not any(setting.startswith("ser_json_") for setting in self.cls.model_config)
            and all(codec.plain_check(inside) is not None for codec in self._known.values())
        )

    def _codec_or_none(self, field: FieldInfo) -> Codec | None:
        try:
            return field_codec(self.cls, field, self._codecs.of(field.annotation))
        except Refused:
            # Only Pydantic can handle this type, because of the field's metadata or the model's configuration.
            return None

    # Writing. Whole payloads use Pydantic's JSON writer and reader, which support integers of any size.

    def dumps(self, value: Any) -> bytes:
        try:
            if self._is_plain(value):
                payload = self._serializer.to_json(value, by_alias=True, round_trip=True, warnings=False)
            elif not self._direct or type(value) is not self.cls or self._doubtful(value):
                return to_json(self.encode(value), inf_nan_mode="constants")
            else:
                payload = self._serializer.to_json(
                    value, by_alias=self._written_by_alias, round_trip=True, warnings=self._warnings
                )
        except PydanticSerializationError as error:
            raise culprit(self.cls, value, error) from None
        if self._is_verified:
            _check_json(payload)
            self._verify(value, self.loads, payload)
        return payload

    @functools.cached_property
    def _is_verified(self) -> bool:
        """Whether what is written must be read back as a whole, because functions of the classes may change it."""
        return (
            self._writes_itself
            or any(field.exclude and field.is_required() for field in self.cls.model_fields.values())
            or (self._root and not self._special and self._fields["root"].check is None)
            or any(field.check is None and not field.is_comparable for field in self._fields.values())
            or runs_functions(self.cls.__pydantic_core_schema__)
        )

    @functools.cached_property
    def _warnings(self) -> Literal["error", False]:
        """Pydantic is five times slower if it must refuse values that are not as declared."""
        return "error" if any(field.check is None for field in self._fields.values()) else False

    def _doubtful(self, value: BaseModel) -> list[PydanticField]:
        """The fields of ``value`` that Pydantic might change, and that can be compared on their own."""
        if self._writes_itself:
            return []
        fields = value.__dict__
        return [
            field
            for name, field in self._fields.items()
            if field.is_comparable and not (field.check is not None and field.check(fields.get(name, _NO_VALUE)))
        ]

    def _verify(self, value: BaseModel, read: Callable[[Any], Any], written: Any) -> None:
        """Raise ``Refused`` if ``read`` does not return ``value`` for what was written.

        A model inside another one that is verified is not verified on its own.
        """
        if self._codecs.verifying:
            return
        with self._codecs.verification():
            self._compare(value, read, written)

    def _compare(self, value: BaseModel, read: Callable[[Any], Any], written: Any) -> None:
        try:
            arrived = read(written)
        except Unreadable as fault:
            reason = f"{self.name} does not read what it writes ({fault})"
            raise Refused(f"{reason}; its validators must accept what its serializers write") from None
        if (flaw := difference(value, arrived)) is not None:
            advice = "validators and serializers must keep a value that was sent as it is"
            raise Refused(f"{flaw.reason}; {advice}", flaw.path)

    def encode(self, value: Any) -> Any:
        tree = super().encode(value)
        carries_mark = self._root and type(value) is self.cls and type(tree) is dict and TYPE_KEY in tree
        return self.mark(tree) if carries_mark else tree

    def encode_fields(self, value: Any) -> Any:
        if not self._is_verified:
            return self._written(value)
        if self._codecs.verifying:
            return _checked(self._written(value))
        with self._codecs.verification():
            tree = _checked(self._written(value))
            self._compare(value, self.decode_fields if self._root else self.decode, tree)
        return tree

    def _written(self, value: Any) -> Any:
        try:
            if self._is_plain(value):
                return self._serializer.to_python(value, mode="json", by_alias=True, round_trip=True, warnings=False)
            return self._encode_root(value) if self._root else self._encode_model(value)
        except PydanticSerializationError as error:
            raise culprit(self.cls, value, error) from None

    def _encode_model(self, value: BaseModel) -> Any:
        tree = self._encode_plain_fields(value)
        if type(tree) is not dict:
            return tree
        name = ""
        try:
            for name, codec in self._special.items():
                tree[self._keys[name]] = codec.encode(getattr(value, name))
            for name, item in (value.model_extra or {}).items():
                tree[name] = self._codecs.any.encode(item)
        except Refused as fault:
            raise fault.under(name) from None
        except AttributeError:
            raise Refused("the field has no value", name) from None
        if TYPE_KEY in tree:
            raise Refused(f'a field of {self.name} has the reserved name "{TYPE_KEY}"')
        return tree

    def _encode_plain_fields(self, value: BaseModel) -> Any:
        """Return the fields that Pydantic writes: an object, unless the model's serializer writes something else."""
        doubtful = self._doubtful(value)
        left = {*self._special, *(field.name for field in doubtful)}
        tree = {}
        if len(left) < len(self._fields) + len(self._special):
            tree = self._serializer.to_python(
                value, mode="json", by_alias=False, round_trip=True, warnings=self._warnings, exclude=left
            )
        if type(tree) is not dict:
            return tree
        for field in doubtful:
            if (item := field.tree(value)) is not ABSENT:
                tree[field.name] = item
        return {self._renamed.get(name, name): item for name, item in tree.items()} if self._renamed else tree

    def _encode_root(self, value: Any) -> Any:
        if self._special:
            return self._special["root"].encode(value.root)
        self._fields["root"].check_writable(value)
        return self._serializer.to_python(value, mode="json", round_trip=True, warnings="error")

    # Reading

    def loads(self, payload: bytes) -> Any:
        if not self._codecs.strict and not (_TYPE_KEY_BYTES in payload or self._needs_steps):
            return self._validated(self._validator, payload)
        tree = from_json(payload)
        if self._root or self._codecs.strict or type(tree) is not dict or TYPE_KEY in tree:
            return self.decode(tree)
        return self._validated(self._reader(payload), payload)

    @functools.cached_property
    def _needs_steps(self) -> bool:
        """Whether fields without class names inside may have to be read by natsrt's codecs."""
        return (bool(self._special) or self._extra) and self._plain_fields is None

    def decode(self, tree: Any) -> Any:
        if self._root and not (type(tree) is dict and TYPE_KEY in tree):
            return self.decode_fields(tree)
        if type(tree) is not dict and self._writes_itself:
            return self.decode_fields(tree)
        return super().decode(tree)

    def mark(self, tree: Any) -> dict[str, Any]:
        return {TYPE_KEY: self.name, VALUE_KEY: tree} if self._root else super().mark(tree)

    def decode_marked(self, tree: dict[str, Any]) -> Any:
        return self.decode_fields(self.unwrap(tree)) if self._root else super().decode_marked(tree)

    def decode_fields(self, tree: Any) -> Any:
        is_closed = self._codecs.strict and type(tree) is dict and not self._extra and not self._root
        if is_closed and (unknown := tree.keys() - self._readable):
            raise unknown_fields(self.name, unknown)
        payload = to_json(tree)
        return self._validated(self._reader(payload), payload)

    def _reader(self, payload: bytes) -> SchemaValidator:
        has_steps = _TYPE_KEY_BYTES in payload or self._needs_steps or self._codecs.strict
        return self._stepwise if has_steps else self._validator

    @functools.cached_property
    def _stepwise(self) -> SchemaValidator:
        """A validator in which natsrt's codecs read the fields that have one, after the validators that run before."""
        steps: dict[str, Step] = {name: functools.partial(self._read_special, name) for name in self._special}
        steps.update({name: field.read for name, field in self._fields.items() if field.may_have_mark})
        if not steps and not self._extra:
            return self._validator
        return validator_with(self.cls, steps, self._read_extra if self._extra else None, self._decode_all)

    def _read_special(self, name: str, tree: Any, inner: Inner) -> Any:
        """Read a field that a codec writes. Pydantic reads a tree without class names that the codec cannot read.

        What the codec has read is as declared. Pydantic looks at it only if there are constraints, since it changes
        some values on the way: a list that was declared as an ``Iterable``, for example.
        """
        value = self._decode_special(name, tree)
        if value is _NO_VALUE:
            return inner.validate_json(to_json(tree))
        return inner.validate_python(value) if isinstance(self._special[name], ConstrainedCodec) else value

    def _read_extra(self, tree: Any, inner: Inner) -> Any:
        return inner.validate_python(self._codecs.any.decode(tree))

    def _decode_special(self, name: str, tree: Any) -> Any:
        """Return the value that the codec of a field reads; `_NO_VALUE` if it cannot and the tree has no class name."""
        try:
            return self._special[name].decode(tree)
        except Unreadable as fault:
            if self._codecs.strict or has_mark(tree):
                raise fault.under(name) from fault.__cause__
            return _NO_VALUE

    def _decode_all(self, tree: Any) -> Any:
        """Return an object with the values of the fields that have a codec, for a constructor that reads the others."""
        if type(tree) is not dict:
            return tree
        values = dict(tree)
        for name in self._special:
            key = self._keys[name]
            if key in tree and (value := self._decode_special(name, tree[key])) is not _NO_VALUE:
                values[key] = value
        return values

    def _validated(self, validator: SchemaValidator, payload: bytes) -> Any:
        try:
            return validator.validate_json(payload)
        except ValidationError as error:
            # The text of a ValidationError quotes the input.
            raise Unreadable(_problems(error, self._readable)) from None
        except Fault:
            raise
        except Exception as error:
            raise Unreadable(f"{self.name} does not accept its fields ({type(error).__name__})") from error


def _checked(tree: Any) -> Any:
    """Return a tree that functions of a class have written. Raises ``Refused`` if it is not JSON."""
    if (flaw := unwritable(tree)) is not None:
        raise Refused(flaw.reason, flaw.path)
    return tree


def _check_json(payload: bytes) -> None:
    """Do what `_checked` does for a payload: Pydantic may write ``NaN`` and ``Infinity``."""
    if b"NaN" in payload or b"Infinity" in payload:
        _checked(from_json(payload))


def _aliases(field: FieldInfo) -> list[str]:
    """The keys from which Pydantic reads a field with an alias, in order of preference."""
    alias = field.validation_alias
    if isinstance(alias, AliasChoices):
        return [choice for choice in alias.choices if isinstance(choice, str)]
    return [alias] if isinstance(alias, str) else []


def _problems(error: ValidationError, known: frozenset[str]) -> str:
    """Return the first five problems of a model that did not validate, as text.

    Keys that are not fields of the model may be user data, so they are replaced by ``*``. A key that the model forbids
    is named: without it, nobody could say what is wrong.
    """
    problems = []
    for problem in error.errors(include_url=False, include_context=False, include_input=False)[:5]:
        steps = [str(s) if isinstance(s, int) or s in known else "*" for s in problem["loc"]]
        if problem["type"] == "extra_forbidden" and steps:
            steps[-1] = cut(str(problem["loc"][-1]), 60)
        what = "the field is missing" if problem["type"] == "missing" else problem["type"]
        problems.append(f"{'.'.join(steps)}: {what}" if steps else what)
    return "; ".join(problems)
