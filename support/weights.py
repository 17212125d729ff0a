"""A network from any checkpoint: ours, the released ones, timm's.

    file --names, shapes--> Checkpoint(kind, weights, facts) --constructor--> network, filled

All facts that shape a network are read here, from the tensors. Three facts no tensor tells: the
heads where there is no position table, the sides of a grid that is not square, and the early layer.
Our files state them in `arch`. The released models have 64 numbers per head, square grids, and
early layer 9 of 12 or 21 of 24.

Fine-tuning needs a backbone and not the whole network. load_backbone takes it from a file of any
kind, copies the one table of pre-training into every block, and resizes tables or positions for
another image size. A name that is left over, or that finds nothing in the file, is an error unless
EXPECTED lists it.

Read in this order: read, backbone_facts, build, load_backbone, load_state.
"""
# Shapes:  gh x gw = N patches, D width, H heads; a position table is ((2gh - 1)(2gw - 1) + 3, H)
import argparse
import collections
import math
import re
from pathlib import Path

import torch

from model import IMAGENET_MEAN, IMAGENET_STD, ViT, relative_position_index
from support.files import UserError, read_file
from support.positions import TABLE, grid_of, resize_pos_embed, resize_relative_table

# One file. name: how errors call it. file: all that it holds. kind: a key of EXPECTED.
# weights: the tensors by name. backbone: the arguments of ViT. facts: the arguments of the
# network of this kind: VQKD (vqkd), BEiT (pretrain), ViT (finetune, backbone). For segment they
# are the arguments of ViT, and classes, channels and aux_channels of UPerNet.
Checkpoint = collections.namedtuple("Checkpoint", "name file kind weights backbone facts")

# Names, as the model has them: filled from the file, as initialised, in the file only.
Report = collections.namedtuple("Report", "loaded missing unexpected")

INDEX = "relative_position_index"
WRAPPERS = ("model", "module", "state_dict")     # where a file keeps its tensors; else at the top
PREFIX = {"vqkd": "encoder.", "segment": "backbone."}    # of the backbone's names; else none
# A released tokenizer holds a copy of its teacher, and entries of the codebook that nothing reads.
TEACHER = r"(teacher_model|scaling_layer)\..*"
DEAD = r"quantize\.embedding\.(cluster_size|embed_avg|initted)"
EXPECTED = {             # kind: (names that may be left over, names that may start afresh)
    # Stage 1. The encoder is the backbone. Its norm is called fc_norm.
    "vqkd": (r"(decoder|quantize|encode_task_layer|(more_)?decode_task_layers?).*"
             rf"|{TEACHER}", r"head\..*"),
    # Stage 2. The code head and the shallow head are dropped. So is the norm where the classifier
    # pools the mean: its fc_norm stands behind the mean over patches and starts afresh.
    "pretrain": (r"mask_token|(lm_head|norm)\..*|cls_pt_.*", r"(fc_norm|head)\..*"),
    # Stage 3. Everything is used. The head starts afresh where the classes are others.
    "finetune": (r"head\..*", r"head\..*"),
    "backbone": (r"norm\..*", r"(fc_norm|head)\..*"),    # blocks without any head
    # UPerNet, named as in mmseg. Its pyramid reads raw block outputs, so there is no norm.
    "segment": (r"(fpn\d|decode_head|auxiliary_head)\..*", r"(norm|fc_norm|head)\..*"),
}


# --- reading a file -------------------------------------------------------------------------------
def read(source, remedy=""):
    """-> Checkpoint.  source: a path, or the contents of a file (dict), ours or released.

    UserError for what is no checkpoint of a network; `remedy` says how to make a missing file.
    """
    file = source if isinstance(source, dict) else open_file(Path(source), remedy)
    name = "the checkpoint" if isinstance(source, dict) else str(source)
    weights = state_dict(file, name)
    kind = kind_of(weights, name)
    weights = {k: v for k, v in weights.items() if not re.fullmatch(f"{TEACHER}|{DEAD}", k)}
    # timm's training checkpoints have a string in that place, the name of their model.
    stated = file["arch"] if isinstance(file.get("arch"), dict) else {}
    try:
        backbone = backbone_facts(weights, kind, stated, name)
        facts = network_facts(weights, kind, arguments(file) | stated, backbone)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{name} is incomplete or has odd shapes ({error}): fetch or make it "
                        f"anew") from error
    return Checkpoint(name, file, kind, weights, backbone, facts)


