"""Raw downloads in small, as their owners and mirrors lay them out, oddities included."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
from PIL import Image

RNG_SEED = 0
FLIPPED = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])  # BraTS as nibabel reads it


def junk(folder: Path) -> None:
    """What macOS leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".DS_Store").write_bytes(b"\0\1")
    (folder / "._g0001.jpg").write_bytes(b"\0\5\x16\7")


def photograph(path: Path, size: tuple[int, int], seed: int = RNG_SEED) -> None:
    """An RGB picture of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.stem.encode()]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    Image.fromarray(pixels).save(path, kind)


def fundus_mask(path: Path, size: tuple[int, int], mode: str = "L", cup: bool = True) -> None:
    """REFUGE's codes: 0 cup, 128 rim, 255 background."""
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    radius = np.hypot(x - size[0] * 0.6, y - size[1] * 0.4)
    grey = np.full((size[1], size[0]), 255, np.uint8)
    grey[radius < 8] = 128
    if cup:
        grey[radius < 4] = 0
    image = Image.fromarray(grey)
    if mode == "P":
        image = Image.fromarray(np.select([grey == 0, grey == 128], [0, 1], 2).astype(np.uint8))
        image.putpalette([0, 0, 0, 128, 128, 128, 255, 255, 255] + [0] * 759)
    elif mode == "RGB":
        image = image.convert("RGB")
    image.save(path)


def refuge1(root: Path) -> None:
    """The seven archives of REFUGE-1, unpacked side by side."""
    big, small = (64, 62), (48, 48)
    for grade, stem, mode in (
        ("Glaucoma", "g0001", "L"),
        ("Non-Glaucoma", "n0001", "P"),
        ("Non-Glaucoma", "n0002", "RGB"),
    ):
        suffix = ".JPG" if stem == "n0002" else ".jpg"
        photograph(root / "Training400" / grade / f"{stem}{suffix}", big)
        fundus_mask(root / "Annotation-Training400" / "Disc_Cup_Masks" / grade / f"{stem}.bmp", big, mode)
    photograph(root / "Training400" / "Non-Glaucoma" / "n0003.jpg", big)  # without mask
    (root / "Training400" / "AMD").mkdir()
    (root / "Training400" / "AMD" / "A0012.jpg").write_bytes(b"\xff\xd8corrupt")
    junk(root / "__MACOSX")
    (root / "Annotation-Training400" / "Fovea_location.xlsx").write_bytes(b"PK\3\4")
    photograph(root / "Annotation-Training400" / "Illustration" / "g0001.jpg", (9, 9))
    doubled = root / "REFUGE-Validation400" / "REFUGE-Validation400"
    photograph(doubled / "V0001.jpg", small)
    photograph(doubled / "V0002.jpg", small)
    validation = root / "REFUGE-Validation400-GT" / "Disc_Cup_Masks"
    fundus_mask(validation / "V0001.bmp", small)
    fundus_mask(validation / "V0002.bmp", small, cup=False)
    photograph(root / "Test400" / "T0001.jpg", small)
    photograph(root / "Test400" / "T0002.jpg", small)
    photograph(root / "Test400" / "T0003.jpg", small)
    fundus_mask(root / "Disc_Cup_Masks" / "G" / "T0001.bmp", small)
    fundus_mask(root / "Disc_Cup_Masks" / "N" / "T0002.bmp", small)


def refuge2(root: Path) -> None:
    """REFUGE-2's tree."""
    train = root / "REFUGE2" / "Train"
    for part, images, stem in (
        ("REFUGE1-train", "Training400/Glaucoma", "g0001"),
        ("REFUGE1-val", "REFUGE-Validation400", "V0001"),
        ("REFUGE1-test", "Test400", "T0001"),
    ):
        size = (64, 62) if stem == "g0001" else (48, 48)
        photograph(train / part / images / f"{stem}.jpg", size)
        below = "Disc_Cup_Masks/Glaucoma" if stem == "g0001" else "Disc_Cup_Masks"
        fundus_mask(train / part / below / f"{stem}.bmp", size)
    photograph(root / "REFUGE2" / "Validation" / "Images" / "V0001.jpg", (50, 50))
    fundus_mask(root / "REFUGE2" / "Validation" / "Disc_Masks" / "V0001.png", (50, 50))
    (root / "REFUGE2" / "Validation" / "glaucoma.csv").write_text("FileName,Glaucoma Risk\n../../../etc/passwd,1\n")
    photograph(root / "REFUGE2" / "Test" / "refuge2-test" / "T0001.jpg", (44, 44))
    fundus_mask(root / "REFUGE2" / "Test" / "Disc_Mask" / "T0001.png", (44, 44))
    (root / "REFUGE2" / "Test" / "task1.xls").write_bytes(b"\xd0\xcf\x11\xe0T0001,1")  # a table without header


