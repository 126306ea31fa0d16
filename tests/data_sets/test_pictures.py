"""Pictures as a person sees them, or refused; masks saved as pictures mean what they show."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from monai.bundle import ConfigParser
from PIL import ExifTags, Image, ImageFilter, TiffImagePlugin

from medsegdiff_monai.data.pictures import open_picture, picture_values
from medsegdiff_monai.data.raw.masks import coding_of, traits_of
from medsegdiff_monai.data.reading import load_image, load_label
from medsegdiff_monai.data.report import inspect_dataset
from medsegdiff_monai.errors import InputError

CONFIGS = Path(__file__).parents[2] / "bundle" / "configs"
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)  # rows, columns
GREY = COLOURS[..., 0]
DEEP = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
DISC = np.hypot(*(np.indices((40, 52)) - np.array([18, 27])[:, None, None])) < 11


def stored(file, image, **options):
    image.save(file, **options)
    return file


def tiff(file, pixels, **tags):
    """A TIFF without compression; ``tags`` are Pillow's numbers with a ``t`` in front."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for key, value in tags.items():
        directory[int(key[1:])] = value
    return stored(file, Image.fromarray(pixels), tiffinfo=directory)


def png(pixels, bits, colour):
    """A PNG of kinds that Pillow does not write: ``pixels`` are the bytes of the rows."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns = len(pixels), len(pixels[0]) * 8 // bits // {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    head = struct.pack(">IIBBBBB", columns, rows, bits, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + bytes(row) for row in pixels))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def seen(file, channels=None):
    """Rows, columns and channels of what is read."""
    return np.moveaxis(load_image(file, channels).numpy(), (0, 1, 2), (2, 1, 0)).squeeze()


KINDS = {
    "rgb.png": (Image.fromarray(COLOURS), COLOURS),
    "interlaced.tif": (Image.fromarray(COLOURS), COLOURS),
    "grey.bmp": (Image.fromarray(GREY), GREY),
    "deep.png": (Image.fromarray(DEEP), DEEP),
    "deep.tif": (Image.fromarray(DEEP), DEEP),
    "signed.tif": (Image.fromarray(GREY.astype(np.int32) - 100), GREY.astype(np.int32) - 100),
    "float.tiff": (Image.fromarray(GREY / np.float32(7)), GREY / np.float32(7)),
    "bits.png": (Image.fromarray(GREY > 99), (GREY > 99) * 255),
    "bits.tif": (Image.fromarray(GREY > 99), (GREY > 99) * 255),
    "opaque.png": (Image.fromarray(np.dstack([COLOURS, np.full_like(GREY, 255)])), COLOURS),
    "opaque_grey.png": (Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)])), GREY),
    "really_grey.png": (Image.fromarray(np.dstack([GREY] * 3)), GREY),
    "palette_of_greys.png": (Image.fromarray(GREY).convert("P"), GREY),
    "ink.tif": (Image.fromarray(COLOURS).convert("CMYK"), COLOURS),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_kinds_of_pictures(tmp_path, name, compression):
    image, expected = KINDS[name]
    if compression and not name.endswith(("tif", "tiff")):
        pytest.skip("of TIFF")
    file = stored(tmp_path / name, image, **({"compression": compression} if compression else {}))
    np.testing.assert_allclose(seen(file), expected, rtol=1e-6)


def test_big_endian_and_big_tiff(tmp_path):
    swapped = Image.frombytes("I;16B", DEEP.shape[::-1], DEEP.astype(">u2").tobytes())
    np.testing.assert_array_equal(seen(stored(tmp_path / "x.tif", swapped)), DEEP)
    np.testing.assert_array_equal(seen(stored(tmp_path / "y.tif", Image.fromarray(DEEP), big_tiff=True)), DEEP)


def test_palettes_are_seen_in_their_colours(tmp_path):
    palette = Image.fromarray(COLOURS).quantize(20)
    for suffix in ("png", "bmp", "tif"):
        np.testing.assert_array_equal(
            seen(stored(tmp_path / f"x.{suffix}", palette)), np.asarray(palette.convert("RGB"))
        )
    np.testing.assert_array_equal(open_picture(tmp_path / "x.png"), np.asarray(palette.convert("RGB")))


def turn(pixels, orientation):
    """The pixels that EXIF's table makes of the stored ones: first row and first column lie there."""
    rows = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
    across = orientation > 4
    table = {5: 1, 6: 2, 7: 3, 8: 4}
    pixels = np.swapaxes(pixels, 0, 1) if across else pixels
    place = rows[table.get(orientation, orientation)]
    return pixels[:: -1 if "bottom" in place else 1, :: -1 if "right" in place else 1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_orientation_tags_are_followed(tmp_path, orientation, suffix):
    smooth = np.dstack([np.linspace(0, 200, 24 * 40).reshape(24, 40)] * 3).astype(np.uint8)
    smooth[..., 1] = 90
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = stored(tmp_path / f"x.{suffix}", Image.fromarray(smooth), exif=exif)
    np.testing.assert_allclose(seen(file), turn(smooth.astype(int), orientation), atol=8 if suffix == "jpg" else 0)


def test_grey_and_colours_fit_the_network(tmp_path):
    grey = stored(tmp_path / "grey.png", Image.fromarray(GREY))
    deep = stored(tmp_path / "deep.png", Image.fromarray(DEEP))
    both = stored(tmp_path / "both.png", Image.fromarray(np.dstack([GREY] * 3)))
    rgb = stored(tmp_path / "rgb.png", Image.fromarray(COLOURS))
    for file, pixels in ((grey, GREY), (both, GREY), (deep, DEEP)):
        np.testing.assert_array_equal(seen(file, 1), pixels)
        np.testing.assert_array_equal(seen(file, 3), np.dstack([pixels] * 3))
    assert load_image(rgb, 1).shape == load_image(rgb, 3).shape == (3, 9, 6)
    assert load_image([str(grey), str(both)], 2).shape == (2, 9, 6)  # files that are channels themselves


def test_a_photograph_with_a_preview_inside_is_the_photograph(tmp_path):
    photo, preview = (Image.fromarray(COLOURS[::step, ::step]).resize((64, 48)) for step in (1, 2))
    photo.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[preview])
    assert Image.open(tmp_path / "x.jpg").n_frames == 2
    np.testing.assert_allclose(seen(tmp_path / "x.jpg"), np.asarray(photo), atol=90)