def open_file(path, remedy=""):
    """The contents of a checkpoint. A .safetensors file holds nothing but tensors by name."""
    if path.suffix != ".safetensors" or not path.is_file():
        return read_file(path, remedy=remedy)
    from safetensors import SafetensorError      # here: not every installation has it
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}): make or fetch it "
                        f"anew") from error


def unwrap(file):
    """The dict that holds the tensors."""
    found = [file[k] for k in WRAPPERS if isinstance(file.get(k), dict)]
    return found[0] if found else file


def arguments(file):
    """What a file was made with, {} if unknown: a Namespace in released files, a dict in ours."""
    args = file.get("args")
    if isinstance(args, argparse.Namespace):
        return vars(args)
    return args if isinstance(args, dict) else {}


def state_dict(file, name):
    """The tensors by name. Index buffers of released files follow from the grid: left out."""
    weights = {k: v for k, v in unwrap(file).items() if not str(k).endswith(INDEX)}
    if not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UserError(f"{name} holds no weights by name, neither under {', '.join(WRAPPERS)} nor "
                        f"directly: give a checkpoint of a stage here, or a released one")
    for k, v in weights.items():
        if not v.is_floating_point() and not k.endswith("num_batches_tracked"):
            raise UserError(f"{name} holds {v.dtype} numbers in {k}, which are no weights: the "
                            f"file is damaged or of another kind")
        if not v.isfinite().all():
            raise UserError(f"{name} holds numbers that are not finite in {k}: take an earlier "
                            f"checkpoint")
    return weights


def kind_of(weights, name):
    """vqkd, pretrain, finetune, segment or backbone, judged by the names alone."""
    for kind, prefix in PREFIX.items():
        if f"{prefix}patch_embed.proj.weight" in weights:
            return kind
    parts = {k.split(".")[0] for k in weights}
    if "patch_embed.proj.weight" not in weights:
        raise UserError(f"{name} holds no Vision Transformer (no patch_embed.proj.weight; names "
                        f"begin with {listed(sorted(parts))}): give a file of vqkd.py, "
                        f"pretrain.py or finetune.py, or a released BEiT v2 checkpoint")
    if parts & {"mask_token", "lm_head"}:
        return "pretrain"
    return "finetune" if "head" in parts else "backbone"


# --- facts that shape a network -------------------------------------------------------------------
def strip_prefix(weights):
    return {re.sub("^(encoder|backbone)[.]", "", k): v for k, v in weights.items()}


def listed(names):
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def size_of(weights, name, axis=0):
    """One side of a tensor; 1 where there is none, and `check` will say so."""
    there = name in weights and weights[name].ndim > axis
    return weights[name].shape[axis] if there else 1


def count(weights, name):
    """How many entries the list `name` has: different numbers in the names."""
    found = [re.match(re.escape(name) + r"\.(\d+)\.", k) for k in weights]
    return len({m[1] for m in found if m})


