"""Weights in and out: our checkpoints, the released ones and timm's, recognised by their names, loaded and converted.

    file --names, shapes--> what it is --expand, resize--> a ViT with its weights, and a report of every name
                                       --check every name--> a file for ours | the released code | timm

Fine-tuning copies the one relative-position table of pre-training into every block, and another image size means
another grid of patches, so tables or positions are resized. Names that are left over, or find nothing in the file, are
an error unless EXPECTED lists them as thrown away or begun afresh.

What is written to disk stands here, too: files that are whole or not there, with a checksum (write_file, read_file),
what a run says of itself (describe_run) and its log (Log).

Read in this order: load_backbone, read_architecture, load_state, resize_relative_table; then examine, convert.

    python weights.py --check FILE                       # what it is, how large, which commands take it
    python weights.py IN OUT --to ours                   # or released, timm (OUT may end in .safetensors)
    python weights.py IN OUT --to timm --image-size 384  # position tables resized as the released code does it
"""
# Shapes used in this file:  gh x gw = N patches, D width, H heads; a table has (2gh - 1)(2gw - 1) + 3 rows

import argparse
import collections
import contextlib
import hashlib
import json
import math
import os
import pickle
import platform
import re
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import IMAGENET_MEAN, IMAGENET_STD, PRESETS, ViT, relative_position_index

ROOT = Path(__file__).resolve().parent
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


# ------------------------------------------------------------------------------------------------------ files on disk
class UserError(Exception):
    """A mistake the user can mend: one sentence that names the thing and the remedy. engine.run exits 2 with it."""


def tensors(contents, place=""):
    """Every tensor inside nested dicts, lists and tuples, with its place: ("model.norm.weight", tensor), ..."""
    if isinstance(contents, torch.Tensor):
        yield place, contents
    elif isinstance(contents, (dict, list, tuple)):
        pairs = contents.items() if isinstance(contents, dict) else enumerate(contents)
        for key, value in pairs:
            yield from tensors(value, f"{place}.{key}" if place else str(key))


def checksum(contents):
    """SHA-256 over place, kind, shape and bytes of every tensor: torch.load itself would not notice a flipped bit."""
    digest = hashlib.sha256()
    for place, t in tensors(contents):
        digest.update(f"{place} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_file(path, contents, previous=None):
    """torch.save to a temporary name beside `path`, flush to disk, then rename: a reader never sees half a file, and
    what was there stays until the new file is complete (under the name `previous`, where one is given)."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            # A file of tensors alone, as timm reads it, has no room for one.
            bare = all(isinstance(v, torch.Tensor) for v in contents.values())
            torch.save(contents if bare else contents | dict(checksum=checksum(contents)), f)
            f.flush()
            os.fsync(f.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary.is_file():
            temporary.unlink()
        raise UserError(f"could not write {path} ({' '.join(str(error).split())}): free some space or choose another "
                        f"--out; the file that was there before is untouched") from error


def read_file(path, kind=None, remedy=""):
    """Load a checkpoint on the CPU without running any code in it; UserError for what is none, or not what was written.
    An argparse.Namespace, which released files hold, is harmless and allowed; any other object is refused."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}" + (f"; {remedy}" if remedy else ""))
    size = os.path.getsize(path)
    try:
        # torch.save does not compress. A file that states more bytes than it has would fill the memory (a zip bomb).
        if zipfile.is_zipfile(path) and sum(part.file_size for part in zipfile.ZipFile(path).infolist()) > size:
            raise UserError(f"{path} unpacks to more than it holds, which no checkpoint does: not loaded")
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
        found = list(tensors(contents))
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds objects other than tensors and numbers, or is damaged: not loaded") from error
    except Exception as error:               # a damaged file raises whatever its reader stumbles over
        raise UserError(f"{path} is truncated or no checkpoint at all: make or fetch it anew") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__}, not a checkpoint")
    odd = [place for place, t in found if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized]
    if odd or sum(t.numel() * t.element_size() for _, t in found) > 4 * size + 2**20:        # 4: weights may be shared
        what = f"a tensor of an odd kind ({odd[0]})" if odd else "tensors"
        raise UserError(f"{path} holds {what} without the numbers that it would fill: not loaded")
    if "checksum" in contents and contents["checksum"] != checksum(contents):
        raise UserError(f"{path} is damaged (its tensors do not give its checksum): take an earlier copy, or make it "
                        f"anew")
    if kind is not None and contents.get("kind") != kind:
        raise UserError(f"{path} is a {contents.get('kind', 'foreign')!r} file where a {kind!r} file is needed")
    return contents


