"""What a code looks like: its colour, its patches, their average, and pixels decoded from codes.

Nothing here draws; extras/panels.py does. Read in this order: code_colours, patches_of_code,
mean_patches, mosaic, PixelDecoder.
"""
# Shapes:  n images, N = gh x gw patches of p x p pixels per image, K codes, D code width
import collections

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from support import data
from support.optim import cosine_schedule
from support.process import seed_all
from vqkd import l2

# What the tokenizer says of a set of images: images (n, 3, H, W) uint8, z (n, gh, gw) token ids.
Tokens = collections.namedtuple("Tokens", "images z")


@torch.no_grad()
def read_tokens(tokenizer, dataset, device="cpu"):
    """One pass over a data set -> Tokens, on the CPU. The images stay bytes."""
    images, z = [], []
    batches = data.eval_batches(len(dataset), 64)
    for batch, _ in data.make_loader(dataset, batches, 0, device):
        images.append(batch.cpu())
        z.append(tokenizer.encode(data.to_float(batch, device)).cpu())
    return Tokens(torch.cat(images), torch.cat(z).view(-1, *tokenizer.encoder.grid))


# --- one code -------------------------------------------------------------------------------------
def code_colours(codebook):
    """A colour per code, (K, D) -> (K, 3) in [0, 1]. It depends on the codebook alone.

    The three directions in which the unit code vectors differ most become red, green and blue.
    So similar codes have similar colours. Ranks instead of values spread the colours evenly.
    """
    v = l2(codebook.detach().cpu().double())
    centred = v - v.mean(dim=0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]                     # (3, D)
    # The sign of an axis is arbitrary. We make its largest entry positive.
    strongest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
    scores = centred @ (axes * strongest.sign()).T                                   # (K, 3)
    places = scores.argsort(dim=0, stable=True).argsort(dim=0)
    ranks = places.double() / max(1, len(v) - 1)
    ranks = F.pad(ranks, (0, 3 - ranks.shape[1]), value=0.5)       # D < 3 gives fewer than 3 axes
    return (0.08 + 0.87 * ranks).numpy()


def patches_of_code(z, code, count, seed=0):
    """Up to `count` patches with this code, drawn at random, each from another image.

    z (n, gh, gw) -> [(image, y, x), ...]
    """
    places = (z == code).nonzero()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    chosen = {}
    for image, y, x in places[order].tolist():
        chosen.setdefault(image, (image, y, x))
    return list(chosen.values())[:count]


def most_used(counts, most, among=1.0):
    """`most` codes, the most used first. among=0.5: spread over the more used half of the codes."""
    used = max(1, int((counts > 0).sum()))
    order = counts.argsort(descending=True, stable=True)[:used].tolist()
    last = min(most, len(order))
    if among < 1:
        last = max(last, round(among * len(order)))
    places = np.linspace(0, last - 1, min(most, last)).round().astype(int)
    return [order[i] for i in places]


