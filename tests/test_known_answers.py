"""Numbers to check a copy of the method against, for readers without the authors' files.

Every parameter of a small network is filled by one formula of integers, and so are its images:
the i-th number of the k-th parameter (in the order of named_parameters, counted from 0) is

    scale * (2 r / 997 - 1),   r = (31 i^2 + 17 i + 101 k) mod 997

The scale is 0.02 for what makes the stream of tokens (SMALL) and 1 for all others: LayerNorm then
divides by a small variance, where eps shows, and GELU sees numbers about 1, where tanh shows.

Any implementation that computes the same method gives the answers below, on any machine, to about
seven digits. They were recorded by `python tests/test_known_answers.py`, which prints them, at a
state of this code that agrees with the authors' own numbers (tests/test_golden.py).

Tensors are compared, and not losses alone: a LayerNorm with eps 1e-5 or a GELU by tanh hardly moves
a loss. The last test shows that the tolerance notices both.
"""
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import model as network      # noqa: E402  (the path is needed when this file runs as a script)
from extras.panels import attention_maps  # noqa: E402
from finetune import layer_decay_groups  # noqa: E402
from model import ViT, imagenet_normalize  # noqa: E402
from pretrain import BEiT, hidden_patches, mim_loss, sample_block_mask  # noqa: E402
from segment import AUX_WEIGHT, pixel_cross_entropy, upernet  # noqa: E402
from vqkd import VQKD, code_sums, ema_update, l2, vqkd_loss  # noqa: E402

SMALL = "patch_embed.", "cls_token", "pos_embed", "mask_token", "gamma_"     # parts of names
SIZES = dict(image_size=24, patch_size=8, width=24, depth=3, heads=3)    # 3 x 3 patches
# Float32 and float64 differ by up to 1e-6 of a tensor's largest number, gradients by up to 2e-5.
FORWARD = 1e-5
GRADIENT = 1e-4
LOSS = 5e-6              # absolute


# --- the formula ----------------------------------------------------------------------------------
def formula(shape, k, low=-1, high=1):
    """Numbers in [low, high), the same on every machine."""
    i = torch.arange(torch.Size(shape).numel())
    r = (31 * i * i + 17 * i + 101 * k) % 997
    return (low + (high - low) * (r.double() / 997)).float().view(shape)


@torch.no_grad()
def fill(model):
    for k, (name, parameter) in enumerate(model.named_parameters()):
        scale = 0.02 if any(part in name for part in SMALL) else 1
        parameter.copy_(scale * formula(parameter.shape, k))
    return model.train()


def images(size=24):
    """Two images (2, 3, size, size) in [0, 1)"""
    return formula((2, 3, size, size), 1, 0, 1)


def gradient_norm(model):
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients).norm()


# --- the methods ----------------------------------------------------------------------------------
def classifier():
    """ViT with a table per block, layer scale and mean pooling, and its cross-entropy."""
    model = fill(ViT(**SIZES, num_classes=5))
    x = imagenet_normalize(images())
    tokens = model.features(x)[-1]
    logits = model(x)
    loss = F.cross_entropy(logits, torch.tensor([1, 4]))
    loss.backward()
    return {
        "[CLS] after the last block": tokens[0, 0, :6],
        "last patch after the last block": tokens[1, -1, :6],
        "logits": logits[0],
        "attention of the first head": attention_maps(model, x)[0, 0, 0, :6],
        "loss": loss,
        "gradient of q_bias of block 1": model.blocks[1].attn.q_bias.grad[:6],
        "gradient norm": gradient_norm(model),
    }


def tokenizer():
    """VQ-KD, Eq. (2): look-up, decoder, loss, straight-through gradient, codes that move."""
    model = VQKD(**SIZES, decoder_depth=1, codes=16, code_dim=6, teacher_dims=(10,))
    fill(model)
    codebook = model.quantize.embedding.weight
    codebook.copy_(l2(codebook))
    o, h, v, z = model(images())
    t = formula(o.shape, 3)
    loss, parts = vqkd_loss(o, t, h, v)
    loss.backward()
    moved = ema_update(codebook, *code_sums(h, z, 16), decay=0.9)
    return {
        "h of the first patch": h[0, 0],
        "token ids of the first image": z[0].float(),
        "o of the first patch": o[0, 0, :6],
        "loss": loss,
        "cosine loss": 1 - parts["cosine"],
        "commitment loss": parts["commit"],
        "code of the first patch, moved": moved[z[0, 0]],
        "gradient of the patch embedding": model.encoder.patch_embed.proj.bias.grad[:6],
        "gradient norm": gradient_norm(model),
    }


