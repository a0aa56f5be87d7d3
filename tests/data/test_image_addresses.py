"""Images are fetched from http(s) only, within limits of time and size, and whatever a server does is an error with a cure."""

import http.server
import io
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data.images import address, is_address, load_image, missing_image
from finetune.data.images.address import fetch
from finetune.runtime.errors import UserError


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 16), "red").save(file, "PNG")
    return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by its server's `answer`, a function of the handler; `closing` is set when the test is over."""

    def do_GET(self) -> None:
        self.server.answer(self)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def drip(self, data: bytes) -> None:
        """Send data for ever, a piece each twentieth of a second, until the client or the test is gone."""
        try:
            while not self.server.closing.wait(0.05):
                self.wfile.write(data)
        except OSError:
            pass


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Handler], None]], str]]:
    """Starts servers that answer as a function does. Returns the address of each."""
    servers = []

    def start(answer: Callable[[Handler], None]) -> str:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.answer, server.closing = True, answer, threading.Event()
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()


def assert_refused(where: str, complaint: str, source: str | None = None) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        load_image(source or where)
    (problem,) = caught.value.problems
    assert problem.where == (source or where)
    assert problem.cure


def test_an_image_is_fetched_whatever_the_case_of_its_scheme(serve: Callable) -> None:
    where = serve(lambda handler: handler.send(png(), Content_Type="image/png"))
    for source in (f"{where}/a.png", where.replace("http", "HTTP"), f"{where}/ä b.png?x=ü#part"):
        assert is_address(source)
        assert missing_image(source) is None
        assert load_image(source).shape == (16, 24, 3)


def test_paths_are_sent_quoted_and_not_quoted_twice(serve: Callable) -> None:
    seen: list[str] = []

    def answer(handler: Handler) -> None:
        seen.append(handler.path)
        handler.send(png())

    where = serve(answer)
    load_image(f"{where}/ä b%20c.png?size=1,2&name=ü#part")
    assert seen == ["/%C3%A4%20b%20c.png?size=1,2&name=%C3%BC"]


# Redirects


def test_five_redirects_are_followed_and_no_more(serve: Callable) -> None:
    def answer(handler: Handler) -> None:
        left = int(handler.path[1:])
        if left:
            handler.send(b"", 302, Location=f"/{left - 1}")
        else:
            handler.send(png())

    where = serve(answer)
    assert load_image(f"{where}/5").shape == (16, 24, 3)
    assert_refused(f"{where}/6", "cannot be fetched")


