"""Everything a tokenizer can be distilled from: pixels, hand-made features, semantic features (paper, Section 2.2).

    pixel                       the patch's own pixels, normalised      what plain autoencoding learns
    hog                         histograms of oriented gradients        hand-made, needs no weights: the default of tiny
    clip                        CLIP ViT-B/16 patch features            the paper's teacher: default of small and base
    dino                        DINO ViT-B/16 patch features            the paper's other teacher
    open_clip:NAME@TAG_OR_FILE  any CLIP of open_clip with a plain ViT as its image tower, for instance the larger
                                open_clip:ViT-L-14-quickgelu@openai
    timm:NAME@FILE, timm:NAME   any ViT of timm, with weights from a file or timm's own
    clip+dino                   several at once, any of the above: their features side by side

A teacher is a plain callable: images (B, 3, H, W) in [0, 1] -> features t (B, N, C), float32, without gradient.
N = gh x gw are the STUDENT's patches. It is no module of the student: never trained, never saved, never wrapped.
The network part may run under the caller's autocast.

A large teacher costs more than its student. cache_features computes the features of all images once, into a file.
"""
# Shapes used in this file:  B images, N = gh x gw patches, C features of a patch (`dim`), p patch size in pixels,
#                            n images in a data set
import contextlib
import functools
import logging
import math
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import attention_weights
from support.files import UserError

NAMES = "clip, dino, open_clip:NAME@TAG_OR_FILE, timm:NAME@FILE, hog, pixel, or several joined by + (clip+dino)"
PAPER = {"clip": "open_clip:ViT-B-16-quickgelu@openai", "dino": "timm:vit_base_patch16_224.dino"}


def widths(name, side, patch_size):
    """C of each teacher, for --dry-run: known for the two of the paper, free of cost for ours."""
    known = dict(clip=512, dino=768)
    return [known.get(one) or build_one(one, (side, side), patch_size, "cpu").dim for one in split_names(name)]


def build_teacher(name, grid, patch_size, device):
    """-> the teacher called `name`, whose patches are the student's: `grid` (gh, gw) of `patch_size` pixels each.

    It says who it is: name, names and dims (one short label and one width per teacher joined by +), dim = sum(dims).
    """
    parts = split_names(name)
    built = [build_one(part, (grid[0], grid[1]), patch_size, device) for part in parts]
    teacher = built[0] if len(built) == 1 else SideBySide(built)
    # Labels for log lines: clip, dino, hog, pixel, else the model's name; numbered where two have the same.
    labels = [part.partition("@")[0].partition(":")[2] or part for part in parts]
    teacher.name, teacher.grid, teacher.dims = name, (grid[0], grid[1]), tuple(one.dim for one in built)
    teacher.names = tuple(x if labels.count(x) == 1 else f"{x}_{i}" for i, x in enumerate(labels, 1))
    return teacher


def split_names(name):
    """"clip+dino" -> ["clip", "dino"]. Only a + before the name of a teacher splits: that of a file may hold one."""
    parts = re.split(r"\+(?=(?:clip|dino|hog|pixel)(?:\+|$)|open_clip:|timm:)", name)
    twice = [part for i, part in enumerate(parts) if PAPER.get(part, part) in [PAPER.get(p, p) for p in parts[:i]]]
    if twice:
        raise UserError(f"--teacher {name} has {twice[0]} twice: name each teacher once")
    return parts


def build_one(name, grid, patch_size, device):
    kind, _, rest = PAPER.get(name, name).partition(":")
    model, _, weights = rest.partition("@")
    if name == "pixel":
        return PixelTeacher(patch_size)
    if name == "hog":
        return HogTeacher(patch_size)
    if kind == "open_clip" and model and weights:
        return ClipTeacher(model, weights, grid, device)
    if kind == "timm" and model:
        return TimmTeacher(model, weights, grid, device)
    raise UserError(f"--teacher {name} is not known: choose from {NAMES}; a larger one than clip is "
                           f"open_clip:ViT-L-14-quickgelu@openai")


