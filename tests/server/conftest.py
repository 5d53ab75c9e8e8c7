"""One real server for the tests of this folder.

It has the demo model in float32, so that a request gives the same tokens in whatever company.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

MISSING = [name for name in ("fastapi", "openai", "llguidance") if find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []  # qwen1m_ext[test] brings them
if not MISSING:
    from openai import OpenAI

    from lib.server import ARGUMENTS, ServerProcess


@pytest.fixture(scope="session")
def session_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, session_dir: Path) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = (*ARGUMENTS, "--session-dir", str(session_dir))
    with ServerProcess(log, *arguments, holdable=True) as process:
        yield process


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> OpenAI:
    return server.client()