def test_a_redirect_goes_to_http_only(serve: Callable, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    for target in (f"file://{tmp_path}/a.png", "ftp://127.0.0.1/a.png", "data:image/png;base64,AAAA", "gopher://x/"):
        where = serve(lambda handler, target=target: handler.send(b"", 302, Location=target))
        assert_refused(where, r"cannot be fetched \(.*(not allowed|is no http\(s\) address)")


# Limits


@pytest.mark.parametrize("part", ["body", "chunks", "headers", "status", "silence"])
def test_a_slow_server_is_not_waited_for(serve: Callable, part: str) -> None:
    """Each of its pieces comes well before a socket's own timeout."""

    def answer(handler: Handler) -> None:
        if part == "silence":
            handler.server.closing.wait()
            return
        if part == "status":
            handler.drip(b"H")
        handler.send_response(200)
        if part == "headers":
            handler.flush_headers()
            handler.drip(b"X-Header: more\r\n"[:1])
        if part == "chunks":
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.drip(b"1\r\nx\r\n" if part == "chunks" else b"x")

    with pytest.raises(UserError, match=r"cannot be fetched .*(more than 0.5 seconds|timed out)"):
        fetch(serve(answer), seconds=0.5)


def test_a_fetch_that_has_run_out_of_time_ends_its_thread(serve: Callable) -> None:
    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.drip(b"x")

    with pytest.raises(UserError):
        fetch(serve(answer), seconds=0.3)
    for thread in threading.enumerate():
        if thread.name == "fetch image":
            thread.join(10)
            assert not thread.is_alive()


def test_the_part_that_came_in_time_is_not_taken_for_the_whole(serve: Callable) -> None:
    """Of an answer without a length, nothing else tells."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.drip(png())

    with pytest.raises(TimeoutError):
        address._download(serve(answer), 0.3)


def test_what_is_too_large_is_not_read_to_its_end(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "MAX_BYTES", 2**20)
    sent = []

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while not handler.server.closing.is_set():
                sent.append(handler.wfile.write(bytes(2**16)))
        except OSError:
            pass

    assert_refused(serve(answer), "more than 1 MB")
    assert sum(sent) < 64 * 2**20  # what sockets hold in between


# Odd answers


@pytest.mark.parametrize("status", [204, 304, 400, 401, 403, 404, 410, 429, 500, 503])
def test_answers_without_an_image_are_named(serve: Callable, status: int) -> None:
    complaint = "no image can be read" if status == 204 else f"cannot be fetched .*{status}"
    assert_refused(serve(lambda handler: handler.send(b"", status)), complaint)


def test_a_page_instead_of_an_image_is_called_one(serve: Callable) -> None:
    page = serve(lambda handler: handler.send(b"<!DOCTYPE html><p>Log in", Content_Type="text/html; charset=utf-8"))
    assert_refused(page, r"no image can be read from it \(a web page, which the server calls text/html\)")
    text = serve(lambda handler: handler.send(b"no such image", Content_Type="text/plain"))
    assert_refused(text, r"of no known kind, which the server calls text/plain")


def test_an_answer_that_ends_early_is_an_error(serve: Callable) -> None:
    assert_refused(serve(lambda handler: handler.send(png(), Content_Length="1000")), "cannot be fetched .*of 1000")

    def chunks(handler: Handler) -> None:
        handler.send(b"ff\r\nshort", Transfer_Encoding="chunked", Content_Length="")
        handler.close_connection = True

    assert_refused(serve(chunks), "cannot be fetched")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nx",
        b"HTTP/1.1 302 Found\r\nLocation: http://[::1/a.png\r\n\r\n",
        b"HTTP/1.1 302 Found\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://a:port/\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: //\xff\xfe/\r\n\r\n",
    ],
    ids=range(11),
)
def test_answers_that_are_no_http_are_errors(serve: Callable, raw: bytes) -> None:
    def answer(handler: Handler) -> None:
        handler.wfile.write(raw)
        handler.close_connection = True

    assert_refused(serve(answer), "cannot be fetched|no image can be read")


# Odd addresses


@pytest.mark.parametrize(
    "source",
    [
        "http://",
        "http:///a.png",
        "http://127.0.0.1:9/a.png",
        "http://127.0.0.1:port/a.png",
        "http://127.0.0.1:99999/a.png",
        "http://[::1/a.png",
        "http://[nonsense]/a.png",
        f"http://{'a' * 70}.example/a.png",
        "http://a..example/a.png",
        "http://\udcff.example/a.png",
        "http://user:password@/a.png",
        "http://exa mple/a.png",
        "http://example\n/a.png",
        "https://",
    ],
)
def test_odd_addresses_are_errors(source: str) -> None:
    assert_refused(source, "cannot be fetched")


def test_https_of_a_server_that_does_not_speak_it_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert_refused(f"https://127.0.0.1:{server.getsockname()[1]}/a.png", "cannot be fetched .*SSL")


def test_images_from_an_address_have_a_background_too(serve: Callable) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (24, 16), (255, 0, 255, 0)).save(file, "PNG")
    where = serve(lambda handler: handler.send(file.getvalue()))
    assert (load_image(where) == 255).all()
    assert np.array_equal(load_image(where, "black"), np.zeros((16, 24, 3)))
