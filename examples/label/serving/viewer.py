"""The OHIF viewer as MONAI Label 0.8.5 ships it, with two faults put right that keep readers from storing a label.

*Export DICOM SEG* of its segmentation panel ends in an error page, "Cannot read properties of undefined (reading
'store')": two of its extensions have a command of the name ``storeSegmentation``, and the one that is called is not
told which archive is shown, unlike the other. It asks for the archive itself here.

What is then stored is upside down where the viewer has the slices in the other order: dcmjs sorts the images of a
DICOM-SEG from the last to the first along their normal, but not the masks that belong to them. Both come in that order
here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fastapi.responses import FileResponse, Response

__all__ = ["mended"]

STORE = "await dataSource.store.dicom(naturalizedReport);"
SLICES = "const segImages = imageIds.map(imageId => esm.cache.getImage(imageId));"
MENDED = {
    STORE: f"dataSource = dataSource ?? extensionManager.getActiveDataSource()[0]; {STORE}",
    SLICES: f"""{SLICES}
      const along = image => {{
        const {{ rowCosines: r, columnCosines: c, imagePositionPatient: p }} =
          esm.metaData.get('imagePlaneModule', image.referencedImageId);
        return p[0] * (r[1] * c[2] - r[2] * c[1]) + p[1] * (r[2] * c[0] - r[0] * c[2]) +
          p[2] * (r[0] * c[1] - r[1] * c[0]);
      }};
      segImages.sort((a, b) => along(b) - along(a));""",
}


def mended(file: FileResponse) -> Response:
    """Return a file of the viewer, or in its place what it should have been."""
    content = _mended(str(file.path)) if str(file.path).endswith(".js") else ""
    return Response(content, media_type="text/javascript") if content else file


@cache
def _mended(path: str) -> str:
    """The script without the faults; empty where it has none."""
    script = Path(path).read_text(encoding="utf-8")
    if not any(fault in script for fault in MENDED):
        return ""
    for fault, right in MENDED.items():
        script = script.replace(fault, right)
    return script
