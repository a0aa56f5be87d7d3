"""Fetches an image from an http(s) address: within a time limit for the whole, a size limit, and few redirects."""

import http.client
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import IO, NamedTuple

from finetune.runtime.errors import UserError

SECONDS = 60.0  # for everything: finding the host, redirects, and the slowest server
MAX_BYTES = 64 * 2**20
_SILENCE = 30.0  # seconds for which a server may say nothing
_CHUNK = 2**16
_SCHEMES = ("http://", "https://")
_SAFE = "%/:=&?~#+!$,;'@()*[]|"  # left as they are in paths and queries, which may be quoted already
_CURE = "mend the address, or download the image and give the file"


class Fetched(NamedTuple):
    """The body of an answer, and the kind of content that the server says it is, such as "text/html"."""

    data: bytes
    content_type: str


def is_address(source: str) -> bool:
    """Whether a source is an http(s) address rather than a file."""
    return source.lower().startswith(_SCHEMES)


def fetch(address: str, seconds: float = SECONDS) -> Fetched:
    """Fetch an address.

    Args:
        seconds: time limit for the whole. A socket's own timeout starts anew with every byte.
    Raises:
        UserError: it cannot be fetched, takes too long, is too large, or redirects to anything but http(s).
    """
    outcome: list[Fetched | BaseException] = []

    def work() -> None:
        try:
            outcome.append(_download(address, seconds))
        except BaseException as error:  # raised below, in the thread that asked
            outcome.append(error)

    # In a thread, because finding a host and reading an answer's headers have no time limit of their own. It is a daemon, so
    # that it keeps no process alive.
    thread = threading.Thread(target=work, daemon=True, name="fetch image")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise UserError(f"cannot be fetched (it took more than {seconds:g} seconds)", _CURE, address)
    (result,) = outcome
    if isinstance(result, Fetched):
        return result
    if isinstance(result, OSError | http.client.HTTPException | ValueError):
        raise UserError(f"cannot be fetched ({_reason(result)})", _CURE, address) from None
    raise result


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


class _Redirects(urllib.request.HTTPRedirectHandler):
    """At most five redirects, to http(s) only: the standard library also follows them to ftp."""

    max_redirections = 5

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not is_address(newurl):
            raise urllib.error.URLError(f"it redirects to {newurl}, which is no http(s) address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(address: str, seconds: float) -> Fetched:
    """Raises OSError, http.client.HTTPException, ValueError or UserError."""
    deadline = time.monotonic() + seconds
    opener = urllib.request.OpenerDirector()  # without the handlers of file:, ftp: and data: addresses
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(_quoted(address), headers={"User-Agent": "finetune"})
    with opener.open(request, timeout=min(_SILENCE, seconds)) as answer:
        data = bytearray()
        while chunk := answer.read1(_CHUNK):
            data += chunk
            if len(data) > MAX_BYTES:
                raise UserError(f"more than {MAX_BYTES >> 20} MB", "use a smaller image", address)
            if time.monotonic() > deadline:  # what is there may be a part, of an answer that announces no length
                raise TimeoutError(f"it took more than {seconds:g} seconds")
        announced = answer.headers.get("Content-Length", "")
        if announced.isdigit() and len(data) < int(announced):
            raise OSError(f"the answer ends after {len(data)} of {announced} bytes")
        return Fetched(bytes(data), answer.headers.get_content_type())


def _quoted(address: str) -> str:
    """An address as a browser sends it: with characters of its path and query quoted that HTTP does not allow there."""
    parts = urllib.parse.urlsplit(address)
    path, query = (urllib.parse.quote(part, safe=_SAFE) for part in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, ""))
