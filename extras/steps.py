"""One training step of each stage, on random images and random weights, to be timed.

Each function builds what the stage builds and returns step(run, clock). A step does what the loop
of the stage does with one micro-batch, and calls clock(part) after each part. `run` gives device
and precision, as in the stages.
"""
# Shapes:  B images, N patches, M hidden patches, K codes, C teacher width or classes
import logging
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import finetune
import linprobe
import pretrain
import segment
import vqkd
from model import PRESETS, ViT, imagenet_normalize
from support import data, teachers
from support.optim import adamw, param_groups, set_lr

CLASSES = 1000


def random_images(c, args, device):
    return torch.randint(256, (args.batch_size, 3, c.S, c.S), dtype=torch.uint8, device=device)


def random_labels(classes, args, device, *shape):
    return torch.randint(classes, (args.batch_size, *shape), device=device)


def optimizer_for(groups, device):
    optimizer = adamw(groups, (0.9, 0.98), device)
    set_lr(optimizer, 1e-5)
    return optimizer


def compiled(function, args):
    """args.compile: False, True, or the name of a mode of torch.compile."""
    if not args.compile:
        return function
    return torch.compile(function, mode=None if args.compile is True else args.compile)


def update(optimizer):
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def random_tokenizer(c, device):
    """A tokenizer whose codes are random unit vectors."""
    tokenizer = vqkd.build(c.vqkd, (c.C,)).to(device)
    tokenizer.quantize.embedding.weight.copy_(vqkd.l2(torch.randn(c.K, c.d)))
    return tokenizer


def random_clip(c, device):
    """The CLIP teacher (ViT-B/16) with random weights, read from a file as real ones are."""
    import open_clip                         # here, because it is slow to import
    name = "ViT-B-16-quickgelu"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pt"
        logging.disable(logging.WARNING)     # open_clip warns that the weights are random
        torch.save(open_clip.create_model(name, pretrained=None).state_dict(), path)
        logging.disable(logging.NOTSET)
        side = c.S // c.p
        return teachers.ClipTeacher(name, str(path), (side, side), device)


# --- stage 1 and 2 --------------------------------------------------------------------------------
def vqkd_step(c, args, device):
    network = random_tokenizer(c, device)
    teacher = compiled(random_clip(c, device), args)
    forward = compiled(network, args)
    groups = param_groups(network.named_parameters(), c.vqkd.weight_decay)
    optimizer = optimizer_for(groups, device)
    pixels = random_images(c, args, device)

    def step(run, clock):
        images = data.to_float(pixels, device)
        clock("data")
        with run.autocast():
            t = teacher(images)
            clock("teacher")
            o, h, v, z = forward(images)
            loss, _ = vqkd.vqkd_loss(o, t, h, v)
        clock("forward")
        loss.backward()
        clock("backward")
        update(optimizer)
        network.quantize.update(*vqkd.code_sums(h, z, c.K), c.vqkd.decay)
        clock("optimiser")
    return step


def pretrain_step(c, args, device):
    tokenizer = random_tokenizer(c, device).eval().requires_grad_(False)
    c.pretrain.checkpoint_activations = args.checkpoint_activations
    network = pretrain.build(c.pretrain, c.K).to(device)
    encode = compiled(tokenizer.encode, args)
    forward = compiled(network, args)
    groups = param_groups(network.named_parameters(), c.pretrain.weight_decay)
    optimizer = optimizer_for(groups, device)
    pixels = random_images(c, args, device)
    masks = [pretrain.sample_block_mask(*network.grid, c.M, c.pretrain.mask_min_block).flatten()
             for _ in range(args.batch_size)]
    mask = torch.stack(masks)                                # (B, N)
    hidden = pretrain.hidden_patches(mask).to(device)        # (B, m)
    mask = mask.to(device)

    def step(run, clock):
        images = data.to_float(pixels, device)
        clock("data")
        with run.autocast():
            z = encode(images).gather(1, hidden).flatten()               # (M,)
            clock("tokenizer")
            logits, logits_cls = forward(imagenet_normalize(images), mask, hidden)
            loss, _ = pretrain.mim_loss(logits, logits_cls, z)
        clock("forward")
        loss.backward()
        clock("backward")
        nn.utils.clip_grad_norm_(network.parameters(), c.pretrain.clip_grad)
        update(optimizer)
        clock("optimiser")
    return step


