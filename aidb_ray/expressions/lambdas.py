"""Functions that users give: called once, where they are written, with `Ref`s for parameters."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from aidb_ray.errors import QueryError
from aidb_ray.expressions.language import Expression, Ref, as_predicate
from aidb_ray.expressions.nodes import Node, Reference, is_aggregate, walk
from aidb_ray.expressions.sources import Fields


def call_with_refs(fn: Callable[..., Any], scope: Mapping[str, Fields | None]) -> Any:
    """Call `fn` once with a `Ref` for each parameter, which are named after the aliases in `scope`.

    A parameter that has a default keeps it, so that loops can bind values.

    Raises:
        QueryError: `fn` is not a plain function, or a parameter is not an alias.
    """
    return fn(**{name: Ref(Reference(name, ()), _scoped(name, scope)) for name in _aliases(fn)})


def predicate(fn: Callable[[Ref], Expression], fields: Fields | None = None) -> Node:
    """Return the condition that `fn` makes of one row, whatever it calls that row.

    Raises:
        QueryError: see `call_with_refs` and `as_predicate`.
    """
    names = _aliases(fn)
    if len(names) != 1:
        raise QueryError(
            f"A condition on one row takes one parameter, not {len(names)}.", code="invalid_lambda"
        )
    node = as_predicate(call_with_refs(fn, {names[0]: fields}))
    if any(map(is_aggregate, walk(node))):
        raise QueryError("A condition on one row has no groups.", code="aggregate_not_allowed")
    return node


def _aliases(fn: Callable[..., Any]) -> list[str]:
    is_plain = inspect.isfunction(fn) or inspect.ismethod(fn)
    if not is_plain or inspect.iscoroutinefunction(fn) or inspect.isgeneratorfunction(fn):
        raise QueryError(
            f"Expected a lambda or plain function whose parameters are aliases, not {fn!r}.",
            code="invalid_lambda",
        )
    names: list[str] = []
    for parameter in inspect.signature(fn, follow_wrapped=False).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise QueryError(
                f"`{parameter}` of a query function cannot be matched with an alias: "
                f"name the aliases.",
                code="invalid_lambda",
            )
        if parameter.default is parameter.empty:
            names.append(parameter.name)
    return names


def _scoped(name: str, scope: Mapping[str, Fields | None]) -> Fields | None:
    if name in scope:
        return scope[name]
    similar = difflib.get_close_matches(name, scope, n=1)
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    raise QueryError(
        f"{name!r} is not an alias of this query.{hint} Its aliases: {', '.join(sorted(scope))}.",
        code="unknown_field",
    )
