"""Guards the shape of the package: which way imports go, what is public, what is never called."""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]
import pytest

import aidb_ray
from aidb_ray import errors

PACKAGE = Path(aidb_ray.__file__).parent

# Lowest first. A module imports only from levels below its own and from its own package.
LEVELS = (
    {"errors"},
    {"contracts", "crash_points", "expressions", "json_values", "retry"},
    {"runtime"},
    {"store"},
    {"models", "query"},
    {"chunks"},
    {"database"},
    {"effects"},
    {"lifecycle"},
    {"agents"},
    {"batch", "cli", "data", "gateway", "testing"},
    {"__init__"},
)
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}

# `Database.agent(name)` gives the handle of a level that is built on databases.
UPWARD_BY_DESIGN = {("database.database", "aidb_ray.agents.agent")}

# They decide; others wait, send and store. Time and randomness reach them as arguments.
PURE = {
    "agents.cancels",
    "agents.cycle",
    "agents.delegation",
    "agents.parking",
    "effects.outcomes",
    "effects.pending",
    "errors",
    "expressions",
    "json_values",
    "lifecycle.wake",
    "query.aggregates",
    "query.answer",
    "query.builder",
    "query.circuit",
    "query.clauses",
    "query.groups",
    "query.joined",
    "query.joins",
    "query.operators",
    "query.ordering",
    "query.outputs",
    "query.plan",
    "query.query",
    "query.shapes",
    "query.shown",
    "store.changes",
    "store.claim_plan",
    "store.claims",
    "store.replication",
    "store.row_types",
    "store.tables",
    "store.versions",
}
IMPURE_IMPORTS = {
    "asyncio",
    "io",
    "os",
    "pathlib",
    "random",
    "ray",
    "secrets",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "time",
}

# Each can run code that came with data.
FORBIDDEN_CALLS = {
    "__import__",
    "cloudpickle.load",
    "cloudpickle.loads",
    "compile",
    "dill.load",
    "dill.loads",
    "eval",
    "exec",
    "marshal.load",
    "marshal.loads",
    "os.popen",
    "os.system",
    "pickle.Unpickler",
    "pickle.load",
    "pickle.loads",
    "shelve.open",
    "yaml.full_load",
    "yaml.load",
    "yaml.unsafe_load",
}

ERROR_SAMPLES: tuple[errors.AidbError, ...] = (
    errors.AidbError("base", code="custom"),
    errors.ConfigError("no generate", code="no_generate"),
    errors.CoroutineError("no coroutine"),
    errors.NotReadyError("await ready()"),
    errors.RowError("bad", collection="messages", key="k", loc=("args", 0)),
    errors.KeyExistsError("exists", collection="messages", key="k"),
    errors.KeyMissingError("missing", collection="messages", key="k"),
    errors.ContractError("wrong type", collection="messages", key="k", loc=("content",)),
    errors.ConflictError("changed", collection="c", key="k", current={"id": "k"}, revision=7),
    errors.QueryError("unknown field", code="unknown_field"),
    errors.FencedError(resource="writer/12", our_epoch=3, current_epoch=4),
    errors.ToolError("raised", code="invalid_args"),
    errors.ModelError("slow down", retryable=True, status=429, retry_after_ms=2_000),
    errors.RunCancelledError("cancelled", reason="user left"),
    errors.WebhookError("bad signature", code="bad_signature", status=401),
    errors.UnavailableError("no answer", outcome="unknown"),
    errors.StorageError("read-only"),
    errors.StorageFullError("no space"),
    errors.CorruptionError("bad frame", file="seg", offset=512, first_revision=3, last_revision=9),
    errors.StoreMismatchError("another store"),
    errors.StoreLockedError("locked", pid=7, host="node"),
    errors.SlowConsumerError("too far behind", resume=41),
    errors.CompactedError("too old", oldest=12),
)