def refuge_kaggle(root: Path) -> None:
    """The Kaggle repackaging."""
    for split, suffix in (("train", ".bmp"), ("val", ".png"), ("test", ".bmp")):
        stem = {"train": "g0001", "val": "V0001", "test": "T0001"}[split]
        photograph(root / "REFUGE2" / split / "images" / f"{stem}.jpg", (48, 48))
        fundus_mask(root / "REFUGE2" / split / "mask" / f"{stem}{suffix}", (48, 48))


def brats_case(
    folder: Path,
    case: str,
    labels: tuple[int, ...] = (0, 1, 2, 4),
    suffix: str = ".nii.gz",
    seg: str | None = "",
    size: tuple[int, int, int] = (24, 24, 16),
) -> None:
    """One case; ``seg`` is another name for the mask, or None for no mask."""
    folder.mkdir(parents=True, exist_ok=True)
    new = case.startswith("BraTS-GLI")
    names = ("t1n", "t1c", "t2w", "t2f") if new else ("t1", "t1ce", "t2", "flair")
    rng = np.random.default_rng(list(case.encode()))
    brain = np.zeros(size, np.int16)
    brain[4:20, 4:20, 3:13] = 1
    joint = "-" if new else "_"
    for i, name in enumerate(names):
        volume = (brain * (100 * (i + 1) + rng.integers(0, 50, size))).astype(np.int16)
        nib.save(nib.Nifti1Image(volume, FLIPPED), folder / f"{case}{joint}{name}{suffix}")
    if seg is not None:
        mask = np.zeros(size, np.uint8)
        for i, value in enumerate(labels):
            mask[6 + 3 * i : 9 + 3 * i, 6:12, 5:10] = value
        nib.save(nib.Nifti1Image(mask, FLIPPED), folder / (seg or f"{case}{joint}seg{suffix}"))


def brats2020(root: Path) -> None:
    """BraTS 2020, with the mask of case 355 and a validation case."""
    training = root / "MICCAI_BraTS2020_TrainingData" / "MICCAI_BraTS2020_TrainingData"
    for number, labels in ((1, (0, 1, 2, 4)), (2, (0, 1, 2)), (3, (0,))):
        case = f"BraTS20_Training_{number:03d}"
        brats_case(training / case, case, labels, ".nii")
    case = "BraTS20_Training_355"
    brats_case(training / case, case, suffix=".nii", seg="W39_1998.09.19_Segm.nii")
    case = "BraTS20_Validation_001"
    brats_case(root / "MICCAI_BraTS2020_ValidationData" / case, case, suffix=".nii.gz", seg=None)
    junk(training)
    (training / "name_mapping.csv").write_text("Grade,BraTS_2020_subject_ID\nHGG,../../BraTS20_Training_001\n")


def brats2021(root: Path) -> None:
    """BraTS 2021 as Kaggle's tar unpacks it: no parent folder, two cases twice."""
    for case in ("BraTS2021_00000", "BraTS2021_00002", "BraTS2021_00495"):
        brats_case(root / case, case)
    brats_case(root / "extra" / "BraTS2021_00495", "BraTS2021_00495", (0, 1))


def brats2023(root: Path) -> None:
    """BraTS 2023: two time points of one patient."""
    parent = root / "ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData"
    for case in ("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00002-000"):
        brats_case(parent / case, case, (0, 1, 2, 3))


