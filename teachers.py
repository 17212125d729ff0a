"""Everything a tokenizer can be distilled from: pixels, hand-made features, semantic features (paper, Section 2.2).

    pixel   the patch's own pixels, normalised            what plain autoencoding learns
    hog     histograms of oriented gradients              hand-made, needs no weights: the default of tiny
    clip    CLIP ViT-B/16 patch features, projected       the paper's teacher: the default of small and base
    dino    DINO ViT-B/16 patch features                  the paper's other teacher
    open_clip:NAME@TAG_OR_FILE, timm:NAME@FILE            any other one

A teacher is a plain callable: images (B, 3, H, W) in [0, 1] -> features t (B, N, C), float32, without gradient, N = gh x gw
the STUDENT's patches. It is no module of the student: never trained, never saved, never wrapped.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import engine
from model import IMAGENET_MEAN, IMAGENET_STD

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NAMES = "clip, dino, open_clip:NAME@TAG_OR_FILE, timm:NAME@FILE, hog, pixel"


def build_teacher(name, grid, patch_size, device):
    """-> a teacher whose patches are the student's `grid` (gh, gw) of `patch_size` pixels each."""
    kind, _, rest = name.partition(":")
    model, _, weights = rest.partition("@")
    if name == "pixel":
        return PixelTeacher(patch_size)
    if name == "hog":
        return HogTeacher(patch_size)
    if name == "clip":
        return ClipTeacher("ViT-B-16-quickgelu", "openai", grid, device)
    if name == "dino":
        return TimmTeacher("vit_base_patch16_224.dino", "", grid, device)
    if kind == "open_clip" and model and weights:
        return ClipTeacher(model, weights, grid, device)
    if kind == "timm" and model:
        return TimmTeacher(model, weights, grid, device)
    raise engine.UserError(f"--teacher {name} is not known; choose from {NAMES}")


# ---------------------------------------------------------------------------------------------------- without weights
class PixelTeacher:
    """Each patch's pixels, made zero mean and unit variance patch by patch (as MAE's target)."""

    def __init__(self, patch_size):
        self.patch_size, self.dim = patch_size, 3 * patch_size ** 2

    @torch.no_grad()
    def __call__(self, images):
        patches = F.unfold(images.float(), self.patch_size, stride=self.patch_size).transpose(1, 2)      # (B, N, 3pp)
        mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        return (patches - mean) / (var + 1e-6).sqrt()


class HogTeacher:
    """Histograms of oriented gradients (Dalal and Triggs, 2005) of a patch and its surroundings.

    Cells of half a patch hold `bins` orientations of 0..180 degrees, each pixel voting with its gradient's length, shared
    between the two nearest bins. A patch is described by its 2 x 2 cells and the ring of 12 cells around them, normalised
    to unit length together. So brightness, contrast, colour and polarity drop out and the outline stays.
    """
    bins = 9

    def __init__(self, patch_size):
        if patch_size % 2:
            raise engine.UserError(f"--teacher hog needs an even patch size, not {patch_size}")
        self.cell, self.dim = patch_size // 2, 16 * self.bins

    @torch.no_grad()
    def __call__(self, images):
        grey = F.pad(images.float().mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")           # (B, 1, H+2, W+2)
        dx = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
        dy = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
        # Soft vote: 1 at the bin's own orientation, falling linearly to 0 at its neighbours'.
        angle = torch.atan2(dy, dx) * (self.bins / math.pi)                          # in bins; +-180 degrees are one
        centres = torch.arange(self.bins, device=images.device).view(1, -1, 1, 1)
        away = (angle - centres + self.bins / 2) % self.bins - self.bins / 2         # signed distance on the circle
        votes = (1 - away.abs()).clamp(min=0) * torch.hypot(dx, dy)                  # (B, bins, H, W)
        cells = F.avg_pool2d(votes, self.cell)                                       # (B, bins, 2gh, 2gw)
        around = F.unfold(F.pad(cells, (1, 1, 1, 1)), 4, stride=2).transpose(1, 2)   # (B, N, 16 * bins)
        # Without its mean a feature points away from what all patches share, and the cosine measures what differs.
        around = around - around.mean(dim=-1, keepdim=True)
        # The constant says how faint an edge may be and still count: about a step of 2 % over one pixel row.
        return around / (around.norm(dim=-1, keepdim=True) + 0.02)


# ------------------------------------------------------------------------------------------------------ with weights
def to_teacher(images, grid, patch_size, mean, std):
    """The teacher's door: resize so that its patches are the student's, clamp to [0, 1], its own mean and std."""
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    images = images.float()
    if tuple(images.shape[-2:]) != size:
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (mean, std))
    return (images.clamp(0, 1) - mean) / std


