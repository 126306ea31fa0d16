"""Several masks of an image: scores, peers, and what the page of ambiguity says."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from benchmarks import ambiguity, ambiguity_page, lidc, peers, ssn
from medsegdiff_monai.objective import mask_loss

from .conftest import CONFIGS, write_json
from .test_benchmarks import call, one_thread  # noqa: F401


def make_lidc(folder, side=24):
    """Bright squares, which two of four raters outline, one of them larger; the first case has the outline of one."""
    (root := folder / "LIDC4").mkdir(parents=True)
    random, lists = np.random.default_rng(0), {}
    for split, cases in {"training": 20, "validation": 4, "test": 6}.items():
        lists[split] = []
        for i in range(cases):
            row, column = random.integers(8, 12, 2)
            masks = np.zeros((4, side, side), np.uint8)
            masks[0, row : row + 5, column : column + 5] = 1
            if i:
                masks[1, row - 1 : row + 6, column - 1 : column + 6] = 1
            image = (150 * masks[0] + random.integers(0, 50, (side, side))).astype(np.uint8)
            files = {f"{split}_{i}_{k}.png": array for k, array in enumerate([image, *masks])}
            for name, array in files.items():
                Image.fromarray(array).save(root / name)
            first, *others = files
            lists[split].append({"image": first, "labels": others, "patient": f"{split} {i // 2}"})
    write_json(root, **lists)
    return folder


def test_ambiguity_scores_each_method_and_writes_it_down(tmp_path, monkeypatch):
    make_lidc(tmp_path)
    monkeypatch.setattr(ambiguity, "SETTINGS", {**ambiguity.SETTINGS, "channels": [8, 8], "batch_size": 4})
    file, page, picture = (tmp_path / name for name in ("r.jsonl", "page.md", "f.png"))
    arguments = ["--data_root", tmp_path, "--size", 16, "--seconds", 0.3, "--seeds", 0, 1, "--steps", 1, 2]
    arguments += ["--work_dir", tmp_path / "work", "--results", file, "--page", page, "--figure", picture]
    call(monkeypatch, ambiguity, *arguments)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    runs = {(row["method"], row["seed"]): row for row in rows if row["seconds"]}
    assert runs.keys() == {(method, seed) for method in [*ambiguity.METHODS, "ours, 2 steps"] for seed in (0, 1)}
    assert len(runs) + len(ambiguity.BOUNDS) == len(rows)
    passes = {"ours": 16, "ours, 2 steps": 32, "MONAI UNet": 1, "five UNets": 5, "UNet, MC dropout": 16, "SSN": 1}
    members = {"ours": 16, "ours, 2 steps": 16, "MONAI UNet": 1, "five UNets": 5, "UNet, MC dropout": 16, "SSN": 16}
    for name in passes:
        row = runs[name, 0]
        assert (row["passes"], row["members"], row["cases"]) == (passes[name], members[name], 6)
        assert row["iterations"] >= 1 and 0 <= row["brier"] < 1 and 0 <= row["ece_band"] < 1 and row["ged"] > -0.1
    assert runs["five UNets", 0]["parameters_m"] == pytest.approx(5 * runs["MONAI UNet", 0]["parameters_m"], abs=1e-3)
    assert runs["MONAI UNet", 0]["pairwise"] == 0 < runs["SSN", 0]["pairwise"]
    assert runs["ours", 0]["ged"] != runs["ours", 1]["ged"]

    text = page.read_text("utf-8")
    scored = next(line for line in text.splitlines() if line.startswith("| SSN")).split(" | ")
    assert scored[1].split(" ± ")[0] == f"{sum(runs['SSN', seed]['ged'] for seed in (0, 1)) / 2:.3f}"
    assert "GED16 ↓" in text and "16×16, 0.3 s: 6 slices (test)" in text and "CC BY 3.0" in text and "(f.png)" in text
    difference = sum((runs["ours", seed]["ged"] - runs["SSN", seed]["ged"]) / 2 for seed in (0, 1))
    told = [line.split() for line in text.splitlines() if line.startswith("| SSN")]
    assert float(told[-1][3]) == pytest.approx(difference, abs=6e-4) and len(told) == 3
    assert text.count("| bound: perfect majority mask |") == 1 and picture.read_bytes().startswith(b"\x89PNG")

    # what is there is not repeated; what is taken out is scored again from the weights, as it was
    again = "\n".join(json.dumps(row) for row in rows if row["method"] != "ours, 2 steps" or row["seed"]) + "\n"
    file.write_text(again)
    monkeypatch.setattr(peers.Training, "until", lambda *_: pytest.fail("trained again"))
    call(monkeypatch, ambiguity, *arguments)
    assert file.read_text().startswith(again)
    last, before = json.loads(file.read_text().splitlines()[-1]), runs["ours, 2 steps", 0]
    assert {**last, "seconds_per_image": 0} == {**before, "seconds_per_image": 0}
    with pytest.raises(SystemExit, match="smaller than --size 32"):
        call(monkeypatch, ambiguity, "--data_root", tmp_path, "--size", 32)
    with pytest.raises(SystemExit, match="has no tset"):
        call(monkeypatch, ambiguity, "--data_root", tmp_path, "--size", 16, "--split", "tset")
    with pytest.raises(SystemExit, match=r"dataset\.json: is not there"):
        call(monkeypatch, ambiguity, "--data_root", tmp_path / "nowhere", "--size", 16)


def test_crops_are_augmented_with_their_raters(tmp_path):
    crops = lidc.load(make_lidc(tmp_path), "training", 16)
    assert crops.images.shape == (20, 1, 16, 16) and crops.raters.shape == (20, 4, 16, 16)
    torch.testing.assert_close(crops.images.mean((1, 2, 3)), torch.zeros(20), atol=1e-5, rtol=0)
    assert crops.raters.any((2, 3))[0].tolist() == [True, False, False, False]
    crops.images = crops.raters[:, :1].float() + torch.arange(20).view(20, 1, 1, 1) * 10  # tells its number
    batches = lidc.Batches(crops, 6, seed=0)
    seen, turned = [], 0
    for batch in [*batches, *batches]:
        assert batch["image"].shape == (6, 1, 16, 16) and batch["label"].shape == (6, 4, 1, 16, 16)
        for image, raters in zip(batch["image"], batch["label"]):
            inside, outside = image[raters[0] > 0], image[raters[0] == 0]
            assert inside.max() - inside.min() < 1e-3 > outside.max() - outside.min()  # the mask went the same way
            number = int((outside[0] / 10).round())
            seen.append(number)
            turned += not torch.equal(raters[1, 0] > 0, crops.raters[number, 1])
    assert turned > 0
    one = next(iter(lidc.Batches(crops, 6, seed=3)))
    assert torch.equal(one["image"], next(iter(lidc.Batches(crops, 6, seed=3)))["image"])
    assert not torch.equal(one["image"], next(iter(lidc.Batches(crops, 6, seed=4)))["image"])


def test_each_pass_over_the_crops_has_each_of_them_once():
    numbers = torch.arange(8.0)
    raters = torch.zeros(8, 4, 4, 4, dtype=torch.bool)
    crops = lidc.Crops(numbers.view(8, 1, 1, 1).expand(8, 1, 4, 4), raters, ["a"] * 8)
    batches = lidc.Batches(crops, 2, seed=0)
    batches.augment = lambda batch: batch
    orders = [torch.cat([batch["image"][:, 0, 0, 0] for batch in batches]) for _ in range(2)]
    assert all(torch.equal(order.sort()[0], numbers) for order in orders) and not torch.equal(*orders)


def test_scores_of_a_slice():
    raters = torch.zeros(4, 16, 16, dtype=torch.bool)
    raters[:2, 4:8, 4:8] = True
    perfect, band = ambiguity.score(raters.float(), raters, 1)
    assert perfect["ged"] == pytest.approx(2 / 4 * 2 - 8 / 12 - 2 / 4)  # half of all pairs are at distance 1
    assert perfect["matched_iou"] == perfect["best_iou"] == 1 and perfect["ncc"] == pytest.approx(1)
    assert perfect["pairwise"] == pytest.approx(8 / 12) and perfect["brier"] == pytest.approx(0.25 * 16 / 256)
    assert perfect["dice"] == 0  # a mean of one half is not above it, but two of four are enough for the consensus
    assert band.shape[0] == 2 and torch.equal(*band) and 16 < band.shape[1] < 256

    pairs, _ = ambiguity.score(raters.float(), raters, 2)  # those within a pair are equal here, and do not count
    assert pairs["pairwise"] == 1 and pairs["ged"] == pytest.approx(1 - 1 - 2 / 4)

    single, _ = ambiguity.score(raters[:1].float(), raters, 1)
    assert single["pairwise"] == 0 and single["dice"] == 1 and single["ged"] == pytest.approx(2 / 2 - 1 / 2)
    assert single["brier"] == pytest.approx(0.5 * 16 / 256)
    nothing, near = ambiguity.score(torch.zeros(1, 16, 16), raters[3:].expand(4, -1, -1), 1)
    assert nothing["dice"] == 1 and near.shape == (2, 0)


def test_slices_of_the_picture_are_torn_ones_at_even_distances():
    marked = torch.tensor([4, 2, 0, 3, 1, 2, 2, 3, 3, 2, 4])
    raters = (torch.arange(4) < marked[:, None])[:, :, None, None].expand(-1, -1, 2, 2)
    assert ambiguity_page.chosen(raters) == [1, 5, 7, 9]  # of 1, 3, 5, 6, 7, 8, 9
    assert ambiguity_page.chosen(raters[:4]) == [1, 3]


def test_loss_of_the_unet_is_the_mean_over_raters():
    logits, raters = torch.randn(3, 2, 8, 8), (torch.rand(3, 4, 2, 8, 8) > 0.5).float()
    expected = sum(mask_loss(logits, raters[:, i]) for i in range(4)) / 4
    torch.testing.assert_close(peers.each_rater(logits, raters), expected)
    assert all((one == raters[i]).flatten(1).all(1).any() for i, one in enumerate(peers.one_rater(raters)))


def test_stochastic_segmentation_network_draws_from_its_gaussian():
    torch.manual_seed(0)
    net = ssn.StochasticSegmentationNetwork(torch.nn.Conv2d(1, ssn.FEATURES, 1), 2, 2)
    image, seen = torch.randn(1, 1, 2, 2), {}
    for name in ("mean", "log_variance", "factor"):
        getattr(net, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        drawn = net(image, 40000)
    assert drawn.shape == (1, 40000, 2, 2, 2)
    factor, diagonal = seen["factor"].view(ssn.RANK, -1), seen["log_variance"].exp().flatten() + ssn.EPS
    torch.testing.assert_close(drawn[0].mean(0), seen["mean"][0], atol=0.05, rtol=0)
    torch.testing.assert_close(drawn[0].flatten(1).T.cov(), factor.T @ factor + diagonal.diag(), atol=0.06, rtol=0.06)


def test_likelihood_of_the_stochastic_segmentation_network_by_its_definition():
    logits, raters = torch.randn(3, 5, 1, 4, 2), (torch.rand(3, 4, 1, 4, 2) > 0.5).float()
    p = torch.distributions.Bernoulli(logits=logits[:, :, None]).log_prob(raters[:, None]).sum((3, 4, 5)).exp()
    torch.testing.assert_close(ssn.log_likelihood_loss(logits, raters), -p.mean(1).log().mean() / 8)
    far = ssn.log_likelihood_loss(1e4 * logits, raters)  # no overflow
    assert far.isfinite()


def test_likelihood_is_in_single_precision_under_autocast():
    """Whatever type the features have: sums over all pixels need more digits than those of bfloat16."""
    torch.manual_seed(0)
    net = ssn.StochasticSegmentationNetwork(torch.nn.Identity(), 2, 1)
    features = torch.randn(2, ssn.FEATURES, 64, 64).bfloat16()
    raters = (torch.rand(2, 4, 1, 64, 64) > 0.5).float()

    def loss(given: torch.Tensor, amp: bool) -> torch.Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return ssn.log_likelihood_loss(net(given, 5), raters)

    torch.testing.assert_close(loss(features, True), loss(features.float(), False))
    logits = torch.randn(2, 5, 1, 64, 64).bfloat16()
    torch.testing.assert_close(ssn.log_likelihood_loss(logits, raters), ssn.log_likelihood_loss(logits.float(), raters))


@pytest.mark.parametrize("name", ["UNet, MC dropout", "SSN", "Probabilistic U-Net"])
def test_members_of_opponents_differ_and_are_those_of_their_image(name):
    if name not in ambiguity.METHODS:
        pytest.skip("needs lightning-uq-box")
    method = ambiguity.METHODS[name]
    torch.manual_seed(0)
    peer = method.build(ambiguity.configured(method, 16, 0, channels=[8, 8], num_members=3))
    images, raters = torch.randn(2, 1, 16, 16), (torch.rand(2, 4, 1, 16, 16) > 0.5).float()
    peer.loss(images, raters).backward()
    assert all(p.grad is not None for p in peer.module.parameters())
    with torch.no_grad():
        members = peer.segment(peer.module.eval(), images)
        assert members.shape == (2, 3, 16, 16) and 0 <= members.min() <= members.max() <= 1
        assert not torch.allclose(members[:, 0], members[:, 1])
        torch.manual_seed(1)
        batch = torch.stack([peer.segment(peer.module, images)[1].mean(0) for _ in range(200)]).mean(0)
        alone = torch.stack([peer.segment(peer.module, images[1:])[0].mean(0) for _ in range(200)]).mean(0)
    assert (batch - alone).abs().mean() < 0.03


def test_ambiguity_scores_the_weights_of_the_bundle_by_group(tmp_path, monkeypatch):
    """Slices that one radiologist marked, and slices that two did; together they are all."""
    make_lidc(tmp_path)
    configs = tmp_path / "bundle" / "configs"
    (configs / "datasets").mkdir(parents=True)
    shutil.copy(CONFIGS / "inference.json", configs)
    plain = json.loads((CONFIGS / "datasets" / "generic_2d.json").read_text())
    small = {"in_channels": 1, "num_classes": 1, "roi_size": [16, 16], "channels": [8, 8], "num_res_blocks": 1}
    overlay = {**plain, **small, "checkpoint": str(tmp_path / "lidc.pt")}
    (configs / "datasets" / "lidc.json").write_text(json.dumps(overlay))
    monkeypatch.setattr(ambiguity, "CONFIGS", configs)
    parser = ConfigParser()
    parser.read_config([str(configs / "inference.json"), str(configs / "datasets" / "lidc.json")])
    torch.save(parser.get_parsed_content("network_def").state_dict(), tmp_path / "lidc.pt")
    file, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    arguments = ["--data_root", tmp_path, "--results", file, "--page", page, "--figure", tmp_path / "none.png"]
    file.write_text(json.dumps({"method": "bound", "members": 16, "seconds": 0, "size": 16, "split": "test"}) + "\n")
    call(monkeypatch, ambiguity, *arguments, "--shipped", 9)
    row = json.loads(file.read_text().splitlines()[-1])
    groups = row["groups"]
    assert (row["method"], row["size"], row["cases"], row["members"]) == ("shipped", 16, 6, 16)
    assert groups["marked by 1"]["cases"] == 1 and groups["marked by 2"]["cases"] == 5
    assert groups["nodule below 50 pixels"]["cases"] == 6 and "200 pixels and more" not in groups
    weighed = (groups["marked by 1"]["ged"] + 5 * groups["marked by 2"]["ged"]) / 6
    assert weighed == pytest.approx(row["ged"], abs=1e-4)
    assert f"| marked by 2 | 5 | {groups['marked by 2']['ged']:.3f} |" in page.read_text("utf-8")
