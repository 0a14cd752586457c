"""Joining and starting clusters, as far as that can be shown without one: secrets, addresses."""

from __future__ import annotations

import os
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from aidb_ray.errors import ConfigError
from aidb_ray.runtime import NAMESPACE, Cluster, cluster, credentials

TOKEN_FILE = Path(".ray") / "auth_token"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "has_file", "mode"),
    [
        ({}, False, None),
        ({}, True, "token"),
        ({"RAY_AUTH_TOKEN": "secret"}, False, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "/some/file"}, False, "token"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "disabled"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "secret"}, False, "disabled"),
    ],
)
def test_a_token_is_shown_if_there_is_one_and_the_user_has_not_decided(
    home: Path, environment: dict[str, str], mode: str | None, *, has_file: bool
) -> None:
    if has_file:
        (home / TOKEN_FILE).parent.mkdir()
        (home / TOKEN_FILE).write_text("secret")
    shown = {"PATH": "/bin", **environment}

    credentials.show_token(shown)

    decided = {} if mode is None else {"RAY_AUTH_MODE": mode}
    assert shown == {"PATH": "/bin", **environment, **decided}


def test_who_has_no_home_has_no_token_to_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    nothing: dict[str, str] = {}
    given = {"RAY_AUTH_TOKEN": "secret"}

    credentials.show_token(nothing)
    credentials.show_token(given)

    assert nothing == {}
    assert given["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("address", ["127.0.0.1:1", None])
def test_the_token_is_shown_before_ray_reads_the_environment(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    def stop_here(environment: object) -> None:
        assert environment is os.environ
        raise RuntimeError("shown")

    if address is None:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "show_token", stop_here)
    monkeypatch.setitem(sys.modules, "ray", None)
    joining: Future[Cluster] = Future()

    cluster._join(joining, address, NAMESPACE, None)

    with pytest.raises(RuntimeError, match="shown"):
        joining.result()


def test_the_secret_of_a_cluster_is_readable_by_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", {"HOME": str(tmp_path)})
    path = tmp_path / ".ray" / "auth_token"

    credentials.provide_token()
    first = path.read_text(encoding="utf-8")
    credentials.provide_token()

    assert path.stat().st_mode & 0o777 == 0o600
    assert len(first) == 64
    assert path.read_text(encoding="utf-8") == first


def test_without_a_home_the_secret_of_a_cluster_is_for_child_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    environment = {"HOME": str(tmp_path / "file")}
    monkeypatch.setattr("os.environ", environment)

    credentials.provide_token()

    assert len(environment["RAY_AUTH_TOKEN"]) == 64


def test_a_secret_that_the_environment_settles_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"})

    credentials.provide_token()

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "address", ["10.0.0.1:6379", "127.0.0.1:6379", "auto", "ray://10.0.0.9:10001", None]
)
def test_an_address_that_may_be_the_current_cluster_is_accepted(address: str | None) -> None:
    credentials.check_same_cluster(address, "10.0.0.1:6379")


@pytest.mark.parametrize("address", ["10.0.0.2:6379", "10.0.0.1:6380"])
def test_an_address_of_another_cluster_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="cannot join"):
        credentials.check_same_cluster(address, "10.0.0.1:6379")
