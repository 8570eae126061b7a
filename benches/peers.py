"""What Python's libraries take for the same work, one caller, as one line of JSON.

    peers.py REDIS_URL PREFIX CONTENT_BYTES LENGTH…

The lists `PREFIX + LENGTH` must be there, with as many elements, in LangChain's form. Times are
medians in microseconds.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
import warnings
from collections.abc import Awaitable, Callable
from importlib.metadata import version

warnings.simplefilter("ignore")

from agents.extensions.memory import RedisSession  # noqa: E402
from langchain_community.chat_message_histories import RedisChatMessageHistory  # noqa: E402
from langchain_core.messages import HumanMessage  # noqa: E402

#: Seconds that each measurement may take, about.
BUDGET = 3.0
#: Items of the agent's session.
ITEMS = 10_000


def repeat(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    first = time.perf_counter() - begin
    times = []
    for _ in range(max(5, min(3000, int(BUDGET / max(first, 1e-6))))):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


async def repeat_async(call: Callable[[], Awaitable[object]], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        await call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e6


async def agents(url: str, text: str) -> dict[str, float]:
    session = RedisSession.from_url("bench-agents", url=url)
    item = {"role": "user", "content": text}
    for _ in range(ITEMS // 100):
        await session.add_items([item] * 100)
    taken = {
        "agents_last50": await repeat_async(lambda: session.get_items(limit=50), 1000),
        "agents_append": await repeat_async(lambda: session.add_items([item]), 2000),
    }
    await session.close()
    return taken


def main() -> None:
    url, prefix, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
    text = "x" * length
    writer = RedisChatMessageHistory("bench-langchain", url=url, ttl=86_400)
    taken: dict[str, object] = {"append": repeat(lambda: writer.add_message(HumanMessage(text)))}
    reads = {}
    for count in sys.argv[4:]:
        reader = RedisChatMessageHistory(count, url=url, key_prefix=prefix)
        reads[count] = repeat(lambda reader=reader: reader.messages)
    taken["reads"] = reads
    taken.update(asyncio.run(agents(url, text)))
    taken["versions"] = {
        name: version(name)
        for name in ("langchain-community", "langchain-core", "openai-agents", "redis")
    }
    print(json.dumps(taken))


if __name__ == "__main__":
    main()