def masked(**changes):
    """Eq. (3), and once more through the shallow head, on 4 hidden patches an image."""
    model = fill(BEiT(**SIZES, codes=11, early_layer=2, head_depth=2, **changes))
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, [0, 1, 3, 4]] = True
    mask[1, [4, 5, 7, 8]] = True
    logits, logits_cls = model(imagenet_normalize(images()), mask, hidden_patches(mask))
    z = torch.arange(8) % 11
    loss, (loss_mim, loss_cls) = mim_loss(logits, logits_cls, z)
    loss.backward()
    return {
        "logits of the first hidden patch": logits[0, :6],
        "the same through the shallow head": logits_cls[0, :6],
        "loss of the last layer": loss_mim,
        "loss of the shallow head": loss_cls,
        "gradient of the mask token": model.mask_token.grad[0, 0, :6],
        "gradient of the table, first head": model.rel_pos_bias.relative_position_bias_table.grad[
            :6, 0],
        "gradient norm": gradient_norm(model),
    }


def masked_with_a_separate_head():
    return masked(shared_head=False)


def segmenter():
    """UPerNet and its auxiliary head in training, dropout left out."""
    model = fill(upernet(classes=4, channels=8, aux_channels=5, pool=None, **SIZES | dict(depth=6)))
    for part in model.modules():
        if isinstance(part, nn.Dropout2d):
            part.eval()
    labels = (torch.arange(2 * 24 * 24).view(2, 24, 24) // 7) % 5
    labels[labels == 4] = 255                                # no class: ignored
    logits, auxiliary = model(imagenet_normalize(images()))
    loss = pixel_cross_entropy(logits, labels)
    loss_aux = pixel_cross_entropy(auxiliary, labels)
    (loss + AUX_WEIGHT * loss_aux).backward()
    model.eval()                                             # BatchNorm by its running statistics
    return {
        "logits of a pixel": logits[0, :, 5, 5],
        "auxiliary logits of a pixel": auxiliary[1, :, 2, 2],
        "loss": loss,
        "auxiliary loss": loss_aux,
        "logits in evaluation": model(imagenet_normalize(images()))[0, :, 5, 5],
        "gradient norm": gradient_norm(model),
    }


METHODS = [classifier, tokenizer, masked, masked_with_a_separate_head, segmenter]

# What `python tests/test_known_answers.py` prints.
ANSWERS = {
    "classifier": {
        "[CLS] after the last block": [
            -0.27164114, -0.19422376, -0.12663831, 0.16111082, 0.063522071, -0.08757706],
        "last patch after the last block": [
            0.042509809, 0.036757007, 0.012052089, 0.24919379, 0.30458489, -0.23884699],
        "logits": [2.551007, 2.0260262, -1.8363341, 0.90095311, -0.30141222],
        "attention of the first head": [
            0.6820249, 0.00023262401, 8.1047001e-05, 0.0061306041, 0.024277898, 0.0029265904],
        "loss": 2.8656905,
        "gradient of q_bias of block 1": [
            -0.016936082, -0.061688829, 0.052644249, 0.043024931, 0.02842525, -0.049984641],
        "gradient norm": 168.10983,
    },
    "tokenizer": {
        "h of the first patch": [
            0.65785539, 0.049259137, 0.44440436, -0.077826872, -0.47928065, -0.36268115],
        "token ids of the first image": [8, 8, 2, 8, 8, 8, 8, 8, 8],
        "o of the first patch": [
            -1.7476447, 0.98189902, 0.2070742, 1.0526534, 3.0223923, -0.46956712],
        "loss": 0.96222895,
        "cosine loss": 0.83908689,
        "commitment loss": 0.12314205,
        "code of the first patch, moved": [
            0.38259229, 0.34081733, 0.51296216, -0.59434074, -0.34788477, 0.0084711192],
        "gradient of the patch embedding": [
            -0.041803278, 0.059229184, 0.0014632768, 0.0095669599, 0.059446953, -0.017029431],
        "gradient norm": 6.4164557,
    },
    "masked": {
        "logits of the first hidden patch": [
            0.92276418, -0.12278642, -1.7829363, -0.90607715, 3.9767232, -0.33825117],
        "the same through the shallow head": [
            0.93867743, -0.77490807, -2.0463176, -1.2950987, 4.3437409, -1.3926342],
        "loss of the last layer": 3.9355087,
        "loss of the shallow head": 4.4676061,
        "gradient of the mask token": [
            0.048566967, -0.6746639, 1.3676383, -1.5737389, -0.35513872, -2.1618819],
        "gradient of the table, first head": [
            0.0070490353, -0.021693742, 0.0053134672, 3.435136e-05, 0.00011181817, 0.022246322],
        "gradient norm": 155.88594,
    },
    "masked_with_a_separate_head": {
        "logits of the first hidden patch": [
            0.92276418, -0.12278642, -1.7829363, -0.90607715, 3.9767232, -0.33825117],
        "the same through the shallow head": [
            2.9921343, -0.91092974, -3.6612921, -2.5619853, 2.3963432, -3.5172045],
        "loss of the last layer": 3.9355087,
        "loss of the shallow head": 5.1048298,
        "gradient of the mask token": [
            -4.4052792, -1.0352459, 3.3184915, 0.48575607, -4.3345995, 0.82279766],
        "gradient of the table, first head": [
            0.010303657, -0.036592536, 0.0052945847, 0.00053817395, -0.00010335281, 0.0079019032],
        "gradient norm": 156.10266,
    },
    "segmenter": {
        "logits of a pixel": [0.44561517, 0.69338107, 0.6488179, 1.0417084],
        "auxiliary logits of a pixel": [-1.6508573, -1.2954146, 0.67523575, -1.7059118],
        "loss": 1.2433856,
        "auxiliary loss": 1.2631569,
        "logits in evaluation": [-2.1187115, 5.0094161, 6.2621851, -8.3151979],
        "gradient norm": 2.0933468,
    },
}


# --- tests ----------------------------------------------------------------------------------------
def compare(method):
    computed = method()
    answers = ANSWERS[method.__name__]
    assert computed.keys() == answers.keys()
    for name, value in computed.items():
        expected = torch.tensor(answers[name])
        largest = expected.abs().max().item()
        if "loss" in name:
            tolerance = LOSS
        elif "gradient" in name:
            tolerance = GRADIENT * largest
        else:
            tolerance = FORWARD * largest
        error = (value.detach() - expected).abs().max().item()
        assert error <= tolerance, f"{name}: {value.tolist()} instead of {answers[name]}"


@pytest.mark.parametrize("method", METHODS)
def test_the_method_gives_the_recorded_numbers(method):
    compare(method)


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_eps_is_noticed(method, monkeypatch):
    monkeypatch.setattr(network, "LAYER_NORM_EPS", 1e-5)     # torch's default
    with pytest.raises(AssertionError):
        compare(method)


@pytest.mark.parametrize("method", METHODS)
def test_a_gelu_by_tanh_is_noticed(method, monkeypatch):
    exact = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate=None: exact(x, approximate="tanh"))
    with pytest.raises(AssertionError):
        compare(method)


