"""Who may ask the server, and how much at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

__all__ = ["UPLOAD", "Guard", "answer", "guarded"]

UPLOAD = "MEDSEGDIFF_LABEL_MAX_UPLOAD_MB"
HOSTS = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src {} data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


def answer(status: int, text: str) -> JSONResponse:
    """One line for people, where MONAI Label's clients look for it."""
    return JSONResponse({"detail": " ".join(text.split())}, status, {"Retry-After": "10"} if status == 503 else None)


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:  # such as a bracket that is not closed
        return SplitResult("", "", "", "", "")


def as_sent(origin: str) -> str:
    """An origin as browsers send it: in small letters, without the port that its scheme has by default."""
    origin = origin.lower()
    return origin.removesuffix({"https": ":443", "http": ":80"}.get(urlsplit(origin).scheme, " "))


class Guard:
    """Refuses requests that someone else's web page makes, or that are too large; ties its own pages to this server.

    A browser names the page that asks in ``Origin``. A page whose own name is made to lead to this machine (DNS
    rebinding) gives that name as ``Host``.

    Args:
        app: the application.
        origins: of other pages that may ask, such as ``https://viewer.hospital.example``.
        max_bytes: of a request.
    """

    def __init__(self, app: Any, origins: Sequence[str] = (), max_bytes: int = 2**30) -> None:
        self.app, self.origins, self.max_bytes = app, list(map(as_sent, origins)), max_bytes
        self.hosts = {*HOSTS, *(urlsplit(origin).hostname for origin in origins)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refused = self._refused({key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]})
        if refused is not None:
            return await refused(scope, receive, send)
        await self.app(scope, self._bounded(receive), self._with_policy(send))

    def _refused(self, headers: dict[str, str]) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if _split(f"//{host}").hostname not in self.hosts:
            return answer(403, f"host {host!r} is not served: add its origin with --origins.")
        if origin is not None and origin not in self.origins and _split(origin).netloc != host:
            return answer(403, f"pages of {origin!r} may not ask this server: add it with --origins.")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return answer(413, self._too_large())
        return None

    def _too_large(self) -> str:
        return f"the request is larger than {self.max_bytes >> 20} MiB: set {UPLOAD} for more."

    def _bounded(self, receive: Any) -> Any:
        received = 0

        async def bounded() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:  # sent in pieces, without a length
                raise HTTPException(413, self._too_large())
            return message

        return bounded

    def _with_policy(self, send: Any) -> Any:
        policy = POLICY.format(" ".join(["'self'", *self.origins]))

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", policy.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        return with_policy


def guarded(origins: Sequence[str], max_bytes: int) -> list[Middleware]:
    """Return what stands before an application: the guard, then what tells browsers that other pages may ask.

    Args:
        origins: of the other pages.
        max_bytes: of a request.
    """
    shared = Middleware(
        CORSMiddleware,
        allow_origins=list(map(as_sent, origins)),
        allow_methods=["*"],
        allow_headers=["*"],
        allow_private_network=True,
    )
    return [Middleware(Guard, origins=origins, max_bytes=max_bytes), *([shared] if origins else [])]