def resize_positions(positions, old, new):
    """Learned position vectors (1 + N, C), [CLS] first, from grid `old` to grid `new` (bicubic)."""
    if old == new:
        return positions
    patches = positions[1:].T.reshape(1, -1, *old)
    patches = F.interpolate(patches.float(), new, mode="bicubic", align_corners=False).flatten(2)[0].T
    return torch.cat([positions[:1], patches.to(positions.dtype)])


class ClipTeacher:
    """Patch features of a CLIP image tower: ln_post AND the projection on every patch token, [CLS] dropped.

    OpenAI's weights were trained with QuickGELU, x * sigmoid(1.702 x). With the ordinary GELU they load without complaint
    and give wrong features, so an architecture without "quickgelu" is refused for them.
    """

    def __init__(self, name, weights, grid, device):
        import open_clip
        if name not in open_clip.list_models():
            raise engine.UserError(f"open_clip knows no model {name}; open_clip.list_models() names them all")
        quick = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
        if "openai" in Path(weights).stem.lower() and not quick:
            raise engine.UserError(f"OpenAI's weights need QuickGELU, which {name} has not: use {name}-quickgelu")
        try:
            model = open_clip.create_model(name, pretrained=weights, device="cpu")
        except Exception as error:                                       # hub clients raise many kinds of errors
            raise engine.UserError(cannot_load(f"open_clip:{name}@{weights}", error)) from error
        self.tower = model.visual.to(device).eval().requires_grad_(False)                # the text tower is let go
        self.grid, self.native = grid, tuple(self.tower.grid_size)
        self.mean = tuple(getattr(self.tower, "image_mean", None) or CLIP_MEAN)
        self.std = tuple(getattr(self.tower, "image_std", None) or CLIP_STD)
        with torch.no_grad():
            self.tower.positional_embedding.data = resize_positions(self.tower.positional_embedding.data, self.native, grid)
        projection = self.tower.proj
        self.dim = self.tower.ln_post.weight.shape[0] if projection is None else projection.shape[1]

    @torch.no_grad()
    def __call__(self, images):
        tower = self.tower
        x = to_teacher(images, self.grid, tower.patch_size, self.mean, self.std)
        x = tower.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([tower.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = tower.transformer(tower.ln_pre(x + tower.positional_embedding.to(x.dtype)))
        x = tower.ln_post(x[:, 1:])
        return (x if tower.proj is None else x @ tower.proj.to(x.dtype)).float()


class TimmTeacher:
    """Final-norm patch tokens of a timm Vision Transformer, [CLS] and registers dropped."""

    def __init__(self, name, weights, grid, device):
        import timm
        if not timm.is_model(name.partition(".")[0]):
            raise engine.UserError(f"timm knows no model {name}; timm.list_models() names them all")
        try:
            model = timm.create_model(name, pretrained=not weights, num_classes=0, dynamic_img_size=False,
                                      checkpoint_path=weights)
            patch = model.patch_embed.patch_size
            self.data = dict(model.pretrained_cfg)
            model.set_input_size((grid[0] * patch[0], grid[1] * patch[1]))           # positions interpolated
        except Exception as error:
            raise engine.UserError(cannot_load(f"timm:{name}@{weights}", error)) from error
        self.model, self.grid, self.patch, self.dim = model.to(device).eval().requires_grad_(False), grid, patch, model.num_features
        self.mean, self.std = self.data.get("mean", IMAGENET_MEAN), self.data.get("std", IMAGENET_STD)

    @torch.no_grad()
    def __call__(self, images):
        x = self.model.forward_features(to_teacher(images, self.grid, self.patch, self.mean, self.std))
        return x[:, self.model.num_prefix_tokens:].float()


def cannot_load(name, error):
    return (f"the teacher {name} could not be loaded ({type(error).__name__}: {' '.join(str(error).split())[:160]}): fetch its weights "
            f"on a machine with a network and pass open_clip:NAME@FILE or timm:NAME@FILE, or use --teacher hog, which needs none")