class SideBySide:
    """Several teachers as one: features (B, N, C1 + C2 + ...), to be taken apart by `dims`. Widths and patch sizes may
    differ, for each teacher gets the image at a size of its own that gives the student's grid."""

    def __init__(self, teachers):
        self.teachers, self.dim = teachers, sum(teacher.dim for teacher in teachers)

    def __call__(self, images):
        return torch.cat([teacher(images) for teacher in self.teachers], dim=-1)


# ---------------------------------------------------------------------------------------------------- without weights
def check_size(images, patch_size):
    h, w = images.shape[-2:]
    if h % patch_size or w % patch_size:
        raise ValueError(f"image size {h}x{w} is not a multiple of the patch size {patch_size}")


class PixelTeacher:
    """Each patch's pixels, made zero mean and unit variance patch by patch, as the target of MAE is.

    What is left is texture and edges at full detail: a code has no reason to keep what the patch means.
    """

    def __init__(self, patch_size):
        self.patch_size, self.dim = patch_size, 3 * patch_size ** 2

    @torch.no_grad()
    def __call__(self, images):
        check_size(images, self.patch_size)
        patches = F.unfold(images.float(), self.patch_size, stride=self.patch_size).transpose(1, 2)   # (B, N, 3 p p)
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (var + 1e-6).sqrt()          # 1e-6: a flat patch gives zeros


class HogTeacher:
    """Histograms of oriented gradients (Dalal and Triggs, 2005) of a patch and its surroundings.

    Cells of half a patch (4 px for patch 8, the customary 8 px for patch 16) hold `bins` orientations of 0 to 180
    degrees: a dark object on light ground has the outline of a light one on dark. Each pixel votes with its gradient's
    length, shared between the two nearest bins. A patch is described by its own 2 x 2 cells and the ring of 12 cells
    around them (zeros beyond the image): not only which stroke the patch holds, but how the stroke goes on outside.
    The 16 cells are one block: centred and normalised to unit length together. So brightness, contrast, colour and
    polarity drop out and the outline stays, which is about what tells one shape from another.
    """

    def __init__(self, patch_size, bins=9):
        # Cells per patch side: 2 where that divides, else 3, else the whole patch. The ring is one cell wide.
        self.per_patch = next(n for n in (2, 3, 1) if patch_size % n == 0)
        self.patch_size, self.cell, self.bins = patch_size, patch_size // self.per_patch, bins
        self.dim = (self.per_patch + 2) ** 2 * bins            # 144 for even patches

    @torch.no_grad()
    def __call__(self, images):
        check_size(images, self.patch_size)
        B, _, H, W = images.shape
        rows, columns = H // self.cell, W // self.cell
        # Gradients by central differences, borders repeated: at the edge of the image half a difference, no false edge.
        grey = F.pad(images.float().mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")[:, 0]  # (B, H+2, W+2)
        dx = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]              # (B, H, W)
        dy = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
        # Soft vote. Bin k stands for a gradient at k * 180/bins degrees: a vertical edge is bin 0. At angle a (in bins)
        # the share 1 - (a - floor a) goes to bin floor a and the rest to the next one, round the circle.
        angle = torch.atan2(dy, dx) * (self.bins / math.pi)      # -bins .. bins: opposite directions agree modulo bins
        low = angle.floor()
        length = torch.hypot(dx, dy) / self.cell ** 2            # a cell is the mean over its pixels
        upper = length * (angle - low)
        low = low.long() % self.bins
        # One scatter into all histograms: (bins x pixels) is never built, which makes this several times faster.
        y, x = (torch.arange(n, device=images.device) // self.cell for n in (H, W))
        first = (torch.arange(B, device=images.device)[:, None, None] * rows + y[:, None]) * columns + x
        first = first * self.bins                                # (B, H, W), where the histogram of its cell starts
        cells = torch.zeros(B * rows * columns * self.bins, device=images.device)
        cells.scatter_add_(0, (first + low).flatten(), (length - upper).flatten())
        cells.scatter_add_(0, (first + (low + 1) % self.bins).flatten(), upper.flatten())
        cells = cells.view(B, rows, columns, self.bins).permute(0, 3, 1, 2)   # (B, bins, rows, columns)
        # 1 + n + 1 cells in each direction around every patch, from cells padded by the width of the ring.
        t = F.unfold(F.pad(cells, (1, 1, 1, 1)), self.per_patch + 2, stride=self.per_patch)              # (B, C, N)
        t = t.transpose(1, 2)                                    # (B, N, C)
        # Histograms are positive, so any two of them point much the same way. Without their mean they differ in
        # direction, which is what the cosine of Eq. (2) reads.
        t = t - t.mean(dim=-1, keepdim=True)
        # The constant keeps a flat block at zero (no 0/0), and scales a faint one down: not its direction.
        return t / (t.norm(dim=-1, keepdim=True) + 0.02)


# ------------------------------------------------------------------------------------------------------ with weights
def to_teacher(images, size, mean, std):
    """The teacher's door: resize to `size` (H, W), clamp to [0, 1] (bicubic overshoots), its own mean and std."""
    images = images.float()
    if tuple(images.shape[-2:]) != tuple(size):
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (mean, std))
    return (images.clamp(0, 1) - mean) / std


