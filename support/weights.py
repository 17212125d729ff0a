"""Weights in: our checkpoints, the released ones and timm's, recognised by their names and loaded into a ViT.

    file --names, shapes--> what it is --expand, resize--> a ViT with its weights, and a report of every name

Fine-tuning copies the one relative-position table of pre-training into every block, and another image size means
another grid of patches, so tables or positions are resized. Names that are left over, or find nothing in the file, are
an error unless EXPECTED lists them as thrown away or begun afresh.

Read in this order: load_backbone, read_architecture, load_state, resize_relative_table.
"""
# Shapes used in this file:  gh x gw = N patches, D width, H heads; a table has (2gh - 1)(2gw - 1) + 3 rows
import argparse
import collections
import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import IMAGENET_MEAN, IMAGENET_STD, PRESETS, ViT
from support.files import UserError, read_file

# What was loaded, what stays as initialised, what the file holds beyond the model: names, as the model has them.
Report = collections.namedtuple("Report", "loaded missing unexpected")

TABLE, INDEX = "relative_position_bias_table", "relative_position_index"
WRAPPERS = ("model", "module", "state_dict")     # where a file keeps its tensors; timm's have them at the top
PREFIX = {"vqkd": "encoder.", "segment": "backbone."}        # in front of the backbone's names; the others have none
EXPECTED = {             # kind: (names that may be left over, names that may start afresh)
    # Stage 1. The encoder is the backbone; its norm, which stands behind the last block, is called fc_norm.
    "vqkd": (r"(decoder|quantize|encode_task_layer|(more_)?decode_task_layers?|teacher_model|scaling_layer)\..*",
             r"head\..*"),
    # Stage 2. The code head and the blocks of patch aggregation are thrown away. A mean-pooling classifier drops the
    # pre-trained norm, too: its fc_norm stands behind the mean over patches and begins afresh.
    "pretrain": (r"mask_token|(lm_head|norm)\..*|cls_pt_.*", r"(fc_norm|head)\..*"),
    # Fine-tuned, on ImageNet-21k perhaps: everything is used, and the head is replaced where the classes are others.
    "finetune": (r"head\..*", r"head\..*"),
    "backbone": (r"norm\..*", r"(fc_norm|head)\..*"),        # blocks without any head
    # UPerNet with mmseg's names; its pyramid taps raw block outputs, so there is no norm.
    "segment": (r"(fpn\d|decode_head|auxiliary_head)\..*", r"(norm|fc_norm|head)\..*"),
}


# ------------------------------------------------------------------------------------------------- from file to model
def load_backbone(source, *, pool="mean", num_classes=0, image_size=None, drop_path=0.0, name=None):
    """-> (ViT, checkpoint dict, Report).  source: path or dict, ours (kind, arch, model) or released (model, module)

    pool: "mean" or "cls" as in ViT; None keeps the norm the file has (`norm` from pre-training, which a linear probe of
    [CLS] needs, else fc_norm). num_classes: 0 for no head, None for the head in the file; a head of another size is
    begun afresh. image_size: int or (H, W), default that of the file. The model takes imagenet_normalize(images).
    """
    checkpoint = source if isinstance(source, dict) else read(Path(source))
    name = name or ("the checkpoint" if isinstance(source, dict) else str(source))       # how errors call it
    weights = state_dict(checkpoint, name)
    arch = read_architecture(weights, checkpoint.get("arch"), name)
    if pool is None:
        pool = "mean" if "fc_norm.weight" in strip_prefix(weights) else None
    if num_classes is None:
        if "head.weight" not in weights:
            raise UserError(f"{name} holds no classifier (no head.weight): fine-tune it first, with python finetune.py")
        num_classes = len(weights["head.weight"])
    source_grid = grid_of(arch["image_size"], arch["patch_size"])
    arch["image_size"] = image_size or arch["image_size"]
    grid_of(arch["image_size"], arch["patch_size"])          # complains where it does not divide
    model = ViT(**arch, pool=pool, num_classes=num_classes, drop_path=drop_path)
    return model, checkpoint, load_state(model, weights, source_grid, name)


