"""A proxy that stands in front of an S3 server and does to its answers what networks and servers do.

    with FaultProxy(endpoint) as proxy:
        proxy.faults.extend(["reset in body", "", "bit"])    # one per ranged GET, in order of arrival; "" lets it through
        proxy.forever = "503"                                # what happens to ranged GETs once the list is used up

Every connection carries one request. Raw sockets, since the point is to break HTTP.
"""

import re
import socket
import struct
import threading
import time
import urllib.parse
from collections import deque

FAULTS = (
    "503",  # SlowDown
    "500",  # InternalError
    "expired",  # ExpiredToken
    "reset",  # RST before the headers
    "reset in body",  # RST after half of the body
    "truncated",  # end after half of the body, although Content-Length promises more
    "truncated without length",  # the same without Content-Length
    "stall",  # silence after half of the body
    "drip",  # one byte every 20 ms
    "bit",  # one flipped bit in the body
    "range ignored",  # 200 instead of 206
    "other range",  # 206 that speaks of another range
    "late",  # `delay` seconds before the first byte, then all is well
)
ERROR = "HTTP/1.1 {status} Fault\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"


class FaultProxy:
    def __init__(self, endpoint: str) -> None:
        address = urllib.parse.urlsplit(endpoint)
        self.upstream = (address.hostname or "", address.port or 80)
        self.faults: deque[str] = deque()
        self.forever = ""
        self.delay = 1.0
        self.ranges: list[str] = []  # Range header of every ranged GET
        self._closed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                request = _message(client)
                if not request:
                    return
                self._answer(client, request)
            except OSError:
                pass  # the client has hung up

    def _answer(self, client: socket.socket, request: bytes) -> None:
        span = re.search(rb"\r\nrange: *([^\r]*)", request, re.IGNORECASE)
        fault = ""
        if request.startswith(b"GET ") and span:
            self.ranges.append(span.group(1).decode())
            fault = self.faults.popleft() if self.faults else self.forever
        assert fault in ("", *FAULTS), fault
        if fault in ("503", "500", "expired"):
            status, code = {"503": (503, "SlowDown"), "500": (500, "InternalError"), "expired": (400, "ExpiredToken")}[fault]
            body = f"<Error><Code>{code}</Code><Message>fault</Message></Error>"
            return client.sendall(ERROR.format(status=status, length=len(body), body=body).encode())
        if fault == "reset":
            return _reset(client)
        if fault == "late":
            self._closed.wait(self.delay)
        self._deliver(client, self._ask(request), fault)

    def _ask(self, request: bytes) -> bytes:
        with socket.create_connection(self.upstream) as server:
            server.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            answer = bytearray()
            while piece := server.recv(2**16):
                answer += piece
        return bytes(answer)

    def _deliver(self, client: socket.socket, answer: bytes, fault: str) -> None:
        head, _, body = answer.partition(b"\r\n\r\n")
        half = len(body) // 2
        if fault == "truncated without length":
            head = re.sub(rb"\r\ncontent-length:[^\r]*", b"", head, flags=re.IGNORECASE)
        if fault == "range ignored":  # answers are rewritten, not requests: those are signed
            head = re.sub(rb"\r\ncontent-range:[^\r]*", b"", head.replace(b"206", b"200", 1), flags=re.IGNORECASE)
        if fault == "other range":
            head = re.sub(rb"(\r\ncontent-range: *bytes )\d+", rb"\g<1>1", head, flags=re.IGNORECASE)
        if fault == "bit":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        client.sendall(head + b"\r\n\r\n")
        if fault == "drip":
            for byte in body:
                client.sendall(bytes([byte]))
                time.sleep(0.02)
        elif fault in ("reset in body", "truncated", "truncated without length", "stall"):
            client.sendall(body[:half])
            time.sleep(0.05)  # so that the half arrives before what follows it
            if fault == "stall":
                self._closed.wait(30)
            if fault == "reset in body":
                _reset(client)
        else:
            client.sendall(body)


def _message(connection: socket.socket) -> bytes:
    """One HTTP request with its body."""
    data = bytearray()
    while b"\r\n\r\n" not in data:
        piece = connection.recv(2**16)
        if not piece:
            return b""
        data += piece
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    if re.search(rb"\r\nexpect: *100-continue", head, re.IGNORECASE):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = re.sub(rb"\r\nexpect:[^\r]*", b"", head, flags=re.IGNORECASE)
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    while length and len(body) < int(length.group(1)):
        body += connection.recv(2**16)
    return head + b"\r\n\r\n" + body


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