def test_content_decides_on_the_kind(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "x.jpg", "PNG")
    np.testing.assert_array_equal(seen(tmp_path / "x.jpg"), COLOURS)


def animation(file):
    return stored(file, Image.fromarray(GREY), save_all=True, append_images=[Image.fromarray(GREY[::-1])])


REFUSED = {
    "clear.png": (lambda f: stored(f, Image.fromarray(np.dstack([COLOURS, GREY]))), "is transparent in places"),
    "key.png": (lambda f: stored(f, Image.fromarray(GREY), transparency=int(GREY[0, 0])), "is transparent in places"),
    "deepkey.png": (lambda f: stored(f, Image.fromarray(DEEP), transparency=int(DEEP[0, 0])), "is transparent"),
    "moving.png": (animation, "holds 2 pages"),
    "stack.tif": (animation, "holds 2 pages"),
    "fiji.tif": (lambda f: tiff(f, GREY, t270="ImageJ=1.53\nimages=40\nslices=40\n"), "holds 40 pages"),
    "deep.png": (lambda f: f.write_bytes(png(np.zeros((4, 18), np.uint8), 16, 2)), "channels of 16 bits"),
    "deepalpha.png": (lambda f: f.write_bytes(png(np.zeros((4, 16), np.uint8), 16, 4)), "channels of 16 bits"),
    "inverted.tif": (lambda f: tiff(f, DEEP, t262=0), "lowest value as white"),
    "signed.tif": (lambda f: tiff(f, GREY, t339=2), "signed numbers of 8 bits"),
    "other.png": (lambda f: stored(f, Image.fromarray(GREY), format="GIF"), "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_read_as_something_else_is_refused(tmp_path, name):
    make, message = REFUSED[name]
    make(tmp_path / name)
    for read in (load_image, load_label, open_picture, picture_values):
        with pytest.raises(InputError, match=message) as error:
            read(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


def two_channels():
    """A TIFF of two channels without a meaning, as microscopes write it."""
    content = io.BytesIO()
    Image.fromarray(np.dstack([GREY, GREY])).save(content, "TIFF")  # grey with alpha
    head = bytearray(content.getvalue())
    at = bytes(head).index(struct.pack("<HHI", 338, 3, 1))
    head[at + 8 : at + 10] = struct.pack("<H", 0)
    return bytes(head)


def test_channels_that_a_picture_has_not(tmp_path):
    (tmp_path / "x.tif").write_bytes(two_channels())
    with pytest.raises(InputError, match="more channels than a picture has"):
        load_image(tmp_path / "x.tif")


@pytest.mark.parametrize("config", ["train", "evaluate", "inference"])
def test_the_bundle_reads_what_the_check_reads(tmp_path, config):
    """Whichever picture, by the transforms of each config."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json")] if config == "train" else [str(CONFIGS / f"{config}.json")])
    parser["in_channels"] = 3
    paths = ["train#preprocessing", "validate#preprocessing"] if config == "train" else ["preprocessing"]
    for path in paths:
        kinds = [step["_target_"] for step in parser[f"{path}#transforms"]]
        first = kinds.index("LoadImaged")
        steps = [parser.get_parsed_content(f"{path}#transforms#{first + i}") for i in (0, 1)]
        for name, (image, _) in KINDS.items():
            file = stored(tmp_path / name, image)
            item = steps[1](steps[0]({"image": str(file)}))
            np.testing.assert_array_equal(item["image"].numpy(), load_image(file, 3).numpy())
        with pytest.raises(Exception, match="cannot be read") as error:
            (tmp_path / "no.png").write_bytes(b"no picture")
            steps[0]({"image": str(tmp_path / "no.png")})
        assert isinstance(error.value, InputError) or isinstance(error.value.__cause__, InputError)


def test_a_set_of_grey_and_coloured_pictures_has_three_channels(tmp_path):
    items = []
    for i in range(4):
        pixels = np.roll(np.dstack([DISC * 200, DISC * (90 if i % 2 else 200), DISC * 200]), i, 1).astype(np.uint8)
        Image.fromarray(pixels if i % 2 else pixels[..., 0]).save(tmp_path / f"i{i}.png")
        Image.fromarray(np.roll(DISC, i, 1).astype(np.uint8)).save(tmp_path / f"l{i}.png")
        items.append({"image": f"i{i}.png", "label": f"l{i}.png"})
    (tmp_path / "dataset.json").write_text(json.dumps({"training": items}))
    report = inspect_dataset(tmp_path)
    assert report.errors == [] and report.overlay["in_channels"] == 3


def palette(indices, *colours):
    image = Image.fromarray(indices.astype(np.uint8))
    image.putpalette([value for colour in colours for value in colour])
    return image


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(DISC * np.uint8(1)),
        Image.fromarray(DISC),
        Image.fromarray(np.dstack([DISC * np.uint8(1)] * 3)),
        Image.fromarray(np.dstack([DISC * np.uint8(1)] * 3 + [np.full(DISC.shape, 255, np.uint8)])),
        Image.fromarray(DISC * np.uint16(1)),
        Image.fromarray(DISC * np.int32(1)),
        Image.fromarray(DISC * np.float32(1)),
        palette(DISC, BLACK, RED),
        palette(DISC, WHITE, RED),
        palette(DISC, BLACK),
    ],
    ids=["grey", "bits", "rgb", "rgba", "uint16", "int32", "float", "palette", "on white", "unset palette"],
)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_label_maps_of_every_kind(tmp_path, image, suffix):
    if suffix == "png" and image.mode in ("I", "F"):
        pytest.skip("of TIFF")
    label = load_label(stored(tmp_path / f"x.{suffix}", image))
    np.testing.assert_array_equal(label.numpy(), DISC.T[None])


def test_label_values_above_255_and_of_few_bits(tmp_path):
    label = load_label(stored(tmp_path / "x.png", Image.fromarray(DISC * np.uint16(300))))
    assert set(np.unique(label.numpy())) == {0, 300}
    for bits, row, expected in ((2, 0b00011011, [0, 1, 2, 3]), (4, 0x0F, [0, 15])):
        (tmp_path / "y.png").write_bytes(png([[row], [row]], bits, 0))
        assert load_label(tmp_path / "y.png").numpy()[0, :, 0].tolist() == expected


BAD_LABELS = {
    "colours.png": (Image.fromarray(np.dstack([DISC * 255, DISC * 0, DISC * 0]).astype(np.uint8)), "holds colours"),
    "ramp.png": (Image.fromarray(np.tile(np.arange(52, dtype=np.uint8), (40, 1))), "holds 52 values"),
    "alpha.png": (Image.fromarray(np.dstack([DISC * 0 + 255] * 3 + [DISC * 255]).astype(np.uint8)), "is transparent"),
    "swapped.png": (palette(DISC, WHITE, BLACK), "shows the value 1 as black"),
    "same.png": (palette(DISC + 2 * np.roll(DISC, 9, 1), BLACK, RED, RED, WHITE), "in one colour"),
    "many.png": (Image.fromarray(np.resize(COLOURS, (40, 52, 3))).quantize(50), "colours: save label values"),
    "blurred.jpg": (Image.fromarray(DISC * np.uint8(2)).filter(ImageFilter.BLUR), "JPEG blurs label values"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_what_is_no_label_map(tmp_path, name):
    image, message = BAD_LABELS[name]
    with pytest.raises(InputError, match=message):
        load_label(stored(tmp_path / name, image))


def test_inverting_tables_are_no_labels_but_pictures(tmp_path):
    """ImageJ shows a mask of 255 as black then."""
    file = tiff(tmp_path / "x.tif", GREY, t262=0)
    assert (255 - GREY).tobytes() in file.read_bytes()
    np.testing.assert_array_equal(seen(file), GREY)
    with pytest.raises(InputError, match="inverting table"):
        load_label(file)


def coded(folder, *masks, stored_as="grey"):
    return coding_of([traits_of(folder / f"{i}.png", np.asarray(m)[None], stored_as) for i, m in enumerate(masks)])


def soft(mask, radius=1.5):
    return np.asarray(Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius)))


def jpeg(mask, quality):
    content = io.BytesIO()
    Image.fromarray(np.asarray(mask).astype(np.uint8)).save(content, "JPEG", quality=quality)
    return np.asarray(Image.open(content))


OTHER = np.roll(DISC, 5, 0)
RING = DISC & ~np.roll(DISC, 1, 0)


@pytest.mark.parametrize("radius", [0.6, 1.5, 3])
def test_soft_edges_are_cut(tmp_path, radius):
    masks = [soft(DISC, radius), soft(OTHER, radius), np.zeros_like(GREY)]
    coding = coded(tmp_path, *masks)
    assert coding.cut == 127.5 and "2 masks have soft edges" in coding.notes[0]
    for mask, truth in zip(masks, (DISC, OTHER, False)):
        wrong = coding.labels(mask, tmp_path) != truth
        assert wrong.mean() < 0.02  # the blur itself moves the edge where it is curved


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_jpeg_masks_are_cut(tmp_path, quality):
    coding = coded(tmp_path, jpeg(DISC * 255, quality), jpeg(OTHER * 255, quality), stored_as="lossy")
    assert (coding.labels(jpeg(DISC * 255, quality), tmp_path) != DISC).mean() < 0.01


@pytest.mark.parametrize(
    ("masks", "labels"),
    [
        ([DISC * 255, OTHER * 255, DISC * 0], {0, 1}),
        ([DISC * 65535, OTHER * 65535], {0, 1}),
        ([DISC * 255, OTHER * 1], {0, 1}),
        ([DISC * 256], {0, 256}),
        ([DISC * 128 + (DISC & OTHER) * 127], {0, 128, 255}),
        ([DISC + 3 * (DISC & OTHER)], {0, 1, 4}),
        ([DISC + 254 * RING], {0, 1, 255}),  # 255 as what VOC leaves out
        ([DISC * 85, DISC * 170, OTHER * 255], {0, 85, 170, 255}),
    ],
)
def test_values_that_are_clear(tmp_path, masks, labels):
    masks = [mask.astype(np.uint16) for mask in masks]
    coding = coded(tmp_path, *masks)
    assert {int(v) for mask in masks for v in np.unique(coding.labels(mask, tmp_path))} == labels


@pytest.mark.parametrize(
    ("masks", "kind", "message"),
    [
        ([DISC * 255, OTHER * 2], "grey", "a label must have the same value"),
        ([DISC * 255, OTHER * 254], "grey", "greatest value is 255, that of 1.png is 254"),
        ([DISC * 65535, OTHER * 65534], "grey", "a label must have the same value"),
        ([DISC * 255, OTHER * 128, OTHER * 1], "grey", "greatest value is 255, that of 2.png is 1"),
        ([soft(DISC), OTHER * 2], "grey", "a label must have the same value"),
        ([DISC * 255 - RING * 127], "grey", "labels or soft edges"),  # a border of its own, or a smoothed edge
        ([np.maximum(soft(DISC), soft(np.roll(DISC, 20, 1)) // 2)], "grey", "over whole areas"),
        ([jpeg(DISC * 128 + (DISC & OTHER) * 127, 90)], "lossy", "over whole areas"),
        ([jpeg(DISC * 2, 95)], "lossy", "JPEG blurs label values"),
        ([np.arange(2080).reshape(40, 52) // 52], "grey", "holds 40 values"),
    ],
)
def test_values_that_may_mean_several_things(tmp_path, masks, kind, message):
    with pytest.raises(InputError, match=message):
        coded(tmp_path, *(np.asarray(mask).astype(np.uint16) for mask in masks), stored_as=kind)


def test_a_mask_that_is_darker_than_the_others(tmp_path):
    spot = soft(np.hypot(*(np.indices(DISC.shape) - 20)) < 4, 4)
    coding = coded(tmp_path, soft(DISC), spot)
    with pytest.raises(InputError, match=f"holds {spot.max()} at most, other masks 255"):
        coding.labels(spot, tmp_path / "1.png")


def test_masks_that_may_be_inverted_get_a_word(tmp_path):
    assert "make sure that 0 is the background" in coded(tmp_path, ~DISC * 255, ~OTHER * 255).notes[0]
    assert not coded(tmp_path, DISC * 255, OTHER * 255, ~DISC * 0 + 255).notes


def test_masks_without_background_get_a_word(tmp_path):
    assert "no mask holds 0, the background, 0.png nothing below 1" in coded(tmp_path, DISC + 1, OTHER + 1).notes[0]
    assert not coded(tmp_path, DISC + 1, OTHER).notes


def test_numbers_of_objects_get_a_word(tmp_path):
    same = coded(tmp_path, *(np.arange(20).reshape(4, 5) % 5 for _ in range(3)), stored_as="label")
    assert "objects" not in str(same.notes)
    masks = [np.minimum(np.arange(20).reshape(4, 5), n) for n in (2, 4, 5)]
    assert "if they number objects" in coded(tmp_path, *masks, stored_as="label").notes[-1]
