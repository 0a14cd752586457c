"""Row types at the edge: a user's values into stored JSON and back, with errors that name fields.

Any pydantic model, dataclass or TypedDict may be a row type; without one a row is a plain dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from datetime import datetime
from functools import lru_cache
from types import UnionType
from typing import (
    Annotated,
    Any,
    Generic,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
from pydantic import (
    AwareDatetime,
    BaseModel,
    FutureDatetime,
    NaiveDatetime,
    PastDatetime,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import to_jsonable_python

from aidb_ray.contracts import DEFAULT_ROW_TYPES, MAX_KEY_LENGTH, TERMINAL_STATUSES
from aidb_ray.errors import ConfigError, ContractError
from aidb_ray.expressions import Field, Fields
from aidb_ray.store.changes import MAX_ROW_BYTES

T = TypeVar("T")

MAX_DEPTH = 64
_CODES = {
    "missing": "missing_field",
    "string_unicode": "invalid_unicode",
    "finite_number": "invalid_number",
    "int_parsing_size": "invalid_number",
    "timezone_aware": "timezone_required",
    "recursion_loop": "too_deep",
}
# To a type checker these are datetimes; here they are classes of their own.
_DATETIMES = cast(
    "tuple[type[Any], ...]", (AwareDatetime, NaiveDatetime, PastDatetime, FutureDatetime)
)
_LEAST_INT, _GREATEST_INT = -(1 << 63), (1 << 64) - 1
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
        self._untyped: tuple[str, ...] = ()
        self._has_numbers = False
        self._is_default = row_type in DEFAULT_ROW_TYPES.values()
        self._terminal = TERMINAL_STATUSES.get(cast("Any", row_type), ())
        if row_type is not None:
            try:
                adapter: TypeAdapter[T] = TypeAdapter(row_type)
            except PydanticUserError as error:
                raise ConfigError(
                    f"{row_type!r} cannot be a row type: {error}", code="invalid_schema"
                ) from error
            self._validate = adapter.validator.validate_python
            self._validate_json = adapter.validator.validate_json
            self._serialize = adapter.serializer.to_json
            self.wire_names = _wire_names(row_type)
            self._python_names = {wire: name for name, wire in self.wire_names.items()}
            self.fields = _fields(row_type)
            hints = get_type_hints(row_type, include_extras=True)
            self._untyped = tuple(n for n in self.wire_names if _is_untyped(hints.get(n)))
            self._has_numbers = any(
                _has_numbers(hints.get(n)) for n in self.wire_names if n not in self._untyped
            )
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
        if not isinstance(row, dict) and isinstance(row, Mapping):
            row = dict(cast("Mapping[str, Any]", row))
        try:
            model = self._validate(row)
            for name in self._untyped:
                self._check_json(collection, _get(model, name), name)
            key = self._checked_key(collection, _get(model, self.key_field))
            if self._is_default and isinstance(row, dict):
                # Just checked, by no one's code but ours.
                value = self._serialize(model, by_alias=True)
            else:
                value = self._serialize(model, by_alias=True, warnings="error")
        except ValidationError as error:
            raise self._contract_error(error, collection) from None
        except (ValueError, TypeError) as error:
            # pydantic_core's PydanticSerializationError is a ValueError.
            raise self._unstorable_row(collection, cast("object", row), error) from error
        return key, self._checked(collection, key, value)

    def _unstorable_row(self, collection: str, row: object, error: Exception) -> ContractError:
        """Say why a row that fits its type has no JSON: pydantic lets half characters pass."""
        for name, wire in (self.wire_names or {}).items():
            if isinstance(row, Mapping):
                fields = cast("Mapping[str, Any]", row)
                value = fields.get(name, fields.get(wire))
            else:
                value = getattr(row, name)
            if isinstance(value, str) and not _is_unicode(value):
                return ContractError(
                    f"{name} in a row of {collection!r} holds half of a surrogate pair.",
                    code="invalid_unicode",
                    collection=collection,
                    loc=(name,),
                )
        return _unstorable(collection, "", (), str(error))

    def prepare(self, collection: str, changes: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Return changes (Python names) as values of JSON by stored name.

        They are copies: what the caller does to theirs afterwards has no effect.

        Raises:
            ContractError: there is no such field, or JSON cannot hold the value.
        """
        names = self.wire_names
        prepared: dict[str, Any] = {}
        for name, value in changes.items():
            wire = name if names is None else names.get(name)
            if wire is None:
                raise ContractError(
                    f"Rows of {collection!r} have no field {name!r}; they have "
                    f"{', '.join(names or ())}.",
                    code="extra_forbidden",
                    collection=collection,
                    key=key,
                    loc=(name,),
                )
            if names is None or name in self._untyped or isinstance(value, str):
                self._check_json(collection, value, name, key)
                prepared[wire] = deepcopy(value)
                continue
            try:
                prepared[wire] = to_jsonable_python(value, by_alias=True)
            except (ValueError, TypeError) as error:
                raise _unstorable(collection, key, (name,), str(error)) from error
            self._check_json(collection, prepared[wire], name, key)
        return prepared

    def patch(self, collection: str, stored: bytes, changes: Mapping[str, Any], key: str) -> bytes:
        """Return stored JSON with prepared changes made.

        Raises:
            ContractError: the result does not fit the row type, the key would change, or a
                terminal status would (`illegal_transition`).
        """
        before = _decode_dict(stored)
        fields = {**before, **changes}
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
        except ValidationError as error:
            raise self._contract_error(error, collection, key) from None
        if before.get("status") in self._terminal:
            self._check_status_stays(collection, key, before["status"], _get(model, "status"))
        return self._checked(collection, key, self._serialize(model, by_alias=True))

    def _check_status_stays(self, collection: str, key: str, before: str, after: str) -> None:
        if after != before:
            raise ContractError(
                f"{collection}[{key!r}] is {before} for good and cannot become {after}.",
                code="illegal_transition",
                collection=collection,
                key=key,
                loc=("status",),
            )

    def decode(self, stored: bytes) -> T:
        """Return the row as its type.

        Raises:
            ContractError: `invalid_row`: it was stored under another type.
        """
        if self.row_type is None:
            return cast("T", _decode_dict(stored))
        try:
            return self._validate_json(stored, strict=False)
        except ValidationError as error:
            raise ContractError(
                f"A stored row is no {self.row_type.__name__}: {error}", code="invalid_row"
            ) from None

    def fields_of(self, stored: bytes) -> dict[str, Any]:
        """Return the row's values by Python name, typed as in the row type."""
        decoded = self.decode(stored)
        if isinstance(decoded, Mapping):
            return dict(cast("Mapping[str, Any]", decoded))
        return {name: getattr(decoded, name) for name in self.wire_names or {}}

    def decode_fields(self, fields: Mapping[str, Any]) -> T:
        """Return a row from its decoded fields (wire names). See `decode`."""
        if self.row_type is None:
            return cast("T", dict(fields))
        return self.decode(msgspec.json.encode(fields))

    def _encode_dict(self, collection: str, row: object) -> tuple[str, bytes]:
        if not isinstance(row, Mapping):
            raise _unstorable(collection, "", (), f"it is a {type(row).__name__}, no mapping")
        fields = dict(cast("Mapping[str, Any]", row))
        self._check_json(collection, fields)
        key = fields.get(self.key_field)
        if key is None:
            raise ContractError(
                f"A row of {collection!r} needs {self.key_field!r}, its key.",
                code="missing_field",
                collection=collection,
                loc=(self.key_field,),
            )
        key = self._checked_key(collection, key)
        try:
            value = msgspec.json.encode(fields)
        except TypeError as error:
            # Subclasses of str and int look like JSON.
            raise _unstorable(collection, key, (), str(error)) from error
        return key, self._checked(collection, key, value)

    def _checked_key(self, collection: str, key: object) -> str:
        if not isinstance(key, str) or not key or len(key) > MAX_KEY_LENGTH or "\0" in key:
            shown = repr(key)
            raise ContractError(
                f"The key of a row is 1 to {MAX_KEY_LENGTH} characters without NUL, not "
                f"{shown if len(shown) < 100 else shown[:100] + '...'}.",
                code="invalid_id",
                collection=collection,
                loc=(self.key_field,),
            )
        return key

    def _checked(self, collection: str, key: str, value: bytes) -> bytes:
        if len(value) > MAX_ROW_BYTES:
            raise ContractError(
                f"{collection}[{key!r}] has {len(value)} bytes; {MAX_ROW_BYTES} are allowed.",
                code="row_too_large",
                collection=collection,
                key=key,
            )
        if self._has_numbers:
            # Python's integers have no end, and pydantic writes them all.
            try:
                fields: object = _decode_dict(value)
            except msgspec.MsgspecError as error:
                raise ContractError(
                    f"{collection}[{key!r}] holds a number that cannot be stored: {error}",
                    code="invalid_number",
                    collection=collection,
                    key=key,
                ) from error
            self._check_json(collection, fields, key=key)
        return value

    def _check_json(
        self, collection: str, value: object, name: str | None = None, key: str = ""
    ) -> None:
        """Raise if `value`, of field `name` or all fields, is not what JSON can hold."""
        problem = _find_problem(value, () if name is None else (name,), 0)
        if problem is not None:
            code, loc, words = problem
            raise ContractError(
                f"{'.'.join(map(str, loc)) or 'A value'} in a row of {collection!r} {words}.",
                code=code,
                collection=collection,
                key=key,
                loc=loc,
            )

    def _contract_error(
        self, error: ValidationError, collection: str, key: str = ""
    ) -> ContractError:
        first = error.errors(include_url=False, include_input=False)[0]
        kind = first["type"]
        code = _CODES.get(kind, kind)
        if kind == "value_error" and "invalid_id" in first["msg"]:
            code = "invalid_id"
        loc = first["loc"]
        if loc and isinstance(loc[0], str):
            loc = (self._python_names.get(loc[0], loc[0]), *loc[1:])
        others = error.error_count() - 1
        more = f" (and {others} more)" if others else ""
        return ContractError(
            f"A row of {collection!r} does not fit: {'.'.join(map(str, loc)) or 'the row'}: "
            f"{first['msg']}{more}.",
            code=code,
            collection=collection,
            key=key,
            loc=loc,
        )


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
    return {name: name for name in get_type_hints(row_type)}


