"""What a tokenizer is distilled from: pixels, hand-made or semantic features (Section 2.2).

    pixel                       the patch's own pixels, normalised: what plain autoencoding learns
    hog                         histograms of oriented gradients, hand-made: default of tiny
    clip                        CLIP ViT-B/16 patch features, the paper's teacher: default of base
    dino                        DINO ViT-B/16 patch features, the paper's other teacher
    open_clip:NAME@TAG_OR_FILE  any CLIP of open_clip with a plain ViT as its image tower, such as
                                the larger open_clip:ViT-L-14-quickgelu@openai
    timm:NAME@FILE, timm:NAME   any ViT of timm, with weights from a file or timm's own
    clip+dino                   several of these at once: their features side by side

A teacher is a plain callable: images (B, 3, H, W) in [0, 1] -> features t (B, N, C), float32,
without gradient. N = gh x gw are the STUDENT's patches. A teacher is no module, so it is never
trained, saved or wrapped with the student. Networks may run under the caller's autocast.

A large teacher costs more than its student: features.py computes the features once, into a file.
"""
# Shapes:  B images, N = gh x gw patches, C features of a patch (`dim`), p patch size in pixels
import contextlib
import functools
import logging
import math
import os
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import attention_weights
from support.files import UserError

NAMES = ("clip, dino, open_clip:NAME@TAG_OR_FILE, timm:NAME@FILE, hog, pixel, "
         "or several joined by + (clip+dino)")
PAPER = {"clip": "open_clip:ViT-B-16-quickgelu@openai", "dino": "timm:vit_base_patch16_224.dino"}


# --- by name --------------------------------------------------------------------------------------
def build_teacher(name, grid, patch_size, device):
    """-> the teacher called `name`, on the student's `grid` (gh, gw) of `patch_size` pixels.

    It has name, grid, dim = C, and of each part a short label and a width: names, dims. Both
    together are widths = {label: width}.
    UserError if there is no such teacher, or its weights cannot be had.
    """
    grid = tuple(grid)
    parts = split_names(name)
    built = [build_one(part, grid, patch_size, device) for part in parts]
    teacher = built[0] if len(built) == 1 else SideBySide(built)
    teacher.name, teacher.grid = name, grid
    teacher.dims = tuple(one.dim for one in built)
    # clip, dino, hog, pixel, otherwise the name of the network; numbered if two are equal.
    labels = [part.partition("@")[0].partition(":")[2] or part for part in parts]
    teacher.names = tuple(label if labels.count(label) == 1 else f"{label}_{i}"
                          for i, label in enumerate(labels, 1))
    teacher.widths = dict(zip(teacher.names, teacher.dims, strict=True))
    return teacher


def widths(name, grid, patch_size):
    """C of each teacher, for --dry-run. Those of the paper are known without building them."""
    known = dict(clip=512, dino=768)
    return [known.get(one) or build_one(one, grid, patch_size, "cpu").dim
            for one in split_names(name)]


def split_names(name):
    """"clip+dino" -> ["clip", "dino"]. A + that is part of a file's name does not split."""
    starts = r"(?:clip|dino|hog|pixel)(?:\+|$)|open_clip:|timm:"
    parts = re.split(rf"\+(?={starts})", name)
    full = [PAPER.get(part, part) for part in parts]
    for i, part in enumerate(parts):
        if full[i] in full[:i]:
            raise UserError(f"--teacher {name} has {part} twice: name each teacher once")
    return parts


def build_one(name, grid, patch_size, device):
    """-> one teacher of split_names."""
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
    raise UserError(f"--teacher {name} is not known: choose from {NAMES}; "
                    f"larger than clip is open_clip:ViT-L-14-quickgelu@openai")


def each_cosine(o, t, widths):
    """The mean cosine to each of several teachers.  o, t (B, N, C), widths {label: part of C}

    -> {"cosine_clip": (), "cosine_dino": ()}. With one teacher, or without widths, it is {}.
    """
    if widths is None or len(widths) == 1:
        return {}
    sizes = list(widths.values())
    parts = zip(widths, o.split(sizes, dim=-1), t.split(sizes, dim=-1), strict=True)
    return {f"cosine_{label}": F.cosine_similarity(one, other, dim=-1).mean()
            for label, one, other in parts}