def mlp_ratio(weights, prefix=""):
    """Hidden numbers of an MLP by its width, such that int(width * ratio) gives them again."""
    hidden = size_of(weights, f"{prefix}blocks.0.mlp.fc1.weight")
    width = size_of(weights, f"{prefix}blocks.0.mlp.fc1.weight", 1)
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def backbone_facts(weights, kind, stated, name):
    """The arguments of ViT. UserError where positions or heads do not add up."""
    weights = strip_prefix(weights)
    tables = [v for k, v in weights.items() if k.endswith(TABLE)]
    positions = weights.get("pos_embed")
    depth = count(weights, "blocks")
    if stated.get("depth", depth) > depth:
        depth += 1                           # the last block is missing, and `check` will say so
    if bool(tables) == (positions is not None) or not depth:
        absolute = "no" if positions is None else "an"
        raise UserError(f"{name} has {depth} blocks, {len(tables)} relative-position tables and "
                        f"{absolute} absolute position embedding: one kind of positions is needed")
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    if tables:
        rows, heads = tables[0].shape
        side = (math.isqrt(rows - 3) + 1) // 2
    else:
        rows = positions.shape[1] - 1
        heads = stated.get("heads", width // 64)             # 64 per head in all released models
        side = math.isqrt(rows)
    if heads < 1 or width % heads:
        raise UserError(f"{name} does not tell the number of attention heads (width {width}): "
                        f"its `arch` is needed")
    image_size = stated.get("image_size", side * patch)
    gh, gw = grid_of(image_size, patch)
    if rows != ((2 * gh - 1) * (2 * gw - 1) + 3 if tables else gh * gw):
        raise UserError(f"{name} has {rows} positions, which is not a grid of {gh}x{gw} patches: "
                        f"the file is damaged, or not square and without `arch`")
    kind_of_positions = "shared" if f"rel_pos_bias.{TABLE}" in weights else "per_block"
    scaled = any(k.endswith((".gamma_1", ".gamma_2")) for k in weights)
    pool = "cls" if kind == "finetune" else None
    if any(k.startswith("fc_norm.") for k in weights):
        pool = "mean"
    return dict(
        image_size=image_size, patch_size=patch, width=width, heads=heads, in_channels=channels,
        depth=depth, mlp_ratio=mlp_ratio(weights),
        positions=kind_of_positions if tables else "absolute",
        layer_scale=0.1 if scaled else 0.0,          # whether there is one: the file has the values
        pool=pool)


def network_facts(weights, kind, stated, backbone):
    """The arguments of the network of this kind: those of ViT, and what its heads add."""
    if kind == "vqkd":
        taken = "image_size", "patch_size", "width", "depth", "heads", "mlp_ratio"
        return {k: backbone[k] for k in taken} | tokenizer_facts(weights, stated, backbone)
    if kind == "pretrain":
        depth = backbone["depth"]
        # The released code calls the same argument early_layers.
        early = stated.get("early_layer") or stated.get("early_layers")
        early = early or {24: 21}.get(depth, max(1, depth * 3 // 4))     # 9 of 12, 21 of 24
        if not 1 <= early <= depth:
            raise ValueError(f"early layer {early} of {depth}")
        own_head = any(k.startswith(("cls_pt_norm.", "cls_pt_lm_head.")) for k in weights)
        sizes = {k: v for k, v in backbone.items() if k != "pool"}
        return sizes | dict(codes=size_of(weights, "lm_head.bias"), early_layer=early,
                            head_depth=count(weights, "cls_pt_layers"), shared_head=not own_head)
    if kind == "finetune":
        return backbone | dict(num_classes=size_of(weights, "head.bias"))
    if kind == "segment":
        return backbone | dict(classes=size_of(weights, "decode_head.conv_seg.bias"),
                               channels=size_of(weights, "decode_head.conv_seg.weight", 1),
                               aux_channels=size_of(weights, "auxiliary_head.conv_seg.weight", 1))
    return backbone


def tokenizer_facts(weights, stated, backbone):
    """What VQKD has beside its encoder: decoder, codebook, and a head for each teacher."""
    width = size_of(weights, "decoder.patch_embed.proj.weight")
    heads = backbone["heads"] if width == backbone["width"] else max(1, width // 64)
    heads = stated.get("decoder_heads", heads)
    if width % heads:
        raise ValueError(f"a decoder of width {width} with {heads} heads")
    more = range(count(weights, "more_decode_task_layers"))
    layers = ["decode_task_layer", *(f"more_decode_task_layers.{i}" for i in more)]
    teacher_dims = [size_of(weights, f"{layer}.2.bias") for layer in layers]
    return dict(codes=size_of(weights, "quantize.embedding.weight"),
                code_dim=size_of(weights, "quantize.embedding.weight", 1),
                teacher_dims=teacher_dims, decoder_depth=count(weights, "decoder.blocks"),
                decoder=dict(width=width, heads=heads, mlp_ratio=mlp_ratio(weights, "decoder.")))


# --- a whole network ------------------------------------------------------------------------------
def build(make, checkpoint):
    """The network make(**facts) with the weights of the file. UserError where they do not fit."""
    with torch.device("meta"):               # shapes without numbers
        model = make(**checkpoint.facts)
    check(model.state_dict(), checkpoint)
    model.to_empty(device="cpu").load_state_dict(checkpoint.weights)
    for part in model.modules():             # the index is in no file, as it follows from the grid
        if isinstance(part, ViT) and part.relative_position_index is not None:
            part.relative_position_index = relative_position_index(*part.grid)
    return model


def check(wanted, checkpoint, remedy="the file is incomplete, damaged or not of this model"):
    """UserError, one sentence, where names or shapes differ from the wanted tensors."""
    given = checkpoint.weights
    misshapen = [f"{k} {tuple(given[k].shape)} instead of {tuple(v.shape)}"
                 for k, v in wanted.items() if k in given and given[k].shape != v.shape]
    problems = {
        "lacks": [k for k in wanted if k not in given],
        "has the unknown": [k for k in given if k not in wanted],
        "has in a wrong shape": misshapen,
    }
    found = [f"{what} {listed(names)}" for what, names in problems.items() if names]
    if found:
        raise UserError(f"{checkpoint.name} ({checkpoint.kind}) {' and '.join(found)}: {remedy}")


# --- the backbone alone ---------------------------------------------------------------------------
def load_backbone(source, *, pool="mean", num_classes=0, image_size=None, drop_path=0.0):
    """The backbone of a file of any kind.  -> (ViT, contents of the file, Report)

    source: a Checkpoint, or what `read` takes. The model wants imagenet_normalize(images).
    pool: "mean" or "cls" as in ViT; None keeps the norm of the file (a linear probe of [CLS] needs
    the `norm` of pre-training). num_classes: 0 for no head, None for the head of the file; a head
    of another size starts afresh. image_size: int or (H, W), by default that of the file.
    """
    checkpoint = source if isinstance(source, Checkpoint) else read(source)
    sizes = dict(checkpoint.backbone)
    source_grid = grid_of(sizes["image_size"], sizes["patch_size"])
    if num_classes is None:
        if "num_classes" not in checkpoint.facts:
            raise UserError(f"{checkpoint.name} holds no classifier (no head.weight): fine-tune it "
                            f"first, with python finetune.py")
        num_classes = checkpoint.facts["num_classes"]
    if sizes["positions"] == "shared":
        sizes["positions"] = "per_block"
    sizes["image_size"] = image_size or sizes["image_size"]
    sizes["pool"] = pool or sizes["pool"]
    grid_of(sizes["image_size"], sizes["patch_size"])        # complains where it does not divide
    model = ViT(**sizes, num_classes=num_classes, drop_path=drop_path)
    return model, checkpoint.file, load_state(model, checkpoint, source_grid)


@torch.no_grad()
def load_state(model, checkpoint, source_grid):
    """Put the backbone of a checkpoint of any kind into a ViT.  -> Report

    source_grid: that of the file. UserError for names or shapes that do not belong.
    """
    weights = table_per_block(strip_prefix(checkpoint.weights), model.depth)
    for k, v in weights.items():
        if k.endswith(TABLE):
            weights[k] = resize_relative_table(v, source_grid, model.grid)
        elif k == "pos_embed":
            weights[k] = resize_pos_embed(v, source_grid, model.grid)
    own = model.state_dict()
    if model.num_classes and len(weights.get("head.weight", [])) != model.num_classes:
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")}    # a fresh head
    left_over, fresh = EXPECTED[checkpoint.kind]
    needed = {k: v for k, v in own.items() if k in weights or not re.fullmatch(fresh, k)}
    given = {k: v for k, v in weights.items() if k in own or not re.fullmatch(left_over, k)}
    remedy = "the file is incomplete, or not of this model"
    if any(k.startswith(("norm.", "fc_norm.")) for k in needed.keys() ^ given.keys()):
        pooling = "[CLS]" if "norm.weight" in weights else "mean"
        remedy = f"it was trained with {pooling} pooling, so choose that"
    check(needed, checkpoint._replace(weights=given), remedy)
    report = Report([k for k in own if k in weights], [k for k in own if k not in weights],
                    [k for k in weights if k not in own])
    if checkpoint.kind == "vqkd":
        weights = fold_pixel_range(weights)
    model.load_state_dict({k: weights[k].float() for k in report.loaded}, strict=False)
    return report


def table_per_block(weights, depth):
    """Pre-training has one table for all blocks. In fine-tuning each block trains its own copy."""
    shared = f"rel_pos_bias.{TABLE}"
    if shared not in weights:
        return dict(weights)
    rest = {k: v for k, v in weights.items() if k != shared}
    return rest | {f"blocks.{i}.attn.{TABLE}": weights[shared] for i in range(depth)}


def fold_pixel_range(weights):
    """The encoder of a tokenizer, made to read the pixels that a backbone reads.

    It was trained on x = 2 p - 1; a backbone gets n = (p - m) / s, so  x = 2 s n + (2m - 1).
    The patch embedding W x + b is linear:  W' = 2 s W,  b' = b + W (2m - 1).
    """
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    w = weights["patch_embed.proj.weight"].float()           # (D, 3, p, p)
    b = weights["patch_embed.proj.bias"].float()             # (D,)
    return weights | {"patch_embed.proj.weight": w * (2 * std),
                      "patch_embed.proj.bias": b + (w * (2 * mean - 1)).sum(dim=(1, 2, 3))}