def describe_run(kind, args):
    """What every file says about itself, beside its weights: arguments, commit, and a hash of each source file."""
    status, commit = subprocess.getstatusoutput(f"git -C {shlex.quote(str(ROOT))} rev-parse HEAD")
    return dict(kind=kind, preset=args.model, data=str(args.data), image_size=args.image_size, args=plain_args(args),
                commit="unknown" if status else commit, torch=str(torch.__version__), source_hash={
                    f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:12] for f in sorted(ROOT.glob("*.py"))})


def plain_args(args):
    return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in vars(args).items()}


def set_aside(stage, out):
    """--fresh: earlier results move to OUT.1 (or .2 ...). With the tokenizer goes the whole folder, which stands on it;
    a later stage moves only its own files, for it needs the others."""
    aside = Path(next(f"{out}.{n}" for n in range(1, 10**6) if not Path(f"{out}.{n}").exists()))
    if stage == "vqkd" and out.exists():
        out.rename(aside)
    for f in sorted(out.glob(f"{stage}.*")):
        aside.mkdir(exist_ok=True)
        f.rename(aside / f.name)


class Log:
    """One JSON line per call on rank 0, appended to STAGE.jsonl; the first line says what the run is. On resuming,
    lines of steps that the resume file does not know are cut off, so that no step stands there twice. With `append`
    (measurements, which are no runs) all lines stay, and another first line follows them."""

    def __init__(self, path, args, process, start_step=0, append=False, **facts):
        self.path, self.active, self.begin = Path(path), process.rank == 0, time.time()
        if not self.active:
            return
        place = dict(machine=f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
                     device=str(process.device),
                     threads=torch.get_num_threads(), processes=process.world_size, torch=str(torch.__version__))
        with self.writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            lines = [x for x in lines if x.endswith("}\n") and (
                append or start_step and json.loads(x).get("step", -1) < start_step)]
            temporary = Path(f"{self.path}.tmp")             # a kill between two lines must not cost the log
            temporary.write_text("".join(lines))
            os.replace(temporary, self.path)
        if append or not lines:
            self(**describe_run(self.path.stem, args) | place, python=platform.python_version(), cores=os.cpu_count(),
                 **facts)
            return
        first = json.loads(lines[0])
        if changed := [f"{k} {first[k]} -> {v}" for k, v in facts.items() if k in first and first[k] != round(v, 6)]:
            raise UserError(f"{args.data} is not what it was when this run began ({', '.join(changed)}): restore it, "
                            f"or add --fresh")
        if moved := ", ".join(f"{k} {first.get(k)} -> {v}" for k, v in place.items() if first.get(k) != v):
            print(f"note: the run goes on in another place ({moved}): its end will be close, not equal to the last "
                  f"bit, to that of a run without a break", file=sys.stderr)

    @contextlib.contextmanager
    def writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}): free some space, or put the folder back if "
                            f"it was moved, or choose another --out; the last resume file is untouched") from error

    def __call__(self, **facts):
        if self.active:
            facts = {k: round(v, 6) if isinstance(v, float) else v for k, v in facts.items()}
            with self.writing(), open(self.path, "a") as f:
                f.write(json.dumps(facts | dict(time=round(time.time() - self.begin, 2))) + "\n")


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


# ------------------------------------------------------------------------------------------------- from file to file
# A file, taken apart: whose layout it has (ours, released, timm), kind, arch, its tensors by name, those that only the
# released code has (aside), the other entries (rest), and the names of what nobody needs (dropped).
Contents = collections.namedtuple("Contents", "layout kind arch weights aside rest dropped")

