"""What an effect is: its definition as a value, checked when it is made."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast, get_args

import msgspec

from aidb_ray.contracts import is_valid_name
from aidb_ray.effects.outcomes import InDoubt, LateResults
from aidb_ray.errors import ConfigError, QueryError
from aidb_ray.expressions import SourceRef
from aidb_ray.models.tools import ToolContext
from aidb_ray.query.builder import Query
from aidb_ray.retry import Retry, check_bounds
from aidb_ray.store.changes import Insert

Placement: TypeAlias = Literal["actor", "here"]
Handler: TypeAlias = Callable[[Any, ToolContext], Awaitable[Any]]
"""Does the work for one row."""
Reconcile: TypeAlias = Callable[..., Any]
"""`(row, ctx)`: return `Happened(result)`, or None to have the row run again."""

ONCE = Retry(max_attempts=1)


@dataclass(frozen=True, slots=True)
class Happened:
    """What a reconcile function returns when the lost attempt had done its work."""

    result: Any = None


@dataclass(frozen=True, slots=True)
class EffectDefinition:
    """All that an effect is, as the `create_..._effect` functions make it.

    Attributes:
        what: What it does, for its fingerprint: digests of tools, or a name.
        statuses: Written where the user gave no callback: at work, completed, failed.
        needs_approval: Whether a person must agree before this row is run.
        owns: Whether a row is for this executor at all.
        follow_up: `(session, fields) -> inserts` that are written together with the end of a row
            where the user gave no callback; `fields` are those of the row then, by wire name.
    """

    name: str
    query: Query[Any]
    handler: Handler
    what: tuple[str, ...] = ()
    on_executing: Callable[..., Any] | None = None
    on_complete: Callable[..., Any] | None = None
    on_error: Callable[..., Any] | None = None
    is_complete: Callable[[Any], bool] | None = None
    owns: Callable[[Mapping[str, Any]], bool] | None = None
    needs_approval: Callable[[Mapping[str, Any]], bool] | None = None
    follow_up: Callable[[str, Mapping[str, Any]], Sequence[Insert]] | None = None
    statuses: tuple[str, str, str] = ("executing", "completed", "failed")
    max_running: int = 8
    lease_ms: int = 30_000
    timeout_ms: int | None = None
    grace_ms: int = 5_000
    retry: Retry = ONCE
    late_results: LateResults = "discard"
    on_in_doubt: InDoubt | Reconcile = "retry"
    placement: Placement = "actor"
    processes: int = 1
    version: str | None = None
    ray_options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        _check(self)

    @property
    def source(self) -> SourceRef[Any]:
        """The collection whose rows are claimed: the first that the query reads."""
        return cast("SourceRef[Any]", self.query.sources[0][1])

    @property
    def key_name(self) -> str:
        """Wire name of the field that identifies a row."""
        source = self.source
        found = (source.fields or {}).get(source.key)
        return source.key if found is None else found.wire

    def fingerprint(self) -> str:
        """Return a digest of what makes this effect do what it does.

        Of functions it counts whether they are given, not what they do; say `version=` when one
        changes. `grace_ms` and `placement` do not count.
        """
        callbacks = (self.on_executing, self.on_complete, self.on_error, self.is_complete)
        parts = [
            self.name,
            str(self.query),
            self.source.version,
            sorted(self.what),
            [callback is not None for callback in callbacks],
            self.retry,
            repr(sorted(self.ray_options.items())),
            self.max_running,
            self.lease_ms,
            self.timeout_ms,
            self.processes,
            self.late_results,
            self.on_in_doubt if isinstance(self.on_in_doubt, str) else "reconcile",
            self.version,
        ]
        return hashlib.blake2b(msgspec.json.encode(parts), digest_size=16).hexdigest()


def _check(definition: EffectDefinition) -> None:
    name = definition.name
    if not is_valid_name(name) or "/" in name or "*" in name:
        raise ConfigError(f"{name!r} cannot name an effect.", code="invalid_name")
    query = definition.query
    if not isinstance(query.sources[0][1], SourceRef) or query.grouping is not None:
        raise QueryError(
            f"An effect works on rows of a collection, not on what is made of them:\n{query}",
            code="unsupported_query",
        )
    if query.outputs is not None or query.is_distinct:
        raise QueryError(
            f"An effect is given whole rows: leave `select` and `distinct` out of\n{query}",
            code="unsupported_query",
        )
    check_bounds(definition, "max_running", "lease_ms", "processes", least=1)
    check_bounds(definition, "timeout_ms", least=1, may_be_none=True)
    check_bounds(definition, "grace_ms", least=0)
    for option, allowed in (
        ("late_results", get_args(LateResults)),
        ("placement", get_args(Placement)),
    ):
        if getattr(definition, option) not in allowed:
            words = " or ".join(map(repr, allowed))
            raise ConfigError(
                f"{option} is {words}, not {getattr(definition, option)!r}.", code="invalid_option"
            )
    doubt = definition.on_in_doubt
    if not callable(doubt) and doubt not in get_args(InDoubt):
        raise ConfigError(
            f"on_in_doubt is 'retry', 'fail', 'park' or a function, not {doubt!r}.",
            code="invalid_option",
        )
    if definition.placement == "here" and (definition.processes > 1 or definition.ray_options):
        raise ConfigError(
            "An effect that runs here has no processes of its own to place.", code="invalid_option"
        )


def check_contract(query: Query[Any], needed: Sequence[str]) -> None:
    """Refuse rows that lack a field which the runtime relies on.

    Raises:
        ConfigError: `contract`.
    """
    source = query.sources[0][1]
    fields = getattr(source, "fields", None)
    missing = [name for name in needed if fields is not None and name not in fields]
    if missing:
        raise ConfigError(
            f"Rows of {getattr(source, 'name', source)!r} have no field {', '.join(missing)}, "
            f"which an effect relies on.",
            code="contract",
        )
