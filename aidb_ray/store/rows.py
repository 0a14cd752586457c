"""Row types at the edge: a user's values into stored JSON and back, with errors that name fields.

Any pydantic model, dataclass or TypedDict may be a row type; without one a row is a plain dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from types import UnionType
from typing import Any, Generic, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from aidb_ray.errors import ConfigError, ContractError
from aidb_ray.expressions import Field, Fields

T = TypeVar("T")

MAX_DEPTH = 64
_CODES = {
    "missing": "missing_field",
    "string_unicode": "invalid_unicode",
    "finite_number": "invalid_number",
    "timezone_aware": "timezone_required",
}
_decode_dict = msgspec.json.Decoder(dict[str, Any]).decode


class RowCodec(Generic[T]):
    """Encodes and decodes the rows of one type; `key_field` names the field that is the key.

    Attributes:
        wire_names: Stored name by Python name, None for rows without a type.
    """

    def __init__(self, row_type: type[T] | None, key_field: str) -> None:
        self.row_type = row_type
        self.key_field = key_field
        self.wire_names: Mapping[str, str] | None = None
        self.fields: Fields | None = None
        self._adapter: TypeAdapter[T] | None = None
        if row_type is not None:
            self._adapter = TypeAdapter(row_type)
            self._validate = self._adapter.validator.validate_python
            self._validate_json = self._adapter.validator.validate_json
            self._serialize = self._adapter.serializer.to_json
            self.wire_names = _wire_names(row_type)
            self.fields = _fields(row_type)
            if key_field not in self.wire_names:
                raise ConfigError(
                    f"{row_type.__name__} has no field {key_field!r} to be the key.",
                    code="invalid_key_field",
                )
        self._wire_key = (self.wire_names or {}).get(key_field, key_field)

    def encode(self, collection: str, row: T | Mapping[str, Any]) -> tuple[str, bytes]:
        """Return key and stored JSON of a new row, defaults filled in.

        Raises:
            ContractError: the row does not fit its type; `loc` names the field.
        """
        if self.row_type is None:
            return self._encode_dict(collection, row)
        try:
            model = self._validate(row)
            key = self._key_of(model)
            return key, self._serialize(model, by_alias=True)
        except ValidationError as error:
            raise _contract_error(error, collection) from None
        except (ValueError, TypeError) as error:
            # pydantic_core's PydanticSerializationError is a ValueError.
            raise ContractError(
                f"A row of {collection!r} cannot be stored: {error}",
                code="not_serializable",
                collection=collection,
            ) from error

    def patch(self, collection: str, stored: bytes, changes: Mapping[str, Any], key: str) -> bytes:
        """Return stored JSON with `changes` (Python names) made.

        Raises:
            ContractError: the result does not fit the row type, or the key would change.
        """
        fields = _decode_dict(stored)
        names = self.wire_names
        for name, value in changes.items():
            wire = name if names is None else names.get(name)
            if wire is None:
                known = ", ".join(names or ())
                raise ContractError(
                    f"Rows of {collection!r} have no field {name!r}; they have {known}.",
                    code="extra_forbidden",
                    collection=collection,
                    key=key,
                    loc=(name,),
                )
            fields[wire] = value if names is None else _to_json_value(value, collection, name)
        if fields.get(self._wire_key) != key:
            raise ContractError(
                f"The key of {collection}[{key!r}] cannot change; insert a new row instead.",
                code="immutable_key",
                collection=collection,
                key=key,
                loc=(self.key_field,),
            )
        if self.row_type is None:
            return self._encode_dict(collection, fields)[1]
        try:
            # JSON on both sides: strict validation takes a stored time as text only from JSON.
            model = self._validate_json(msgspec.json.encode(fields))
            return self._serialize(model, by_alias=True)
        except ValidationError as error:
            raise _contract_error(error, collection, key) from None

    def decode(self, stored: bytes) -> T:
        """Return the row as its type."""
        if self.row_type is None:
            return cast("T", _decode_dict(stored))
        return self._validate_json(stored, strict=False)

    def fields_of(self, stored: bytes) -> dict[str, Any]:
        """Return the row's values by Python name, typed as in the row type."""
        decoded = self.decode(stored)
        if isinstance(decoded, Mapping):
            return dict(cast("Mapping[str, Any]", decoded))
        return {name: getattr(decoded, name) for name in self.wire_names or {}}

    def decode_fields(self, fields: Mapping[str, Any]) -> T:
        """Return a row from its decoded fields (wire names)."""
        if self.row_type is None:
            return cast("T", dict(fields))
        return self._validate_json(msgspec.json.encode(fields), strict=False)

    def _key_of(self, model: T) -> str:
        if isinstance(model, Mapping):
            mapping = cast("Mapping[str, Any]", model)
            return cast("str", mapping[self.key_field])
        return cast("str", getattr(model, self.key_field))

    def _encode_dict(self, collection: str, row: object) -> tuple[str, bytes]:
        if not isinstance(row, Mapping):
            raise ContractError(
                f"A row of {collection!r} is a mapping, not {type(row).__name__}.",
                code="not_serializable",
                collection=collection,
            )
        fields = cast("Mapping[str, Any]", row)
        problem = _find_problem(fields, (), 0)
        if problem is not None:
            code, loc, words = problem
            raise ContractError(
                f"{'.'.join(map(str, loc))} in a row of {collection!r} {words}.",
                code=code,
                collection=collection,
                loc=loc,
            )
        key = fields.get(self.key_field)
        if key is None:
            raise ContractError(
                f"A row of {collection!r} needs {self.key_field!r}, its key.",
                code="missing_field",
                collection=collection,
                loc=(self.key_field,),
            )
        if not isinstance(key, str) or not key or len(key) > 1024 or "\0" in key:
            raise ContractError(
                f"The key of a row is 1 to 1,024 characters without NUL, not {key!r}.",
                code="invalid_id",
                collection=collection,
                loc=(self.key_field,),
            )
        return key, msgspec.json.encode(fields)