# Names are the same in every layout, by design. This is what has no place in one of them:
TEACHER = r"(teacher_model|scaling_layer)\..*"                   # ours: a copy of CLIP or DINO in a released tokenizer
DEAD = r"quantize\.embedding\.(cluster_size|embed_avg|initted)"  # ours, but kept aside: the released code asks for them
SECOND_TEACHER = r"more_decode_task_layers\..*"                  # released
PRETRAINING = r"mask_token|(lm_head|cls_pt_\w+)\..*"             # timm
STATE = ("optimizer", "scaler", "lr_scheduler", "model_ema", "amp", "health")     # of a run, not of a model

ABOUT = {                # kind: what it is, and the commands that take it
    "vqkd": ("VQ-KD tokenizer", "pretrain.py --tokenizer", "vqkd.py --encode IMAGES --init"),
    "pretrain": ("pre-trained backbone with its heads", "finetune.py --checkpoint", "linprobe.py --checkpoint",
                 "segment.py --checkpoint"),
    "finetune": ("classifier", "finetune.py --eval --checkpoint", "finetune.py --init 21k --checkpoint",
                 "segment.py --init 21k --checkpoint"),
    "segment": ("UPerNet for segmentation", "segment.py --eval --checkpoint"),
    "backbone": ("backbone without heads", "finetune.py --checkpoint", "linprobe.py --checkpoint"),
}
SIZES = {"quantize.embedding.weight": "codes", "decode_task_layer.2.bias": "numbers to rebuild (CLIP 512, DINO 768)",
         "lm_head.bias": "codes to guess", "head.bias": "classes", "decode_head.conv_seg.bias": "classes per pixel"}


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def conv_norm(conv, norm, *shape):
    """A convolution without bias (none at all where conv is None) and its BatchNorm."""
    return ({f"{conv}.weight": shape} if conv else {}) | affine(norm, *shape[:1]) | {
        f"{norm}.running_mean": shape[:1], f"{norm}.running_var": shape[:1], f"{norm}.num_batches_tracked": ()}


def shapes_of(kind, weights, arch):
    """Every name that a complete file of this kind holds, with its shape. What only heads know (the number of codes, of
    classes, of blocks in a head, a teacher's width) is read off their own tensors."""
    D, prefix = arch["width"], PREFIX.get(kind, "")

    def size(name, axis=0):
        return weights[name].shape[axis] if name in weights and weights[name].ndim > axis else 0

    def count(name):                                         # of layers in a list, by their numbers
        return max((1 + int(m[1]) for m in (re.match(rf"{name}\.(\d+)\.", k) for k in weights) if m), default=0)

    def vit(prefix, depth, **changes):                       # one block is built and stands for all
        sizes = {k: arch[k] for k in ("image_size patch_size width heads in_channels mlp_ratio positions layer_scale "
                                      "pool").split()}
        one = ViT(depth=1, **(sizes | changes)).state_dict()
        return {prefix + k.replace("blocks.0.", f"blocks.{i}."): tuple(v.shape) for k, v in one.items()
                for i in range(depth if k.startswith("blocks.0.") else 1)}

    shapes = vit(prefix, arch["depth"])
    if kind == "segment" or (kind == "backbone" and not any("norm" in k.split(".")[0] for k in weights)):
        shapes = {k: v for k, v in shapes.items() if not k.startswith(f"{prefix}norm.")}
    if kind == "vqkd":
        dim, grid = size("quantize.embedding.weight", 1), grid_of(arch["image_size"], arch["patch_size"])
        shapes |= vit("decoder.", count(r"decoder\.blocks"), image_size=grid, patch_size=1, in_channels=dim)
        shapes |= {f"quantize.{k}": (size("quantize.embedding.weight"), dim)[:n] for k, n in (
            ("embedding.weight", 2), ("cluster_size", 1))}
        more = [f"more_decode_task_layers.{i}" for i in range(count("more_decode_task_layers"))]
        shapes |= affine("encode_task_layer.0", D, D) | affine("encode_task_layer.2", dim, D)
        for name in ("decode_task_layer", *more):
            shapes |= affine(f"{name}.0", D, D) | affine(f"{name}.2", size(f"{name}.2.bias"), D)
    elif kind == "pretrain":
        shapes |= {"mask_token": (1, 1, D)} | affine("lm_head", size("lm_head.bias"), D)
        for i in range(count("cls_pt_layers")):              # like any block, but without a table of its own
            shapes |= {k.replace("blocks.0.", f"cls_pt_layers.{i}."): v for k, v in shapes.items()
                       if k.startswith("blocks.0.") and not k.endswith(TABLE)}
        if any(k.startswith(("cls_pt_norm.", "cls_pt_lm_head.")) for k in weights):
            shapes |= affine("cls_pt_norm", D) | affine("cls_pt_lm_head", size("lm_head.bias"), D)
    elif kind == "finetune":
        shapes |= affine("head", size("head.bias"), D)
    elif kind == "segment":
        classes, C = size("decode_head.conv_seg.bias"), size("decode_head.conv_seg.weight", 1)
        aux = size("auxiliary_head.conv_seg.weight", 1)
        for name in ("fpn1.0", "fpn1.3", "fpn2.0"):          # transposed convolutions
            shapes |= affine(f"backbone.{name}", D, D, 2, 2)
        shapes |= conv_norm(None, "backbone.fpn1.1", D)
        for name, *shape in [(f"psp_modules.{i}.1", C, D, 1, 1) for i in range(4)] + [             # pools 1, 2, 3, 6
                *((f"lateral_convs.{i}", C, D, 1, 1) for i in range(3)), ("bottleneck", C, D + 4 * C, 3, 3),
                *((f"fpn_convs.{i}", C, C, 3, 3) for i in range(3)), ("fpn_bottleneck", C, 4 * C, 3, 3)]:
            shapes |= conv_norm(f"decode_head.{name}.conv", f"decode_head.{name}.bn", *shape)
        shapes |= conv_norm("auxiliary_head.convs.0.conv", "auxiliary_head.convs.0.bn", aux, D, 3, 3)
        shapes |= affine("decode_head.conv_seg", classes, C, 1, 1)
        shapes |= affine("auxiliary_head.conv_seg", classes, aux, 1, 1)
    return shapes


