"""The chat page at `/`: plain files, served under a policy that lets nothing in from outside.

    app.include_router(page.router())

The page asks the same routes as any other client. Its scripts are modules without a build step (`files/`).
"""

import hashlib
from importlib import resources

from fastapi import APIRouter, Request, Response

# No script, style, picture or connection but of this server; no string ever becomes markup (trusted types), so that
# what a model writes stays text; nobody shows the page inside another.
POLICY = "; ".join([
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "connect-src 'self'",
    "manifest-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
    "require-trusted-types-for 'script'", "trusted-types 'none'",
])  # fmt: skip
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-cache",  # asked again each time, answered with 304: a new server has a new page
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
INDEX = "index.html"


def files() -> dict[str, bytes]:
    """The page's files by name."""
    folder = resources.files(__package__) / "files"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def router() -> APIRouter:
    """GET / and GET /page/{name}. Files are read once: no name reaches the file system."""
    known = files()
    tags = {name: f'"{hashlib.sha256(content).hexdigest()[:24]}"' for name, content in known.items()}
    result = APIRouter(include_in_schema=False)

    def answer(name: str, request: Request) -> Response:
        content = known.get(name)
        if content is None:
            return Response(f"there is no file {name[:80]!r} of the page", 404, HEADERS, "text/plain")
        headers = HEADERS | {"etag": tags[name]}
        if tags[name] in request.headers.get("if-none-match", ""):
            return Response(None, 304, headers)
        return Response(content, 200, headers, TYPES["." + name.rpartition(".")[2]])

    @result.get("/")
    async def index(request: Request) -> Response:
        return answer(INDEX, request)

    @result.get("/page/{name}")
    async def file(name: str, request: Request) -> Response:
        return answer(name, request)

    return result
