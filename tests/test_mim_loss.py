"""The masked loss, Eq. (3) for both heads; what the loop of stage 2 gives to it."""
import math

import pytest
import torch
import torch.nn.functional as F

import pretrain
import vqkd
from conftest import log_lines
from model import ViT, imagenet_normalize
from pretrain import BEiT, mim_loss
from support import data
from support.files import read_file, write_file
from support.run import contents


# --- the loss -------------------------------------------------------------------------------------
def test_the_loss_of_raw_logits_is_a_number_known_by_hand():
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])          # p = 3/4, 1/4
    logits_cls = torch.zeros(2, 2)                                           # p = 1/2, 1/2
    loss, (loss_mim, loss_cls) = mim_loss(logits, logits_cls, torch.tensor([0, 0]))
    assert loss_mim.item() == pytest.approx((math.log(4 / 3) + math.log(4)) / 2)
    assert loss_cls.item() == pytest.approx(math.log(2))
    assert loss.item() == pytest.approx(loss_mim.item() + loss_cls.item())


def test_a_certain_and_right_answer_costs_nothing_so_labels_are_not_smoothed():
    logits = 100 * F.one_hot(torch.tensor([3, 1]), 8).float()
    loss, _ = mim_loss(logits, logits, torch.tensor([3, 1]))
    assert loss.item() == pytest.approx(0, abs=1e-6)         # smoothing by 0.1 would give 17.5


def test_one_number_added_to_all_logits_of_a_patch_changes_nothing():
    logits, z = torch.randn(5, 8), torch.randint(0, 8, (5,))
    shifted = logits + torch.randn(5, 1)
    torch.testing.assert_close(mim_loss(logits, None, z)[0], mim_loss(shifted, None, z)[0])


def test_both_heads_weigh_alike_in_the_gradient():
    logits, z = torch.randn(5, 8), torch.randint(0, 8, (5,))
    first = logits.clone().requires_grad_()
    second = logits.clone().requires_grad_()
    mim_loss(first, second, z)[0].backward()
    torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(first.grad, (logits.softmax(1) - F.one_hot(z, 8)) / 5)


def test_without_the_shallow_head_its_loss_is_zero():
    logits, z = torch.randn(5, 8), torch.randint(0, 8, (5,))
    loss, (loss_mim, loss_cls) = mim_loss(logits, None, z)
    assert loss == loss_mim
    assert loss_cls == 0


def test_what_is_only_logged_keeps_no_graph():
    logits = torch.randn(5, 8, requires_grad=True)
    loss, parts = mim_loss(logits, logits, torch.randint(0, 8, (5,)))
    assert loss.requires_grad
    assert not any(part.requires_grad for part in parts)


def test_the_loss_of_bfloat16_logits_is_computed_in_float32():
    logits, z = (30 * torch.randn(50, 8)).bfloat16(), torch.randint(0, 8, (50,))
    loss, parts = mim_loss(logits, logits, z)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mim_loss(logits.float(), logits.float(), z)[0])


def test_untrained_model_is_as_good_as_a_uniform_guess():
    model = BEiT(32, 8, 32, 4, 4, 64, early_layer=2, head_depth=2)
    mask = torch.zeros(3, 16, dtype=torch.bool)
    mask[:, [1, 5, 6]] = True
    logits, logits_cls = model(torch.randn(3, 3, 32, 32), mask)
    loss, (loss_mim, loss_cls) = mim_loss(logits, logits_cls, torch.randint(0, 64, (9,)))
    assert abs(loss.item() - 2 * math.log(64)) < 0.1         # two heads, ln K each
    assert loss_mim + loss_cls == pytest.approx(loss.item())


# --- the loop -------------------------------------------------------------------------------------
@pytest.fixture
def run(tmp_path):
    """run(name, flags) trains a tiny backbone, 8 images an update. -> its weights, the log's lines

    The tokenizer has random weights and 16 codes.
    """
    flags = "--limit 16 --batch-size 8 --workers 0 --amp no --device cpu --log-every 1".split()
    args = vqkd.parse_args([*flags, "--codes", "16", "--encoder-depth", "1"])
    tokenizer = vqkd.build(args, (144,))
    tokenizer.quantize.embedding.weight.copy_(F.normalize(torch.randn(16, 16), dim=-1))
    write_file(tmp_path / "vqkd.pt", contents("vqkd", tokenizer, args))

    def train(name, *more):
        out = tmp_path / name
        tokenizer_file = str(tmp_path / "vqkd.pt")
        pretrain.main([*flags, "--tokenizer", tokenizer_file, "--out", str(out), *more])
        return read_file(out / "pretrain.pt")["model"], log_lines(out / "pretrain.jsonl")
    return train


