"""Inference for clients: one case at a time, a few that wait, and none for clients that have gone."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Any, TypeVar

import torch
from fastapi import BackgroundTasks, Depends, File, Form, Request, UploadFile
from fastapi.responses import Response
from monailabel.config import settings
from monailabel.endpoints.infer import ResultType, send_response
from monailabel.endpoints.user.auth import RBAC, User
from monailabel.interfaces.utils.app import app_instance
from monailabel.utils.others.generic import device_list

from medsegdiff_monai.errors import InputError

from .archive import dicom_series
from .inference import unless_stopped, wants
from .refusals import Busy, NotThere, Stopped

__all__ = ["PLACES", "Turns", "infer", "options"]

T = TypeVar("T")
logger = logging.getLogger(__name__)
PLACES = 8  # requests for inference that are taken at a time, the one that is computed among them
LOOK_SECONDS = 0.25  # between two looks whether the client is still there
CLIENT_CLOSED = 499  # nobody reads it
MAX_MEMBERS = 100
CHOICES = {
    "result_extension": (".nii.gz", ".nii", ".nrrd", ".seg.nrrd", ".mha", ".dcm"),
    "result_dtype": ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"),
    "logging": ("debug", "info", "warning", "error", "critical"),
    "result_write_to_file": ("true",),
}
KEPT = ("model", "image", "session", "label", "dicom_series")  # options do not say what is read


class Turns:
    """First come, first served, up to a number.

    Args:
        places: how many may wait, the one whose turn it is among them.
    """

    def __init__(self, places: int = PLACES) -> None:
        self.places, self.taken = places, 0
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[asyncio.Lock]:
        """Take a place.

        Raises:
            Busy: where all are taken.
        """
        if self.taken >= self.places:
            raise Busy(f"{self.taken} requests are waiting already: send it again in a while.")
        self.taken += 1
        try:
            yield self._turn
        finally:
            self.taken -= 1

    async def run(self, work: Callable[[], T], gone: Callable[[], Any]) -> T:
        """Run ``work`` in a thread when its turn has come; it is told to stop as soon as ``gone`` returns true.

        Raises:
            Busy: where all places are taken.
            Stopped: where it was stopped.
        """
        stop, started = threading.Event(), threading.Event()

        def unless_gone() -> T:
            with unless_stopped(stop):
                return work()

        async def in_turn(turn: asyncio.Lock) -> T:
            async with turn:
                started.set()
                return await asyncio.to_thread(unless_gone)

        async with self.place() as turn:
            task = asyncio.create_task(in_turn(turn))
            try:
                while not (await asyncio.wait({task}, timeout=LOOK_SECONDS))[0]:
                    if not stop.is_set() and await gone():
                        stop.set()
                        if not started.is_set():  # its place is free at once
                            task.cancel()
                            raise Stopped
                return task.result()
            finally:
                stop.set()  # whatever ends this


_turns = Turns()


def _stored(upload: UploadFile, folder: Path) -> str:
    """An upload as a file of its own name."""
    name = Path(upload.filename or "").name[-100:]  # the end says what it is
    path = folder / (name if set(name) - {"."} else "image.nii.gz")
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file)
    return str(path)


def options(text: str, name: str = "params") -> dict[str, Any]:
    """Read the options of a request.

    Raises:
        InputError: for text that is no JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: is not JSON that can be read ({error}).") from error
    if not isinstance(found, dict):
        raise InputError(f'{name}: must be a JSON object, such as {{"num_members": 5}}.')
    return found


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The options of inference, of which those are known to be usable that MONAI Label itself reads."""
    try:
        many = float(given.get("num_members", 1)) > MAX_MEMBERS
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"num_members={str(given['num_members'])[:20]!r} must be a whole number.") from error
    if many:
        raise InputError(f"num_members={given['num_members']} must be at most {MAX_MEMBERS}.")
    for option, values in CHOICES.items():
        if given.get(option) and str(given[option]).lower() not in values:
            raise InputError(f"{option}={given[option]!r} must be one of {', '.join(values)}.")
    if not isinstance(given.get("fusion", ""), str):
        raise InputError(f"fusion={given['fusion']!r} must be a name, such as expected_dice.")
    devices = {"cpu", "cuda", *device_list(), *(f"cuda:{i}" for i in range(torch.cuda.device_count()))}
    devices |= {"mps"} if torch.backends.mps.is_available() else set()
    wanted = given.get("device") or "cpu"
    if (wanted if isinstance(wanted, str) else str([*wanted, ""][0])) not in devices:
        raise InputError(f"device={wanted!r} is not there: take one of {', '.join(sorted(devices))}.")
    return {key: value for key, value in given.items() if key not in KEPT}


def _session(name: str) -> Any:
    sessions = app_instance().sessions()
    # MONAI Label would take a path for a name, and delete what it leads to
    session = sessions.get_session(name) if sessions is not None and re.fullmatch(r"[\da-f-]+", name) else None
    if not session:
        raise NotThere(f"session {name!r} is not there, or has expired: upload the image again.")
    return session


def _segment(request: dict[str, Any], output: ResultType | None) -> dict[str, Any]:
    instance = app_instance()
    if output == ResultType.dicom_seg:
        if wants(request, "save_label"):
            raise InputError("save_label: a label is saved as a label map: leave out output=dicom_seg.")
        image = request["image"]
        place = image if os.path.isabs(image) else instance.datastore().get_image_uri(image)
        request |= {"result_extension": ".dcm", "dicom_series": dicom_series(place)}
    result = instance.infer(request)
    if output == ResultType.dicom_seg:
        result["dicom_seg"] = result["file"]
    return result


async def infer(
    request: Request,
    background_tasks: BackgroundTasks,
    model: str,
    image: str = "",
    session_id: str = "",
    params: Annotated[str, Form()] = "{}",
    file: Annotated[UploadFile | None, File()] = None,
    label: Annotated[UploadFile | None, File()] = None,
    output: ResultType | None = None,
    user: Annotated[User | None, Depends(RBAC(settings.MONAI_LABEL_AUTH_ROLE_USER))] = None,
) -> Any:
    """Segment a study (``image``), an upload (``file``) or the image of a session, in MONAI Label's own words.

    Raises:
        InputError: for what cannot be done, with the status of the answer in its class.
    """
    if not (file or image or session_id):
        raise InputError("no image: give image=STUDY, session_id=SESSION, or upload a file.")
    wanted = {"model": model, "image": image, **_checked(options(params))}
    uploads = Path(mkdtemp(prefix="upload"))
    background_tasks.add_task(shutil.rmtree, uploads, ignore_errors=True)
    try:
        await asyncio.to_thread(_gather, wanted, uploads, session_id, file, label)
        result = await _turns.run(lambda: _segment(wanted, output), request.is_disconnected)
    except BaseException as error:
        shutil.rmtree(uploads, ignore_errors=True)  # without an answer, tasks in the background do not run
        if isinstance(error, InputError) and str(uploads) in str(error):
            raise type(error)(re.sub(rf"{re.escape(str(uploads))}/\w+/", "", str(error))) from error
        if not isinstance(error, Stopped):
            raise
        logger.info("The client has gone: its request was stopped.")
        return Response(status_code=CLIENT_CLOSED)
    return send_response(app_instance().datastore(), result, output, background_tasks)


def _gather(wanted: dict[str, Any], uploads: Path, session_id: str, file: Any, label: Any) -> None:
    """Put the files that a request is about into it."""
    datastore, image = app_instance().datastore(), wanted["image"]
    if file:
        wanted["image"] = _stored(file, _folder(uploads, "image"))
    elif session_id:
        session = _session(session_id)
        wanted |= {"image": session.image, "session": session.to_json()}
    else:
        datastore.known(image)
    if label:
        wanted["label"] = _stored(label, _folder(uploads, "label"))


def _folder(uploads: Path, name: str) -> Path:
    (uploads / name).mkdir()
    return uploads / name
