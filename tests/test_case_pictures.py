"""Pictures of cases: where a mask is wrong, and in which colour."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from medsegdiff_monai.handlers import ValidationPictures
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
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    seen = {"panels": {}, "legend": {}, "title": ""}
    shown, title = Axes.imshow, Axes.set_title

    def imshow(axis, image, **more):
        axis._shown = image
        return shown(axis, image, **more)

    def set_title(axis, text):
        seen["panels"][text] = axis._shown
        return title(axis, text)

    def legend(figure, handles, **more):
        seen["legend"] = {patch.get_label(): tuple(patch.get_facecolor()[:3]) for patch in handles}

    monkeypatch.setattr(Axes, "imshow", imshow)
    monkeypatch.setattr(Axes, "set_title", set_title)
    monkeypatch.setattr(Figure, "legend", legend)
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text, **more: seen.update(title=text))
    return seen


def picture(names, mask, label):
    none = np.zeros((1, 6, 5))
    maps = [x.numpy().astype(np.uint8) for x in (mask, label)]
    return overlay_bytes(none, maps[0], none, maps[1], np.eye(4), names, "case", None, error_map(mask, label))


def test_each_kind_of_error_has_its_colour_in_picture_and_legend(drawn):
    found, wanted = torch.zeros(1, 6, 5, dtype=torch.uint8), torch.zeros(1, 6, 5)
    found[0, 1, 2], wanted[0, 4, 3], found[0, 2, 2], wanted[0, 2, 2] = 1, 1, 1, 1
    picture({1: "disc"}, found, wanted)
    panel = drawn["panels"]["errors"]  # (rows, columns, 3), of a black image
    legend = drawn["legend"]
    assert list(legend) == ["disc", "false positive", "false negative"]
    assert np.allclose(panel[2, 1], 0.55 * np.array(legend["false positive"]))
    assert np.allclose(panel[3, 4], 0.55 * np.array(legend["false negative"]))
    assert np.count_nonzero(panel.any(-1)) == 2 and len({*legend.values()}) == 3
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
