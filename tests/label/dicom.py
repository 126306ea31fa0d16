"""A DICOM series of a volume, and an archive with as much of DICOMweb as MONAI Label and OHIF ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qsl, urlsplit

import nibabel as nib
import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from .conftest import voxels


def write_series(image: nib.Nifti1Image, folder: Path, patient: str = "MNI152") -> Path:
    """Write a volume as a DICOM MR series of a study of its own, one file for each slice."""
    folder.mkdir()
    lps = np.diag([-1, -1, 1, 1]) @ image.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    series, study = generate_uid(), generate_uid()
    for k in range(image.shape[2]):
        ds = pydicom.Dataset()
        ds.SpecificCharacterSet = "ISO_IR 100"
        ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, generate_uid()
        ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series, study, study
        ds.Modality, ds.PatientID, ds.PatientName, ds.InstanceNumber = "MR", patient.lower(), patient, k + 1
        ds.StudyDate, ds.StudyTime, ds.SeriesNumber, ds.SeriesDescription = "20260101", "120000", 1, "T1"
        ds.StudyID, ds.AccessionNumber, ds.PatientSex, ds.PatientBirthDate = "1", "", "O", ""
        ds.ImageOrientationPatient = [*(lps[:3, 0] / spacing[0]), *(lps[:3, 1] / spacing[1])]
        ds.ImagePositionPatient = list(lps[:3, 3] + k * lps[:3, 2])
        ds.PixelSpacing, ds.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        ds.Rows, ds.Columns = image.shape[1], image.shape[0]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.PixelData = voxels(image)[:, :, k].T.astype("<i2").tobytes()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.is_little_endian, ds.is_implicit_VR = True, False
        ds.save_as(folder / f"{k:03d}.dcm", write_like_original=False)
    return folder


class Archive:
    """Instances in memory, found by the keys that MONAI Label and OHIF ask for."""

    def __init__(self, instances: list[bytes]) -> None:
        self.instances = instances
        self.refuses = False  # to store, in an answer that is none of an error

    def find(self, **wanted: str) -> list[tuple[pydicom.Dataset, bytes]]:
        read = [(pydicom.dcmread(BytesIO(i), stop_before_pixels=True), i) for i in self.instances]
        return [(ds, i) for ds, i in read if all(ds.get(key) == value for key, value in wanted.items())]

    def series(self, **wanted: str) -> list[pydicom.Dataset]:
        return list({ds.SeriesInstanceUID: ds for ds, _ in self.find(**wanted)}.values())


@contextmanager
def dicomweb(archive: Archive) -> Iterator[str]:
    """Serve an archive by QIDO, WADO and STOW on loopback; the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            one = re.fullmatch(r"/studies/[\d.]+/series/([\d.]+)(/metadata)?", url.path)
            if one and not one[2]:
                parts = [i for _, i in archive.find(SeriesInstanceUID=one[1])]
                body = b"".join(b"--part\r\nContent-Type: application/dicom\r\n\r\n" + i + b"\r\n" for i in parts)
                self.answer(body + b"--part--\r\n", 'multipart/related; type="application/dicom"; boundary=part')
            elif one:
                self.answer_json([ds for ds, _ in archive.find(SeriesInstanceUID=one[1])])
            else:
                self.answer_json(archive.series(**dict(parse_qsl(url.query))))

        def do_POST(self) -> None:
            boundary = self.headers.get_param("boundary", header="content-type")
            parts = self.rfile.read(int(self.headers["Content-Length"])).split(f"--{boundary}".encode())[1:-1]
            archive.instances += [part.split(b"\r\n\r\n", 1)[1][:-2] for part in parts]
            stored = pydicom.dcmread(BytesIO(archive.instances[-1]), stop_before_pixels=True)
            answer = pydicom.Dataset()
            if archive.refuses:
                del archive.instances[-len(parts) :]
                answer.FailedSOPSequence = [pydicom.Dataset()]
                answer.FailedSOPSequence[0].FailureReason = 0xA700
                return self.answer_json(answer)
            answer.ReferencedSOPSequence = [pydicom.Dataset() for _ in parts]
            answer.RetrieveURL = f"/studies/{stored.StudyInstanceUID}/series/{stored.SeriesInstanceUID}"
            self.answer_json(answer)

        def answer_json(self, found: pydicom.Dataset | list[pydicom.Dataset]) -> None:
            content = [ds.to_json_dict() for ds in found] if isinstance(found, list) else found.to_json_dict()
            self.answer(json.dumps(content).encode(), "application/dicom+json")

        def answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
