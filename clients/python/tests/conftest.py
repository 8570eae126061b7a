"""Real servers for the tests: the program itself, and a Redis of their own."""

from __future__ import annotations

import os
import pathlib
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator

import pytest
from loopback_openai import Provider, loopback_openai

ROOT = pathlib.Path(__file__).resolve().parents[3]
PROGRAM = pathlib.Path(
    os.environ.get("CHAT_MEMORY_PROGRAM", str(ROOT / "target" / "debug" / "chat-memory"))
)
LIMIT_SECONDS = 30.0


class Server:
    """A running chat-memory. It listens on a Unix socket, which survives a restart."""

    def __init__(self, folder: pathlib.Path, *arguments: str) -> None:
        self.target = f"unix:{folder / 'socket'}"
        self._arguments = ["--listen", self.target, *arguments]
        self.addresses: list[str] = []
        self.start()

    def start(self) -> None:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("CHAT_MEMORY_")
        }
        self._process = subprocess.Popen(
            [str(PROGRAM), *self._arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            assert self._process.stdout is not None
            with self._process.stdout as output:
                for line in output:
                    lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            line = lines.get(timeout=LIMIT_SECONDS)
            assert line is not None, "the program did not start"
            if "listening on " in line:
                self.addresses.append(line.split("listening on ")[1].strip())
            if line.startswith("Stop it with"):
                return

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(LIMIT_SECONDS)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(LIMIT_SECONDS)


@pytest.fixture(scope="session")
def folder() -> Iterator[pathlib.Path]:
    """A short path: that of a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="cm-") as path:
        yield pathlib.Path(path)


@pytest.fixture(scope="session")
def server(folder: pathlib.Path) -> Iterator[Server]:
    """The server that most tests share: the embedded store, the model that echoes."""
    shared = folder / "shared"
    shared.mkdir()
    server = Server(shared, "--listen", "127.0.0.1:0", "--database", str(shared / "chat-memory.db"))
    yield server
    server.kill()


@pytest.fixture
def own_server(folder: pathlib.Path) -> Iterator[Server]:
    """A server that a test may stop and start."""
    own = folder / uuid.uuid4().hex[:8]
    own.mkdir()
    server = Server(own, "--database", str(own / "chat-memory.db"))
    yield server
    server.kill()


class Redis:
    """A redis-server of its own, and a chat-memory on it."""

    def __init__(self, folder: pathlib.Path, *arguments: str) -> None:
        socket = folder / "redis"
        self._process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", ""],
            stdout=subprocess.DEVNULL,
            cwd=folder,
        )
        deadline = time.monotonic() + LIMIT_SECONDS
        while not socket.exists():
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.01)
        self.url = f"unix://{socket}?db=0"
        self.server = Server(folder, "--redis", f"redis+unix://{socket}", *arguments)
        self.target = self.server.target

    def kill(self) -> None:
        self.server.kill()
        self._process.kill()
        self._process.wait(LIMIT_SECONDS)


@pytest.fixture
def asking(folder: pathlib.Path) -> Iterator[tuple[Server, Provider]]:
    """A server that a test may stop and start, and the model that it asks."""
    own = folder / uuid.uuid4().hex[:8]
    own.mkdir()
    with loopback_openai() as provider:
        database = str(own / "chat-memory.db")
        server = Server(own, "--database", database, "--model-url", provider.url, "--model", "m")
        yield server, provider
        server.kill()


@pytest.fixture(scope="session")
def redis(folder: pathlib.Path) -> Iterator[Redis]:
    assert shutil.which("redis-server"), "redis-server is missing"
    own = folder / "redis"
    own.mkdir()
    redis = Redis(own)
    yield redis
    redis.kill()


@pytest.fixture
def target(server: Server) -> str:
    return server.target


@pytest.fixture
def session_id() -> str:
    """A session that no other test uses."""
    return f"test-{uuid.uuid4()}"
