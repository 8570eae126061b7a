"""A model server on this machine that speaks OpenAI's protocol. It repeats what it was told, and
can be held in the middle of it."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Provider:
    """What the model was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[dict[str, Any]] = []
        self._go_on = threading.Event()
        self._go_on.set()

    def hold(self) -> None:
        """Streams the first word only, from now on."""
        self._go_on.clear()

    def let_go(self) -> None:
        """Streams the rest, and all to come."""
        self._go_on.set()

    def wait(self) -> None:
        """Waits while it is held."""
        self._go_on.wait(30)

    def contents(self) -> list[str]:
        """The texts of the last request, in order."""
        return [message["content"] for message in self.requests[-1]["messages"]]


@contextlib.contextmanager
def loopback_openai() -> Iterator[Provider]:
    provider = Provider()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = json.loads(body)
            provider.requests.append(request)
            answer = f"You said: {request['messages'][-1]['content']}"
            base = {"id": "c1", "created": 1, "model": request["model"]}
            if not request.get("stream"):
                message = {"role": "assistant", "content": answer}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
                self._send(
                    "application/json",
                    json.dumps(
                        {**base, "object": "chat.completion", "choices": [choice], "usage": usage}
                    ),
                )
                return
            events: list[dict[str, Any]] = []
            for word in answer.split(" "):
                delta = {"role": "assistant", "content": word + " "}
                events.append({"index": 0, "finish_reason": None, "delta": delta})
            events.append({"index": 0, "finish_reason": "stop", "delta": {}})
            self._begin("text/event-stream")
            with contextlib.suppress(OSError):  # The server may leave.
                for index, event in enumerate(events):
                    if index == 1:
                        provider.wait()
                    chunk = {**base, "object": "chat.completion.chunk", "choices": [event]}
                    self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.write(b"data: [DONE]\n\n")

        def _begin(self, kind: str, length: int | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()

        def _send(self, kind: str, text: str) -> None:
            body = text.encode()
            self._begin(kind, len(body))
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    provider.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield provider
    finally:
        provider.let_go()
        server.shutdown()
        server.server_close()
        thread.join(30)