def examine(path):
    """Take a file apart and check it name by name, shape by shape. -> Contents; UserError for what does not belong."""
    file = read(path)
    raw, weights = unwrap(file), state_dict(file, str(path))
    kind, rest = kind_of(weights, path), {}
    stated = file["arch"] if isinstance(file.get("arch"), dict) else {}
    arch = read_architecture(weights, stated, path)
    aside = {k: v for k, v in weights.items() if re.fullmatch(DEAD, k)}
    teacher = [k for k in weights if re.fullmatch(TEACHER, k)]
    weights = {k: v for k, v in weights.items() if k not in aside and k not in teacher}
    bare = strip_prefix(weights)
    if f"rel_pos_bias.{TABLE}" in bare:
        arch["positions"] = "shared"
    arch["pool"] = "mean" if any(k.startswith("fc_norm.") for k in bare) else "cls" if kind == "finetune" else None
    if kind == "finetune" and "head.bias" in weights:
        arch["num_classes"] = len(weights["head.bias"])

    wanted = shapes_of(kind, weights, arch)
    index = relative_position_index(*grid_of(arch["image_size"], arch["patch_size"]))
    problems = [("lacks", [k for k in wanted if k not in weights]),
                ("has the unknown", [k for k in weights if k not in wanted]),
                ("has in a wrong shape", [f"{k} {tuple(weights[k].shape)} instead of {shape}" for k, shape in
                                          wanted.items() if k in weights and weights[k].shape != shape]),
                ("has numbers that are not finite in", [k for k, v in weights.items() if not torch.isfinite(v).all()]),
                ("orders its offsets in another way in", [k for k, v in raw.items() if str(k).endswith(INDEX) and (
                    not torch.is_tensor(v) or v.shape != index.shape or (v != index).any())])]
    if found := " and ".join(f"{what} {listed(names)}" for what, names in problems if names):
        raise UserError(f"{path} ({kind}) {found}: the file is incomplete, damaged or not of this model")
    if raw is not file:
        aside |= file.get("released_only", {})
        rest = {k: v for k, v in file.items() if k not in (*STATE, *WRAPPERS, "kind", "arch", "released_only")}
    if str(file.get("kind")).startswith(f"{kind}_"):         # finetune_21k: what no name tells
        rest["our_kind"] = file["kind"]
    rest["args"] = arguments(rest)
    layout = "ours" if "kind" in file else "timm" if raw is file else "released"
    return Contents(layout, kind, arch | stated, weights, aside, rest, teacher + [k for k in STATE if k in file])