class SideBySide:
    """Several teachers as one: features (B, N, C1 + C2 + ...), which `dims` takes apart.

    Each teacher resizes the image so that its own patches form the student's grid.
    """

    def __init__(self, teachers):
        self.teachers = teachers
        self.dim = sum(teacher.dim for teacher in teachers)

    def __call__(self, images):
        return torch.cat([teacher(images) for teacher in self.teachers], dim=-1)


# --- teachers without weights ---------------------------------------------------------------------
def check_size(images, patch_size):
    h, w = images.shape[-2:]
    if h % patch_size or w % patch_size:
        raise ValueError(f"image size {h}x{w} is not a multiple of the patch size {patch_size}")


class PixelTeacher:
    """The pixels of each patch with mean 0 and variance 1, which is the target of MAE.

    Texture and edges stay in full detail. So a code need not hold what the patch means.
    """

    def __init__(self, patch_size):
        self.patch_size = patch_size
        self.dim = 3 * patch_size**2

    @torch.no_grad()
    def __call__(self, images):
        check_size(images, self.patch_size)
        patches = F.unfold(images.float(), self.patch_size, stride=self.patch_size)
        patches = patches.transpose(1, 2)                    # (B, N, 3 p p)
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (var + 1e-6).sqrt()        # 1e-6: a flat patch gives zeros


class HogTeacher:
    """Histograms of oriented gradients (Dalal and Triggs, 2005) of a patch and its surroundings.

    A cell is half a patch wide (4 px for patch 8; 8 px, as usual, for patch 16). Its histogram has
    `bins` orientations in 180 degrees, so dark on light has the outline of light on dark. Each
    pixel votes with the length of its gradient, shared between the two nearest bins.
    A patch is described by its own 2 x 2 cells and the 12 cells around them (zeros beyond the
    image), which show how a stroke goes on outside. All 16 are centred and normalised together:
    brightness, contrast and colour drop out, the outline stays.
    """

    def __init__(self, patch_size, bins=9):
        # Cells per side of a patch: 2 if that divides, else 3, else the whole patch.
        self.per_patch = next(n for n in (2, 3, 1) if patch_size % n == 0)
        self.patch_size, self.bins = patch_size, bins
        self.cell = patch_size // self.per_patch
        self.dim = (self.per_patch + 2)**2 * bins            # 144 for even patches

    @torch.no_grad()
    def __call__(self, images):
        check_size(images, self.patch_size)
        cells = F.pad(self.histograms(images), (1, 1, 1, 1))
        # The window of a patch is one cell wider on each side.
        t = F.unfold(cells, self.per_patch + 2, stride=self.per_patch).transpose(1, 2)   # (B, N, C)
        # Histograms are positive, so all of them point much the same way. Without their mean they
        # differ in direction, which is what the cosine of Eq. (2) reads.
        t = t - t.mean(dim=-1, keepdim=True)
        # 0.02 keeps a flat window at zero and shortens a faint one; directions stay the same.
        return t / (t.norm(dim=-1, keepdim=True) + 0.02)

    def histograms(self, images):
        """-> (B, bins, rows, columns): one histogram per cell."""
        B, _, H, W = images.shape
        rows, columns = H // self.cell, W // self.cell
        # Central differences. The border is repeated, so the image's edge is no edge.
        grey = F.pad(images.float().mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        grey = grey[:, 0]                                    # (B, H + 2, W + 2)
        dx = grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2]          # (B, H, W)
        dy = grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]
        # Bin k stands for k * 180/bins degrees; a vertical edge is bin 0. At angle a (in bins) the
        # share 1 - (a - floor a) goes to bin floor a and the rest to the next one, in a circle.
        angle = torch.atan2(dy, dx) * (self.bins / math.pi)  # opposite directions agree
        low = angle.floor()
        length = torch.hypot(dx, dy) / self.cell**2          # a cell is the mean over its pixels
        upper = length * (angle - low)
        low = low.long() % self.bins
        # One scatter into all histograms at once is several times faster than a mask per bin.
        y = torch.arange(H, device=images.device) // self.cell
        x = torch.arange(W, device=images.device) // self.cell
        image = torch.arange(B, device=images.device)[:, None, None]
        first = ((image * rows + y[:, None]) * columns + x) * self.bins      # where a cell starts
        cells = torch.zeros(B * rows * columns * self.bins, device=images.device)
        cells.scatter_add_(0, (first + low).flatten(), (length - upper).flatten())
        cells.scatter_add_(0, (first + (low + 1) % self.bins).flatten(), upper.flatten())
        return cells.view(B, rows, columns, self.bins).permute(0, 3, 1, 2)


