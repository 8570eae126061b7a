"""Targets and connections. Clients of one target share one channel; the last one closes it."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

TARGET_DEFAULT = "127.0.0.1:50051"
TARGET_VARIABLE = "CHAT_MEMORY_TARGET"

# A page is at most 3 MiB of messages; this leaves room for what surrounds them.
RECEIVE_BYTES_MAX = 16 * 1024 * 1024

_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
    # A peer that went silent is found within 80 seconds of a running call, not by TCP in hours.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # A server that restarts is back in milliseconds; gRPC's default waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # The client retries by itself, with the ids that make it safe.
    ("grpc.enable_retries", 0),
    ("grpc.primary_user_agent", "chat-memory-python"),
)


@dataclass(frozen=True)
class Target:
    """Where the server is."""

    address: str
    """What gRPC calls it: `host:port` or `unix:/path`."""
    tls: bool

    @staticmethod
    def parse(text: str | None) -> Target:
        """Reads `host:port`, `http://host:port`, `https://host:port` or `unix:/path`. None means
        `$CHAT_MEMORY_TARGET`, or `127.0.0.1:50051` without it."""
        text = text if text is not None else os.environ.get(TARGET_VARIABLE) or TARGET_DEFAULT
        if text.startswith("unix:"):
            path = text.removeprefix("unix:")
            path = path.removeprefix("//") if path.startswith("///") else path
            if not path or path.startswith("//"):
                raise ValueError(f"target {text!r}: a Unix socket is written unix:/path")
            return Target(f"unix:{path}", tls=False)
        tls = text.startswith("https://")
        address = text.removeprefix("https://").removeprefix("http://").removesuffix("/")
        host, colon, port = address.rpartition(":")
        if "://" in address or "/" in address or not colon or not host or not port.isdecimal():
            raise ValueError(
                f"target {text!r}: must be host:port, http://host:port, https://host:port "
                "or unix:/path"
            )
        return Target(address, tls)

    def options(self) -> list[tuple[str, Any]]:
        """The channel's options."""
        options = list(_OPTIONS)
        if self.address.startswith("unix:"):
            # By default gRPC sends the escaped path as the authority, which is not a legal one:
            # strict HTTP/2 servers, such as this one, refuse the call.
            options.append(("grpc.default_authority", "localhost"))
        host = self.address.rpartition(":")[0].strip("[]")
        if host in ("localhost", "::1") or host.startswith("127."):
            # A proxy from the environment cannot reach this machine's own loopback.
            options.append(("grpc.enable_http_proxy", 0))
        return options


class _Entry:
    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.users = 1


_lock = threading.Lock()
# A process that was forked must not use its parent's connections, so its id is part of the key.
_channels: dict[tuple[int, Target], _Entry] = {}
_aio_channels: dict[tuple[int, Target, asyncio.AbstractEventLoop], _Entry] = {}


def take(target: Target) -> grpc.Channel:
    """A channel to the target, shared with whoever has it already."""
    key = (os.getpid(), target)
    with _lock:
        entry = _channels.get(key)
        if entry is None:
            if target.tls:
                credentials = grpc.ssl_channel_credentials()
                channel = grpc.secure_channel(target.address, credentials, target.options())
            else:
                channel = grpc.insecure_channel(target.address, target.options())
            entry = _channels[key] = _Entry(channel)
        else:
            entry.users += 1
        shared: grpc.Channel = entry.channel
        return shared


def give_back(target: Target) -> None:
    """Says that one user of the channel is done. The last one closes it."""
    key = (os.getpid(), target)
    with _lock:
        entry = _channels.get(key)
        if entry is None:
            return
        entry.users -= 1
        if entry.users > 0:
            return
        del _channels[key]
    entry.channel.close()


def take_aio(target: Target) -> grpc.aio.Channel:
    """As `take`, for the running event loop: a channel of `grpc.aio` belongs to one loop."""
    loop = asyncio.get_running_loop()
    key = (os.getpid(), target, loop)
    with _lock:
        for other in [other for other in _aio_channels if other[2].is_closed()]:
            # Its loop is gone, and with it the way to close it in good order.
            del _aio_channels[other]
        entry = _aio_channels.get(key)
        if entry is None:
            if target.tls:
                credentials = grpc.ssl_channel_credentials()
                channel = grpc.aio.secure_channel(target.address, credentials, target.options())
            else:
                channel = grpc.aio.insecure_channel(target.address, target.options())
            entry = _aio_channels[key] = _Entry(channel)
        else:
            entry.users += 1
        shared: grpc.aio.Channel = entry.channel
        return shared


async def give_back_aio(target: Target) -> None:
    """As `give_back`, for the running event loop."""
    key = (os.getpid(), target, asyncio.get_running_loop())
    with _lock:
        entry = _aio_channels.get(key)
        if entry is None:
            return
        entry.users -= 1
        if entry.users > 0:
            return
        del _aio_channels[key]
    await entry.channel.close()
