"""A real redis-server, the real program, and short ways to use them. Without either, it fails."""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import warnings

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "target/interop/stubs"))
warnings.filterwarnings("ignore", category=DeprecationWarning)

import grpc  # noqa: E402
import redis as redis_client  # noqa: E402
from chatmemory.v1 import chat_memory_pb2 as pb  # noqa: E402
from chatmemory.v1 import chat_memory_pb2_grpc as rpc  # noqa: E402
from google.rpc import error_details_pb2  # noqa: E402
from grpc_status import rpc_status  # noqa: E402
from langchain_community.chat_message_histories import RedisChatMessageHistory  # noqa: E402

PROGRAM = os.environ.get("INTEROP_PROGRAM", str(ROOT / "target/debug/chat-memory"))
PATIENCE_SECONDS = 30


def until(what, condition):
    """Waits for a condition, with a limit."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"gave up waiting until {what}")


class Redis:
    def __init__(self, durable=False):
        self.durable = durable
        self.directory = tempfile.TemporaryDirectory()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self):
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--dir", self.directory.name]
        if self.durable:
            command += ["--appendonly", "yes", "--appendfsync", "always"]
        self.child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = redis_client.Redis.from_url(self.url)

        def answers():
            assert self.child.poll() is None, "redis-server ended"
            try:
                return self.client.ping()
            except redis_client.RedisError:
                return False

        until("redis-server answers", answers)

    def kill(self):
        self.child.kill()
        self.child.wait()

    def raw(self, session):
        """The stored elements, oldest first."""
        return self.client.lrange(f"message_store:{session}", 0, -1)[::-1]


class Server:
    def __init__(self, redis, *arguments):
        command = [PROGRAM, "--listen", "127.0.0.1:0", "--redis", redis.url, *arguments]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CHAT_MEMORY_")}
        self.child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**environment, "OPENAI_API_KEY": "none"},
        )
        self.address = ""
        for line in self.child.stdout:
            if "listening on " in line:
                self.address = line.split("listening on ")[1].strip()
            if line.startswith("Stop it with"):
                break
        assert self.address, "the program did not start"
        self.channel = grpc.insecure_channel(self.address)
        self.stub = rpc.ChatMemoryStub(self.channel)

        def answers():
            try:
                return self.get("probe") is not None
            except grpc.RpcError:
                return False

        until("the server has its store", answers)

    def get(self, session, **fields):
        """All messages, with their bytes."""
        messages, token = [], ""
        while True:
            request = pb.GetMessagesRequest(
                session_id=session, include_raw=True, page_token=token, **fields
            )
            page = self.stub.GetMessages(request, timeout=PATIENCE_SECONDS)
            messages += page.messages
            token = page.next_page_token
            if not token:
                return messages

    def append(self, session, *messages, **fields):
        request = pb.AppendRequest(session_id=session, messages=messages, **fields)
        return self.stub.Append(request, timeout=PATIENCE_SECONDS).messages

    def chat(self, session, text, **fields):
        question = pb.Message(role=pb.ROLE_USER, content=text)
        request = pb.ChatRequest(session_id=session, messages=[question], **fields)
        return self.stub.Chat(request, timeout=PATIENCE_SECONDS)

    def follow(self, session, turn_id, **fields):
        request = pb.ChatRequest(session_id=session, turn_id=turn_id, **fields)
        return self.stub.Chat(request, timeout=PATIENCE_SECONDS)

    def clear(self, session):
        return self.stub.Clear(pb.ClearRequest(session_id=session), timeout=PATIENCE_SECONDS)

    def end(self):
        self.child.kill()
        self.child.wait()


def history(redis, session, **settings):
    return RedisChatMessageHistory(session, url=redis.url, **settings)


def stored(redis, session):
    """The texts in the history, as LangChain reads them."""
    return [message.content for message in history(redis, session).messages]


def reason(error):
    for detail in rpc_status.from_call(error).details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason
    return ""


def tell(stream):
    """The text of a turn, and the reason of its error, or ''."""
    text = ""
    try:
        for event in stream:
            text += event.delta.text
    except grpc.RpcError as error:
        return text, reason(error)
    return text, ""
