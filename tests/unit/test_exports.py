"""Whoever annotates a function of theirs finds each type of a public signature in `aidb_ray`."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
import typing
from collections.abc import Iterator
from typing import Any, cast

import aidb_ray

INTERNAL = {
    # Kept by those who are given them, and named by nobody.
    "ActorRef",
    "AgentActor",
    "AgentCollections",
    "AgentInSession",
    "Closable",
    "Connecting",
    "Delegate",
    "EffectActor",
    "Filter",
    "Insert",
    "MutationRecord",
    "Named",
    "OpenAIText",
    "Partition",
    "Patch",
    "QuerySource",
    "Record",
    "ShardStatus",
    "SingleQuery",
    "Site",
    "Sites",
    "SourceRef",
    "StoreStatus",
    "StoredRow",
    "Subscribed",
    "ThreadWatch",
}


def names_of(module: Any) -> dict[str, Any]:
    """Return what a module's annotations may name, what only type checkers import included."""
    found: dict[str, Any] = {}
    with open(module.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            source = importlib.import_module(node.module)
            for alias in node.names:
                found[alias.asname or alias.name] = getattr(source, alias.name, None)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name] = importlib.import_module(alias.name)
    return {**found, **vars(module)}


def functions() -> Iterator[Any]:
    for name in aidb_ray.__all__:
        value = getattr(aidb_ray, name)
        if inspect.isfunction(value):
            yield value
        elif inspect.isclass(value):
            for key, each in vars(value).items():
                method = getattr(each, "fget", each)
                if not key.startswith("_") and inspect.isfunction(method):
                    yield method


def classes_in(annotation: Any) -> Iterator[type]:
    for arg in typing.get_args(annotation):
        parts = cast("list[Any]", arg) if isinstance(arg, list) else [arg]
        for part in parts:
            yield from classes_in(part)
    origin = typing.get_origin(annotation) or annotation
    if inspect.isclass(origin) and origin.__module__.startswith("aidb_ray"):
        yield origin


def test_signatures_name_only_what_is_exported() -> None:
    named: set[str] = set()
    read = 0
    for function in functions():
        names = names_of(sys.modules[function.__module__])
        try:
            hints = typing.get_type_hints(function, names, names)
        except (NameError, TypeError):
            continue  # What stands only for type checkers cannot be looked up everywhere.
        read += 1
        for annotation in hints.values():
            named.update(each.__name__ for each in classes_in(annotation))

    assert read > 200
    assert named - set(aidb_ray.__all__) - INTERNAL == set()