def outline(*points: tuple[float, float]) -> dict[str, object]:
    """An outline as DDTI's JSON holds it, with a key that readers do not know."""
    return {"points": [{"x": x, "y": y} for x, y in points], "annotation": {}, "regionType": "freehand"}


SQUARE = outline((10, 8), (20, 8), (20, 18), (10, 18))


def ddti_xml(marks: list[tuple[object, str | None]], number: object = 1, pair_in_one: bool = False) -> str:
    """An XML of DDTI: marks of (image, svg)."""
    head = (
        f"<number>{number}</number><age></age><sex>u</sex><composition>sólido</composition><tirads></tirads>"
        "<calcifications>non</calcifications><reportbacaf></reportbacaf><reporteco>nódulo ñ</reporteco>"
    )
    bodies = [f"<image>{i}</image>" + ("" if svg is None else f"<svg>{svg}</svg>") for i, svg in marks]
    wrapped = f"<mark>{''.join(bodies)}</mark>" if pair_in_one else "".join(f"<mark>{b}</mark>" for b in bodies)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<case>{head}{wrapped}</case>'


def ultrasound(path: Path, border: bool = False) -> None:
    """A grey JPEG of 56 x 36 with three channels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.random.default_rng(list(path.stem.encode())).integers(40, 200, (36, 56), dtype=np.uint8)
    if border:
        grey[:, :6] = grey[:, -6:] = 0
    Image.fromarray(grey).convert("RGB").save(path)


def ddti(root: Path) -> Path:
    """The owners' flat folder, doubled; one oddity for each case number."""
    folder = root / "DDTI_V1" / "DDTI_V1"
    second = outline((30, 5), (40, 5), (40, 12), (30, 12))
    outside = outline((-20, -20), (15, -20), (15, 15), (-20, 15))
    xml = {
        1: ddti_xml([(1, json.dumps([SQUARE]))]),
        2: ddti_xml([(1, json.dumps([SQUARE, second]))], 2),
        3: ddti_xml([(1, json.dumps([SQUARE])), (2, json.dumps([second]))], 3, pair_in_one=True),
        4: ddti_xml([(1, "")], 4),
        5: ddti_xml([(1, "[]")], 5),
        6: ddti_xml([(1, '[{"points": [{"x": 1')], 6),
        7: ddti_xml([(1, json.dumps([SQUARE]))], 7)[:-40],
        8: ddti_xml([(1, json.dumps([outline((1, 1), (5, 5))]))], 8),
        9: ddti_xml([(1, json.dumps([outside]))], 9),
        10: ddti_xml([(1, json.dumps([SQUARE]))], 10),
        11: ddti_xml([(1, json.dumps([SQUARE]))], 99),
        12: ddti_xml([(1, None), (2, json.dumps([SQUARE]))], 12),
    }
    folder.mkdir(parents=True)
    for number, text in xml.items():
        (folder / f"{number}.xml").write_text(text, encoding="utf-8")
    for stem in ("1_1", "2_1", "3_1", "3_2", "4_1", "5_1", "6_1", "7_1", "8_1", "9_1", "11_1", "12_1", "12_2", "13_1"):
        ultrasound(folder / f"{stem}.jpg", border=stem == "9_1")
    junk(root / "__MACOSX")
    return folder


def ddti_nifti(root: Path, raters: tuple[str, ...] = ("RadiologistSegmentations",)) -> None:
    """The masks of 2023, x first, beside the pictures."""
    mask = np.zeros((56, 36, 1), np.int16)
    mask[10:20, 5:9] = 1
    for stem in ("1_1", "2_1", "2_2"):
        ultrasound(root / "DDTI_V1" / f"{stem}.jpg")
        for rater in raters:
            folder = root / rater / "Segmentations_1"
            folder.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / f"{stem}.nii")
    ultrasound(root / "DDTI_V1" / "3_1.jpg")