def _fields(row_type: type[Any]) -> dict[str, Field]:
    names = _wire_names(row_type)
    hints = get_type_hints(row_type)
    return {name: _field(wire, hints.get(name)) for name, wire in names.items()}


def _field(wire: str, hint: object) -> Field:
    for kind in _alternatives(hint):
        if isinstance(kind, type):
            if issubclass(kind, (datetime, *_DATETIMES)):
                return Field(wire, kind="datetime")
            if issubclass(kind, BaseModel):
                return Field(wire, fields=_fields(kind))
    return Field(wire)


def _alternatives(hint: object) -> list[object]:
    """Return the members of a union, or the type itself, without annotations."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [kind for member in get_args(hint) for kind in _alternatives(member)]
    return [hint]


def _is_untyped(hint: object) -> bool:
    """Whether a field takes whatever it is given, so that nobody has checked what is inside."""
    kinds = _alternatives(hint)
    if any(kind in (Any, object, None, dict, list) for kind in kinds):
        return True
    return any(
        get_origin(kind) in (dict, list, Mapping) and _is_untyped(get_args(kind)[-1])
        for kind in kinds
    )


def _has_numbers(hint: object, seen: frozenset[object] = frozenset()) -> bool:
    for kind in _alternatives(hint):
        if kind is int or kind is float:
            return True
        if kind in seen:
            continue
        inner: tuple[object, ...] = get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner = tuple(get_type_hints(kind, include_extras=True).values())
        if any(_has_numbers(each, frozenset({*seen, cast("object", kind)})) for each in inner):
            return True
    return False


def _get(model: object, name: str) -> Any:
    if isinstance(model, dict):
        return cast("dict[str, Any]", model).get(name)
    return getattr(model, name)


def _unstorable(collection: str, key: str, loc: tuple[str | int, ...], words: str) -> ContractError:
    return ContractError(
        f"{'.'.join(map(str, loc)) or 'A value'} in a row of {collection!r} cannot be stored: "
        f"{words}.",
        code="not_serializable",
        collection=collection,
        key=key,
        loc=loc,
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
            return None if _is_unicode(value) else _half_a_pair(loc)
        case int():
            if _LEAST_INT <= value <= _GREATEST_INT:
                return None
            return "invalid_number", loc, "is an integer beyond 64 bits"
        case float():
            if value - value == 0:
                return None
            return "invalid_number", loc, "is not a finite number"
        case dict():
            for name, item in cast("dict[object, object]", value).items():
                if not isinstance(name, str):
                    return "not_serializable", loc, f"has the key {name!r}, which is no string"
                if not _is_unicode(name):
                    return _half_a_pair(loc)
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


def _half_a_pair(loc: tuple[str | int, ...]) -> tuple[str, tuple[str | int, ...], str]:
    return "invalid_unicode", loc, "holds half of a surrogate pair"


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
