"""Objectives of training: formulas against plain ones, what a set of masks is rewarded for, and what trainings meet."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.engines import Evaluator
from monai.metrics import compute_iou

from medsegdiff_monai import objective
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.handlers import BestModelSaver, EarlyStopping, WarmStart
from medsegdiff_monai.metrics import generalised_energy_distance
from medsegdiff_monai.networks import MedSegDiffUNet
from medsegdiff_monai.objective import (
    OBJECTIVES,
    DiffusionTrainingInferer,
    SegmentationDiffusionPrepareBatch,
    ensemble_score,
    loss_function,
    mask_loss,
    noise_loss,
    soft_jaccard_distance,
)
from medsegdiff_monai.schedulers import DDIMScheduler

from .conftest import CONFIGS, ROOT

SURE = 40.0  # a logit whose probability is 0 or 1


def masks(*shape: int, share: float = 0.4) -> torch.Tensor:
    return (torch.rand(shape) < share).float()


def logits_of(sets: torch.Tensor) -> torch.Tensor:
    """Logits (batch * K, classes, ...) of binary masks (batch, K, classes, ...)."""
    return (SURE * (2 * sets - 1)).flatten(0, 1)


@pytest.fixture
def score_alone(monkeypatch):
    """The kernel score without the losses of the mean."""
    monkeypatch.setattr(objective, "DICE_WEIGHT", 0.0)
    monkeypatch.setattr(objective, "BCE_WEIGHT", 0.0)


def test_the_distance_of_binary_masks_is_one_minus_iou():
    torch.manual_seed(0)
    a, b = masks(2, 3, 2, 40, 50), masks(2, 4, 2, 40, 50, share=0.6)
    d = soft_jaccard_distance(a, b)
    assert d.shape == (2, 2, 3, 4)
    for image, i, j in product(range(2), range(3), range(4)):
        iou = compute_iou(a[image, i][None], b[image, j][None])[0]
        torch.testing.assert_close(d[image, :, i, j], 1 - iou, atol=2e-3, rtol=0)  # the formula adds 1 to both sums
    nothing = torch.zeros(1, 2, 1, 4, 4)
    assert soft_jaccard_distance(nothing, nothing).abs().max() == 0
    torch.testing.assert_close(soft_jaccard_distance(b, a), d.mT)


def test_the_kernel_of_the_distance_is_positive_definite():
    """Which is what makes the energy score proper."""
    torch.manual_seed(0)
    soft = torch.rand(1, 40, 1, 5, 5, dtype=torch.float64) ** 4
    kernel = 1 - soft_jaccard_distance(soft, soft)[0, 0]
    assert torch.linalg.eigvalsh(kernel).min() > 0


def test_the_score_is_the_formula_written_out():
    torch.manual_seed(0)
    logits, raters = torch.randn(6, 2, 5, 5, dtype=torch.float64), masks(2, 4, 2, 5, 5).double()
    total = 0.0
    for image, k in product(range(2), range(2)):
        s, y = logits.reshape(2, 3, 2, 5, 5)[image, :, k].sigmoid(), raters[image, :, k]

        def d(a, b):
            return 1 - ((a * b).sum() + 1) / ((a * a).sum() + (b * b).sum() - (a * b).sum() + 1)

        across = sum(d(a, b) for a in s for b in y) / 12
        among = sum(d(a, b) for a, b in combinations(s, 2)) / 3
        m = s.mean(0)
        dice = sum(1 - (2 * (m * b).sum() + 1e-5) / (m.sum() + b.sum() + 1e-5) for b in y) / 4
        bce = -sum((b * m.log() + (1 - b) * (1 - m).log()).mean() for b in y) / 4
        total += (across - among / 2 + 0.5 * dice + 0.3 * bce) / 4
    assert float(ensemble_score(logits, raters)) == pytest.approx(float(total), abs=1e-5)


def test_the_score_is_half_the_energy_distance_up_to_what_the_raters_say_alone(score_alone):
    torch.manual_seed(0)
    raters = masks(1, 4, 1, 60, 60)
    spread = (1 - compute_iou(raters[0].repeat(4, 1, 1, 1), raters[0].repeat_interleave(4, 0))).mean()
    for share in (0.2, 0.5):
        members = masks(1, 5, 1, 60, 60, share=share)
        ged = generalised_energy_distance(members[0, :, 0] > 0, raters[0, :, 0] > 0)
        score = float(ensemble_score(logits_of(members), raters))
        assert 2 * score - float(spread) == pytest.approx(ged, abs=3e-3)


def test_its_expectation_is_least_for_members_drawn_as_the_raters_are(score_alone):
    """Two opinions, held by three raters and by one: of all shares with which members have the first, 3/4 is best."""
    grid = torch.arange(400.0).reshape(1, 20, 20)
    opinions = torch.stack([(grid < 100).float(), (grid < 250).float()])  # (2, classes, ...)
    raters = opinions[[0, 0, 0, 1]][None]
    score = {
        pair: float(ensemble_score(logits_of(opinions[list(pair)][None]), raters)) for pair in product((0, 1), (0, 1))
    }
    shares = [i / 20 for i in range(21)]
    expected = [
        sum(q ** pair.count(0) * (1 - q) ** pair.count(1) * value for pair, value in score.items()) for q in shares
    ]
    assert shares[min(range(21), key=expected.__getitem__)] == 0.75


def test_sure_logits_give_a_finite_score_and_gradient():
    raters = masks(1, 2, 1, 6, 6)
    logits = logits_of(1 - raters).requires_grad_()  # all wrong, and sure of it
    loss = ensemble_score(5 * logits, raters)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_losses_of_single_masks_are_their_formulas():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 2, 6, 6, dtype=torch.float64), masks(3, 2, 6, 6).double()
    p = torch.sigmoid(logits)
    dice = 1 - (2 * (p * target).sum((2, 3)) + 1e-5) / (p.sum((2, 3)) + target.sum((2, 3)) + 1e-5)
    bce = -(target * p.log() + (1 - target) * (1 - p).log())
    assert mask_loss(logits, target).item() == pytest.approx(float(dice.mean() + bce.mean()), abs=1e-5)
    assert noise_loss(logits, target).item() == pytest.approx(float(((logits - target) ** 2).mean()), abs=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_float32_whatever_the_networks_dtype(name):
    target = masks(2, 3, 1, 4, 4) if OBJECTIVES[name].of_sets else masks(4, 1, 4, 4)
    output = torch.randn(4, 1, 4, 4, dtype=torch.bfloat16)
    assert loss_function(name)(output, target).dtype == torch.float32


def prepared(name: str, batch: int = 64, raters: int = 3, **kwargs):
    scheduler = DDIMScheduler(prediction_type=OBJECTIVES[name].prediction_type)
    data = {"image": torch.rand(batch, 1, 4, 4), "label": masks(batch, raters, 2, 4, 4)}
    return scheduler, data, SegmentationDiffusionPrepareBatch(scheduler, name, **kwargs)(data, "cpu")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_is_prepared_for_its_objective(name):
    torch.manual_seed(0)
    scheduler, data, (mask, target, args, more) = prepared(name)
    members = 2 if name == "ensemble" else 1
    assert mask.shape == more["noise"].shape == (64 * members, 2, 4, 4) and args == ()
    assert torch.equal(more["condition"], data["image"])
    drawn = ((mask + 1) / 2).unflatten(0, (64, members))
    # each image is noised from the mask of one of its raters, whoever that is
    which = (drawn[:, :1] == data["label"]).flatten(2).all(2)
    assert which.any(1).all() and 0.15 < which.float().mean(0).min() < which.float().mean(0).max() < 0.55
    assert (drawn == drawn[:, :1]).all()
    expected = {
        "ensemble": data["label"],
        "mask": (mask + 1) / 2,
        "epsilon": more["noise"],
        "v_prediction": scheduler.get_velocity(mask, more["noise"], more["timesteps"]),
    }[name]
    torch.testing.assert_close(target, expected)
    # masks of an image are scored together, so they are at one timestep, each with noise of its own
    timesteps, guessed = (more[key].unflatten(0, (64, members)) for key in ("timesteps", "guessed"))
    assert (timesteps == timesteps[:, :1]).all() and (guessed == guessed[:, :1]).all()
    assert len(more["noise"].flatten(1).unique(dim=0)) == 64 * members


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shares_of_timesteps_and_of_own_guesses(name):
    torch.manual_seed(0)
    more = prepared(name, batch=5000)[2][3]
    last = more["timesteps"] == 999
    kind = OBJECTIVES[name]
    assert float(last.float().mean()) == pytest.approx(kind.last_share, abs=0.03)
    assert float(more["guessed"][~last].float().mean()) == pytest.approx(kind.own_guess, abs=0.05)
    assert not more["guessed"][last].any()  # of pure noise there is nothing to guess
    others = more["timesteps"][~last].float()
    assert others.mean() == pytest.approx(499, abs=25) and others.min() < 20 and others.max() > 978


def test_bad_objectives_are_refused():
    with pytest.raises(InputError, match="objective='dice' must be one of ensemble, mask, epsilon, v_prediction"):
        loss_function("dice")
    with pytest.raises(InputError, match="objective='ensemble' needs prediction_type='sample', not 'epsilon'"):
        SegmentationDiffusionPrepareBatch(DDIMScheduler(prediction_type="epsilon"), "ensemble")
    with pytest.raises(InputError, match="train_num_members=1 must be at least 2"):
        SegmentationDiffusionPrepareBatch(DDIMScheduler(), "ensemble", 1)


def test_masks_are_noised_from_what_the_network_makes_of_the_same_noise():
    """As a deterministic sampler has them: both noises of a member are one."""
    scheduler, seen = DDIMScheduler(), []

    def network(x, timesteps, context):
        seen.append((x, timesteps, context, torch.is_grad_enabled()))
        return 3 * x

    image, noise, mask = torch.randn(2, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.ones(4, 1, 8, 8)
    timesteps, guessed = torch.tensor([10, 10, 700, 700]), torch.tensor([False, False, True, True])
    more = {"noise": noise, "condition": image, "timesteps": timesteps}
    out = DiffusionTrainingInferer(scheduler)(mask, network, guessed=guessed, **more)
    (first, last, context, grad), (noised, _, whole, _) = seen
    assert torch.equal(first, noise[2:]) and last.tolist() == [999] and not grad
    assert torch.equal(context, image[1:]) and torch.equal(whole, image)  # an image once for all of its masks
    mask[2:] = torch.tanh(3 * noise[2:] / 2)
    torch.testing.assert_close(noised, scheduler.add_noise(mask, noise, timesteps))
    torch.testing.assert_close(out, 3 * noised)
    seen.clear()
    DiffusionTrainingInferer(scheduler)(mask, network, guessed=torch.zeros(4, dtype=torch.bool), **more)
    assert len(seen) == 1 and seen[0][3]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_training_pass_under_autocast(name):
    torch.manual_seed(0)
    kind = OBJECTIVES[name].prediction_type
    scheduler, _, (mask, target, _, more) = prepared(name, batch=2)
    net = MedSegDiffUNet(2, 1, 2, channels=[8, 8], num_res_blocks=1, ff_size=4, prediction_type=kind)
    for block in net.modules():  # what starts at zero lets no gradient through
        torch.nn.init.normal_(block.weight, std=0.1) if getattr(block, "weight", None) is not None else None
    more["guessed"] = torch.ones(len(mask), dtype=torch.bool)
    out = DiffusionTrainingInferer(scheduler, amp="true")(mask, net, **more)
    assert out.dtype == torch.bfloat16 and out.shape == mask.shape
    loss_function(name)(out, target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def two_opinions(name: str, iterations: int) -> torch.Tensor:
    """Train on one image of which raters see the left or the right half; returns 32 members at one pass each."""
    torch.manual_seed(0)
    left = torch.zeros(1, 1, 16, 16)
    left[..., :8] = 1
    raters = torch.stack([left, left.flip(-1)], 1).expand(4, -1, -1, -1, -1)
    scheduler = DDIMScheduler(schedule="cosine")
    # the noise of the whole image decides, which two levels alone would not see
    net = MedSegDiffUNet(2, 1, 1, channels=[8, 16, 16], num_res_blocks=1, ff_size=16)
    optimizer = torch.optim.AdamW(net.parameters(), 5e-3)
    prepare, infer = SegmentationDiffusionPrepareBatch(scheduler, name, 4), DiffusionTrainingInferer(scheduler)
    for _ in range(iterations):
        inputs, target, _, more = prepare({"image": torch.zeros(4, 1, 16, 16), "label": raters}, "cpu")
        optimizer.zero_grad()
        loss_function(name)(infer(inputs, net, **more), target).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return net.eval()(torch.randn(32, 1, 16, 16), torch.tensor([999]), torch.zeros(1, 1, 16, 16))


def test_members_are_opinions_and_not_their_mean():
    """With the score, some members see the left half and some the right; with Dice and BCE all see the same."""
    x0 = two_opinions("ensemble", 250)
    sides = torch.stack([x0[..., :8].mean((1, 2, 3)), x0[..., 8:].mean((1, 2, 3))], 1)
    sure = (sides[:, 0] - sides[:, 1]).abs() > 1.0
    assert sure.float().mean() > 0.5
    assert 6 <= int((sides[:, 0] > sides[:, 1]).sum()) <= 26
    same = two_opinions("mask", 100)
    assert (same - same.mean(0)).abs().mean() < 0.2 * (x0 - x0.mean(0)).abs().mean()


@pytest.mark.parametrize("epochs, sizes", [(4, [1, 1, 3, 3]), (5, [1, 1, 3, 3, 3]), (1, [3])])
def test_a_training_starts_with_single_masks(epochs, sizes):
    """In the first half of its epochs; what an epoch has depends on its number, so that a resumed run goes on."""
    prepare = SegmentationDiffusionPrepareBatch(DDIMScheduler(), "ensemble", 3)
    batch = {"image": torch.rand(2, 1, 4, 4), "label": masks(2, 4, 1, 4, 4)}
    seen = []
    trainer = Engine(lambda engine, _: seen.append(len(prepare(batch)[0]) // 2))
    WarmStart(prepare).attach(trainer)
    trainer.run([0], max_epochs=epochs)
    assert seen == sizes
    resumed = Engine(lambda engine, _: seen.append(len(prepare(batch)[0]) // 2))
    WarmStart(prepare).attach(resumed)
    resumed.load_state_dict({"epoch": epochs // 2, "max_epochs": epochs, "epoch_length": 1})
    seen.clear()
    resumed.run([0], max_epochs=epochs)
    assert seen == sizes[epochs // 2 :]


def test_a_training_that_goes_on_with_trained_weights_draws_sets_from_the_start():
    """As of MONAI Label, which loads weights by a handler of its own; new layers have no record of a training."""
    prepare = SegmentationDiffusionPrepareBatch(DDIMScheduler(), "ensemble", 3)
    for trained, numbers in ((False, [1, 1, 3, 3]), (True, [3, 3, 3, 3])):
        seen: list[int] = []
        trainer = Engine(lambda engine, _, seen=seen: seen.append(prepare.num_members))
        trainer.network = MedSegDiffUNet(2, 1, 1, channels=[2, 2], num_res_blocks=1, ff_size=4)
        source = MedSegDiffUNet(2, 1, 1, channels=[2, 2], num_res_blocks=1, ff_size=4)
        if trained:
            source.record.set_names(["nodule"])
        WarmStart(prepare).attach(trainer)
        trainer.add_event_handler(
            Events.STARTED, lambda engine, source=source: engine.network.load_state_dict(source.state_dict())
        )
        trainer.run([0], max_epochs=4)
        assert seen == numbers


def test_no_validation_of_single_masks_is_the_best_of_a_training(tmp_path):
    """However good its Dice is, later weights replace it; patience does not run out before sets of masks begin."""
    dice = [0.1, 0.9, 0.2, 0.3, 0.5, 0.4]
    network = torch.nn.Linear(1, 1)
    validator = Evaluator("cpu", [0], epoch_length=1)

    def validate(engine):
        state = validator.state
        state.epoch, score = engine.state.epoch, dice[engine.state.epoch - 1]
        if score > state.best_metric or state.best_metric_epoch == -1:
            state.best_metric, state.best_metric_epoch = score, engine.state.epoch

    written = []
    trainer = Engine(lambda engine, _: network.weight.data.fill_(engine.state.epoch))
    WarmStart(SegmentationDiffusionPrepareBatch(DDIMScheduler()), validator).attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    BestModelSaver(network, str(tmp_path / "model.pt"), validator).attach(trainer)
    EarlyStopping(validator, patience=1, val_interval=1).attach(trainer)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: written.append(int(torch.load(tmp_path / "model.pt")["weight"]))
    )
    trainer.run([0], max_epochs=6)
    assert written == [1, 2, 3, 4, 5, 5]
    assert validator.state.best_metric_epoch == 5


def test_a_set_of_one_is_trained_by_segmentation_losses_alone():
    logits, raters = torch.randn(2, 1, 5, 5), masks(2, 3, 1, 5, 5)
    bce = F.binary_cross_entropy_with_logits(logits, raters.mean(1))
    dice = [mask_loss(logits, y) - F.binary_cross_entropy_with_logits(logits, y) for y in raters.transpose(0, 1)]
    torch.testing.assert_close(ensemble_score(logits, raters), 0.3 * bce + 0.5 * torch.stack(dice).mean())


def test_the_shipped_training_starts_so_unless_it_goes_on_from_weights():
    for pretrained, number in ((None, 1), ("weights.pt", 0)):
        parser = ConfigParser()
        parser.read_config(str(CONFIGS / "train.json"))
        parser.update({"bundle_root": str(ROOT / "bundle"), "pretrained": pretrained})
        parser["validate#evaluator"] = None  # there is no data here
        handlers = [h for h in parser["train#handlers"] if h["_target_"].endswith("WarmStart")]
        found = [parser.get_parsed_content(f"train#handlers#{parser['train#handlers'].index(h)}") for h in handlers]
        assert sum(isinstance(h, WarmStart) for h in found) == number
        if number:
            assert found[0].prepare_batch is parser.get_parsed_content("train#trainer#prepare_batch")