def resize(c, image_size):
    """The same contents for images of another size: every table and position embedding is interpolated."""
    if image_size < 2 * c.arch["patch_size"]:
        raise UserError(f"--image-size {image_size}: a patch has {c.arch['patch_size']} pixels, take two at least")
    grids = [grid_of(size, c.arch["patch_size"]) for size in (c.arch["image_size"], image_size)]
    weights = {k: resize_relative_table(v, *grids) if k.endswith(TABLE) else
               resize_pos_embed(v, *grids) if k.endswith("pos_embed") else v for k, v in c.weights.items()}
    return c._replace(weights=weights, arch=c.arch | dict(image_size=image_size),
                      rest=c.rest | {k: image_size for k in c.rest if k == "image_size"})


def convert(c, to):
    """-> what goes into a file of layout `to`, and the names that have no place there."""
    left = {"ours": TEACHER, "released": SECOND_TEACHER, "timm": PRETRAINING}[to]
    weights = {k: v for k, v in c.weights.items() if not re.fullmatch(left, k)}
    dropped = [k for k in c.weights if k not in weights]
    if to == "ours":
        aside = dict(released_only=c.aside) if c.aside else {}
        # Without source_hash: a stage takes a file that has one for the end of its own run.
        rest = {k: v for k, v in c.rest.items() if k not in ("source_hash", "our_kind")}
        return rest | aside | dict(kind=c.rest.get("our_kind", c.kind), arch=c.arch, model=weights), dropped
    if to == "timm":
        if c.kind in PREFIX:
            raise UserError(f"timm has no place for a {ABOUT[c.kind][0]}: use --to ours or --to released")
        weights = table_per_block(weights, c.arch["depth"])
        return {k: v.clone(memory_format=torch.contiguous_format) for k, v in weights.items()}, dropped
    index, full = relative_position_index(*grid_of(c.arch["image_size"], c.arch["patch_size"])), {}
    for k, v in weights.items():
        full |= {k: v} | ({k.removesuffix(TABLE) + INDEX: index} if k.endswith(TABLE) else {})
    if c.kind == "vqkd":                                     # loaded strictly, so with the dead entries
        name, codes = "quantize.embedding", weights["quantize.embedding.weight"]
        full |= {f"{name}.cluster_size": torch.zeros(len(codes)), f"{name}.embed_avg": codes.clone(),
                 f"{name}.initted": torch.ones(1)} | c.aside             # 1: no k-means start on top of these codes
    wrapped = dict(model=full)
    if c.kind == "segment":              # mmseg reads the names of the classes from meta
        names = dict(CLASSES=tuple(c.rest["classes"])) if c.rest.get("classes") else {}
        wrapped = dict(meta=names | (c.rest.get("meta") or {}), state_dict=full)
    # arch is ours: it tells what shapes cannot (heads without a table, unequal sides); the released code ignores it.
    return c.rest | dict(arch=c.arch, args=argparse.Namespace(**c.rest["args"])) | wrapped, dropped


def timm_arguments(arch):
    """For timm.create_model("beitv2_base_patch16_224", ...): the model which the file of --to timm loads strictly."""
    more = dict(use_abs_pos_emb=True, use_rel_pos_bias=False) if arch["positions"] == "absolute" else {}
    more |= {} if arch["layer_scale"] else dict(init_values=0)           # None is left out by create_model
    more |= {} if arch["mlp_ratio"] == 4 else dict(mlp_ratio=arch["mlp_ratio"])
    more |= {} if arch["in_channels"] == 3 else dict(in_chans=arch["in_channels"])
    return dict(img_size=arch["image_size"], patch_size=arch["patch_size"], embed_dim=arch["width"],
                depth=arch["depth"], num_heads=arch["heads"], num_classes=arch.get("num_classes", 0),
                global_pool="avg" if arch["pool"] == "mean" else "token", **more)