def read(path):
    """A checkpoint, or a .safetensors file, which holds nothing but tensors by name."""
    if path.suffix != ".safetensors" or not path.is_file():
        return read_file(path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}): make or fetch it anew") from error


def unwrap(checkpoint):
    return next((checkpoint[k] for k in WRAPPERS if isinstance(checkpoint.get(k), dict)), checkpoint)


def arguments(checkpoint):
    """What a file was made with: a Namespace in released files, a dict in ours. -> dict, empty where it does not say"""
    said = checkpoint.get("args")
    return vars(said) if isinstance(said, argparse.Namespace) else said if isinstance(said, dict) else {}


def look_at(path, preset, remedy=""):
    """-> (checkpoint, kind, arch) of a file that a stage is to start from; UserError where --model is another one."""
    checkpoint = read_file(path, remedy=remedy)
    state = state_dict(checkpoint, str(path))
    kind, arch = kind_of(state, str(path)), read_architecture(state, checkpoint.get("arch"), str(path))
    if arch["width"] != PRESETS[preset]["width"]:
        raise UserError(f"{path} has width {arch['width']}, --model {preset} has {PRESETS[preset]['width']}: "
                        f"give the --model it was made with")
    return checkpoint, kind, arch


def state_dict(checkpoint, name="the checkpoint"):
    """The tensors by name, wherever the checkpoint keeps them. Index buffers of released files follow from the grid."""
    weights = {k: v for k, v in unwrap(checkpoint).items() if not str(k).endswith(INDEX)}
    if not weights or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UserError(f"{name} holds no weights by name, neither under {', '.join(WRAPPERS)} nor directly: "
                        f"give a checkpoint of a stage here, or a released one")
    if odd := [k for k, v in weights.items() if not v.is_floating_point() and not k.endswith("num_batches_tracked")]:
        raise UserError(f"{name} holds {weights[odd[0]].dtype} numbers in {listed(odd)}, which are no weights: the "
                        f"file is damaged or of another kind")
    return weights


def kind_of(weights, name="the checkpoint"):
    """vqkd, pretrain, finetune, segment or backbone, judged by the names alone."""
    for kind, prefix in PREFIX.items():
        if f"{prefix}patch_embed.proj.weight" in weights:
            return kind
    if "patch_embed.proj.weight" not in weights:
        found = ", ".join(sorted({k.split(".")[0] for k in weights})[:4])
        raise UserError(f"{name} holds no Vision Transformer (no patch_embed.proj.weight; names begin with {found}): "
                        f"give a file of vqkd.py, pretrain.py or finetune.py, or a released BEiT v2 checkpoint")
    has = {k.split(".")[0] for k in weights}
    return "pretrain" if has & {"mask_token", "lm_head"} else "finetune" if "head" in has else "backbone"


def strip_prefix(weights):
    return {re.sub("^(encoder|backbone)[.]", "", k): v for k, v in weights.items()}


def grid_of(image_size, patch_size):
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % patch_size or width % patch_size:
        raise UserError(f"the image size {height}x{width} is not a multiple of the patch size {patch_size}: change one")
    return height // patch_size, width // patch_size


