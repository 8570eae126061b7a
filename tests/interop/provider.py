"""A model that answers as a test says, behind OpenAI's protocol on a loopback port."""

import http.server
import json
import threading

PIECES = ["one ", "two ", "three ", "four"]
ANSWER = "".join(PIECES)


class Script:
    """How a model answers: what to do before which piece, and where to break."""

    def __init__(self, before=None, break_at=None):
        self.before = before or {}
        self.break_at = break_at

    def pieces(self):
        for index, piece in enumerate(PIECES):
            if index in self.before:
                self.before[index]()
            if index == self.break_at:
                raise ConnectionError("the model broke off")
            yield piece


class Provider:
    """Asks nobody: it plays its script, whatever the question."""

    def __init__(self):
        self.script, self.prompts = Script(), []
        provider = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                provider.prompts.append(body["messages"])
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.end_headers()
                try:
                    for piece in provider.script.pieces():
                        self.event({"delta": {"content": piece}, "finish_reason": None})
                    self.event({"delta": {}, "finish_reason": "stop"})
                    self.wfile.write(b"data: [DONE]\n\n")
                except OSError:
                    pass  # The connection ends here.

            def event(self, choice):
                choices = [{"index": 0, **choice}]
                chunk = {"id": "c", "object": "chat.completion.chunk", "choices": choices}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
