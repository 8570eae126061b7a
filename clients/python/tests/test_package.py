"""The package as it is published."""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys
import venv

import pytest
from conftest import Server

import chat_memory
import generate

HERE = pathlib.Path(__file__).resolve().parents[1]

USE = """
import asyncio, sys, warnings
warnings.simplefilter("error")
import chat_memory
from chat_memory import AsyncClient, Client, user
assert "site-packages" in chat_memory.__file__, chat_memory.__file__
target = sys.argv[1]
with Client(target) as client:
    client.append("wheel", [user("hi")])
    assert client.chat("wheel", "again").text() == "You said: again"

async def count():
    async with AsyncClient(target) as client:
        return len([message async for message in client.messages("wheel")])

assert asyncio.run(count()) == 3
assert "chatmemory" not in sys.modules and "langchain_core" not in sys.modules
"""


def test_the_stubs_are_those_of_the_proto() -> None:
    assert generate.stale() == [], "run generate.py"


def test_the_version_is_said_once() -> None:
    assert importlib.metadata.version("chat-memory") == chat_memory.__version__


def test_a_wheel_works_in_an_empty_environment(server: Server, tmp_path: pathlib.Path) -> None:
    def run(*command: str) -> None:
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation"),
        *("--outdir", str(tmp_path / "dist"), str(HERE)),
    )
    (wheel,) = (tmp_path / "dist").iterdir()
    venv.create(tmp_path / "empty", with_pip=True)
    python = str(tmp_path / "empty" / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", str(wheel))
    # With the newest grpcio and protobuf, while the other tests run with older ones.
    run(python, "-c", USE, server.target)
    site = next((tmp_path / "empty" / "lib").glob("python*/site-packages/chat_memory"))
    assert (site / "py.typed").exists()
    assert (site / "_proto" / "chat_memory_pb2.pyi").exists()
    assert (site / "_proto" / "chat_memory_pb2_grpc.pyi").exists()


def test_the_first_example_of_the_readme_runs(
    server: Server, session_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    example = readme.split("```python\n")[1].split("```")[0]
    example = example.replace("127.0.0.1:50051", server.target).replace('"demo"', f'"{session_id}"')
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith(
        "1 My name is Ann.\n2 Hello Ann!\nYou said: What is my name?\nstored\n"
    )