def read_architecture(weights, stated=None, name="the checkpoint"):
    """ViT keyword arguments from names and shapes. Shapes cannot tell the sides of a non-square grid, nor the number of
    heads without a table; those come from `stated`, the arch that our own files hold (released ones are square)."""
    kind_of(weights, name)
    # timm's training checkpoints have a string in that place, the name of their model.
    weights, stated = strip_prefix(weights), stated if isinstance(stated, dict) else {}
    shape = {k: tuple(v.shape) for k, v in weights.items()}
    tables = [v for k, v in shape.items() if k.endswith(TABLE)]
    positions = shape.get("pos_embed")
    blocks = {int(k.split(".")[1]) for k in weights if re.match(r"blocks\.\d+\.", k)}
    if bool(tables) == bool(positions) or not blocks:
        raise UserError(f"{name} has {len(blocks)} blocks, {len(tables)} relative-position tables and "
                        f"{'an' if positions else 'no'} absolute position embedding: one kind of positions is needed")
    try:
        width, channels, patch, _ = shape["patch_embed.proj.weight"]
        rows = tables[0][0] - 3 if tables else positions[1] - 1
        heads = tables[0][1] if tables else stated.get("heads", width // 64)     # 64 per head in all released models
        hidden = shape["blocks.0.mlp.fc1.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{name} is incomplete or has odd shapes ({error}): fetch or make it anew") from error
    if not heads or width % heads:
        raise UserError(f"{name} does not tell the number of attention heads (width {width}): its `arch` is needed")
    side = (math.isqrt(rows) + 1) // 2 if tables else math.isqrt(rows)
    image_size = stated.get("image_size", side * patch)
    gh, gw = grid_of(image_size, patch)
    if rows != ((2 * gh - 1) * (2 * gw - 1) if tables else gh * gw):
        raise UserError(f"{name} has positions for {rows} {'offsets' if tables else 'patches'}, which is not a grid of "
                        f"{gh}x{gw} patches: the file is damaged, or not square and without `arch`")
    depth = max(1 + max(blocks), stated.get("depth", 0))     # a last block that is missing altogether is missed, too
    scaled = any(k.endswith((".gamma_1", ".gamma_2")) for k in weights)          # the values themselves are in the file
    return dict(image_size=image_size, patch_size=patch, width=width, depth=depth, heads=heads, in_channels=channels,
                mlp_ratio=hidden / width, positions="per_block" if tables else "absolute",
                layer_scale=0.1 if scaled else 0.0)


@torch.no_grad()
def load_state(model, weights, source_grid, name="the checkpoint"):
    """Put weights (names of any kind) into a ViT. -> Report. UserError for names or shapes that do not belong."""
    kind = kind_of(weights, name)
    weights = table_per_block(strip_prefix(weights), model.depth)
    own = model.state_dict()
    if "head.weight" in weights and "head.weight" in own and len(weights["head.weight"]) != model.num_classes:
        weights = {k: v for k, v in weights.items() if not k.startswith("head.")}        # other classes: a fresh head
    for k, v in weights.items():
        if k in own and not torch.isfinite(v).all():
            raise UserError(f"{name}: {k} holds numbers that are not finite; take an earlier checkpoint")
        if k.endswith(TABLE):
            weights[k] = v = resize_relative_table(v, source_grid, model.grid)
        elif k == "pos_embed":
            weights[k] = v = resize_pos_embed(v, source_grid, model.grid)
        if k in own and v.shape != own[k].shape:
            raise UserError(f"{name}: {k} has shape {tuple(v.shape)} where the model has {tuple(own[k].shape)}: "
                            f"the file is damaged or of another architecture")
    report = Report([k for k in own if k in weights], [k for k in own if k not in weights],
                    [k for k in weights if k not in own])
    left_over, fresh = EXPECTED[kind]
    for what, names, allowed in (("lacks", report.missing, fresh), ("has the unknown", report.unexpected, left_over)):
        odd = [k for k in names if not re.fullmatch(allowed, k)]
        if odd:
            remedy = "the file is incomplete, or not of this model"
            if odd[0].split(".")[0] in ("norm", "fc_norm"):
                pooling = "[CLS]" if "norm.weight" in weights else "mean"
                remedy = f"it was trained with {pooling} pooling, so choose that"
            raise UserError(f"{name} ({kind}) {what} {listed(odd)}: {remedy}")
    if kind == "vqkd":
        weights = fold_pixel_range(weights)
    model.load_state_dict({k: weights[k].float() for k in report.loaded}, strict=False)
    return report


def table_per_block(weights, depth):
    """Pre-training has one table for all blocks; in fine-tuning each block trains a copy of its own."""
    shared = weights.get(f"rel_pos_bias.{TABLE}")
    copies = {} if shared is None else {f"blocks.{i}.attn.{TABLE}": shared for i in range(depth)}
    return {k: v for k, v in weights.items() if k != f"rel_pos_bias.{TABLE}"} | copies


def listed(names):
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def fold_pixel_range(weights):
    """The tokenizer was trained on pixels in [-1, 1], a backbone gets (x - mean) / std: the first layer, being linear,
    can absorb the change. With n = (x - m) / s:  2x - 1 = 2 s n + (2m - 1),  so  W' = 2 s W,  b' = b + W (2m - 1)."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    w, b = weights["patch_embed.proj.weight"].float(), weights["patch_embed.proj.bias"].float()     # (D, 3, p, p), (D,)
    return weights | {"patch_embed.proj.weight": w * (2 * std).view(1, 3, 1, 1),
                      "patch_embed.proj.bias": b + (w * (2 * mean - 1).view(1, 3, 1, 1)).sum(dim=(1, 2, 3))}


# -------------------------------------------------------------------------------------------------- another grid size
def geometric_offsets(source, target):
    """Where the offsets -(source-1) .. source-1 of the old grid lie on the axis of the new: 0, +-1, +-(1 + q), ...

    Far offsets matter less exactly than near ones, so the steps grow by a ratio q, such that 1 + q + ... + q^(source-2)
    meets target - 1. Recipe, not in the paper: bisection in 1.01 .. 1.5, so q never shrinks the steps.
    """
    if source == target:
        return np.arange(1 - source, source, dtype=float)
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        if (1 - q ** (source - 1)) / (1 - q) > target - 1:
            right = q
        else:
            left = q
    positive = np.cumsum(q ** np.arange(source - 1))         # 1, 1 + q, 1 + q + q^2, ...
    return np.concatenate([-positive[::-1], [0.0], positive])


def resize_relative_table(table, source_grid, target_grid):
    """Table ((2gh-1)(2gw-1) + 3, H) of one grid to another's: a cubic spline per head, the three [CLS] rows copied.

    This is what the released code does. timm (1.0.31) has the same geometric grid but interpolates linearly on it: from
    14x14 to 24x24 its tables differ by up to 2 % of their height where they are smooth (far more where they are noise),
    the logits of a random base model at 384 by 0.3 %. --to timm --image-size resizes before timm has to.
    """
    if tuple(source_grid) == tuple(target_grid):
        return table
    if len(table) != 3 + math.prod(2 * g - 1 for g in source_grid):
        raise UserError(f"a position table has {len(table)} rows, too many or too few for {source_grid[0]}x"
                        f"{source_grid[1]} patches: the file is damaged, or its `arch` is wrong")
    if min(source_grid) < 2:
        raise UserError(f"a grid of {source_grid[0]}x{source_grid[1]} patches has no offsets to interpolate between: "
                        f"keep the image size of these weights")
    from scipy.interpolate import RectBivariateSpline        # here, because it is slow to import
    sides = [2 * g - 1 for g in source_grid]
    old = [geometric_offsets(s, t) for s, t in zip(source_grid, target_grid)]
    new = [np.arange(1 - t, t, dtype=float) for t in target_grid]
    heads = []
    for head in table[:-3].T.double().numpy():               # (rows - 3,)
        spline = RectBivariateSpline(*old, head.reshape(sides), kx=min(3, sides[0] - 1), ky=min(3, sides[1] - 1), s=0)
        heads.append(torch.from_numpy(spline(*new)).flatten())
    return torch.cat([torch.stack(heads, dim=1).to(table.dtype), table[-3:]])


def resize_pos_embed(pos_embed, source_grid, target_grid):
    """Absolute positions (1, 1 + N, D) of one grid to another's: bicubic over the patches, [CLS] kept."""
    if tuple(source_grid) == tuple(target_grid):
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    square = patches.unflatten(1, tuple(source_grid)).permute(0, 3, 1, 2)        # (1, D, gh, gw)
    square = F.interpolate(square.float(), size=tuple(target_grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, square.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)
