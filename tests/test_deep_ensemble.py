"""Several weights that share the members of one ensemble."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medsegdiff_monai import MedSegDiff
from medsegdiff_monai.configs import read_config
from medsegdiff_monai.data import DataSpec, inference_items
from medsegdiff_monai.deep_ensemble import DeepEnsemble, DeepEnsembleInferer, load_checkpoints, network_for
from medsegdiff_monai.ensembles import EnsembleInferer, Flips
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.export import export_segmenter
from medsegdiff_monai.inferers import DiffusionEnsembleInferer
from medsegdiff_monai.networks import MedSegDiffUNet
from medsegdiff_monai.schedulers import DDIMScheduler, DDPMScheduler

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY

SETTINGS = {"num_classes": 2, "roi_size": (16, 16), "num_steps": 2}
IMAGES = {"whole": (2, 1, 16, 16), "windows": (1, 1, 24, 20)}


def make_network(seed: int) -> MedSegDiffUNet:
    """A network whose output depends on all of its weights."""
    torch.manual_seed(seed)
    network = MedSegDiffUNet(2, 1, 2, channels=[8, 8], num_res_blocks=1, ff_size=16)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def make_ensemble(number: int) -> DeepEnsemble:
    ensemble = DeepEnsemble(make_network(0), number)
    for seed, network in enumerate(ensemble.networks):
        network.load_state_dict(make_network(seed).state_dict())
    return ensemble


def members(inferer: DiffusionEnsembleInferer, image: torch.Tensor, network: torch.nn.Module) -> torch.Tensor:
    """(batch, members, classes, *spatial)."""
    with torch.no_grad():
        return inferer(image, network).unflatten(1, (-1, 2))


@pytest.mark.parametrize("shape", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("number, batch", [(2, None), (2, 1), (3, 2), (5, None)])
def test_member_i_is_that_of_network_i_modulo_their_number(number, batch, shape):
    image, ensemble, scheduler = torch.rand(shape), make_ensemble(number), DDIMScheduler(schedule="cosine")
    found = members(DeepEnsembleInferer(scheduler, member_batch_size=batch, **SETTINGS), image, ensemble)
    assert found.shape[1] == 5
    alone = [members(DiffusionEnsembleInferer(scheduler, **SETTINGS), image, one) for one in ensemble.networks]
    for i in range(5):
        torch.testing.assert_close(found[:, i], alone[i % number][:, i])
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


@pytest.mark.parametrize("number, batch", [(2, None), (3, 4), (4, None), (4, 1), (8, None)])
def test_each_network_sees_both_views(number, batch):
    ensemble, settings = make_ensemble(number), {**SETTINGS, "num_members": 4 * number, "member_batch_size": batch}
    image, scheduler = torch.rand(IMAGES["whole"]), DDIMScheduler(schedule="cosine")
    inferer = DeepEnsembleInferer(scheduler, flip_axes=[1], **settings)
    found = members(inferer, image, ensemble)
    for k, one in enumerate(ensemble.networks):
        plain, mirrored = (DiffusionEnsembleInferer(scheduler, flip_axes=[], **settings) for _ in range(2))
        mirrored.noise = lambda *args, noise=plain.noise: noise(*args).flip(-1)
        views = [members(plain, image, one), members(mirrored, image.flip(-1), one).flip(-1)]
        seen = [
            [torch.allclose(found[:, i], view[:, i], atol=1e-5) for view in views] for i in range(k, 4 * number, number)
        ]
        assert sorted(seen) == [[False, True]] * 2 + [[True, False]] * 2


def test_samplers_that_draw_noise_at_every_step_draw_that_of_the_member():
    image, ensemble, scheduler = torch.rand(1, 1, 16, 16), make_ensemble(2), DDPMScheduler(schedule="cosine")
    found = members(DeepEnsembleInferer(scheduler, **SETTINGS), image, ensemble)
    alone = [members(DiffusionEnsembleInferer(scheduler, **SETTINGS), image, one) for one in ensemble.networks]
    for i in range(5):
        torch.testing.assert_close(found[:, i], alone[i % 2][:, i])


def test_one_network_is_sampled_bit_for_bit_as_ever():
    image, network, scheduler = torch.rand(1, 1, 24, 20), make_network(3), DDIMScheduler(schedule="cosine")
    assert network_for(network, "a.pt") is network and network_for(network, ["a.pt"]) is network
    both = [kind(scheduler, **SETTINGS)(image, network) for kind in (DeepEnsembleInferer, DiffusionEnsembleInferer)]
    assert torch.equal(*both)


def test_members_are_as_many_passes_as_those_of_one_network():
    passes = []
    inferer = DeepEnsembleInferer(DDIMScheduler(), progress=passes.append, **SETTINGS)
    inferer(torch.rand(1, 1, 16, 16), make_ensemble(2))
    assert sum(passes) == 5 * 2


def test_an_early_stop_has_asked_each_of_two_networks():
    inferer = DeepEnsembleInferer(DDIMScheduler(), agreement_threshold=1e-6, **SETTINGS)
    image, ensemble = torch.rand(1, 1, 16, 16), make_ensemble(2)
    found = members(inferer, image, ensemble)
    assert found.shape[1] == 2
    torch.testing.assert_close(found[:, 1], members(inferer, image, ensemble.networks[1])[:, 1])


def test_fewer_members_than_weights_and_other_inferers_are_refused():
    ensemble = make_ensemble(3)
    few = DeepEnsembleInferer(DDIMScheduler(), **{**SETTINGS, "num_members": 2})
    with pytest.raises(InputError, match="num_members=2 is fewer than the 3 files of weights"):
        few(torch.rand(1, 1, 16, 16), ensemble)
    with pytest.raises(InputError, match="3 files of weights, which this inferer does not share"):
        EnsembleInferer(Flips([0]), (16, 16))(torch.rand(1, 1, 16, 16), ensemble)


# --- files


def write_weights(folder: Path, number: int) -> list[str]:
    """Weights whose trainings learnt something, each another thing."""
    files = []
    for seed in range(number):
        network = make_network(seed)
        network.record.reliability.copy_(torch.linspace(0, 1 / (seed + 1), 129).expand(2, -1))
        network.record.grading.copy_(torch.tensor([[1.0 + seed, -seed, 0.5]] * 2))
        network.record.extent.copy_(torch.tensor([[10.0 + seed] * 2, [20.0 + seed] * 2]))
        network.record.flipped.copy_(torch.tensor([1.0, seed]))
        network.record.set_names(["disc", "cup"])
        files.append(str(folder / f"{seed}.pt"))
        torch.save(network.state_dict(), files[-1])
    return files


def test_records_are_put_together(tmp_path):
    files = write_weights(tmp_path, 2)
    ensemble = network_for(make_network(9), files)
    load_checkpoints(files, ensemble)
    for seed, network in enumerate(ensemble.networks):
        torch.testing.assert_close(network.mask_stem.weight, make_network(seed).mask_stem.weight)
    record = ensemble.record
    torch.testing.assert_close(record.reliability, torch.linspace(0, 0.75, 129).expand(2, -1))
    assert record.grading.tolist() == [[1.5, -0.5, 0.0]] * 2  # no interval: nobody measured this ensemble
    assert record.flip_axes() == [0]
    assert record.extent.tolist() == [[10.0, 10.0], [21.0, 21.0]] and record.names() == ["disc", "cup"]


def test_what_one_training_does_not_know_is_not_known(tmp_path):
    files = [*write_weights(tmp_path, 1), str(tmp_path / "plain.pt")]
    torch.save(make_network(1).state_dict(), files[1])
    ensemble = network_for(make_network(9), files)
    load_checkpoints(files, ensemble)
    assert not ensemble.record.reliability.any() and not ensemble.record.grading.any()
    assert ensemble.record.extent[0].tolist() == [10.0, 10.0] and ensemble.record.names() == ["disc", "cup"]


def test_weights_of_other_classes_or_another_architecture_are_refused(tmp_path):
    files = write_weights(tmp_path, 2)
    other = make_network(1)
    other.record.set_names(["cup", "disc"])
    torch.save(other.state_dict(), files[1])
    with pytest.raises(InputError, match=r"1\.pt: has the classes cup, disc, but .*0\.pt has disc, cup"):
        load_checkpoints(files, network_for(make_network(9), files))
    torch.save(MedSegDiffUNet(2, 1, 2, channels=[8, 16], ff_size=16).state_dict(), files[1])
    with pytest.raises(InputError, match=r"1\.pt: weights of another architecture"):
        load_checkpoints(files, network_for(make_network(9), files))


CONFIG = {**PICTURE_SETTINGS, "channels": TINY["channels"], "bundle_root": str(ROOT / "bundle"), "device": "cpu"}


@pytest.mark.parametrize("given", [["a.pt", "b.pt"], "['a.pt', 'b.pt']"], ids=str)
def test_a_list_of_weights_is_read_from_text_too(given):
    parser = read_config(CONFIGS / "inference.json", **CONFIG, checkpoint=given)
    assert parser.get_parsed_content("checkpoint") == ["a.pt", "b.pt"]
    assert len(parser.get_parsed_content("network").networks) == 2


def test_a_file_whose_name_is_in_brackets_is_one(tmp_path, monkeypatch):
    (tmp_path / "[a]").touch()
    monkeypatch.chdir(tmp_path)
    assert read_config(CONFIGS / "inference.json", **CONFIG, checkpoint="[a]")["checkpoint"] == "[a]"


WRONG = {
    "num_members=1 is fewer than the 2 files of weights": {"checkpoint": ["a.pt", "b.pt"], "num_members": 1},
    "checkpoint names a.pt twice": {"checkpoint": ["a.pt", "a.pt"]},
    "must be a path, or a list, each a path": {"checkpoint": []},
}


@pytest.mark.parametrize("config", ["evaluate", "inference"])
@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_one_line(message, config):
    with pytest.raises(InputError, match=message) as error:
        read_config(CONFIGS / f"{config}.json", **CONFIG, **WRONG[message])
    assert "\n" not in str(error.value)


def test_export_takes_one_network(tmp_path):
    with pytest.raises(InputError, match="export takes one network"):
        export_segmenter(str(tmp_path / "a.ts"), str(CONFIGS / "inference.json"), **CONFIG, checkpoint=["a", "b"])


def test_finished_cases_are_those_of_all_weights(tmp_path, pictures, bundle):
    """Inference by two weights, anew where either changes; scores by the same; the same in Python."""
    files = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = read_config(CONFIGS / "inference.json", **CONFIG).get_parsed_content("network_def")
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        files.append(str(tmp_path / f"{seed}.pt"))
        torch.save(network.state_dict(), files[-1])
    settings = {**PICTURE_SETTINGS, "dataset_dir": pictures, "num_members": 3}
    out = bundle("inference", checkpoint=files, outputs=["seg", "members"], **settings)
    (line,) = map(json.loads, (out / "cases.jsonl").read_text().splitlines())
    assert len(line["settings"]["checkpoint"]) == 2 and line["row"]["members"] == 3
    where = str(pictures), DataSpec(2, 3, 1), str(out)
    same = {"outputs": ["seg"], "settings": line["settings"]}
    assert not inference_items(*where, files, **same)
    assert all(inference_items(*where, other, **same) for other in (files[0], [files[1], files[0]]))
    torch.save(network.state_dict(), files[0])
    assert inference_items(*where, files, **same)
    one = MedSegDiff.from_bundle(ROOT / "bundle", checkpoint=files[:1], **{**CONFIG, "num_members": 3})
    both = MedSegDiff.from_bundle(ROOT / "bundle", checkpoint=files, **{**CONFIG, "num_members": 3})
    image = pictures / "image_4.png"
    assert np.array_equal(both.segment(image).members[0], one.segment(image).members[0])
    assert bundle("evaluate", checkpoint=files, **settings).joinpath("report.html").is_file()
