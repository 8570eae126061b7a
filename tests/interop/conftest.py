import itertools
import os

import pytest
from harness import Redis, Server
from provider import Provider

LINE = os.environ["INTEROP_LINE"]
_sessions = itertools.count()


@pytest.fixture(scope="session")
def redis():
    server = Redis()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def server(redis):
    program = Server(redis)
    yield program
    program.end()


@pytest.fixture(scope="module")
def provider():
    provider = Provider()
    yield provider
    provider.http.shutdown()


@pytest.fixture
def session():
    return f"session-{next(_sessions)}"

# The chain is shown as it is today: its table is of the current line only. So are the differences to
# its windows.
if LINE != "1":
    collect_ignore = ["test_chain.py", "test_windows.py"]
