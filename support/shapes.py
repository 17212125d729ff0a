"""The built-in pictures: ten shapes, every factor known, nothing to download.
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from support.files import UserError
from support.images import InMemory


def hashed(*numbers, draws):
    """Uniform numbers in [0, 1) that depend on `numbers` alone: a counter instead of a generator (splitmix64's mixing).

    Each number is an integer or an array (c,) of integers; the result is (c, draws). It gives image 7 without drawing
    images 0 to 6, and a thousand images in one pass."""
    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden, state = np.uint64(0x9E3779B97F4A7C15), np.zeros(1, dtype=np.uint64)
    for number in numbers:                                   # arrays of integers wrap around at 2^64, as they should
        state = mix(state + golden * (np.atleast_1d(number).astype(np.uint64) + np.uint64(1)))
    state = mix(state[:, None] + golden * np.arange(1, draws + 1, dtype=np.uint64))                  # (c, draws)
    return (state >> np.uint64(40)).astype(np.float32) / np.float32(2 ** 24)

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "arrow", "hourglass")
TEXTURES = ("plain", "gradient", "stripes", "checks", "dots")


def signed_distance(shape, x, y):
    """About the distance to the outline, negative inside. x points right, y down; a shape fills about [-1, 1] each way.
    No two shapes are equal up to a rotation or a reflection."""
    def box(x, y, half_width, half_height):
        return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)

    r, sector = np.hypot(x, y), np.float32(np.pi / 5)
    if shape == "circle":
        return r - 0.92
    if shape == "square":
        return box(x, y, 0.82, 0.82)
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * (y - 0.2), y - 0.2) - 0.58
    if shape == "star":      # fold the plane into half a spike, where the outline is the line from its tip to a notch
        angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
        return (r * np.cos(angle) - 1.08) * 0.3596 + r * np.sin(angle) * 0.9331
    if shape == "cross":
        return np.minimum(box(x, y, 0.95, 0.32), box(x, y, 0.32, 0.95))
    if shape == "ring":
        return np.abs(r - 0.72) - 0.22
    if shape == "crescent":
        return np.maximum(np.hypot(x + 0.05, y) - 0.95, 0.72 - np.hypot(x - 0.42, y))
    if shape == "heart":     # a square on its tip, and a disc on each of its two upper sides
        u, v = 0.7071 * (x - y + 0.08), -0.7071 * (x + y - 0.08)
        return np.minimum.reduce([box(u, v, 0.56, 0.56), np.hypot(u - 0.56, v) - 0.56, np.hypot(u, v - 0.56) - 0.56])
    if shape == "arrow":
        head = np.maximum(0.8 * np.abs(x) - 0.6 * (y + 0.97), y - 0.12)
        return np.minimum(head, box(x, y - 0.45, 0.26, 0.5))
    if shape == "hourglass":
        return np.maximum(np.abs(y) - 0.88, 0.75 * (np.abs(x) - 0.88 * np.abs(y) - 0.06))
    raise ValueError(f"no shape is called {shape!r}")


def draw_shapes(seed, split, index, max_rotation=15.0, size=48, change=None):
    """Images `index` (c,) of a split in one pass: images (c, 3, S, S), masks (c, S, S), labels (c,), factors.

    Images 0 to 9, 10 to 19, ... hold every class once, so that the first n are balanced. `change` draws them anew with
    other values (c,) of some factors, all else equal: {"hue": ..., "class": labels, "noise": whose noise to take}."""
    index, split, half = np.asarray(index), ("train", "val").index(split), size / 2
    labels = (index + (10 * hashed(seed, split, index // 10, 0, draws=1)[:, 0]).astype(np.int64)) % 10
    u = hashed(seed, split, index, 1, draws=16)
    scale = 0.60 + 0.35 * u[:, 0]                            # of the half-width
    room = (1 - scale) * half + 1.5                          # how far from the middle its centre may lie, in pixels
    # Object and background are clearly apart in brightness, either one the brighter: no pixel is bright for one class,
    # so that a linear classifier on pixels learns little, while outlines look the same to gradients of either sign.
    low, high, brighter = 0.12 + 0.22 * u[:, 6], 0.66 + 0.24 * u[:, 7], u[:, 8] < 0.5
    factors = dict(
        scale=scale, rotation=(2 * u[:, 1] - 1) * np.float32(max_rotation),                          # degrees
        x=(2 * u[:, 2] - 1) * room, y=(2 * u[:, 3] - 1) * room,                                      # pixels
        hue=u[:, 4], saturation=u[:, 5], brightness=np.where(brighter, high, low),
        background_hue=u[:, 9], background=np.where(brighter, low, high),
        texture=(len(TEXTURES) * u[:, 10]).astype(np.int64))
    change = dict(change or {})
    labels, noise_of = np.asarray(change.pop("class", labels)), change.pop("noise", index)
    if unknown := set(change) - set(factors):
        raise ValueError(f"no factor is called {sorted(unknown)}: there are class, noise, {', '.join(factors)}")
    factors |= {name: np.asarray(value, factors[name].dtype) for name, value in change.items()}
    f = {name: value[:, None, None] for name, value in factors.items()}                              # (c, 1, 1) each
    py, px = np.meshgrid(*2 * [np.arange(size, dtype=np.float32) - np.float32(half - 0.5)], indexing="ij")

    # The object: pixels into its own coordinates, then the outline of its class. Its share of a pixel falls from 1 to 0
    # over one pixel across the outline, which is what anti-aliases it.
    cos, sin, unit = np.cos(np.deg2rad(f["rotation"])), np.sin(np.deg2rad(f["rotation"])), f["scale"] * np.float32(half)
    dx, dy = (px - f["x"]) / unit, (py - f["y"]) / unit
    x, y = cos * dx + sin * dy, cos * dy - sin * dx                                                  # (c, S, S)
    distance = np.empty_like(x)
    for k, shape in enumerate(SHAPES):
        distance[labels == k] = signed_distance(shape, x[labels == k], y[labels == k])
    share = np.clip(0.5 - distance * unit, 0, 1)

    # The background: a regular pattern in [-1, 1] of low contrast.
    turn = np.float32(2 * np.pi)
    angle, period = turn * u[:, 11, None, None], 6 + 6 * u[:, 12, None, None]                        # period in pixels
    cos, sin = np.cos(angle), np.sin(angle)
    along, across = cos * px + sin * py, cos * py - sin * px
    warp, weft = (np.sin(turn * (d / period + u[:, j, None, None])) for j, d in ((13, along), (14, across)))
    pattern = np.select([f["texture"] == k for k in range(len(TEXTURES))],
                        [0 * warp, along / np.float32(half), 3 * warp, 3 * warp * weft, 4 * (warp + weft) - 4])

    # Colours: a hue moves the channels against each other and leaves their mean, the brightness, where it is.
    def tint(hue):                                                                                   # -> (c, 3, 1, 1)
        third = np.arange(3, dtype=np.float32)[:, None, None] / 3
        return np.float32(0.17) * f["saturation"][:, None] * np.cos(turn * (hue[:, None] - third))

    ground = (f["background"] + np.float32(0.04) * pattern.clip(-1, 1))[:, None] + tint(f["background_hue"])
    image = ground + share[:, None] * (f["brightness"][:, None] + tint(f["hue"]) - ground)          # (c, 3, S, S)
    noise = hashed(seed, split, noise_of, 2, draws=size * size).reshape(-1, 1, size, size)
    image += np.float32(0.04) * (noise - np.float32(0.5))
    return (image.clip(0, 1) * 255).round().astype(np.uint8), (share > 0.5).astype(np.uint8), labels, factors

SHIFTS = ("noise", "blur", "textures", "grey", "contrast", "sketch")


def unseen_textures(seed, split, index, size=48):
    """A pattern (c, S, S) in [-1, 1] of a kind that TEXTURES has not: rings, zigzags, bricks or a mosaic."""
    u, tiles = hashed(seed, split, index, 3, draws=5), 2 * hashed(seed, split, index, 4, draws=12 * 12) - 1
    u = u[:, :, None, None]                                  # (c, 5, 1, 1)
    kind, angle, period = 4 * u[:, 0], np.pi * u[:, 1], 7 + 4 * u[:, 2]
    py, px = np.meshgrid(*2 * [np.arange(size, dtype=np.float32)], indexing="ij")
    px, py = px - size * u[:, 3], py - size * u[:, 4]        # (c, S, S)   from a place of each image's own
    x, y = np.cos(angle) * px + np.sin(angle) * py, np.cos(angle) * py - np.sin(angle) * px
    rings = np.sin(2 * np.pi * np.hypot(px, py) / period)
    zigzags = np.sin(2 * np.pi * (y + np.abs(x % (2 * period) - period)) / period)
    joints = np.minimum(y % period, (x + period * (y // period % 2)) % (2 * period))         # between rows and bricks
    tile = np.arange(size) * 12 // size
    mosaic = tiles.reshape(-1, 12, 12)[:, tile][:, :, tile]
    return np.select([kind < 1, kind < 2, kind < 3], [2 * rings, 2 * zigzags, 1.6 * joints - 2.2], mosaic).clip(-1, 1)


def shift_shapes(shift, seed, split, index, max_rotation=15.0):
    """draw_shapes seen in a way that no training image is (one of SHIFTS): class, place and size of the object stay.
    What is drawn at random follows from (seed, split, index), so every run meets the same images."""
    from torchvision.transforms.v2 import functional as VF
    number, plain = ("train", "val").index(split), dict(texture=np.zeros(len(index)))
    images, masks, labels, factors = draw_shapes(
        seed, split, index, max_rotation, change=plain if shift == "textures" else None)
    x, inside, size = torch.from_numpy(images) / 255, torch.from_numpy(masks)[:, None].float(), images.shape[-1]
    if shift == "noise":                                     # of each channel apart, as wide as the contrast
        x = x + 0.9 * (torch.from_numpy(hashed(seed, number, index, 3, draws=3 * size**2)).view(x.shape) - 0.5)
    elif shift == "blur":
        x = VF.gaussian_blur(x, [13, 13], [2.5, 2.5])
    elif shift == "textures":                                # three times the contrast of the ones in training
        x = x + 0.12 * (1 - inside) * torch.from_numpy(unseen_textures(seed, number, index, size)).float()[:, None]
    elif shift == "grey":
        x = VF.rgb_to_grayscale(x, num_output_channels=3)
    elif shift == "contrast":
        x = 0.5 + 0.2 * (x - 0.5)
    elif shift == "sketch":                                  # a pencil line where the mask begins, on white paper
        line = F.max_pool2d(inside, 3, 1, 1) + F.max_pool2d(-inside, 3, 1, 1)                # 1 on the edge, else 0
        x = VF.gaussian_blur(0.95 - 0.75 * line, [3, 3], [0.5, 0.5]).expand_as(x)
    else:
        raise UserError(f"shapes have no shift {shift!r}: there are shapes:{', shapes:'.join(SHIFTS)}")
    return (x.clip(0, 1) * 255).round().byte().numpy(), masks, labels, factors


class Shapes(InMemory):
    """Ten shapes on regular backgrounds: no files, no download, and every factor behind an image is known. Drawn at
    start-up in seconds, 83 MB. max_rotation=180 is the variant for asking what a code makes of rotation; shift, one of
    SHIFTS, shows the same objects in another way, for asking what a classifier hangs on."""

    SIZES, native_size = {"train": 12_000, "val": 2_000}, 48

    def __init__(self, split, transform=None, seed=0, limit=None, *, count=None, max_rotation=15.0, pictures=0,
                 shift=None):
        # --seed drives crops, masks and weights. The pictures stay as they are, like any other data set's; another
        # number for `pictures` draws others.
        super().__init__(f"shapes:{shift}" if shift else "shapes", split, transform, seed)
        self.count, self.max_rotation, self.pictures = count or self.SIZES[split], max_rotation, pictures
        self.shift = shift
        self.count = min(limit or self.count, self.count)
        self.classes = list(SHAPES)
        self.labels = torch.from_numpy(self.arrays["labels"])                # (n,)

    def load(self):
        def draw(start):
            index = np.arange(start, min(start + 250, self.count))
            which = self.pictures, self.split, index, self.max_rotation
            return shift_shapes(self.shift, *which) if self.shift else draw_shapes(*which)

        with ThreadPoolExecutor(os.cpu_count()) as pool:     # 250 at a time stay in a core's cache
            images, masks, labels, factors = zip(*pool.map(draw, range(0, self.count, 250)))
        factors = {name: np.concatenate([part[name] for part in factors]) for name in factors[0]}
        return dict(images=np.concatenate(images), masks=np.concatenate(masks), labels=np.concatenate(labels),
                    factors=factors)

    def masks(self, index):
        """Which pixels are the object's: (S, S) uint8, or (m, S, S) for several indices."""
        return torch.from_numpy(self.arrays["masks"][index])

    @property
    def factors(self):
        """What each image was drawn from: {"scale": (n,), "rotation": (n,) degrees, "x", "y": pixels, ...}."""
        return self.arrays["factors"]
