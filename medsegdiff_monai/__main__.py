"""Commands: ``python -m medsegdiff_monai check | prepare | segment | export | package | demo``."""

from __future__ import annotations

from typing import Any

import fire

from .errors import show_input_errors_plainly


def segment(
    *images: str,
    output_dir: str,
    bundle_root: str | None = None,
    config_file: str | list[str] | None = None,
    **override: Any,
) -> None:
    """Segment single images through the bundle's ``inference.json``; finished ones are skipped.

    Other flags set config variables, such as ``--overwrite true --num_members 9 --checkpoint FILE``.

    Args:
        *images: files (NIfTI, NRRD, MHA, PNG, JPEG, BMP) or folders that hold a DICOM series.
        output_dir: folder to write to.
        bundle_root: the bundle's folder; found in the working directory where it is not given.
        config_file: config, or list of configs, in place of ``configs/inference.json``.

    Raises:
        InputError: for no image, a config that is not there, or a variable that it does not have.
    """
    from inspect import signature

    from monai.bundle import run

    from .errors import InputError
    from .settings import find_bundle_root, read_config

    if not images:
        raise InputError("segment: give at least one image, for instance: segment scan.nii.gz --output_dir results")
    root = bundle_root or find_bundle_root()
    config = config_file or f"{root}/configs/inference.json"
    variables: dict[str, Any] = {
        "bundle_root": root,
        "images": [str(image) for image in images],
        "output_dir": str(output_dir),
    }
    own = signature(run).parameters  # such as logging_file
    read_config(config, **variables, **{name: value for name, value in override.items() if name not in own})
    run(config_file=config, **variables, **override)


def prepare(kind: str, source: str, output: str, **options: Any) -> None:
    """Turn a raw download into a data set in Decathlon layout; run again, it goes on where it stopped.

    Other flags are ``--seed``, ``--workers``, and those of the kind, such as ``--crop_disc true`` (refuge) or
    ``--slices 2D --regions whole`` (brats) or ``--raters channels`` (folder).

    Args:
        kind: ``refuge``, ``brats``, ``ddti``, ``decathlon`` or ``folder`` (images/ and labels/ matched by name; several
            raters in labels_1/, labels_2/ ..., or in the channels or bits of each label picture).
        source: folder of the download; it is never altered.
        output: folder to write to.
    """
    from .data.raw.prepare import prepare

    prepare(kind, str(source), str(output), **options)


def check(dataset: str, write: str | None = None, strict: bool | str = False) -> None:
    """Check a data set in Decathlon layout: every fault at once, a fingerprint, and the config variables that fit.

    Args:
        dataset: folder that holds ``dataset.json``.
        write: file to write the proposed variables to, an overlay for the bundle's configs.
        strict: whether warnings count as errors.
    """
    from .data.report import check

    check(str(dataset), write, strict)


def export(
    output: str, bundle_root: str | None = None, config_file: str | list[str] | None = None, **override: Any
) -> None:
    """Write the whole segmenter as one file that needs nothing of this package: image in, probabilities out.

    The sampler, its noise and its members are inside; members are fused by their mean. Images are preprocessed as
    ``configs/inference.json`` says. Other flags set config variables, such as ``--num_members 9 --num_steps 2
    --checkpoint FILE``.

    Args:
        output: file to write: ``.ts`` or ``.pt`` (TorchScript, images of any size), or ``.onnx`` (any batch, images of
            the config's ``roi_size``, rounded up to what the network's strides divide).
        bundle_root: the bundle's folder; found in the working directory where it is not given.
        config_file: config, or list of configs, in place of ``configs/inference.json``; with the overlay that the
            weights were trained with, if any.
    """
    from .export import export_segmenter
    from .settings import find_bundle_root

    root = bundle_root or find_bundle_root()
    export_segmenter(str(output), config_file or f"{root}/configs/inference.json", bundle_root=root, **override)


def package(
    output: str, bundle_root: str | None = None, results: str | None = None, weights_url: str | None = None
) -> None:
    """Write the bundle as the model zoo takes it: self-contained, as a folder and a zip.

    It holds the configs, the weights in ``models/model.pt``, the measured scores and this package's code, and runs
    where the package is not installed.

    Args:
        output: folder to write both to; an earlier package there is replaced.
        bundle_root: the bundle's folder; found in the working directory where it is not given.
        results: file of measured results; ``benchmarks/results.jsonl`` beside the bundle where it is not given.
        weights_url: address to download the weights from, where they are above 25 MB, the zoo's limit for a file.
    """
    from .package import package_bundle
    from .settings import find_bundle_root

    for path in package_bundle(str(output), bundle_root or find_bundle_root(), results, weights_url):
        print(path)


def demo(output_dir: str = "demo_output") -> None:
    """Prepare real MRI that a Python package carries, train on it, score, and write a picture of the result.

    Args:
        output_dir: folder to write to.
    """
    from .demo import run_demo

    run_demo(output_dir)


def main() -> None:
    """Run a command; bad input ends with one message."""
    show_input_errors_plainly()
    commands = {
        "check": check, "prepare": prepare, "segment": segment, "export": export, "package": package, "demo": demo
    }  # fmt: skip
    fire.Fire(commands, name="medsegdiff_monai")


if __name__ == "__main__":
    main()
