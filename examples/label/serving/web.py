"""MONAI Label's web application, as it is served here: ``--uvicorn_app examples.label.serving.web:app``.

Its endpoints are coroutines that never wait: while one computes, or asks an archive, nobody else is answered. They run
in threads here. Errors are one line, nothing is let in that a web page of someone else sends, and no page loads scripts
from elsewhere. What would replace or delete the weights, or reach more of the archive than DICOMweb, is left out.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import wraps
from html import escape
from typing import Any

import requests
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from monailabel.endpoints import (
    activelearning,
    batch_infer,
    datastore,
    infer,
    info,
    logs,
    model,
    ohif,
    proxy,
    scoring,
    session,
    train,
    wsi_infer,
)  # fmt: skip
from monailabel.interfaces.exception import MONAILabelException
from monailabel.interfaces.utils.app import app_instance

from medsegdiff_monai.errors import InputError, find_input_error

from .endpoint import infer as own_infer
from .endpoint import options
from .guard import UPLOAD, answer, guarded
from .refusals import Conflict, NotThere
from .viewer import mended

__all__ = ["app"]

logger = logging.getLogger(__name__)

ORIGINS = "MEDSEGDIFF_LABEL_ORIGINS"  # of web pages that may ask this server, with spaces between them
STATUS = {
    MemoryError: (503, "there is not enough memory for it: close something else, or take a smaller image."),
    requests.RequestException: (
        503,
        "the archive does not answer as it should: see that it runs and takes such files, then try again.",
    ),
    shutil.ReadError: (400, "the upload is no archive that can be unpacked, such as a zip."),
}
OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate", re.IGNORECASE)  # torch has no one error
# DICOMweb alone: an archive has more behind the same address, which a path with two dots would reach
DICOMWEB = re.compile(r"(studies|series|instances)(/(?!\.+(/|$))[\w.,-]+)*")
STOW = re.compile(r"studies(/[\d.]+)?")
JSON_FORMS = ("params", "info")  # fields of forms that hold options as text
FOLDER = "MEDSEGDIFF_LABEL_FILES"  # for files of requests that are being answered

if FOLDER in os.environ:
    tempfile.tempdir = os.environ[FOLDER]


def _in_thread(endpoint: Callable) -> Callable:
    """A coroutine that never waits as a function, which FastAPI runs in a thread."""

    @wraps(endpoint)
    def run(*args: Any, **kwargs: Any) -> Any:
        for name in JSON_FORMS:
            if isinstance(kwargs.get(name), str):
                options(kwargs[name], name)
        try:
            endpoint(*args, **kwargs).send(None)
        except StopIteration as done:
            return done.value
        except BaseException:
            for task in getattr(kwargs.get("background_tasks"), "tasks", []):  # they remove the upload
                task.func(*task.args, **task.kwargs)
            raise
        raise RuntimeError(f"{endpoint.__name__} waits")

    run.__signature__ = inspect.signature(endpoint)  # type: ignore[attr-defined]
    del run.__wrapped__  # FastAPI would find the coroutine behind it
    return run


def _serve_in_threads(router: Any, **replaced: Callable) -> None:
    for i, route in enumerate(router.routes):
        if isinstance(route, APIRoute):
            endpoint = replaced.get(route.endpoint.__name__) or _in_thread(route.endpoint)
            kept = {
                key: getattr(route, key) for key in ("methods", "name", "tags", "summary", "responses", "deprecated")
            }
            router.routes[i] = APIRoute(route.path, endpoint, include_in_schema=route.include_in_schema, **kept)


async def _proxy(request: Request, op: str, path: str) -> Any:
    """MONAI Label's way to the archive, in a thread, and with the question that the viewer asks."""
    path = path.strip("/")
    if not (STOW if request.method == "POST" else DICOMWEB).fullmatch(path):
        raise NotThere(f"{path[:100]!r} is not there: /proxy/dicom passes on DICOMweb requests alone.")
    await request.body()  # it is kept, so that nothing waits below
    asked = f"{path}?{request.url.query}" if request.url.query and not path.endswith("metadata") else path
    return await asyncio.to_thread(_in_thread(_stock_proxy), request, op, asked)


_stock_proxy = proxy.proxy_dicom
proxy.proxy_dicom = _proxy