def module_name(path: Path) -> str:
    """Return the name below `aidb_ray`: `store.tables`, `store` for its `__init__.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if len(parts) > 1 and parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


MODULES = {
    module_name(path): ast.parse(path.read_text("utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if "__pycache__" not in path.parts
}


def imports_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import, wherever it stands."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names)
            case ast.ImportFrom(module=module, names=names):
                yield from ((node.lineno, f"{module}.{name.name}") for name in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(module)), *_]):
                if ast.unparse(function).rpartition(".")[2] in {"import_module", "__import__"}:
                    yield node.lineno, module
            case _:
                pass


def unit_of(module: str) -> str:
    """Return the first name below `aidb_ray`, which has a level."""
    return module.removeprefix("aidb_ray").lstrip(".").partition(".")[0] or "__init__"


def layer_violations(modules: dict[str, ast.Module]) -> list[str]:
    found: list[str] = []
    for name, tree in modules.items():
        importer = unit_of(name)
        for line, target in imports_of(tree):
            if target.partition(".")[0] != "aidb_ray":
                continue
            unit = unit_of(target)
            if unit not in LEVEL_OF:  # A name of the package itself, such as `aidb_ray.eq`.
                unit = "__init__"
            if (name, target.rpartition(".")[0]) in UPWARD_BY_DESIGN:
                continue
            if unit != importer and LEVEL_OF[unit] >= LEVEL_OF[importer]:
                found.append(f"{name}:{line} imports {target}")
    return found


def impurities(modules: dict[str, ast.Module]) -> list[str]:
    return [
        f"{name}:{line} imports {target}"
        for name, tree in modules.items()
        if name in PURE or name.partition(".")[0] in PURE
        for line, target in imports_of(tree)
        if target.partition(".")[0] in IMPURE_IMPORTS
    ]


def forbidden_calls(modules: dict[str, ast.Module]) -> list[str]:
    found: list[str] = []
    for name, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
                found.append(f"{name}:{node.lineno} calls {ast.unparse(node.func)}")
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names} & FORBIDDEN_CALLS
                found += [f"{name}:{node.lineno} imports {one}" for one in sorted(names)]
            elif isinstance(node, ast.keyword) and ast.unparse(node) == "shell=True":
                found.append(f"{name}:{node.value.lineno} says shell=True")
    return found


def named_tests(document: str) -> Iterator[tuple[str, str]]:
    """Yield (file, test) for each test that a document names; `::test` is of the file before."""
    file = ""
    for named, test in re.findall(r"`(tests/\S+?\.py)?::(\w+)`", document):
        file = named or file
        yield file, test


def test_every_law_has_its_tests() -> None:
    root = PACKAGE.parent
    laws = (PACKAGE / "ARCHITECTURE.md").read_text("utf-8").partition("## Laws")[2]
    named = list(named_tests(laws.partition("## Words")[0]))
    texts = {file: (root / file).read_text("utf-8") for file, _ in named}
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not re.search(rf"^(async def |def |class )?{test}\b", texts[file], re.MULTILINE)
    ]

    assert len(named) > 20
    assert missing == []


def test_every_module_has_a_level() -> None:
    assert {unit_of(name) for name in MODULES} <= LEVEL_OF.keys()


def test_imports_go_down() -> None:
    assert layer_violations(MODULES) == []


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("store.tables", "from aidb_ray.query.builder import Query"),
        ("store.tables", "from aidb_ray import eq"),
        ("store.tables", "import aidb_ray"),
        ("models.base", "def f():\n    from aidb_ray.query import live"),
        ("contracts", "from importlib import import_module\nimport_module('aidb_ray.store.log')"),
        ("query.live", "from aidb_ray import models"),
        ("database.session", "from aidb_ray.agents.agent import Agent"),
        ("database.database", "from aidb_ray.agents.cycle import Cycle"),
    ],
)
def test_an_import_upward_is_seen(importer: str, source: str) -> None:
    assert layer_violations({importer: ast.parse(source)})


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("store.tables", "from aidb_ray.store.changes import Change"),
        ("store.tables", "from aidb_ray import errors"),
        ("agents.agent", "from aidb_ray.database import Database"),
        ("database.database", "import asyncio"),
    ],
)
def test_an_import_downward_is_allowed(importer: str, source: str) -> None:
    assert layer_violations({importer: ast.parse(source)}) == []


def test_only_the_runtime_knows_ray() -> None:
    importers = {
        name
        for name, tree in MODULES.items()
        if any(target.partition(".")[0] == "ray" for _, target in imports_of(tree))
    }

    runtime = {"runtime.cluster", "runtime.failures", "runtime.ray_refs"}
    assert runtime <= importers
    assert importers <= runtime | {"data"}


def test_pure_modules_have_no_clock_and_no_io() -> None:
    assert PURE & MODULES.keys()
    assert impurities(MODULES) == []


def test_an_impure_import_is_seen() -> None:
    assert impurities({"store.tables": ast.parse("from time import monotonic")})
    assert impurities({"store.tables": ast.parse("def f():\n    import os.path")})
    assert impurities({"expressions.codec": ast.parse("import time")})


def test_nothing_executes_data() -> None:
    assert forbidden_calls(MODULES) == []


@pytest.mark.parametrize(
    "source", ["pickle.loads(b)", "from yaml import load", "eval(x)", "run('ls', shell=True)"]
)
def test_a_call_that_executes_data_is_seen(source: str) -> None:
    assert forbidden_calls({"store.log": ast.parse(source)})


def test_all_is_sorted_and_agrees_with_the_table_and_the_type_checker() -> None:
    (block,) = [node for node in MODULES["__init__"].body if isinstance(node, ast.If)]
    checked = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    assert aidb_ray.__all__ == sorted(set(aidb_ray.__all__))
    assert checked == aidb_ray._WHERE
    assert set(aidb_ray.__all__) == aidb_ray._WHERE.keys()


@pytest.mark.parametrize("name", aidb_ray.__all__)
def test_every_public_name_loads(name: str) -> None:
    value = getattr(aidb_ray, name)

    assert getattr(value, "__name__", name) == name
    assert name in dir(aidb_ray)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="conect"):
        getattr(aidb_ray, "conect")  # noqa: B009


def error_classes(root: type[errors.AidbError] = errors.AidbError) -> set[type[errors.AidbError]]:
    return {root}.union(*(error_classes(leaf) for leaf in root.__subclasses__()))


def test_every_error_is_public_and_has_a_sample() -> None:
    # Ray makes subclasses of ours at run time; they are named after what they wrap.
    ours = {error for error in error_classes() if error.__module__ == errors.__name__}

    assert ours == {type(sample) for sample in ERROR_SAMPLES}
    assert {error.__name__ for error in ours} <= set(aidb_ray.__all__)


def test_errors_live_in_one_file() -> None:
    names = {error.__name__ for error in error_classes()} | {"Exception", "BaseException"}
    strays = [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in MODULES.items()
        if name != "errors"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and {ast.unparse(base).rpartition(".")[2] for base in node.bases} & names
    ]

    assert strays == []


@pytest.mark.parametrize("sample", ERROR_SAMPLES, ids=lambda sample: type(sample).__name__)
def test_every_error_survives_two_hops(sample: errors.AidbError) -> None:
    sample.add_note("seen in another process")

    arrived = pickle.loads(pickle.dumps(cloudpickle.loads(cloudpickle.dumps(sample))))

    assert type(arrived) is type(sample)
    assert arrived.args == sample.args
    assert str(arrived) == str(sample)
    assert arrived.code == sample.code
    assert arrived.__dict__ == sample.__dict__


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ["ag_ui", "httpx", "httpx2", "msgspec", "openai", "pyarrow", "pydantic", "ray", "rich"]
    program = f"import sys, aidb_ray; print([m for m in {heavy} if m in sys.modules])"

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.strip() == "[]"


def test_importing_the_runtime_does_not_load_ray() -> None:
    program = "import sys, aidb_ray.runtime; print('ray' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.strip() == "False"


def test_the_words_load_only_the_standard_library_and_msgspec() -> None:
    program = (
        "import sys, msgspec; before = {m.partition('.')[0] for m in sys.modules}\n"
        "import aidb_ray.errors, aidb_ray.expressions, aidb_ray.store.changes\n"
        "loaded = {m.partition('.')[0] for m in sys.modules} - before\n"
        "print(sorted(loaded - sys.stdlib_module_names - {'aidb_ray'}))"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.strip() == "[]"
