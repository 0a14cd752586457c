"""Row types at the edge: a user's values into stored JSON and back, with errors that name fields.

Any pydantic model, dataclass or TypedDict may be a row type; without one a row is a plain dict.
A row bears the version of its schema, and one of an older version is migrated when it is read.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Any, Generic, TypeVar, cast

import msgspec
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from aidb_ray.contracts import DEFAULT_ROW_TYPES, MAX_KEY_LENGTH, TERMINAL_STATUSES
from aidb_ray.errors import ConfigError, ContractError
from aidb_ray.expressions import Fields, Migrate
from aidb_ray.json_values import find_problem, is_unicode
from aidb_ray.store.changes import MAX_ROW_BYTES
from aidb_ray.store.row_types import RowType, describe
from aidb_ray.store.versions import MARK, VERSION_FIELD, stamp, unstamp

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CODES = {
    "missing": "missing_field",
    "string_unicode": "invalid_unicode",
    "finite_number": "invalid_number",
    "int_parsing_size": "invalid_number",
    "timezone_aware": "timezone_required",
    "recursion_loop": "too_deep",
}
_decode_dict = msgspec.json.Decoder(dict[str, Any]).decode


class RowCodec(Generic[T]):
    """Encodes and decodes the rows of one type; `key_field` names the field that is the key.

    Mappings are validated strictly: no value is converted, but that a time, an enum and the like
    may be given as JSON has them; no field may be unknown. A type whose config speaks of `strict`
    or `extra` is taken at its word.

    Attributes:
        version: The version of the rows' schema, from 1, that is written.
        migrate: Makes fields of older versions fields of this one; None if all look alike.
    """

    def __init__(
        self,
        row_type: type[T] | None,
        key_field: str,
        version: int = 1,
        migrate: Migrate | None = None,
    ) -> None:
        _check_version(version, migrate)
        self.row_type = row_type
        self.key_field = key_field
        self.version = version
        self.migrate = migrate
        self._type: RowType | None = None
        self._is_default = row_type in DEFAULT_ROW_TYPES.values()
        self._terminal = TERMINAL_STATUSES.get(cast("Any", row_type), ())
        if row_type is not None:
            try:
                adapter: TypeAdapter[T] = TypeAdapter(row_type)
                found = self._type = describe(row_type, adapter)
            except PydanticUserError as error:
                raise ConfigError(
                    f"{row_type!r} cannot be a row type: {error}", code="invalid_schema"
                ) from error
            self._validate = adapter.validator.validate_python
            self._validate_json = adapter.validator.validate_json
            self._to_python = adapter.serializer.to_python
            self._to_json = adapter.serializer.to_json
            self._python_names = {wire: name for name, wire in found.names.items()}
            if key_field not in found.names:
                raise ConfigError(
                    f"{row_type.__name__} has no field {key_field!r} to be the key.",
                    code="invalid_key_field",
                )
            if VERSION_FIELD in self._python_names:
                raise ConfigError(
                    f"{row_type.__name__} stores a field as {VERSION_FIELD!r}, which is where a "
                    f"row's version is kept.",
                    code="invalid_schema",
                )
        self._wire_key = key_field if self._type is None else self._type.names[key_field]

    @property
    def fields(self) -> Fields | None:
        """The row type's fields as queries know them; None for rows without a type."""
        return None if self._type is None else self._type.fields

    def encode(self, collection: str, row: T | Mapping[str, Any]) -> tuple[str, bytes]:
        """Return key and stored JSON of a new row, defaults filled in.

        Raises:
            ContractError: the row does not fit its type; `loc` names the field.
        """
        key, value = self._encode(collection, row)
        return key, self._checked(collection, key, stamp(value, self.version))

    def _encode(self, collection: str, row: T | Mapping[str, Any]) -> tuple[str, bytes]:
        if self._type is None:
            return self._encode_dict(collection, row)
        if not isinstance(row, dict) and isinstance(row, Mapping):
            row = dict(cast("Mapping[str, Any]", row))
        try:
            if self._is_default:
                # Strict by themselves, and checked by no one's code but ours.
                model = self._validate(row)
                self._check_untyped(collection, model)
                warnings = "none" if isinstance(row, dict) else "error"
                value = self._to_json(model, by_alias=True, warnings=warnings)
            else:
                raw = self._given_json(collection, cast("object", row))
                kind = self._type
                model = self._validate_json(raw, strict=kind.strict, extra=kind.extra)
                value = self._serialize(model)
        except ValidationError as error:
            raise self._contract_error(error, collection) from None
        except (ValueError, TypeError) as error:
            # pydantic_core's PydanticSerializationError is a ValueError.
            raise self._unstorable_row(collection, cast("object", row), error) from error
        return self._checked_key(collection, _get(model, self.key_field)), value

    def _given_json(self, collection: str, row: object) -> bytes:
        """Return what was given as JSON for validation: only there is a time or an enum a text.

        An instance goes the same way: a dataclass has checked nothing, and what cannot be read
        back must not be written.
        """
        assert self._type is not None
        assert self.row_type is not None
        fields: dict[str, Any] = {}
        if isinstance(row, dict):
            for name, value in cast("dict[str, Any]", row).items():
                given = self._type.accepted.get(name)
                if given is None and self._type.unknown == "forbid":
                    raise self._unknown_field(collection, name)
                wire = given or name
                fields[wire] = self._to_stored(
                    collection, self._python_names.get(wire, name), value
                )
        elif isinstance(row, self.row_type):
            self._check_untyped(collection, row)
            fields = self._to_python(
                row, mode="json", by_alias=True, exclude_computed_fields=True, warnings="none"
            )
        else:
            raise _unstorable(
                collection, "", (), f"it is a {type(row).__name__}, no {self.row_type.__name__}"
            )
        if VERSION_FIELD in fields:
            raise _reserved(collection)
        self._check_json(collection, fields)
        return msgspec.json.encode(fields)

    def _serialize(self, model: T) -> bytes:
        # What is computed from fields is no field, and could not be read back as one.
        return self._to_json(model, by_alias=True, exclude_computed_fields=True, warnings="error")

    def _check_untyped(self, collection: str, model: object) -> None:
        assert self._type is not None
        for name in self._type.untyped:
            self._check_json(collection, _get(model, name), name)

    def _unknown_field(self, collection: str, name: str, key: str = "") -> ContractError:
        assert self._type is not None
        return ContractError(
            f"Rows of {collection!r} have no field {name!r}; they have "
            f"{', '.join(self._type.names)}.",
            code="extra_forbidden",
            collection=collection,
            key=key,
            loc=(name,),
        )

    def _unstorable_row(self, collection: str, row: object, error: Exception) -> ContractError:
        """Say why a row that fits its type has no JSON: pydantic lets half characters pass."""
        assert self._type is not None
        for name, wire in self._type.names.items():
            if isinstance(row, Mapping):
                fields = cast("Mapping[str, Any]", row)
                value = fields.get(name, fields.get(wire))
            else:
                value = getattr(row, name)
            if isinstance(value, str) and not is_unicode(value):
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
        prepared: dict[str, Any] = {}
        for name, value in changes.items():
            wire = name if self._type is None else self._type.names.get(name)
            if wire is None:
                assert self._type is not None
                if self._type.unknown != "allow":
                    raise self._unknown_field(collection, name, key)
                wire = name
            if wire == VERSION_FIELD:
                raise _reserved(collection, key)
            prepared[wire] = self._to_stored(collection, name, value, key)
        return prepared

    def _to_stored(self, collection: str, name: str, value: object, key: str = "") -> Any:
        """Return a copy of a field's value as JSON has it."""
        kind = self._type
        if kind is None or name in kind.untyped or type(value) is str:
            self._check_json(collection, value, name, key)
            return deepcopy(value)
        try:
            stored = to_jsonable_python(value, by_alias=True)
        except (ValueError, TypeError) as error:
            raise _unstorable(collection, key, (name,), str(error)) from error
        self._check_json(collection, stored, name, key)
        return stored

    def patch(self, collection: str, stored: bytes, changes: Mapping[str, Any], key: str) -> bytes:
        """Return stored JSON with prepared changes made; a row of an older version is migrated.

        Raises:
            ContractError: the result does not fit the row type, the key would change, or a
                terminal status would (`illegal_transition`). See `current`.
        """
        before = _decode_dict(self.current(stored, collection, key))
        fields = {**before, **changes}
        if fields.get(self._wire_key) != key:
            raise ContractError(
                f"The key of {collection}[{key!r}] cannot change; insert a new row instead.",
                code="immutable_key",
                collection=collection,
                key=key,
                loc=(self.key_field,),
            )
        if self._type is None:
            value = self._encode_dict(collection, fields)[1]
            # Whoever leaves the type out changes the runtime's rows by the same rules.
            kept = DEFAULT_ROW_TYPES.get(collection)
            if kept is not None and before.get("status") in TERMINAL_STATUSES.get(kept, ()):
                self._check_status_stays(collection, key, before["status"], fields.get("status"))
        else:
            try:
                # JSON on both sides: strict validation takes a stored time as text only from JSON.
                model = self._validate_json(msgspec.json.encode(fields), strict=self._type.strict)
            except ValidationError as error:
                raise self._contract_error(error, collection, key) from None
            if before.get("status") in self._terminal:
                self._check_status_stays(collection, key, before["status"], _get(model, "status"))
            value = self._serialize(model)
        return self._checked(collection, key, stamp(value, self.version))

    def _check_status_stays(self, collection: str, key: str, before: str, after: object) -> None:
        if after != before:
            raise ContractError(
                f"{collection}[{key!r}] is {before} for good and cannot become {after}.",
                code="illegal_transition",
                collection=collection,
                key=key,
                loc=("status",),
            )

    def is_current(self, stored: bytes) -> bool:
        """Whether a stored row is at once seen to be what `current` would return of it."""
        return self.version == 1 and not stored.startswith(MARK)

    def current(self, stored: bytes, collection: str = "", key: str = "") -> bytes:
        """Return a stored row's JSON as rows of this version have it, without the version.

        Raises:
            ContractError: `newer_schema`: it was stored under a later version.
                `migration_failed`: `migrate` raised, or what it returned does not fit.
        """
        if self.is_current(stored):
            return stored
        version, value = unstamp(stored)
        if version > self.version:
            raise ContractError(
                f"{collection}[{key!r}] was written under version {version} of its schema; this "
                f"process reads versions up to {self.version}. Deploy the newer code here, too.",
                code="newer_schema",
                collection=collection,
                key=key,
            )
        if version == self.version or self.migrate is None:
            return value
        return self._migrated(self.migrate, value, version, collection, key)

    def _migrated(
        self, migrate: Migrate, value: bytes, version: int, collection: str, key: str
    ) -> bytes:
        loc: tuple[str | int, ...] = ()
        try:
            found = cast("object", migrate(_decode_dict(value), version))
            if isinstance(found, Mapping):
                new_key, migrated = self._encode(collection, cast("Mapping[str, Any]", found))
                if new_key == key or not key:
                    return migrated
                words = f"its key would become {new_key!r}"
            else:
                words = f"migrate returned a {type(found).__name__}, no mapping"
            cause = None
        except ContractError as error:
            words, loc, cause = str(error), error.loc, error
        except Exception as error:  # noqa: BLE001  A user's code: this row fails, others go on.
            words, cause = f"migrate raised {error!r}", error
        raise ContractError(
            f"{collection}[{key!r}] cannot be migrated from version {version} to {self.version}: "
            f"{words}",
            code="migration_failed",
            collection=collection,
            key=key,
            loc=loc,
        ) from cause

    def try_current(self, stored: bytes, collection: str, key: str) -> bytes | None:
        """Return `current`, or None where it raises, which is logged: one row must not hide all."""
        try:
            return self.current(stored, collection, key)
        except ContractError as error:
            logger.error("a row is left out: %s", error, exc_info=error.__cause__)  # noqa: TRY400
            return None

    def decode(self, stored: bytes, collection: str = "", key: str = "") -> T:
        """Return the row as its type.

        Raises:
            ContractError: `invalid_row`: it was stored under another type. See `current`.
        """
        return self.decode_current(self.current(stored, collection, key), collection, key)

    def decode_current(self, value: bytes, collection: str = "", key: str = "") -> T:
        """Return what `current` returned as a row. See `decode`."""
        if self.row_type is None:
            return cast("T", _decode_dict(value))
        try:
            return self._validate_json(value, strict=False)
        except ValidationError as error:
            raise ContractError(
                f"{collection}[{key!r}] is stored as it fits no {self.row_type.__name__}: {error}",
                code="invalid_row",
                collection=collection,
                key=key,
            ) from None

    def fields_of(self, stored: bytes, collection: str = "", key: str = "") -> dict[str, Any]:
        """Return the row's values by Python name, typed as in the row type."""
        decoded = self.decode(stored, collection, key)
        if isinstance(decoded, Mapping):
            return dict(cast("Mapping[str, Any]", decoded))
        return {name: getattr(decoded, name) for name in self._type.names} if self._type else {}

    def stored_fields(self, stored: bytes, collection: str = "", key: str = "") -> dict[str, Any]:
        """Return the row's values by stored name, as JSON has them. See `current`."""
        return _decode_dict(self.current(stored, collection, key))

    def decode_fields(self, fields: Mapping[str, Any]) -> T:
        """Return a row of this version from its stored fields. See `decode`."""
        if self.row_type is None:
            return cast("T", dict(fields))
        return self.decode_current(msgspec.json.encode(fields))

    def _encode_dict(self, collection: str, row: object) -> tuple[str, bytes]:
        if not isinstance(row, Mapping):
            raise _unstorable(collection, "", (), f"it is a {type(row).__name__}, no mapping")
        fields = dict(cast("Mapping[str, Any]", row))
        if VERSION_FIELD in fields:
            raise _reserved(collection)
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
        return key, value

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
        if self._type is not None and self._type.has_numbers:
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
        problem = find_problem(value, () if name is None else (name,))
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
        loc = self._python_loc(first["loc"])
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

    def _python_loc(self, loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
        """Return a place in a row with the names that fields have in Python."""
        found: list[str | int] = []
        fields = self.fields
        for part in loc:
            named = ((n, one.fields) for n, one in (fields or {}).items() if one.wire == part)
            name, fields = next(named, (part, None))
            found.append(name)
        return tuple(found)


@lru_cache(maxsize=512)
def codec_of(
    row_type: type[Any] | None, key_field: str, version: int = 1, migrate: Migrate | None = None
) -> RowCodec[Any]:
    """Return the codec of a row type, made once per process."""
    return RowCodec(row_type, key_field, version, migrate)


def _check_version(version: object, migrate: object) -> None:
    if not isinstance(version, int) or not 1 <= version < 1_000_000_000:
        raise ConfigError(
            f"The version of a schema is a whole number from 1, not {version!r}.",
            code="invalid_version",
        )
    if migrate is None:
        return
    if version == 1:
        raise ConfigError(
            "There is nothing older than version 1 to migrate: give `version` as well.",
            code="invalid_version",
        )
    if not callable(migrate) or inspect.iscoroutinefunction(migrate):
        raise ConfigError(
            f"migrate is a plain function of a row's fields and their version, not {migrate!r}.",
            code="invalid_migrate",
        )


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


def _reserved(collection: str, key: str = "") -> ContractError:
    return ContractError(
        f"{VERSION_FIELD!r} in a row of {collection!r} is where the store keeps its version; "
        f"choose another name.",
        code="reserved_field",
        collection=collection,
        key=key,
        loc=(VERSION_FIELD,),
    )