@lru_cache(maxsize=512)
def codec_of(row_type: type[Any] | None, key_field: str) -> RowCodec[Any]:
    """Return the codec of a row type, made once per process."""
    return RowCodec(row_type, key_field)


def _wire_names(row_type: type[Any]) -> dict[str, str]:
    if issubclass(row_type, BaseModel):
        return {
            name: field.serialization_alias or field.alias or name
            for name, field in row_type.model_fields.items()
        }
    return {name: name for name in getattr(row_type, "__annotations__", {})}


def _fields(row_type: type[Any]) -> dict[str, Field]:
    names = _wire_names(row_type)
    hints = get_type_hints(row_type)
    return {name: _field(wire, hints.get(name)) for name, wire in names.items()}


def _field(wire: str, hint: object) -> Field:
    kinds = [hint, *get_args(hint)] if get_origin(hint) in (Union, UnionType) else [hint]
    for kind in kinds:
        if isinstance(kind, type):
            if issubclass(kind, datetime):
                return Field(wire, kind="datetime")
            if issubclass(kind, BaseModel):
                return Field(wire, fields=_fields(kind))
    return Field(wire)


def _to_json_value(value: object, collection: str, name: str) -> Any:
    try:
        return to_jsonable_python(value, by_alias=True)
    except (ValueError, TypeError) as error:
        raise ContractError(
            f"{name} in a row of {collection!r} cannot be stored: {error}",
            code="not_serializable",
            collection=collection,
            loc=(name,),
        ) from error


def _contract_error(error: ValidationError, collection: str, key: str = "") -> ContractError:
    first = error.errors(include_url=False, include_input=False)[0]
    kind = first["type"]
    code = _CODES.get(kind, kind)
    if kind == "value_error" and "invalid_id" in first["msg"]:
        code = "invalid_id"
    where = ".".join(map(str, first["loc"])) or "the row"
    others = error.error_count() - 1
    more = f" (and {others} more)" if others else ""
    return ContractError(
        f"A row of {collection!r} does not fit: {where}: {first['msg']}{more}.",
        code=code,
        collection=collection,
        key=key,
        loc=tuple(first["loc"]),
    )


def _find_problem(
    value: object, loc: tuple[str | int, ...], depth: int
) -> tuple[str, tuple[str | int, ...], str] | None:
    """Return code, place and words of the first thing that JSON cannot hold, if any."""
    if depth > MAX_DEPTH:
        return "too_deep", loc[:8], f"is nested deeper than {MAX_DEPTH} levels"
    match value:
        case None | bool():
            return None
        case str():
            return None if value.isascii() or _is_unicode(value) else (
                "invalid_unicode", loc, "holds half of a surrogate pair"
            )  # fmt: skip
        case int():
            return None if value.bit_length() <= 64 else (
                "invalid_number", loc, "is an integer beyond 64 bits"
            )  # fmt: skip
        case float():
            finite = value - value == 0
            return None if finite else ("invalid_number", loc, "is not a finite number")
        case Mapping():
            for name, item in cast("Mapping[object, object]", value).items():
                if not isinstance(name, str):
                    return "not_serializable", loc, f"has the key {name!r}, which is no string"
                problem = _find_problem(item, (*loc, name), depth + 1)
                if problem is not None:
                    return problem
            return None
        case list() | tuple():
            for index, item in enumerate(cast("list[object]", value)):
                problem = _find_problem(item, (*loc, index), depth + 1)
                if problem is not None:
                    return problem
            return None
        case _:
            return "not_serializable", loc, f"is a {type(value).__name__}, which JSON cannot hold"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
