"""Pictures of cases: where a mask is wrong, and in which colour."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from PIL import Image

from medsegdiff_monai.handlers import ValidationPictures
from medsegdiff_monai.panels import draw_panels
from medsegdiff_monai.pictures import ERRORS, error_map, overlay_bytes


def test_errors_are_too_much_too_little_or_another_class():
    found = torch.tensor([[[1, 1, 0, 0, 0, 1]], [[0, 0, 0, 1, 0, 0]]])
    wanted = torch.tensor([[[1, 0, 1, 1, 0, 1]], [[0, 0, 0, 0, 0, 0]]]).float()
    assert error_map(found, wanted).tolist() == [[[0, 1, 2, 3, 0, 0]]]
    unknown = wanted.clone()
    unknown[:, 0, :4] = torch.nan
    assert not error_map(found, unknown).any()


def test_nested_classes_are_each_right_or_wrong():
    disc, cup = torch.ones(1, 3), torch.tensor([[0, 1, 1]])
    label = torch.stack([disc, torch.tensor([[0.0, 0, 1]])])
    assert error_map(torch.stack([disc, cup]), label).tolist() == [[[0, 1, 0]]]


@pytest.fixture
def drawn(monkeypatch):
    """Panels by their titles, entries of the legend, and the title, of pictures that are made."""
    seen = {}

    def draw(rows, size, legend, title):
        seen.update(panels={name: panel for row in rows for name, panel in row.items()}, legend=legend, title=title)
        return draw_panels(rows, size, legend, title)

    monkeypatch.setattr("medsegdiff_monai.pictures.draw_panels", draw)
    return seen


def picture(names, mask, label):
    none = np.zeros((1, 6, 5))
    maps = [x.numpy().astype(np.uint8) for x in (mask, label)]
    return overlay_bytes(none, maps[0], none, maps[1], np.eye(4), names, "case", (), error_map(mask, label))


def test_each_kind_of_error_has_its_colour_in_picture_and_legend(drawn):
    found, wanted = torch.zeros(1, 6, 5, dtype=torch.uint8), torch.zeros(1, 6, 5)
    found[0, 1, 2], wanted[0, 4, 3], found[0, 2, 2], wanted[0, 2, 2] = 1, 1, 1, 1
    picture({1: "disc"}, found, wanted)
    panel = drawn["panels"]["errors"]  # (rows, columns, 3), of a black image
    legend = drawn["legend"]
    assert list(legend) == ["disc", "false positive", "false negative"]
    assert np.allclose(panel[2, 1], 0.55 * np.array(legend["false positive"]))
    assert np.allclose(panel[3, 4], 0.55 * np.array(legend["false negative"]))
    assert np.count_nonzero(panel.any(-1)) == 2 and len(set(map(tuple, legend.values()))) == 3
    picture({1: "disc", 2: "cup"}, found, wanted)
    assert list(drawn["legend"])[2:] == list(ERRORS)


def test_pictures_of_a_validation_say_the_dice_and_show_the_errors(drawn, tmp_path):
    mask, label = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    mask[0, :4], label[0, :3], label[:, 7] = 1, 1, torch.nan
    image = MetaTensor(torch.rand(1, 8, 8), meta={"filename_or_obj": "a.png"})
    output = {"mask": mask, "label": label, "pred": mask[:1].byte(), "uncertainty_entropy": mask[:1] / 2}
    output["member_masks"] = mask[None] > 0
    engine = Engine(lambda e, b: None)
    item = {"image": image, "source": image, "case": "a"}
    engine.state = SimpleNamespace(iteration=1, epoch_length=1, epoch=3, batch=[item], output=[output])
    ValidationPictures(str(tmp_path), 2, {"disc": [1], "cup": [2]})(engine)
    assert drawn["title"] == "a   epoch 3   Dice: disc 0.857, cup 1.000"
    assert "errors" in drawn["panels"] and {"false positive", "false negative"} < drawn["legend"].keys()
    assert (tmp_path / "validation" / "epoch_003" / "a.png").is_file()


def pixels(rows, size=(40, 30), legend=None, title="case"):
    return np.asarray(Image.open(io.BytesIO(draw_panels(rows, size, legend or {}, title))))


def count(picture, colour):
    return int((picture == colour).all(-1).sum())


def test_panels_are_enlarged_and_legend_and_colour_bar_are_drawn():
    colours = np.zeros((3, 4, 3))
    colours[1, 2] = (1, 0, 0)
    drawn = pixels([{"a": colours}], legend={"red": (1, 0, 0)})
    assert count(drawn, (255, 0, 0)) == 10 * 10 + 31 * 13  # a pixel of 40 x 30 for 4 x 3, and the legend's patch
    plain = pixels([{"a": colours}])
    assert count(plain, (255, 0, 0)) == 100 and plain.shape[0] < drawn.shape[0]
    scaled = pixels([{"a": np.zeros((3, 4))}])
    assert scaled.shape[1] > plain.shape[1] and (np.ptp(scaled, -1) > 50).any()  # the colour map


@pytest.mark.parametrize("title", ["$x_1$", "Größe Ωж", "a\nb", "x" * 300, "", "\udcff"])
def test_any_name_of_a_case_can_be_drawn(title):
    drawn = pixels([{"a": np.zeros((3, 4, 3))}, {"b": np.full((3, 4), np.nan)}], title=title)
    assert drawn.ndim == 3 and (not title or drawn[:30].min() < 128)


def test_many_classes_and_narrow_images_have_room():
    legend = {f"class number {i}": (0, 0, i / 50) for i in range(1, 50)}
    drawn = pixels([{"a": np.zeros((3, 4, 3)), "b": np.zeros((3, 4, 3))}], (2, 352), legend)
    assert drawn.shape[1] < 600 and all(count(drawn, (0, 0, round(255 * i / 50))) >= 31 * 13 for i in range(1, 50))