def resize_positions(positions, old, new):
    """Learned positions (1 + N, C), [CLS] first, from grid `old` to grid `new`: bicubic, as open_clip and timm do."""
    if old == new:
        return positions
    patches = positions[1:].T.reshape(1, -1, *old)                # (1, C, gh, gw)
    patches = F.interpolate(patches, new, mode="bicubic", antialias=True).flatten(2)[0].T
    return torch.cat([positions[:1], patches])


class ClipTeacher:
    """Patch features of a CLIP image tower: ln_post AND the projection on every patch token, [CLS] dropped.

    CLIP trained this last step for [CLS] only. It takes the patches to the space where images meet words.
    """

    def __init__(self, name, weights, grid, device):
        import open_clip
        full = f"open_clip:{name}@{weights}"
        if name not in open_clip.list_models():
            raise UserError(f"--teacher {full}: open_clip has no model {name}; see open_clip.list_models()")
        tag = open_clip.get_pretrained_cfg(name, weights)
        if not tag and not Path(weights).is_file():
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
            raise UserError(f"--teacher {full}: {weights} is no file and none of the tags of {name} ({tags})")
        refuse_wrong_activation(full, name, weights, tag, open_clip.get_model_config(name).get("quick_gelu", False))
        with loading(full):
            tower = open_clip.create_model(name, pretrained=weights, device="cpu").visual    # the text tower is let go
        plain = isinstance(tower, open_clip.transformer.VisionTransformer)
        if not plain or tower.attn_pool is not None or tower.final_ln_after_pool:
            raise UserError(f"--teacher {full}: the image tower is no plain ViT with a norm on all tokens; "
                                   f"take a model like ViT-B-16 or ViT-L-14, or timm:NAME@FILE")
        self.mean, self.std = tower.image_mean, tower.image_std
        self.size = tuple(g * p for g, p in zip(grid, tower.patch_size))
        positions = tower.positional_embedding
        positions.data = resize_positions(positions.data, tuple(tower.grid_size), grid)
        self.dim = positions.shape[1] if tower.proj is None else tower.proj.shape[1]
        self.tower = tower.to(device).eval().requires_grad_(False)
        for block in getattr(tower.transformer, "resblocks", ()):
            if isinstance(block.attn, nn.MultiheadAttention):
                block.attn.forward = functools.partial(attend, block.attn)

    @torch.no_grad()
    def __call__(self, images):
        tower = self.tower
        x = tower.conv1(to_teacher(images, self.size, self.mean, self.std)).flatten(2).transpose(1, 2)   # (B, N, width)
        x = torch.cat([tower.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)           # (B, 1 + N, width)
        x = tower.transformer(tower.ln_pre(x + tower.positional_embedding.to(x.dtype)))
        x = tower.ln_post(x)[:, 1:]
        return (x if tower.proj is None else x @ tower.proj).float()                                     # (B, N, C)


def attend(attn, q, k, v, **options):
    """nn.MultiheadAttention for x = q = k = v without a mask. Under autocast on a CPU its own code copies the weights
    once per image, as it hands the product a transposed x: seven times slower at CLIP's size. There we do it."""
    if q.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nn.MultiheadAttention.forward(attn, q, k, v, **options)
    B, T, D = q.shape
    q, k, v = F.linear(q, attn.in_proj_weight, attn.in_proj_bias).view(B, T, 3, attn.num_heads, -1).permute(
        2, 0, 3, 1, 4).unbind(0)                                                         # 3 x (B, H, T, D/H)
    return attn.out_proj((attention_weights(q, k).to(v.dtype) @ v).transpose(1, 2).flatten(2)), None


def refuse_wrong_activation(full, name, weights, tag, quick_gelu):
    """OpenAI's CLIPs (and some later ones) use QuickGELU, x * sigmoid(1.702 x). An activation has no parameters, so
    their weights load into a network with the exact GELU without complaint, and every feature is somewhat wrong."""
    if quick_gelu:
        return
    from_openai = "openai" in Path(weights).name.lower() or ".openai" in weights.lower()   # a file or the hub's folder
    if tag.get("quick_gelu", False) if tag else from_openai:
        raise UserError(f"--teacher {full}: these weights were trained with QuickGELU and {name} has the exact "
                               f"GELU, which gives wrong features: use open_clip:{name}-quickgelu@{weights}")
    if not tag:                        # a file does not say which activation its weights were trained with
        note(f"--teacher {full}: using the exact GELU; if {weights} comes from OpenAI (or DFN, MetaCLIP), which use "
             f"QuickGELU, the features are wrong: then take {name}-quickgelu")


class TimmTeacher:
    """Final-norm patch tokens of a ViT of timm; [CLS] and registers dropped."""

    def __init__(self, name, weights, grid, device):
        import timm
        full = f"timm:{name}@{weights}" if weights else f"timm:{name}"
        if not timm.is_model(name.partition(".")[0]):
            raise UserError(f"--teacher {full}: timm has no model {name}; timm.list_models() names them")
        if weights and not Path(weights).is_file():
            raise UserError(f"--teacher {full}: there is no file {weights}")
        with loading(full):
            model = timm.create_model(name, pretrained=not weights, num_classes=0)
            if weights:
                load_timm(model, weights)
        if not all(hasattr(model, part) for part in ("set_input_size", "num_prefix_tokens", "patch_embed")):
            raise UserError(f"--teacher {full}: {name} is no plain ViT, whose patch tokens could be read")
        self.mean, self.std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        self.size = tuple(g * p for g, p in zip(grid, model.patch_embed.patch_size))
        model.set_input_size(self.size)                        # interpolates the positions; nothing at the native size
        self.dim, self.skip = model.num_features, model.num_prefix_tokens
        self.model = model.to(device).eval().requires_grad_(False)
        # Networks made for mean pooling carry their final norm behind the pooling: here it goes on each token.
        self.fc_norm = getattr(model, "fc_norm", nn.Identity())

    @torch.no_grad()
    def __call__(self, images):
        x = self.model.forward_features(to_teacher(images, self.size, self.mean, self.std))
        return self.fc_norm(x)[:, self.skip:].float()                                                    # (B, N, C)


def load_timm(model, path):
    """Weights of a file into a timm model, translated by timm; every weight of the model must be there."""
    import timm
    state = timm.models.load_state_dict(path)                  # timm reads with weights_only
    translate = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    found = model.load_state_dict(translate(state, model) if translate else state, strict=False)
    extra = [n for n in found.unexpected_keys if not n.startswith(("head", "fc.", "mask_token", "decoder"))]
    if found.missing_keys or extra:
        raise ValueError(f"missing {found.missing_keys[:3]}, not expected {extra[:3]}")


def note(text):
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr)


@contextlib.contextmanager
def loading(full):
    """Whatever goes wrong inside becomes one sentence with the ways to get a teacher; the hub's chatter is muted."""
    if not Path(full.partition("@")[2]).is_file():
        note(f"loading the weights of {full} (downloaded the first time)")
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except Exception as error:         # the network, the hub, torch.load and load_state_dict each raise their own kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "TorchScript" in str(error):
            reason = "the file is a TorchScript archive, which is code: take the plain weights (.safetensors) instead"
        name = full.partition("@")[0]
        raise UserError(
            f"the weights of --teacher {full} could not be loaded ({reason}); fetch their file where a network is "
            f"and name it ({name}@FILE), or choose another of {NAMES}; hog and pixel need no weights") from error
    finally:
        logging.disable(before)


