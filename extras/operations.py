"""How many operations an image costs in each stage, by formula, and the GPU-hours that follow.

Read in this order: block_operations, operations, hours.
"""
# Letters: N patches, T = 1 + N tokens, D width, L depth, K codes of d numbers, M hidden patches,
#          C teacher width; _t: of the tokenizer
from types import SimpleNamespace

from torch.utils.flop_counter import FlopCounterMode

import pretrain
import vqkd
from model import PRESETS

IMAGENET = 1281167                                           # training images
CLIP = dict(width=768, depth=12, patch_size=16, dim=512)     # the image tower of ViT-B/16


def sizes(name):
    """All numbers that the counts need, of preset `name`; .vqkd and .pretrain: the stages' flags"""
    tokenizer = "base" if name == "large" else name          # the paper has one for both
    v = vqkd.parse_args(["--model", tokenizer])
    m = pretrain.parse_args(["--model", name])
    backbone = PRESETS[name]
    N = (m.image_size // m.patch_size) ** 2
    return SimpleNamespace(
        preset=name, S=m.image_size, p=m.patch_size, N=N, T=1 + N, D=backbone["width"],
        L=backbone["depth"], M=m.mask_patches, head_depth=m.head_depth, K=v.codes, d=v.code_dim,
        D_t=PRESETS[tokenizer]["width"], L_t=v.encoder_depth, L_d=v.decoder_depth, C=CLIP["dim"],
        vqkd=v, pretrain=m)


def block_operations(tokens, width):
    """Multiplications and additions of one block for one image, forward.

    Norms, soft-max and GELU are not counted.
    """
    T, D = tokens, width
    # Linear layers: q, k, v, proj are T x D by D x D; the MLP is two of D x 4D.    24 T D^2
    # q k^T and weights v, over all heads: T x T x D each.                           4 T^2 D
    return 24 * T * D ** 2 + 4 * T ** 2 * D


def operations(stage, c):
    """Operations of one image in one step of `stage`, by part.  {part: operations}

    Backward costs twice the forward: one product for the gradient of the input, one for that of the
    weight. The gradient of the pixels is not needed, so the patch embedding costs one less.
    c: from sizes. ValueError for segmentation, whose convolutions torch counts.
    """
    pixels = 2 * c.N * 3 * c.p ** 2                          # patch embedding, per channel
    blocks = c.L * block_operations(c.T, c.D)
    encoder = (pixels * c.D_t + c.L_t * block_operations(c.T, c.D_t)
               + 2 * c.N * c.D_t * (c.D_t + c.d))            # with encode_task_layer
    lookup = 2 * c.N * c.K * c.d                             # h v^T
    if stage == "pretrain":
        streams = 2 if c.head_depth else 1
        logits = streams * 2 * c.M * c.D * c.K               # of the hidden patches only
        trained = blocks + c.head_depth * block_operations(c.T, c.D) + logits
        return dict(tokenizer=encoder + lookup, forward=pixels * c.D + trained,
                    backward=pixels * c.D + 2 * trained)
    if stage == "vqkd":
        decoder = (2 * c.N * c.d * c.D_t + c.L_d * block_operations(c.T, c.D_t)
                   + 2 * c.N * c.D_t * (c.D_t + c.C))        # with decode_task_layer
        width = CLIP["width"]
        teacher = (2 * c.N * 3 * CLIP["patch_size"] ** 2 * width + 2 * c.N * width * CLIP["dim"]
                   + CLIP["depth"] * block_operations(c.T, width))
        return dict(teacher=teacher, forward=encoder + lookup + decoder,
                    backward=2 * (encoder + decoder) - pixels * c.D_t)
    if stage == "finetune":
        trained = blocks + 2 * c.D * 1000                    # with the head
        return dict(forward=pixels * c.D + trained, backward=pixels * c.D + 2 * trained)
    if stage == "linprobe":
        return dict(forward=pixels * c.D + blocks)           # the backbone is frozen
    raise ValueError(f"no formula for {stage}: its convolutions are counted by torch")


def counted(step):
    """The operations that torch counts while `step` runs."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


# --- the paper's runs -----------------------------------------------------------------------------
def schedules():
    """(what, preset, stage, images seen) of each run."""
    runs = [("tokenizer, 100 epochs", "base", "vqkd", 100 * IMAGENET)]
    for name in ("base", "large"):
        for epochs in (300, 1600):
            runs.append((f"pre-training, {epochs} epochs", name, "pretrain", epochs * IMAGENET))
    runs.append(("fine-tuning, 100 epochs", "base", "finetune", 100 * IMAGENET))
    runs.append(("fine-tuning, 50 epochs", "large", "finetune", 50 * IMAGENET))
    return runs


def hours(ops_per_image, images, share, peak, gpus):
    """-> GPU-hours, hours on `gpus`, images a second of all of them.  peak: operations a second"""
    rate = gpus * share * peak / ops_per_image
    return images * gpus / rate / 3600, images / rate / 3600, rate
