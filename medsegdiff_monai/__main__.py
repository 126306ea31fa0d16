"""Commands: ``python -m medsegdiff_monai check | prepare | segment | ...``; without one, all are listed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from . import cli
from .errors import InputError, find_input_error, show_input_errors_plainly

PREPARE = {  # options of some kinds of data sets
    "crop_disc": "refuge: true for the disc alone",
    "slices": "brats: 3D or 2D",
    "regions": "brats: three or whole",
    "rater": "ddti: part of the path of the masks to take, where a picture has several",
    "patient_pattern": "folder: regular expression whose first group is the patient in a file's name",
    "raters": "folder: channels or bits, where one file holds the masks of all raters",
}


def segment(
    *images: str,
    output_dir: str,
    bundle_root: str | None = None,
    config_file: str | Sequence[str] | None = None,
    **override: Any,
) -> None:
    """Segment single images through the bundle's ``inference.json``; finished ones are skipped.

    Args:
        *images: files (NIfTI, NRRD, MHA, PNG, JPEG, TIFF, BMP) or folders that hold a DICOM series.
        output_dir: folder to write to.
        bundle_root: the bundle's folder; found in the working directory where it is not given.
        config_file: config, or list of configs, in place of ``configs/inference.json``.
        **override: config variables, and options of ``monai.bundle.run``.

    Raises:
        InputError: for no image, a config that is not there, or what is wrong with a variable.
    """
    from monai.bundle import run

    from .configs import OPTIONS_OF_RUN, merge_configs, to_be_set
    from .settings import find_bundle_root
    from .workflow import say_command

    if not images:
        raise InputError("segment: give at least one image, for instance: segment scan.nii.gz --output_dir results")
    root = bundle_root or find_bundle_root()
    config = config_file or f"{root}/configs/inference.json"
    options = {name: value for name, value in override.items() if name in OPTIONS_OF_RUN}
    given = {**override, "bundle_root": root, "images": list(images), "output_dir": output_dir}
    given = {name: value for name, value in given.items() if name not in OPTIONS_OF_RUN}
    variables = to_be_set(given)
    merge_configs(config, **variables)
    say_command("inference", [config] if isinstance(config, str) else config, given)
    try:
        run(config_file=config, **options, **variables)  # which checks them first
    except Exception as error:
        found = find_input_error(error)
        if found is None:
            raise
        raise found from None  # and not from what MONAI raised from it


def segment_trained(images: Sequence[str], trained: Sequence[str] | None = None, **options: Any) -> None:
    """Segment with the overlay and weights of one or several trainings of ours; see :func:`segment`."""
    from .settings import find_bundle_root
    from .workflow import trained_files

    if trained is not None:
        if options["config_file"] is not None:
            raise InputError(f"trained={', '.join(trained)} has a config of its own: leave --config_file out.")
        found = trained_files(trained)
        root = options.get("bundle_root") or find_bundle_root()
        options = {**found.variables, **options, "config_file": [f"{root}/configs/inference.json", found.overlay]}
    segment(*images, **options)


def train(**options: Any) -> None:
    """Check a data set, choose settings, and train; see :func:`medsegdiff_monai.workflow.train`."""
    from .workflow import train

    train(**options)


def evaluate(**options: Any) -> None:
    """Score a training; see :func:`medsegdiff_monai.workflow.evaluate`."""
    from .workflow import evaluate

    evaluate(**options)


def init(output: str, bundle_root: str | None = None) -> None:
    """Copy the bundle; see :func:`medsegdiff_monai.workflow.copy_bundle`."""
    from .workflow import copy_bundle

    copy_bundle(output, bundle_root)


def prepare(kind: str, source: str, output: str, **options: Any) -> None:
    """Turn a raw download into a data set in Decathlon layout; run again, it goes on where it stopped.

    Args:
        kind: see :data:`medsegdiff_monai.data.raw.prepare.KINDS`.
        source: folder of the download; it is never altered.
        output: folder to write to.
        **options: ``seed``, ``workers``, and those of the kind.
    """
    from .data.raw.prepare import prepare

    prepare(kind, source, output, **options)


def check(dataset: str, write: str | None = None, strict: bool = False) -> None:
    """Check a data set in Decathlon layout: every fault at once, a fingerprint, and the config variables that fit.

    Args:
        dataset: folder that holds ``dataset.json``.
        write: file to write the proposed variables to, an overlay for the bundle's configs.
        strict: whether warnings count as errors.
    """
    from .data.report import check

    check(dataset, write, strict)


def export(
    output: str, bundle_root: str | None = None, config_file: str | Sequence[str] | None = None, **override: Any
) -> None:
    """Write the whole segmenter as one file that needs nothing of this package: image in, probabilities out.

    The sampler, its noise and its members are inside; members are fused by their mean. Images are preprocessed as
    ``configs/inference.json`` says.

    Args:
        output: file to write: ``.pt2`` (``torch.export``) or ``.onnx`` (any batch, images of the config's ``roi_size``,
            rounded up to what the network's strides divide), or ``.ts`` or ``.pt`` (TorchScript, images of any size).
        bundle_root: the bundle's folder; found in the working directory where it is not given.
        config_file: config, or list of configs, in place of ``configs/inference.json``; with the overlay that the
            weights were trained with, if any.
        **override: config variables.
    """
    from .configs import to_be_set
    from .export import export_segmenter
    from .settings import find_bundle_root

    root = bundle_root or find_bundle_root()
    variables = to_be_set({**override, "bundle_root": root})
    export_segmenter(output, config_file or f"{root}/configs/inference.json", **variables)


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

    for path in package_bundle(output, bundle_root or find_bundle_root(), results, weights_url):
        print(path)


def demo(output_dir: str = "demo_output", lidc: bool = False) -> None:
    """Train on slices of an averaged brain MRI that a Python package carries, score, and write a picture of the result.

    Args:
        output_dir: folder to write to.
        lidc: draw lung nodules, outlined by four radiologists and by the bundle, instead; nothing is trained.
    """
    from .demo import run_demo, run_lidc_demo

    (run_lidc_demo if lidc else run_demo)(output_dir)


def settings(config: str, bundle_root: str | None = None) -> None:
    """Print the variables of a config with their defaults, what they may be, and what they mean.

    Args:
        config: ``train``, ``evaluate`` or ``inference``.
        bundle_root: the bundle's folder; found in the working directory where it is not given.
    """
    from .settings import find_bundle_root
    from .variables import describe

    print(describe(config, bundle_root or find_bundle_root()))


def evaluate_members(folders: Sequence[str], output: str, labels: str | None = None, **options: Any) -> None:
    """Grade the members of any ensemble; see :func:`medsegdiff_monai.report.members.evaluate_members`."""
    from .report.members import evaluate_members
    from .variables import VARIABLES

    if "regions" in options:
        options["regions"] = VARIABLES["regions"].read(options["regions"])
    evaluate_members(folders, output, labels, **options)


def summarize_folds(folders: Sequence[str], output: str) -> None:
    """Put the evaluations of all folds together; see :func:`medsegdiff_monai.report.folds.summarize_folds`."""
    from .report.folds import summarize_folds

    summarize_folds(folders, output)


def _add_root(parser: cli.Parser) -> None:
    text = "folder of the bundle; by default the one in the working directory, else the installed one"
    parser.add_argument("--bundle_root", metavar="DIR", help=text)


def _add_config(parser: cli.Parser) -> None:
    _add_root(parser)
    text = "config, or several as ['FILE','FILE'], in place of configs/inference.json"
    parser.add_argument("--config_file", metavar="FILE", type=cli.config_files, help=text)
    parser.add_variables("inference", but=("bundle_root", "output_dir", "images"))


def _segment_options(parser: cli.Parser) -> None:
    parser.usage = "%(prog)s IMAGE ... --output_dir DIR [--VARIABLE VALUE ...]"
    text = (
        "files (NIfTI, NRRD, MHA, TIFF, PNG, JPEG, BMP) or folders of a DICOM series; those that begin with a dash go "
        "after --"
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=text)
    parser.add_argument("-o", "--output_dir", metavar="DIR", required=True, help="folder to write to")
    _add_trained(parser)
    _add_config(parser)


def _add_trained(parser: cli.Parser) -> None:
    text = (
        "folder that `train` has written to, whose settings and weights are taken; given several times, the weights "
        "share the members"
    )
    parser.add_argument("--trained", metavar="DIR", action="append", help=text)


def _train_options(parser: cli.Parser) -> None:
    parser.usage = "%(prog)s DATASET --output_dir DIR [--VARIABLE VALUE ...]"
    parser.add_argument("dataset", metavar="DATASET", help="folder that holds dataset.json; `prepare` writes one")
    text = "folder for weights, settings, pictures and report"
    parser.add_argument("-o", "--output_dir", dest="output", metavar="DIR", required=True, help=text)
    _add_root(parser)
    parser.add_variables("train", but=("bundle_root", "output_dir", "dataset_dir", "ckpt_dir"))


def _evaluate_options(parser: cli.Parser) -> None:
    parser.usage = "%(prog)s DATASET --output_dir DIR [--trained DIR] [--VARIABLE VALUE ...]"
    parser.add_argument("dataset", metavar="DATASET", help="folder that holds dataset.json")
    text = "folder for masks, tables and report"
    parser.add_argument("-o", "--output_dir", dest="output", metavar="DIR", required=True, help=text)
    _add_trained(parser)
    _add_root(parser)
    parser.add_variables("evaluate", but=("bundle_root", "output_dir", "dataset_dir"))


def _init_options(parser: cli.Parser) -> None:
    parser.add_argument("output", metavar="DIR", help="folder to write, which must not be there yet")
    _add_root(parser)


def _prepare_options(parser: cli.Parser) -> None:
    parser.add_argument(
        "kind", help="refuge, brats, ddti, decathlon, nnunet, or folder (images/ and labels/ matched by name)"
    )
    parser.add_argument("--source", metavar="DIR", required=True, help="folder of the download; it is never altered")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, if the data come without one")
    parser.add_argument("--workers", type=int, help="cases at a time; by default one for each processor")
    for name, text in PREPARE.items():
        parser.add_argument(f"--{name}", metavar="VALUE", default=cli.UNSET, help=text)


def _check_options(parser: cli.Parser) -> None:
    parser.add_argument("--dataset", metavar="DIR", required=True, help="folder that holds dataset.json")
    parser.add_argument("--write", metavar="FILE", help="overlay to write with the variables that fit")
    parser.add_switch("--strict", "count warnings as errors")


def _export_options(parser: cli.Parser) -> None:
    parser.usage = "%(prog)s --output FILE [--VARIABLE VALUE ...]"
    text = "file to write: .pt2 (torch.export), .onnx, or .ts or .pt (TorchScript)"
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help=text)
    _add_config(parser)


def _package_options(parser: cli.Parser) -> None:
    text = "folder to write a folder and a zip to; an earlier package there is replaced"
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help=text)
    _add_root(parser)
    parser.add_argument("--results", metavar="FILE", help="measured results, in place of benchmarks/results.jsonl")
    parser.add_argument("--weights_url", metavar="URL", help="address to download the weights from, needed above 25 MB")


def _demo_options(parser: cli.Parser) -> None:
    parser.add_argument("-o", "--output_dir", metavar="DIR", default="demo_output", help="folder to write to")
    parser.add_switch(
        "--lidc", "draw lung nodules as outlined by four radiologists and by the bundle; nothing is trained"
    )


def _settings_options(parser: cli.Parser) -> None:
    parser.add_argument("config", help="train, evaluate or inference")
    _add_root(parser)


def _members_options(parser: cli.Parser) -> None:
    text = "folder of each member, such as a fold of nnU-Net: masks or probabilities, a file for each case"
    parser.add_argument("folders", nargs="+", metavar="DIR", help=text)
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write tables and report to")
    parser.add_argument("--labels", metavar="DIR", help="folder of the label maps, if there are any")
    text = "label values of each class, such as {'disc': [1, 2], 'cup': [2]}, where no dataset.json says so"
    parser.add_argument("--regions", metavar="VALUE", default=cli.UNSET, help=text)
    text = "what follows the case's name in the members' files, such as _prob"
    parser.add_argument("--suffix", metavar="TEXT", default=cli.UNSET, help=text)
    text = "how members are combined into one mask: mean (default), vote, staple or expected_dice"
    parser.add_argument("--fusion", metavar="NAME", default=cli.UNSET, help=text)
    text = "distance in mm, or pixels, up to which surfaces count as equal; by default 1"
    parser.add_argument("--tolerance", metavar="NUMBER", type=float, default=cli.UNSET, help=text)


def _folds_options(parser: cli.Parser) -> None:
    parser.add_argument("folders", nargs="+", metavar="DIR", help="what the evaluation of each fold has written")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder to write tables and report to")


COMMANDS = {
    "check": cli.Command("Check a data set and write the settings that fit it.", _check_options, check),
    "prepare": cli.Command("Turn a raw download into a data set.", _prepare_options, prepare),
    "segment": cli.Command("Segment single images; finished ones are skipped.", _segment_options, segment_trained),
    "train": cli.Command("Check a data set, choose the settings that fit it, and train.", _train_options, train),
    "evaluate": cli.Command("Segment the cases of a data set and score them.", _evaluate_options, evaluate),
    "init": cli.Command("Write a copy of the bundle, to edit.", _init_options, init),
    "export": cli.Command(
        "Write the segmenter as one file: torch.export, ONNX or TorchScript.", _export_options, export
    ),
    "package": cli.Command("Write the bundle in the layout of MONAI's model zoo.", _package_options, package),
    "demo": cli.Command(
        "Train on an averaged brain MRI, score and show the result; or, with --lidc, show masks of lung nodules.",
        _demo_options,
        demo,
    ),
    "evaluate-members": cli.Command(
        "Grade the masks or probabilities of any ensemble, such as nnU-Net's folds.", _members_options, evaluate_members
    ),
    "summarize-folds": cli.Command("Summarize the folds of a cross-validation.", _folds_options, summarize_folds),
    "settings": cli.Command("List the variables of train, evaluate or inference.", _settings_options, settings),
}


def main() -> None:
    """Run a command; bad input ends with one message."""
    show_input_errors_plainly()
    cli.main(COMMANDS, sys.argv[1:])


if __name__ == "__main__":
    main()
