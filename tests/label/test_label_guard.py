"""Who may ask the server: other web pages, other names, large requests."""

from __future__ import annotations

import pytest

pytest.importorskip("monailabel", reason="MONAI Label has an environment of its own: make test-label")
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from examples.label.serving.guard import guarded

OWN = "http://127.0.0.1"
OTHER = "https://viewer.example:8443"


@pytest.mark.parametrize(
    ("origins", "origin", "status", "allowed"),
    [
        ([OTHER], OTHER, 200, OTHER),
        (["https://Viewer.example:8443"], OTHER, 200, OTHER),
        (["https://viewer.example:443"], "https://viewer.example", 200, "https://viewer.example"),
        ([], OTHER, 403, None),
        ([], "http://[::1", 403, None),
        ([OTHER], "https://elsewhere.example", 403, None),
        ([OTHER], "http://127.0.0.1", 200, None),  # the server's own page, of which a browser asks for no permission
    ],
)
def test_pages_of_allowed_origins_may_ask_and_read(origins, origin, status, allowed):
    """With what a browser asks beforehand, and of which it lets a page read the answer."""
    client = TestClient(Starlette(routes=[Route("/info/", _says_ok)], middleware=guarded(origins, 100)), OWN)
    answer = client.get("/info/", headers={"Origin": origin})
    assert answer.status_code == status and answer.headers.get("access-control-allow-origin") == allowed
    asked = {"Origin": origin, "Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "x-own"}
    preflight = client.options("/info/", headers=asked)
    assert (preflight.status_code == 200 and "PUT" in preflight.headers["access-control-allow-methods"]) == bool(
        allowed
    )


def test_policy_lets_the_viewer_reach_the_server_and_allowed_origins_alone():
    page = Starlette(routes=[Route("/ohif/", _says_ok)], middleware=guarded([OTHER], 100))
    policy = TestClient(page, OWN).get("/ohif/").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["connect-src"].split() == ["'self'", OTHER, "data:", "blob:"] and rules["default-src"] == "'self'"


def test_hosts_by_other_names_and_large_requests_are_refused():
    client = TestClient(
        Starlette(routes=[Route("/info/", _says_ok, methods=["PUT"])], middleware=guarded([], 100)), OWN
    )
    assert client.put("/info/", headers={"Host": "rebound.example"}).status_code == 403
    assert client.put("/info/", headers={"Host": "[::1"}).status_code == 403
    assert client.put("/info/", content=b"x" * 101).status_code == 413
    assert client.put("/info/", content=(b"x" * 60 for _ in range(2))).status_code == 413
    assert client.put("/info/", content=b"x" * 100).status_code == 200


async def _says_ok(request):
    await request.body()
    return PlainTextResponse("ok")
