"""Measures the client against LangChain's RedisChatMessageHistory, side by side on one Redis.

    cargo build --release
    target/python-venv/bin/python clients/python/benches/langchain_speed.py

Starts a redis-server and a server of its own. Each pair is measured in turns (A B A B …), so that a
busy machine slows both, and the medians are printed as rows for a table. It ends with 1 if a target
is missed.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "clients" / "python" / "tests"))

import conftest  # noqa: E402
from langchain_community.chat_message_histories import RedisChatMessageHistory  # noqa: E402
from langchain_core.messages import AIMessage, HumanMessage  # noqa: E402

from chat_memory import Client  # noqa: E402
from chat_memory.langchain import ChatMemoryHistory  # noqa: E402

MESSAGES = 10_000
TEXT = "x" * 200


def side_by_side(
    a: Callable[[], object], b: Callable[[], object], rounds: int, inner: int
) -> tuple[float, float]:
    """The medians of both, in seconds. Of each round `b` runs `inner` times, and `a` once."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, kept, repeats in ((a, times[0], 1), (b, times[1], inner)):
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                kept.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    release = ROOT / "target" / "release" / "chat-memory"
    parser.add_argument("--program", type=pathlib.Path, default=release, help="the server to run")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    conftest.PROGRAM = options.program

    with tempfile.TemporaryDirectory(prefix="cm-") as folder:
        redis = conftest.Redis(pathlib.Path(folder), "--listen", "127.0.0.1:0")
        try:
            address = next(a for a in redis.server.addresses if not a.startswith("unix:"))
            missed = measure(redis, address, options.rounds)
        finally:
            redis.kill()
    return 1 if missed else 0


def measure(redis: conftest.Redis, address: str, rounds: int) -> bool:
    client = Client(address)
    filler = ChatMemoryHistory("long", address)
    for _ in range(MESSAGES // 100):
        filler.add_messages([HumanMessage(TEXT), AIMessage(TEXT)] * 50)
    theirs = RedisChatMessageHistory("long", url=redis.url)
    turn = [HumanMessage(TEXT), AIMessage(TEXT)]

    def langchain_last() -> None:
        assert len(theirs.messages[-10:]) == 10

    def client_last() -> None:
        assert len(client.get_messages("long", last_messages=10).messages) == 10

    def history_last() -> None:
        assert len(ChatMemoryHistory("long", address, last_messages=10).messages) == 10

    def langchain_turn() -> None:
        RedisChatMessageHistory("turns-a", url=redis.url).add_messages(turn)

    def history_turn() -> None:
        ChatMemoryHistory("turns-b", address).add_messages(turn)

    print("| what | LangChain | chat-memory | times faster | target |")
    print("|---|---|---|---|---|")
    missed = False
    for what, a, b, inner, target in [
        ("last 10 of 10,000, `Client.get_messages`", langchain_last, client_last, 20, 200.0),
        ("last 10 of 10,000, `ChatMemoryHistory.messages`", langchain_last, history_last, 20, None),
        ("a turn of two messages, constructor included", langchain_turn, history_turn, 1, 1.0),
    ]:
        times = rounds if inner > 1 else rounds * 20
        theirs_took, ours_took = side_by_side(a, b, times, inner)
        ratio = theirs_took / ours_took
        missed = missed or (target is not None and ratio < target)
        wanted = f"{target:g}" if target is not None else ""
        print(
            f"| {what} | {milliseconds(theirs_took)} | {milliseconds(ours_took)} "
            f"| {ratio:.2f} | {wanted} |",
            flush=True,
        )
    return missed


if __name__ == "__main__":
    sys.exit(main())