def _known(function: Callable, section: str) -> Callable:
    """What starts a task, if there is such a task."""

    @wraps(function)
    def start(name: str, *args: Any, **kwargs: Any) -> Any:
        there = app_instance().info()[section]
        if name not in there:
            raise NotThere(f"{name!r} is not there: {section} has {', '.join(there) or 'nothing'}.")
        if section == "trainers" and not app_instance().datastore().datalist():
            raise Conflict("no study has a label yet, so there is nothing to train on: submit a label first.")
        return function(name, *args, **kwargs)

    return start


_stock_file = ohif.get_ohif
ohif.get_ohif = lambda path: mended(_stock_file(path))


def _run_all(params: dict[str, Any] | None = None, run_sync: bool = False) -> dict[str, Any]:
    """Train all there is: options by the name of each, as the viewer sends them, or the same for each."""
    names, params = list(app_instance().info()["trainers"]), params or {}
    by_name = {name: value for name, value in params.items() if name in names or isinstance(value, dict)}
    for name, value in by_name.items():
        if name not in names or not isinstance(value, dict):
            raise InputError(f"{name!r}: must be one of {', '.join(names)}, with an object of options.")
    shared = {key: value for key, value in params.items() if key not in by_name}
    asked = {name: {**shared, **by_name.get(name, {})} for name in names}
    return {name: {"result": train.run_model(name, own, run_sync, True), "detail": None} for name, own in asked.items()}


def _calls() -> HTMLResponse:
    """A list of what can be called, in place of a page that loads scripts from elsewhere."""
    lines = [
        f"{method.upper():<7} {path:<40} {call.get('summary', '')}"
        for path, methods in app.openapi()["paths"].items()
        for method, call in methods.items()
    ]
    listed = escape("\n".join(lines))
    return HTMLResponse(
        f"<title>MONAI Label</title><h1>MONAI Label</h1><p><a href='/ohif/'>OHIF</a>, <a href='/openapi.json'>"
        f"openapi.json</a></p><pre>{listed}</pre>"
    )


train.run_model = _known(train.run_model, "trainers")
train.run = _run_all
batch_infer.run = _known(batch_infer.run, "models")
_stock_logs = logs.get_logs
logs.get_logs = lambda file, lines, html, text, refresh: _stock_logs(file, lines, False, True, 0)
scoring.run_method = _known(scoring.run_method, "scoring")
for _module in (activelearning, batch_infer, datastore, info, logs, model, ohif, scoring, session, train):
    _serve_in_threads(_module.router)
_serve_in_threads(infer.router, api_run_inference=own_infer)
wsi_infer.router.routes.clear()  # of slides, which are not served here: they would read any file of the server
model.router.routes[:] = [route for route in model.router.routes if route.methods <= {"GET", "HEAD"}]

from monailabel.app import app  # noqa: E402  it takes the endpoints as they are by now

app.router.routes[:] = [route for route in app.routes if getattr(route, "path", "") not in ("/", "/docs")]
app.get("/", include_in_schema=False)(_calls)


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    """The answer to an error."""
    found = find_input_error(error)
    if found is not None:
        return answer(getattr(found, "status", 400), str(found))
    if isinstance(error, MONAILabelException):
        return answer(404, error.msg)
    for kind, (status, text) in STATUS.items():
        if isinstance(error, kind):
            return answer(status, f"{text} ({str(error)[:200]})")
    if isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)):
        return answer(503, STATUS[MemoryError][1])
    first = (str(error).splitlines() or [""])[0][:200]
    return answer(500, f"{type(error).__name__}: {first} (the server's log says more)")


async def _refuse_http(request: Request, error: HTTPException) -> JSONResponse:
    status = {429: 409, 406: 409}.get(error.status_code, error.status_code)  # a task is running; sessions are off
    return answer(status, str(error.detail))


async def _refuse_form(request: Request, error: RequestValidationError) -> JSONResponse:
    faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    return answer(400, "; ".join(faults))


for _kind in (InputError, MONAILabelException, *STATUS, Exception):
    app.add_exception_handler(_kind, _refuse)
app.add_exception_handler(HTTPException, _refuse_http)  # type: ignore[arg-type]
app.add_exception_handler(RequestValidationError, _refuse_form)  # type: ignore[arg-type]
app.user_middleware = guarded(os.environ.get(ORIGINS, "").split(), int(float(os.environ.get(UPLOAD, "1024")) * 2**20))
