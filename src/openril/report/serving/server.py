"""The server of `ril view`: the page, and the groups, pictures and figures that it asks for. It only reads.

Models, data sets and file names contribute to everything that is sent, so every answer carries a policy that runs no script
but the page's, and the server answers only its own page on this machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from openril.report.html import SERVED_POLICY, page_script, page_style, render_page
from openril.report.rollouts import FLAGS, is_hash
from openril.report.serving.index import ORDERS, Query, RunIndex

MOST_GROUPS = 200
"""Groups in one answer."""
HEADERS = {
    "content-security-policy": SERVED_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Source:
    """What the server shows. report: returns the document without groups. picture: (hash, size) -> bytes, media type."""

    index: RunIndex
    report: Callable[[], dict[str, Any]]
    report_version: Callable[[], int]
    picture: Callable[[str, str], tuple[bytes, str] | None]


def make_app(source: Source) -> Starlette:
    """Return the application."""

    def groups(request: Request) -> Response:
        query, offset, limit = read_query(request.query_params)
        places = source.index.find(query)
        found = source.index.groups(places[offset : offset + limit])
        return JSONResponse({"total": len(places), "offset": offset, "groups": found})

    def version(request: Request) -> Response:
        p = source.index.progress
        about = {"steps": p.indexed, "total_steps": p.steps, "groups": p.groups, "indexing": p.indexing}
        problems = p.problems | ({"index": source.index.failure} if source.index.failure else {})
        return JSONResponse(about | {"problems": problems, "report": source.report_version()})

    def picture(request: Request) -> Response:
        name, size = request.path_params["name"], request.query_params.get("size", "thumb")
        if not is_hash(name) or size not in ("thumb", "full"):
            raise HTTPException(400, "expected a picture's hash of 32 hexadecimal digits, and the size thumb or full")
        found = source.picture(name, size)
        if found is None:
            raise HTTPException(404, f"the run folder has no picture {name}")
        return Response(found[0], media_type=found[1], headers={"cache-control": "private, max-age=3600, immutable"})

    def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    routes = [
        Route("/", lambda request: Response(render_page({}, "served"), media_type="text/html")),
        Route("/favicon.ico", lambda request: Response(status_code=204)),
        Route("/page.js", lambda request: Response(page_script(), media_type="text/javascript")),
        Route("/page.css", lambda request: Response(page_style(), media_type="text/css")),
        Route("/api/report", lambda request: JSONResponse(source.report())),
        Route("/api/groups", groups),
        Route("/api/version", version),
        Route("/api/image/{name}", picture),
    ]
    guard_all = [Middleware(BaseHTTPMiddleware, dispatch=guard)]
    return Starlette(routes=routes, exception_handlers={HTTPException: failed}, middleware=guard_all)


async def guard(request: Request, answer: RequestResponseEndpoint) -> Response:
    """Refuse all requests but those of the own page, and put the security headers on every answer."""
    refused = refusal(request.method, request.url.path, request.headers)
    response = await answer(request) if refused is None else JSONResponse({"error": refused[1]}, refused[0])
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def refusal(method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
    """Return status and text for a request that must not be answered, or None.

    A foreign site cannot read from the server even if its name leads to this machine (DNS rebinding), because the host of a
    request must be this machine's own name. The port is free, since an SSH tunnel may end at any.
    """
    host = headers.get("host", "")
    if method != "GET":
        return 405, "ril view only answers GET"
    if not re.fullmatch(r"(?i)(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", host):
        return 403, "ril view only answers requests to 127.0.0.1 or localhost"
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{host}":
        return 403, "ril view only answers its own page"
    site = headers.get("sec-fetch-site", "none")
    followed = path == "/" and headers.get("sec-fetch-mode") == "navigate"  # a link to the page, from anywhere
    if site not in ("none", "same-origin") and not followed:
        return 403, "ril view only answers its own page"
    return None


def read_query(given: Mapping[str, str]) -> tuple[Query, int, int]:
    """Return query, offset and limit. Raises HTTPException 400, naming the parameter, for what cannot be meant."""
    known = ("run", "step_min", "step_max", "skill", "source", "question", "flags", "q", "sort", "offset", "limit")
    for key in given:
        if key not in known:
            raise HTTPException(400, f"{key}: expected one of {', '.join(known)}")

    def number(key: str) -> int | None:
        value = given.get(key)
        if value is not None and not re.fullmatch(r"[0-9]{1,9}", value):
            raise HTTPException(400, f"{key}: expected a whole number, got {value[:20]!r}")
        return None if value is None else int(value)

    def choice(key: str, value: str, choices: Any) -> str:
        if value not in choices:
            raise HTTPException(400, f"{key}: expected one of {', '.join(choices)}, got {value[:20]!r}")
        return value

    query = Query(
        run=number("run"),
        step_min=number("step_min"),
        step_max=number("step_max"),
        skill=given.get("skill"),
        source=given.get("source"),
        question=given.get("question"),
        flags=tuple(choice("flags", flag, FLAGS) for flag in given.get("flags", "").split(",") if flag),
        q=given.get("q", ""),
        sort=choice("sort", given.get("sort", "step"), ORDERS),
    )
    limit = number("limit")
    return query, number("offset") or 0, MOST_GROUPS if limit is None else min(limit, MOST_GROUPS)
