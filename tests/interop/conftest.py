"""One aimock server for all tests here; `npm ci` in this directory installs it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def aimock_url() -> Iterator[str]:
    with subprocess.Popen(
        ["node", "server.mjs"],
        cwd=HERE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        assert url.startswith("http://"), "aimock did not start; was `npm ci` run?"
        yield url
        # It ends when its stdin does, so it does not outlive a test run that was killed.
        server.communicate(timeout=10)