def ddti_pairs(root: Path) -> None:
    """The repackaging: masks of 0/1, of 0/255, and a JPEG mask."""
    folder = root / "DDTI" / "1_or_data"
    mask = np.zeros((36, 28), np.uint8)
    mask[10:20, 5:15] = 1
    for name, value in (("0000.PNG", 1), ("3.PNG", 255), ("0004.jpg", 255)):
        photograph(folder / "image" / name, (28, 36))
        (folder / "mask").mkdir(exist_ok=True)
        Image.fromarray(mask * value).save(folder / "mask" / name, **({"quality": 60} if name.endswith("jpg") else {}))
    (folder / "category.csv").write_text("ID,CATE\n0000.PNG,1\n")
    processed = root / "DDTI" / "2_preprocessed_data" / "stage1"
    photograph(processed / "p_image" / "0000.PNG", (16, 16))


def volume(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write a NIfTI."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def decathlon(root: Path, cases: int = 6) -> Path:
    """A task as its archive unpacks: test images are strings, macOS files lie about."""
    folder = root / "Task04_Toy"
    rng = np.random.default_rng(RNG_SEED)
    for i in range(cases):
        label = np.zeros((11, 13, 9), np.uint8)
        label[3:6, 4:8, 2:6] = 1
        label[6:8, 4:8, 2:6] = 2
        image = (rng.normal(size=label.shape) * 10 + 100 * label).astype(np.float32)
        volume(folder / "imagesTr" / f"toy_{i:03d}.nii.gz", image)
        volume(folder / "labelsTr" / f"toy_{i:03d}.nii.gz", label)
        (folder / "imagesTr" / f"._toy_{i:03d}.nii.gz").write_bytes(b"\0\5\x16\7")
    volume(folder / "imagesTs" / "toy_100.nii.gz", rng.normal(size=(8, 8, 8)).astype(np.float32))
    pairs = [
        {"image": f"./imagesTr/toy_{i:03d}.nii.gz", "label": f"./labelsTr/toy_{i:03d}.nii.gz"} for i in range(cases)
    ]
    content = {
        "name": "Toy",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "front", "2": "back"},
        "numTraining": cases,
        "numTest": 1,
        "training": pairs,
        "test": ["./imagesTs/toy_100.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def picture_set(
    root: Path, cases: int = 6, suffix: str = ".png", foreground: int = 1, size: tuple[int, int] = (37, 23)
) -> Path:
    """2D pictures with masks in Decathlon layout, without a list of labels beyond one."""
    items = []
    for i in range(cases):
        mask = np.zeros((size[1], size[0]), np.uint8)
        mask[5:15, 4 + i : 20] = foreground
        for kind in ("images", "labels"):
            (root / kind).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 80, (size[1], size[0], 3))
        image = (noise + 100 * (mask[..., None] > 0)).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / f"c{i}{suffix}")
        Image.fromarray(mask).save(root / "labels" / f"c{i}.png")
        items.append({"image": f"images/c{i}{suffix}", "label": f"labels/c{i}.png", "extra": {"crop": [1, 2]}})
    half = {"training": items[: cases - 2], "validation": items[cases - 2 :]}
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "lesion"}, **half}))
    return root


def tree(folder: Path) -> dict[str, str]:
    """Content hashes of all files below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def dicom(folder: Path, array: np.ndarray) -> None:
    """Write (x, y, z) as a DICOM series."""
    folder.mkdir(parents=True)
    io = itk.GDCMImageIO.New()
    for k in range(array.shape[2]):
        image = itk.image_from_array(np.ascontiguousarray(array[:, :, k].T[None]))
        image.SetSpacing([2.0, 3.0, 4.0])
        image.SetOrigin([0.0, 0.0, 4.0 * k])
        tags = image.GetMetaDataDictionary()
        for key, value in (
            ("0008|0060", "CT"),
            ("0020|000d", "1.2.3"),
            ("0020|000e", "1.2.3.4"),
            ("0020|0013", str(k)),
            ("0020|0032", f"0\\0\\{4 * k}"),
            ("0020|0037", "1\\0\\0\\0\\1\\0"),
        ):
            tags[key] = value
        image.SetMetaDataDictionary(tags)
        io.KeepOriginalUIDOn()
        itk.imwrite(image, str(folder / f"{k}.dcm"), imageio=io)