# --- teachers with weights ------------------------------------------------------------------------
def to_teacher(images, size, mean, std):
    """What a network gets: images resized to `size` (H, W), then its own mean and std."""
    images = images.float()
    if tuple(images.shape[-2:]) != tuple(size):
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    mean = torch.tensor(mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(std, device=images.device).view(3, 1, 1)
    return (images.clamp(0, 1) - mean) / std                 # bicubic leaves [0, 1] a little


def resize_positions(positions, old, new):
    """Learned positions (1 + N, C) from grid `old` to `new`: bicubic, as open_clip and timm do."""
    if old == new:
        return positions
    patches = positions[1:].T.reshape(1, -1, *old)           # (1, C, gh, gw), without [CLS]
    patches = F.interpolate(patches, new, mode="bicubic", antialias=True).flatten(2)[0].T
    return torch.cat([positions[:1], patches])


class ClipTeacher:
    """Patch features of a CLIP image tower: ln_post AND the projection on every patch token.

    CLIP trained this last step for [CLS] only. It takes patches to where images meet words.
    """

    def __init__(self, name, weights, grid, device):
        tower = load_tower(f"open_clip:{name}@{weights}", name, weights)
        self.mean, self.std = tower.image_mean, tower.image_std
        self.size = tuple(g * p for g, p in zip(grid, tower.patch_size, strict=True))
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
        x = tower.conv1(to_teacher(images, self.size, self.mean, self.std))
        x = x.flatten(2).transpose(1, 2)                     # (B, N, width)
        cls = tower.class_embedding.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + tower.positional_embedding.to(x.dtype)
        x = tower.transformer(tower.ln_pre(x))               # (B, 1 + N, width)
        x = tower.ln_post(x)[:, 1:]                          # [CLS] is dropped
        if tower.proj is not None:
            x = x @ tower.proj
        return x.float()                                     # (B, N, C)


def load_tower(full, name, weights):
    """-> the image tower of an open_clip model; the text tower is let go."""
    import open_clip                         # slow to import
    if name not in open_clip.list_models():
        raise UserError(f"--teacher {full}: open_clip has no model {name}; "
                        f"see open_clip.list_models()")
    tag = open_clip.get_pretrained_cfg(name, weights)        # empty for a file
    if not tag and not Path(weights).is_file():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(f"--teacher {full}: {weights} is no file and none of the tags of {name} "
                        f"({tags})")
    if not open_clip.get_model_config(name).get("quick_gelu", False):
        refuse_quick_gelu(full, name, weights, tag)
    with loading(full):
        tower = open_clip.create_model(name, pretrained=weights, device="cpu").visual
    plain = isinstance(tower, open_clip.transformer.VisionTransformer)
    if not plain or tower.attn_pool is not None or tower.final_ln_after_pool:
        raise UserError(f"--teacher {full}: the image tower is no plain ViT with a norm on all "
                        f"tokens; take a model like ViT-B-16 or ViT-L-14, or timm:NAME@FILE")
    return tower


def refuse_quick_gelu(full, name, weights, tag):
    """For a network with the exact GELU: UserError if its weights were trained with QuickGELU.

    OpenAI's CLIPs and some later ones use QuickGELU, x * sigmoid(1.702 x). An activation has no
    parameters, so such weights load into any network, and every feature is somewhat wrong.
    """
    if tag:
        quick_gelu = tag.get("quick_gelu", False)
    else:                                    # a file does not say: look at its name and folder
        quick_gelu = "openai" in Path(weights).name.lower() or ".openai" in weights.lower()
    if quick_gelu:
        raise UserError(f"--teacher {full}: these weights were trained with QuickGELU and {name} "
                        f"has the exact GELU, which gives wrong features: "
                        f"use open_clip:{name}-quickgelu@{weights}")
    if not tag:
        note(f"--teacher {full}: using the exact GELU. Weights of OpenAI, DFN and MetaCLIP need "
             f"QuickGELU: if {weights} is one of these, take {name}-quickgelu")


def attend(attn, q, k, v, **options):
    """nn.MultiheadAttention for x = q = k = v without a mask.

    Under autocast on a CPU, torch's own code copies the weights once per image, because it hands
    the product a transposed x: seven times slower at CLIP's size. There we do the products.
    """
    if q.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nn.MultiheadAttention.forward(attn, q, k, v, **options)
    B, T, D = q.shape
    qkv = F.linear(q, attn.in_proj_weight, attn.in_proj_bias)
    qkv = qkv.view(B, T, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)                                  # 3 x (B, H, T, D/H)
    out = attention_weights(q, k).to(v.dtype) @ v
    return attn.out_proj(out.transpose(1, 2).flatten(2)), None


class TimmTeacher:
    """Patch tokens of a ViT of timm after its final norm; [CLS] and registers are dropped."""

    def __init__(self, name, weights, grid, device):
        import timm                          # slow to import
        full = f"timm:{name}@{weights}" if weights else f"timm:{name}"
        if not timm.is_model(name.partition(".")[0]):
            raise UserError(f"--teacher {full}: timm has no model {name}; "
                            f"timm.list_models() names them")
        if weights and not Path(weights).is_file():
            raise UserError(f"--teacher {full}: there is no file {weights}")
        with loading(full):
            model = timm.create_model(name, pretrained=not weights, num_classes=0)
            if weights:
                load_timm(model, weights)
        needed = ("set_input_size", "num_prefix_tokens", "patch_embed")
        if not all(hasattr(model, part) for part in needed):
            raise UserError(f"--teacher {full}: {name} is no plain ViT with patch tokens to read")
        self.mean, self.std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
        patch_size = model.patch_embed.patch_size
        self.size = tuple(g * p for g, p in zip(grid, patch_size, strict=True))
        model.set_input_size(self.size)      # interpolates positions; keeps them at the native size
        self.dim, self.skip = model.num_features, model.num_prefix_tokens
        self.model = model.to(device).eval().requires_grad_(False)
        # Networks made for mean pooling have their final norm after it: here it is for each token.
        self.fc_norm = getattr(model, "fc_norm", nn.Identity())

    @torch.no_grad()
    def __call__(self, images):
        x = self.model.forward_features(to_teacher(images, self.size, self.mean, self.std))
        return self.fc_norm(x)[:, self.skip:].float()        # (B, N, C)


def load_timm(model, path):
    """Weights from a file, renamed by timm. ValueError if one of the model's is missing."""
    import timm
    state = timm.models.load_state_dict(path)                # reads with weights_only
    rename = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if rename:
        state = rename(state, model)
    found = model.load_state_dict(state, strict=False)
    known = ("head", "fc.", "mask_token", "decoder")         # not needed here
    extra = [key for key in found.unexpected_keys if not key.startswith(known)]
    if found.missing_keys or extra:
        raise ValueError(f"missing {found.missing_keys[:3]}, not expected {extra[:3]}")


def note(text):
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, file=sys.stderr)


@contextlib.contextmanager
def loading(full):
    """Any error inside becomes one sentence with the ways to get a teacher. Logging is muted."""
    name, _, weights = full.partition("@")
    if not Path(weights).is_file():
        note(f"loading the weights of {full} (downloaded the first time)")
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except Exception as error:               # each library raises errors of its own kinds
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if "TorchScript" in str(error):
            reason = ("the file is a TorchScript archive, which is code: take the plain weights "
                      "(.safetensors) instead")
        raise UserError(
            f"the weights of --teacher {full} could not be loaded ({reason}); fetch their file "
            f"where a network is and name it ({name}@FILE), or choose another of {NAMES}; "
            f"hog and pixel need no weights") from error
    finally:
        logging.disable(before)
