"""Let torchvision be imported beside a torch without CUDA; ``make label`` copies it into ``.venv-label``, where a
``.pth`` file imports it at every start of Python.

MONAI Label needs torchvision's Python code only. The wheel on PyPI is built with CUDA on Linux; beside a torch without,
its library of operators cannot be loaded, and the import stops at the first operator that is missing. They are declared
here, without a body, right before the import, and only where the library really does not load.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _BeforeTorchvision(MetaPathFinder):
    """Acts once, when torchvision is looked for, so that no other start of Python waits for torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            found = find_spec(name)
            if found is not None:
                self.declare(Path(found.origin).parent)

    @staticmethod
    def declare(folder):
        import torch

        for file in [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]:
            try:
                torch.ops.load_library(str(file))
            except OSError:
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in OPERATORS:
                    library.define(operator)
                _BeforeTorchvision.library = library  # what it declares goes when it goes


sys.meta_path.insert(0, _BeforeTorchvision())
