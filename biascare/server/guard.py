"""Who may call the server, and with how much.

    app.add_middleware(Guard, hosts=("127.0.0.1", "localhost"), token=None, max_bytes=32 << 20)

A page of the web that a person has open could send requests to a server on the same machine, and by
a name that changes its address even read the answers. So the name that was asked for has to be one
of ours (Host), and a page that sends a request has to be ours (Origin). A token is needed as well
where others can reach the server.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "biascare_token"
OPEN_TO_ALL = ("/healthz",)
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",  # the address may hold a token
    "Cache-Control": "no-store",  # images of patients do not stay in a browser's cache
}


class Guard:
    """ASGI middleware: Host, Origin, token and size are checked before anything is read."""

    def __init__(self, app: ASGIApp, *, hosts: Sequence[str], token: str | None, max_bytes: int):
        """`hosts`: names and addresses, without a port, that a request may ask for; `token`: None
        where none is needed; `max_bytes`: of a request."""
        self.app = app
        self.hosts = {host.lower() for host in hosts}
        self.token = token
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.refusal(scope)
        await (refusal or self.app)(scope, receive, guarded)

    def refusal(self, scope: Scope) -> Response | None:
        """Why a request is not let in, None where it is."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if host_of(host) not in self.hosts:
            return refused(403, "this server does not go by the name in the Host header")
        origin = headers.get("origin")
        # Browsers always say which page sends a POST; programs say nothing.
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return refused(403, "requests from pages of other servers are not answered")
        if scope["method"] not in ("GET", "HEAD"):
            length = headers.get("content-length", "")
            if not (length.isascii() and length.isdigit()):
                return refused(411, "a request has to say its Content-Length")
            if int(length) > self.max_bytes:
                return refused(413, f"got {length} bytes, expected at most {self.max_bytes}")
        if self.token is None or scope["path"] in OPEN_TO_ALL:
            return None
        return self._without_token(headers, scope)

    def _without_token(self, headers: Headers, scope: Scope) -> Response | None:
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and self._is_token(asked):
            # Once in the address, then in a cookie that scripts cannot read and other pages'
            # requests do not carry; the address without it is what stays in the history.
            answer = RedirectResponse("/", status_code=303)
            answer.set_cookie(COOKIE, asked, httponly=True, samesite="strict")
            return answer
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(bearer) or (cookie is not None and self._is_token(cookie.value)):
            return None
        return refused(401, "a token is needed: open the address that the program printed, or send "
                       "the header 'Authorization: Bearer TOKEN'")  # fmt: skip

    def _is_token(self, given: str) -> bool:
        assert self.token is not None
        # In a time that does not tell how many characters were right.
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token.encode("utf-8"))


def refused(status: int, error: str) -> Response:
    return JSONResponse({"error": error}, status_code=status)


def host_of(header: str) -> str:
    """The name in a Host header, without the port and the brackets of an IPv6 address."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
