"""MONAI Label's web application, as it is served here: ``--uvicorn_app examples.label.serving.web:app``.

Its endpoints are coroutines that never wait: while one computes, or asks an archive, nobody else is answered. They run
in threads here. Errors are one line, and nothing is let in that a web page of someone else sends.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import shutil
from collections.abc import Callable
from functools import wraps
from typing import Any

import requests
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
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


def _in_thread(endpoint: Callable) -> Callable:
    """A coroutine that never waits as a function, which FastAPI runs in a thread."""

    @wraps(endpoint)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            endpoint(*args, **kwargs).send(None)
        except StopIteration as done:
            return done.value
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
train.run_model = _known(train.run_model, "trainers")
scoring.run_method = _known(scoring.run_method, "scoring")
for _module in (activelearning, batch_infer, datastore, info, logs, model, ohif, scoring, session, train):
    _serve_in_threads(_module.router)
_serve_in_threads(infer.router, api_run_inference=own_infer)
wsi_infer.router.routes.clear()  # of slides, which are not served here: they would read any file of the server

from monailabel.app import app  # noqa: E402  it takes the endpoints as they are by now


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