def test_the_rates_of_layer_decay_are_powers_of_065():
    """base: 12 blocks; the embeddings are layer 0, the head is layer 13."""
    rates = {}
    for group in layer_decay_groups(ViT(16, 8, 24, 12, 3, num_classes=5), 0.05, 0.65):
        for name in group["names"]:
            rates[name] = group["lr_scale"]
    for name, rate in {
            "cls_token": 0.0036972058, "patch_embed.proj.weight": 0.0036972058,
            "blocks.0.attn.qkv.weight": 0.0056880090, "blocks.5.gamma_1": 0.0490222789,
            "blocks.10.mlp.fc2.bias": 0.4225, "blocks.11.norm2.weight": 0.65,
            "fc_norm.weight": 1, "head.weight": 1}.items():
        assert rates[name] == pytest.approx(rate, rel=1e-7), name


def test_a_block_mask_hides_75_of_196_patches_and_is_drawn_in_blocks():
    """The mask that Python's `random` gives after random.seed(0)."""
    random.seed(0)
    mask = sample_block_mask(14, 14, 75)
    assert mask.sum() == 75
    assert ["".join(".#"[int(cell)] for cell in row) for row in mask] == MASK


MASK = [
    "..............",
    "..............",
    "..............",
    "######..#.....",
    "######........",
    "######........",
    "########......",
    "########......",
    "########......",
    "########......",
    "######........",
    "######........",
    "######........",
    "######........",
]


# --- recording ------------------------------------------------------------------------------------
def as_text(value):
    numbers = [f"{x:.8g}" for x in value.detach().flatten().tolist()]
    return numbers[0] if value.ndim == 0 else "[" + ", ".join(numbers) + "]"


def record():
    """Print ANSWERS and MASK as they stand above."""
    torch.set_num_threads(1)
    print("ANSWERS = {")
    for method in METHODS:
        print(f'    "{method.__name__}": {{')
        for name, value in method().items():
            text = as_text(value)
            if len(name) + len(text) > 85:
                text = "[\n            " + text[1:]
            print(f'        "{name}": {text},')
        print("    },")
    print("}")
    random.seed(0)
    mask = sample_block_mask(14, 14, 75)
    print("MASK = [")
    for row in mask:
        print(f'    "{"".join(".#"[int(cell)] for cell in row)}",')
    print("]")


if __name__ == "__main__":
    record()