# --- patches --------------------------------------------------------------------------------------
def cut_patches(images, grid):
    """(n, 3, H, W) -> (n * N, 3, p, p), row by row as the tokens are."""
    n, c, height, width = images.shape
    gh, gw = grid
    x = images.view(n, c, gh, height // gh, gw, width // gw).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n * gh * gw, c, height // gh, width // gw)


def mean_patches(tokens, codes, turn=0):
    """The average of all patches of each code, (K, 3, p, p) in [0, 1]; grey for an unused code.

    turn > 0: so many further passes. In each, a patch that is nearer to the negative of the average
    is inverted (light for dark) before it is averaged. HOG gives a patch and its negative the same
    features, so a plain average of the patches of its codes is plain grey.
    """
    p = tokens.images.shape[-1] // tokens.z.shape[-1]
    counts = torch.bincount(tokens.z.flatten(), minlength=codes).view(-1, 1, 1, 1)
    level = torch.zeros(codes, 3, 1, 1)                      # mean colour
    shape = torch.zeros(codes, 3, p, p)                      # what remains without it
    for attempt in range(1 + turn):
        sums = torch.zeros_like(shape)
        levels = torch.zeros_like(level)
        for images, z in zip(tokens.images.split(64), tokens.z.split(64), strict=True):
            x = data.to_float(cut_patches(images, z.shape[1:]), "cpu")
            z = z.flatten()
            mean = x.mean(dim=(2, 3), keepdim=True)
            x = x - mean
            if attempt > 0:
                agreement = (x * shape[z]).sum(dim=(1, 2, 3), keepdim=True)
                x = torch.where(agreement < 0, -x, x)
            sums.index_add_(0, z, x)
            levels.index_add_(0, z, mean)
        shape = sums / counts.clamp(min=1)
        level = levels / counts.clamp(min=1)
    return torch.where(counts > 0, (level + shape).clamp(0, 1), 0.5)


def mosaic(image, z, patches, where=None, invert=False):
    """Put the average patches of the codes z (gh, gw) into an image (3, H, W) in [0, 1].

    patches (K, 3, p, p); where (gh, gw) bool: only at these cells.
    invert: a patch of a code may be light for dark; show the one that is nearer to the image.
    """
    gh, gw = z.shape
    own = cut_patches(image[None], (gh, gw))                 # (N, 3, p, p)
    x = patches[z.flatten()]
    if invert:
        negative = 2 * x.mean(dim=(2, 3), keepdim=True) - x
        distance = (x - own).square().sum(dim=(1, 2, 3))
        distance_negative = (negative - own).square().sum(dim=(1, 2, 3))
        x = torch.where((distance_negative < distance)[:, None, None, None], negative, x)
    if where is not None:
        x = torch.where(where.flatten()[:, None, None, None], x, own)
    rows = x.view(gh, gw, *x.shape[1:]).permute(2, 0, 3, 1, 4)       # (3, gh, p, gw, p)
    return rows.reshape(image.shape).clamp(0, 1)


# --- pixels from codes ----------------------------------------------------------------------------
class PixelDecoder(nn.Module):
    """Code vectors back to pixels, for the eye only: some convolutions, then p x p pixels each."""

    def __init__(self, codebook, patch_size, width=128, depth=4):
        super().__init__()
        self.register_buffer("codebook", l2(codebook.detach().cpu().float()))
        self.enter = nn.Conv2d(codebook.shape[1], width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.leave = nn.Conv2d(width, 3 * patch_size ** 2, 1)
        self.patch_size = patch_size

    def forward(self, z):
        """Token ids (B, gh, gw) -> images (B, 3, H, W), about in [0, 1]"""
        x = self.enter(self.codebook[z].permute(0, 3, 1, 2))             # (B, width, gh, gw)
        for layer in self.layers:
            x = x + layer(F.gelu(x))
        return 0.5 + F.pixel_shuffle(self.leave(F.gelu(x)), self.patch_size)


def lighten_middle(images):
    """Invert images whose middle is darker than the whole.  (B, 3, H, W) -> images, inverted (B,)

    For codes that do not tell an image from its negative. A decoder needs a rule that says which
    of the two to give back. Without a rule its best answer is the grey in between.
    """
    h = images.shape[-2] // 4
    w = images.shape[-1] // 4
    mean = images.mean(dim=(2, 3), keepdim=True)
    darker = images[..., h:-h, w:-w].mean(dim=(1, 2, 3)) < images.mean(dim=(1, 2, 3))
    return torch.where(darker[:, None, None, None], 2 * mean - images, images), darker


def train_pixel_decoder(tokens, codebook, steps, invert=False, seed=0, device="cpu"):
    """A PixelDecoder after `steps` updates of 32 images. The tokens are given, the codes frozen."""
    seed_all(seed)
    patch_size = tokens.images.shape[-1] // tokens.z.shape[-1]
    model = PixelDecoder(codebook, patch_size).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    for step in range(steps):
        lr = cosine_schedule(step, 2e-3, 0, steps, warmup=min(50, steps // 4))
        optimizer.param_groups[0]["lr"] = lr
        batch = torch.randint(len(tokens.z), (32,))
        images = data.to_float(tokens.images[batch], device)
        if invert:
            images, _ = lighten_middle(images)
        F.l1_loss(model(tokens.z[batch].to(device)), images).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)