@pytest.fixture
def seen(monkeypatch):
    """What both networks and the loss are given, in order: [(name, tensors), ...]"""
    encode, forward, loss = vqkd.VQKD.encode, BEiT.forward, pretrain.mim_loss
    calls = []

    def watch_encode(tokenizer, images):
        z = encode(tokenizer, images)
        calls.append(("encode", (images, z)))
        return z

    def watch_forward(model, x, mask, *rest):
        calls.append(("forward", (x, mask)))
        return forward(model, x, mask, *rest)

    def watch_loss(logits, logits_cls, z):
        calls.append(("loss", (logits, z)))
        return loss(logits, logits_cls, z)

    monkeypatch.setattr(vqkd.VQKD, "encode", watch_encode)
    monkeypatch.setattr(BEiT, "forward", watch_forward)
    monkeypatch.setattr(pretrain, "mim_loss", watch_loss)
    return calls


def batches(seen):
    """-> [(tokenizer's images, z, backbone's images, mask, logits, targets)] of every loss."""
    found = []
    for (a, encoded), (b, model), (c, loss) in zip(seen, seen[1:], seen[2:], strict=False):
        if (a, b, c) == ("encode", "forward", "loss"):
            found.append((*encoded, *model, *loss))
    return found


def test_the_targets_are_the_codes_of_the_hidden_patches_in_training_and_in_evaluation(run, seen):
    run("targets", "--steps", "2")
    checked = batches(seen)
    assert len(checked) == 3                                 # two of training, one of evaluation
    for _, z, _, mask, logits, targets in checked:
        assert torch.equal(targets, z[mask])
        assert logits.shape == (len(targets), 16)


def test_the_targets_come_from_the_whole_image_and_the_mask_hides_nothing_from_the_tokenizer(
        run, seen):
    run("whole", "--steps", "2")
    shapes = data.open_data("shapes", "train", limit=16)
    drawn = torch.stack([shapes[(0, i)][0] for i in range(16)]) / 255
    drawn = torch.cat([drawn, drawn.flip(-1)])               # a training image may be mirrored
    for images, _, x, mask, *_ in batches(seen)[:2]:
        assert mask.any(dim=1).all()
        for image in images:
            assert any(torch.equal(image, whole) for whole in drawn)
        torch.testing.assert_close(imagenet_normalize(images), x)


def test_every_image_of_a_batch_has_a_mask_of_its_own(run, seen):
    run("masks", "--steps", "1")
    mask = batches(seen)[0][3]
    assert len({tuple(row.tolist()) for row in mask}) == len(mask) == 8
    assert (mask.sum(dim=1) == 13).all()                     # 75 of 196, of a grid of 36


def test_the_tokenizer_sees_pixels_from_minus_one_to_one_and_the_backbone_imagenets(
        run, monkeypatch):
    embed, pixels = ViT.embed, {"tokenizer": [], "backbone": []}

    def watch(model, x, mask=None):
        pixels["backbone" if isinstance(model, BEiT) else "tokenizer"].append(x)
        return embed(model, x, mask)
    monkeypatch.setattr(ViT, "embed", watch)
    run("a", "--steps", "1")
    for x in pixels["tokenizer"]:
        assert -1 <= x.min() < -0.5
        assert 0.5 < x.max() <= 1
    for x in pixels["backbone"]:
        assert x.min() < -1.2
        assert x.max() > 1.2
    # The guesser of the commonest codes looks at training images, too. So the tokenizer has seen
    # more images than the backbone, but each of the backbone's.
    plain = [(x + 1) / 2 for x in pixels["tokenizer"]]
    for x in pixels["backbone"]:
        alike = [p for p in plain if p.shape == x.shape]
        assert any(torch.allclose(imagenet_normalize(p), x, atol=1e-5) for p in alike)


def test_gradients_are_clipped_to_the_norm_asked_for(run):
    one_step = ["--steps", "1", "--warmup-epochs", "0", "--weight-decay", "0"]
    fast = [*one_step, "--lr", "1e-2", "--min-lr", "1e-2"]
    start, _ = run("start", *one_step, "--lr", "0", "--min-lr", "0")
    # AdamW divides by the gradient's own size plus 1e-8. A far smaller gradient moves nothing.
    clipped, lines = run("clipped", *fast, "--clip-grad", "1e-12")
    free, _ = run("free", *fast, "--clip-grad", "0")
    norm = next(line["grad_norm"] for line in lines if "grad_norm" in line)
    assert norm > 0.01                                       # logged as it was before
    assert max((clipped[k] - start[k]).abs().max() for k in start) < 1e-5
    assert max((free[k] - start[k]).abs().max() for k in start) > 5e-3
