"""What the four training loops tell their networks and optimisers."""
import itertools

import pytest

import finetune
import pretrain
import segment
import vqkd
from model import ViT
from support.optim import adamw, cosine_schedule, set_lr

STAGES = dict(vqkd=vqkd, pretrain=pretrain, finetune=finetune, segment=segment)
FLAGS = dict(            # unusual values, so that a default would show
    vqkd="--lr 3e-2 --min-lr 1e-3 --beta2 0.9 --weight-decay 0.3 --continuous-steps 1 --codes 16 "
         "--warmup-epochs 2 --epochs 3",
    pretrain="--lr 3e-3 --min-lr 1e-4 --beta2 0.9 --weight-decay 0.3 --drop-path 0.3 "
             "--warmup-epochs 2 --epochs 3",
    finetune="--lr 3e-3 --min-lr 1e-4 --weight-decay 0.3 --layer-decay 0.5 --drop-path 0.3 "
             "--evaluations 3 --warmup-epochs 2 --mixup 0.5 --cutmix 0.25 --smoothing 0.2 "
             "--epochs 3",
    segment="--lr 3e-3 --warmup-steps 4 --weight-decay 0.3 --layer-decay 0.5 --drop-path 0.3 "
            "--evaluations 3 --steps 6")
SHARED = "--limit 16 --batch-size 8 --workers 0 --amp no --device cpu"


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """All four loops, one after the other, three epochs of two steps each.

    -> by stage what the loop told the optimiser (groups, betas, rates), how it mixed, and for each
    batch: tokenizer?, training?, drop path, smallest and largest pixel.
    """
    out = tmp_path_factory.mktemp("loops")
    told = {}
    embed_images, mix_images = ViT.embed, finetune.mix

    def watched_adamw(groups, betas, device):
        told[stage].update(groups=groups, betas=betas)
        return adamw(groups, betas, device)

    def watched_set_lr(optimizer, lr):
        told[stage]["rates"].append(lr)
        left = [p for group in optimizer.param_groups for p in group["params"]
                if p.grad is not None]
        told[stage]["left"].append(len(left))
        set_lr(optimizer, lr)

    def watched_embed(model, x, mask=None):
        if x.shape[1] == 3:                  # not the tokenizer's decoder, which sees codes
            told[stage]["batches"].append((
                model.positions == "absolute", model.training, model.blocks[-1].drop_path,
                x.min().item(), x.max().item()))
        return embed_images(model, x, mask)

    def watched_mix(images, labels, classes, *how):
        told[stage]["mixed"] = how
        return mix_images(images, labels, classes, *how)

    with pytest.MonkeyPatch.context() as patch:
        for module in STAGES.values():
            patch.setattr(module, "adamw", watched_adamw)
            patch.setattr(module, "set_lr", watched_set_lr)
        patch.setattr(ViT, "embed", watched_embed)
        patch.setattr(finetune, "mix", watched_mix)
        for stage, module in STAGES.items():
            told[stage] = dict(rates=[], left=[], batches=[])
            module.main([*FLAGS[stage].split(), *SHARED.split(), "--out", str(out)])
    return told


@pytest.mark.parametrize("stage, peak, final", [
    ("vqkd", 3e-2 * 8 / 128, 1e-3), ("pretrain", 3e-3, 1e-4), ("finetune", 3e-3, 1e-4)])
def test_every_loop_follows_the_cosine_schedule_of_its_flags(loops, stage, peak, final):
    rates = [cosine_schedule(step, peak, final, total=6, warmup=4) for step in range(6)]
    assert loops[stage]["rates"] == pytest.approx(rates)


@pytest.mark.parametrize("stage", STAGES)
def test_an_update_begins_without_the_gradients_of_the_one_before(loops, stage):
    assert loops[stage]["left"] == [0] * 6


def test_segmentation_follows_the_poly_schedule_of_its_flags(loops):
    rates = [segment.poly_schedule(step, 3e-3, 6, 4) for step in range(6)]
    assert loops["segment"]["rates"] == pytest.approx(rates)


@pytest.mark.parametrize("stage, betas, layer_decay", [
    ("vqkd", (0.9, 0.9), False), ("pretrain", (0.9, 0.9), False),
    ("finetune", (0.9, 0.999), True), ("segment", (0.9, 0.999), True)])
def test_every_loop_tells_the_optimiser_what_the_flags_say(loops, stage, betas, layer_decay):
    told = loops[stage]
    assert told["betas"] == betas
    assert {group["weight_decay"] for group in told["groups"]} == {0.0, 0.3}
    scales = {0.5 ** i for i in range(8)} if layer_decay else {1.0}          # tiny has six blocks
    assert {group["lr_scale"] for group in told["groups"]} == scales


def test_fine_tuning_mixes_and_smooths_as_its_flags_say(loops):
    assert loops["finetune"]["mixed"] == (0.5, 0.25, 0.2)


@pytest.mark.parametrize("stage", STAGES)
def test_every_loop_trains_in_training_mode_with_drop_path_and_evaluates_without(loops, stage):
    own = [(training, rate) for tokenizer, training, rate, *_ in loops[stage]["batches"]
           if tokenizer == (stage == "vqkd")]
    modes = [mode for mode, _ in itertools.groupby(training for training, _ in own)]
    assert modes == [True, False] * 3
    once_more = stage == "vqkd"              # for the first codes
    assert sum(training for training, _ in own) == 6 + once_more
    assert all(rate == pytest.approx(0 if stage == "vqkd" else 0.3) for _, rate in own)


def test_the_tokenizer_stays_in_evaluation_mode_while_the_backbone_trains(loops):
    modes = [training for tokenizer, training, *_ in loops["pretrain"]["batches"] if tokenizer]
    assert modes
    assert not any(modes)


@pytest.mark.parametrize("stage", STAGES)
def test_every_network_gets_its_own_pixels_in_training_and_in_evaluation(loops, stage):
    for tokenizer, *_, low, high in loops[stage]["batches"]:
        if tokenizer:
            assert -1 <= low < -0.5
            assert 0.5 < high <= 1
        else:                                # black is -2.1 to -1.8, white 2.2 to 2.6
            assert -2.2 < low < -0.9
            assert 1.02 < high < 2.7