# --- classifiers and the other read-outs ----------------------------------------------------------
def supervised_step(network, groups, loss_of, c, args, device):
    """Forward, loss_of(outputs), backward, update."""
    forward = compiled(network.train(), args)
    optimizer = optimizer_for(groups, device)
    pixels = random_images(c, args, device)

    def step(run, clock):
        images = data.to_float(pixels, device)
        clock("data")
        with run.autocast():
            outputs = forward(imagenet_normalize(images))
        loss = loss_of(outputs)
        clock("forward")
        loss.backward()
        clock("backward")
        update(optimizer)
        clock("optimiser")
    return step


def finetune_step(c, args, device):
    flags = finetune.complete(finetune.parse_args(["--model", c.preset, "--init", "scratch"]))
    network, _ = finetune.build(flags, None, list(range(CLASSES)))
    network = network.to(device)
    groups = finetune.layer_decay_groups(network, flags.weight_decay, flags.layer_decay)
    labels = random_labels(CLASSES, args, device)
    targets = finetune.smooth_targets(labels, CLASSES, flags.smoothing)

    def loss_of(logits):
        return finetune.soft_cross_entropy(logits, targets)
    return supervised_step(network, groups, loss_of, c, args, device)


def segment_step(c, args, device):
    """At the size of pre-training, not at segmentation's 512 pixels."""
    network = segment.UPerNet(ViT(**PRESETS[c.preset]), 150).to(device)
    groups = param_groups(network.named_parameters(), 0.05)
    labels = random_labels(150, args, device, c.S, c.S)

    def loss_of(outputs):
        logits, logits_aux = outputs
        return (segment.pixel_cross_entropy(logits, labels)
                + segment.AUX_WEIGHT * segment.pixel_cross_entropy(logits_aux, labels))
    return supervised_step(network, groups, loss_of, c, args, device)


def linprobe_step(c, args, device):
    """The features of the frozen backbone. The heads train on stored features, in seconds."""
    network = ViT(**PRESETS[c.preset]).to(device).eval().requires_grad_(False)
    pixels = random_images(c, args, device)

    def step(run, clock):
        images = data.to_float(pixels, device)
        clock("data")
        with run.autocast(), torch.no_grad():
            linprobe.summarise(network, imagenet_normalize(images))
        clock("forward")
    return step


def timm_step(kind, c, args, device):
    """timm's network of the same size as a classifier.  kind: "BEiT" or "ViT"

    timm's BEiT has a table of relative positions in every block, its ViT no position bias.
    """
    from timm.models.beit import Beit        # here, because timm is slow to import
    from timm.models.vision_transformer import VisionTransformer
    size = PRESETS[c.preset]
    same = dict(img_size=c.S, patch_size=c.p, embed_dim=c.D, depth=c.L, num_heads=size["heads"],
                num_classes=CLASSES)
    if kind == "ViT":
        network = VisionTransformer(**same)
    else:
        network = Beit(**same, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True)
    network = network.to(device)
    groups = param_groups(network.named_parameters(), 0.05)
    labels = random_labels(CLASSES, args, device)

    def loss_of(logits):
        return F.cross_entropy(logits.float(), labels)
    return supervised_step(network, groups, loss_of, c, args, device)


STEPS = dict(pretrain=pretrain_step, vqkd=vqkd_step, finetune=finetune_step, segment=segment_step,
             linprobe=linprobe_step)