def describe(c, path):
    """What a file is, its sizes, and the commands that take it: lines for a reader."""
    a, (what, *uses), w = c.arch, ABOUT[c.kind], c.weights
    count = sum(v.numel() for k, v in w.items() if not re.match(r"quantize\.|.*\.(running_|num_batches)", k))
    lists = {m[1]: m[2] for m in (re.match(r"(decoder\.blocks|cls_pt_layers)\.(\d+)", k) for k in w) if m}
    sizes = [f"{len(w[k])} {name}" for k, name in SIZES.items() if k in w]
    sizes += [f"{int(last) + 1} in {name}" for name, last in lists.items()]
    height, breadth = (a["image_size"],) * 2 if isinstance(a["image_size"], int) else a["image_size"]
    model = {preset["width"]: name for name, preset in PRESETS.items()}.get(a["width"], "NONE_OF_THIS_WIDTH")
    lines = [("kind", f"{what} ({c.kind}), layout: {c.layout}"),
             ("images", f"{height}x{breadth}, patch {a['patch_size']}"),
             ("backbone", f"width {a['width']}, {a['depth']} blocks, {a['heads']} heads, positions {a['positions']}, "
                          f"{'layer scale' if a['layer_scale'] else 'no layer scale'}, pool {a['pool']}"),
             ("heads", ", ".join(sizes) or "none"), ("parameters", f"{count:,} in {len(w)} tensors"),
             ("checksum", "agrees with the tensors" if "checksum" in c.rest else "none in this file"),
             ("left behind", ", ".join(sorted({k.split('.')[0] for k in c.dropped})) or "nothing"),
             *(("good for", f"python {use} {path} --model {model}") for use in uses)]
    return "\n".join([str(path)] + [f"  {label:12} {text}" for label, text in lines])


def write(path, contents):
    """As write_file, or a .safetensors file: under a temporary name, then renamed."""
    if path.suffix != ".safetensors":
        return write_file(path, contents)
    from safetensors.torch import save
    temporary = Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(save(contents, metadata=dict(format="pt")))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"could not write {path} ({error.strerror}): free some space or choose another OUT") from error


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", type=Path, metavar="IN OUT", help="a checkpoint of any kind, and one to write")
    p.add_argument("--to", choices=["ours", "released", "timm"], help="whose layout OUT gets")
    p.add_argument("--image-size", type=int, help="resize positions to images of so many pixels")
    p.add_argument("--check", type=Path, metavar="FILE", help="check every name of FILE, say what it is and good for")
    args = p.parse_args(argv)
    if args.check:
        print(describe(examine(args.check), args.check))
        return
    if len(args.files) != 2 or args.to is None:
        raise UserError("give IN OUT --to ours|released|timm, or --check FILE")
    source, target = args.files
    if target.exists():
        same = source.exists() and target.samefile(source)
        raise UserError(f"{target} {'is IN itself' if same else 'exists'}: nothing is overwritten, choose another OUT")
    if target.suffix == ".safetensors" and args.to != "timm":
        raise UserError(f"{target}: a .safetensors file holds tensors alone, which only --to timm makes; name it .pt")
    c = examine(source)
    if args.image_size is not None:
        c = resize(c, args.image_size)
    contents, dropped = convert(c, args.to)
    write(target, contents)
    dropped = collections.Counter(k.split(".")[0] for k in c.dropped + dropped)
    print(f"{source} ({c.kind}, {c.layout}) -> {target} ({args.to}): {len(unwrap(contents))} names\nleft behind: "
          + (", ".join(f"{name} ({n})" if n > 1 else name for name, n in dropped.items()) or "nothing"))
    if args.to == "timm":
        options = ", ".join(f"{k}={v!r}" for k, v in timm_arguments(c.arch).items())
        print(f'load it strictly into timm.create_model("beitv2_base_patch16_224", {options})')


if __name__ == "__main__":
    import engine                        # which imports this file under its name: main has to be that one's
    import weights
    engine.run(weights.main)
