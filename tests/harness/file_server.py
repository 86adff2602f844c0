"""A real HTTP server on the loopback that behaves and misbehaves as servers do."""

import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """What the server has and how it gives it. requests: (Range, If-Range) of each request; sent: bytes of bodies."""

    content: bytes
    ranges: bool = True
    etag: str | None = '"one"'
    date: str | None = None
    break_after: list[int] = field(default_factory=list)  # bytes of the next bodies, then the connection is cut
    status: list[int] = field(default_factory=list)  # of the next answers, instead of the file
    length: bool = True  # says Content-Length
    pause: float = 0.0  # seconds between pieces
    piece: int = 1 << 16
    redirect: str | None = None
    hang: bool = False
    paths: dict[str, bytes] = field(default_factory=dict)  # what it has besides, by path
    requests: list = field(default_factory=list)
    sent: int = 0
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        served = self.server.served
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        served.requests.append((asked, condition))
        if served.hang:
            time.sleep(5)
        if served.status:
            return self._answer(served.status.pop(0), b"<html>no</html>")
        if served.redirect and self.path != "/moved":
            self.send_response(302)
            self.send_header("Location", served.redirect)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start, status, headers, content = 0, 200, {}, served.paths.get(self.path, served.content)
        match = re.fullmatch(r"bytes=([0-9]+)-", asked or "")
        if served.ranges and match and condition in (None, served.etag, served.date):
            start, status = int(match[1]), 206
            if start >= len(content):
                return self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for name, value in (("ETag", served.etag), ("Last-Modified", served.date)):
            if value:
                headers[name] = value
        self._answer(status, content[start:], headers)

    def _answer(self, status, body, headers=None):
        served = self.server.served
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if served.length:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.close_connection = True
        self.end_headers()
        cut = served.break_after.pop(0) if served.break_after and status < 300 else None
        for start in range(0, len(body), served.piece):
            part = body[start : start + served.piece]
            if cut is not None:
                part = part[: max(0, cut - start)]
            try:
                self.wfile.write(part)
                self.wfile.flush()
            except OSError:
                return  # the client was killed
            served.sent += len(part)
            if cut is not None and start + len(part) >= cut:
                self.close_connection = True
                return
            time.sleep(served.pause)

    def log_message(self, *words):
        pass


@contextmanager
def serving(content, **behaviour):
    served = Served(content, **behaviour)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.served = served
    served.url = f"http://127.0.0.1:{server.server_address[1]}/file"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
