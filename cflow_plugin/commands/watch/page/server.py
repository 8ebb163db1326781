"""The page's server, in a thread of the watch's own process."""

__all__ = ["make_app", "start_page"]

import asyncio
import hmac
import ipaddress
import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cflow_plugin.commands.watch.page.live import Live
from cflow_plugin.errors import CflowError

logger = logging.getLogger(__name__)

TOKEN = "CFLOW_PLUGIN_PAGE_TOKEN"
_FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_BODY = 10_000  # bytes of a request
_PATIENCE = 5.0  # seconds for its body
_NAME = 80
_CONNECTIONS = 64
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(live: Live, token: str | None, hosts: list[str]) -> Any:
    """The page as an ASGI application.

    Args:
        live: What it shows.
        token: What a visitor has to bring along, or ``None``: as ``?token=…`` once, and then in a cookie.
        hosts: Names under which it may be asked for, so that no foreign page reaches it under a name of its own.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, RedirectResponse, Response
    from starlette.routing import Route

    def check(request: Request) -> None:
        given = request.cookies.get("token", "")
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "Open the address with the token that the watch has printed.")

    async def file(request: Request) -> Response:
        if token is not None and hmac.compare_digest(request.query_params.get("token", "").encode(), token.encode()):
            response = RedirectResponse("/", 303)
            response.set_cookie("token", token, httponly=True, samesite="strict")
            return response
        check(request)
        name = _FILES[request.url.path]
        text = (Path(__file__).parent / name).read_text(encoding="utf-8")
        return Response(text, media_type=_TYPES[Path(name).suffix])

    async def state(request: Request) -> Response:
        check(request)
        return JSONResponse(await asyncio.to_thread(live.state))

    async def would(request: Request) -> Response:
        check(request)
        try:
            return JSONResponse(live.would(float(request.query_params["rate"])))
        except KeyError as error:
            raise HTTPException(400, "Name a rate.") from error
        except ValueError as error:
            raise HTTPException(400, "The rate is no number.") from error
        except CflowError as error:
            raise HTTPException(400, str(error)) from error

    async def picture(request: Request) -> Response:
        check(request)
        found = await asyncio.to_thread(live.picture, request.path_params["number"])
        if found is None:
            raise HTTPException(404, "This image is no longer at hand.")
        return Response(found, media_type="image/jpeg")

    async def drawn(request: Request) -> Response:
        check(request)
        try:
            found = await asyncio.to_thread(live.drawn, request.path_params["name"])
        except CflowError as error:
            raise HTTPException(422, str(error)) from error
        if found is None:
            raise HTTPException(404, "This image is not in the sample, or somebody has looked at it.")
        return Response(found, media_type="image/jpeg")

    async def mark(request: Request) -> Response:
        wish = await wish_of(request, "number", "what")
        if type(wish["number"]) is not int:
            raise HTTPException(400, "number is a whole number.")
        return await done(404, lambda: {"copy": live.mark(wish["number"], what_of(wish), wish["who"])})

    async def judge(request: Request) -> Response:
        wish = await wish_of(request, "name", "what")
        return await done(404, lambda: {"copy": live.review.judge(text_of(wish, "name"), what_of(wish), wish["who"])})

    async def measure(request: Request) -> Response:
        wish = await wish_of(request, "model")
        return await done(409, lambda: live.models.measure(text_of(wish, "model")))

    async def use(request: Request) -> Response:
        wish = await wish_of(request, "model")
        return await done(409, lambda: live.models.use(text_of(wish, "model"), wish["who"]) or {})

    async def recalibrate(request: Request) -> Response:
        wish = await wish_of(request, "rate")
        if not isinstance(wish["rate"], float) or not 0 < wish["rate"] < 1:
            raise HTTPException(400, "rate is a number between 0 and 1.")
        return await done(409, lambda: live.models.recalibrate(wish["rate"], wish["who"]))

    async def lay_aside(request: Request) -> Response:
        wish = await wish_of(request)
        return await done(409, lambda: live.review.lay_aside(wish["who"]) or {})

    async def wish_of(request: Request, *names: str) -> dict[str, Any]:
        """What a request asks for, and who does."""
        check(request)
        # A form of a foreign page cannot send this type without asking first.
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise HTTPException(415, "Send JSON.")
        try:
            wish = json.loads(await asyncio.wait_for(_body(request), _PATIENCE))
        except asyncio.TimeoutError as error:
            raise HTTPException(408, "The request came too slowly.") from error
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, "This is no JSON.") from error
        if not isinstance(wish, dict) or set(wish) != {*names, "who"}:
            raise HTTPException(400, f"Send {', '.join(names)} and who.")
        who = wish["who"]
        if not isinstance(who, str) or not who.strip() or len(who) > _NAME or not who.isprintable():
            raise HTTPException(400, f"who is a name of at most {_NAME} letters.")
        return {**wish, "who": who.strip()}

    def what_of(wish: dict[str, Any]) -> str:
        if wish["what"] not in ("good", "defect"):
            raise HTTPException(400, "what is good or defect.")
        return wish["what"]

    def text_of(wish: dict[str, Any], name: str) -> str:
        if not isinstance(wish[name], str):
            raise HTTPException(400, f"{name} is a text.")
        return wish[name]

    async def done(refused: int, action: Callable[[], dict[str, Any]]) -> Response:
        """Do something that may take its time, beside the watch; a refusal has this status."""
        try:
            return JSONResponse(await asyncio.to_thread(action))
        except CflowError as error:
            raise HTTPException(refused, str(error)) from error
        except OSError as error:
            raise HTTPException(507, f"It could not be written ({error.strerror}).") from error

    async def _body(request: Request) -> bytes:
        found = b""
        async for piece in request.stream():
            found += piece
            if len(found) > _BODY:
                raise HTTPException(413, "The request is too large.")
        return found

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    acts = (mark, judge, lay_aside, measure, use, recalibrate)
    routes = [
        Route("/", file),
        Route("/page.css", file),
        Route("/page.js", file),
        Route("/api/state", state),
        Route("/api/would", would),
        Route("/image/{number:int}", picture),
        Route("/drawn/{name}", drawn),
        *[Route(f"/api/{act.__name__}", act, methods=["POST"]) for act in acts],
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers={HTTPException: failed})


def start_page(live: Live, host: str, port: int) -> None:
    """Serve the page until the process ends.

    Args:
        live: What it shows.
        host: Address to listen on; beyond this machine a token is asked for.
        port: Port.

    Raises:
        CflowError: If the page's packages are not installed, or the port is taken.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        message = '--page needs starlette and uvicorn: pip install "cflow-plugin[page]"'
        raise CflowError(message) from error
    try:
        own = ipaddress.IPv4Address("127.0.0.1" if host == "localhost" else host)
        listening = socket.create_server((host, port))
    except (OSError, ValueError, OverflowError) as error:
        message = f"The page cannot be served at {host}, port {port} ({error}): name another --page or --host."
        raise CflowError(message) from error
    token = None if own.is_loopback else os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    hosts = ["localhost", "127.0.0.1"] if own.is_loopback else ["*"]  # elsewhere the token keeps others out
    settings = uvicorn.Config(
        make_app(live, token, hosts),
        log_level="warning",
        access_log=False,
        limit_concurrency=_CONNECTIONS,
        server_header=False,
        headers=list(_HEADERS.items()),
    )
    server = uvicorn.Server(settings)
    threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="page", daemon=True).start()
    address = f"http://{host}:{listening.getsockname()[1]}/"
    logger.info("The page is at %s%s", address, f"?token={token}" if token else "")
