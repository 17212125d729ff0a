"""The built-in pictures: ten shapes, every factor known, nothing to download.

    Shapes         the data set: 12,000 training and 2,000 held-out images, 48 x 48
    draw_shapes    images, masks, labels and factors of given indices
    shift_shapes   the same objects as no training image shows them (noise, blur, ...)

Image i of a split is a pure function of (seed, split, i): `hashed` gives its random numbers, and
from these follow the factors (class, size, place, colours ...), then the object's share of each
pixel, the background and the colours.

Shapes used in this file:  c images drawn in one pass, S = SIZE pixels a side
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from support.files import UserError
from support.images import InMemory

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "arrow",
          "hourglass")
TEXTURES = ("plain", "gradient", "stripes", "checks", "dots")
SHIFTS = ("noise", "blur", "textures", "grey", "contrast", "sketch")
SIZE = 48
HALF = SIZE / 2
TURN = 2 * np.pi


# --- random numbers -------------------------------------------------------------------------------
def hashed(*numbers, draws):
    """Uniform numbers in [0, 1) that depend on `numbers` alone.  -> (c, draws) float32

    Each number is an integer or an array (c,) of integers. A counter stands in the place of a
    generator (splitmix64's mixing). So image 7 needs no drawing of images 0 to 6, and a thousand
    images take one pass.
    """
    def mix(x):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.zeros(1, dtype=np.uint64)     # an array: its integers wrap around at 2^64 silently
    for number in numbers:
        state = mix(state + golden * (np.atleast_1d(number).astype(np.uint64) + np.uint64(1)))
    state = mix(state[:, None] + golden * np.arange(1, draws + 1, dtype=np.uint64))  # (c, draws)
    return (state >> np.uint64(40)).astype(np.float32) / np.float32(2 ** 24)


# --- drawing --------------------------------------------------------------------------------------
def signed_distance(shape, x, y):
    """About the distance to the outline of a shape, negative inside.

    x points right, y down; a shape fills about [-1, 1] each way. No two shapes are equal up to a
    rotation or a reflection.
    """
    def box(x, y, half_width, half_height):
        return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)

    r = np.hypot(x, y)
    if shape == "circle":
        return r - 0.92
    if shape == "square":
        return box(x, y, 0.82, 0.82)
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(x) - 0.5 * (y - 0.2), y - 0.2) - 0.58
    if shape == "star":                      # fold the plane into half a spike: there the outline
        sector = np.pi / 5                   # is the line from the tip to a notch
        angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
        return (r * np.cos(angle) - 1.08) * 0.3596 + r * np.sin(angle) * 0.9331
    if shape == "cross":
        return np.minimum(box(x, y, 0.95, 0.32), box(x, y, 0.32, 0.95))
    if shape == "ring":
        return np.abs(r - 0.72) - 0.22
    if shape == "crescent":
        return np.maximum(np.hypot(x + 0.05, y) - 0.95, 0.72 - np.hypot(x - 0.42, y))
    if shape == "heart":                     # a square on its tip, a disc on each upper side
        u = 0.7071 * (x - y + 0.08)
        v = -0.7071 * (x + y - 0.08)
        left, right = np.hypot(u, v - 0.56) - 0.56, np.hypot(u - 0.56, v) - 0.56
        return np.minimum.reduce([box(u, v, 0.56, 0.56), right, left])
    if shape == "arrow":
        head = np.maximum(0.8 * np.abs(x) - 0.6 * (y + 0.97), y - 0.12)
        return np.minimum(head, box(x, y - 0.45, 0.26, 0.5))
    if shape == "hourglass":
        return np.maximum(np.abs(y) - 0.88, 0.75 * (np.abs(x) - 0.88 * np.abs(y) - 0.06))
    raise ValueError(f"no shape is called {shape!r}")


def sample_factors(u, max_rotation):
    """Uniform numbers u (c, 16) -> what is drawn: {"scale": (c,), "rotation": (c,), ...}."""
    scale = 0.60 + 0.35 * u[:, 0]            # of the half-width
    room = (1 - scale) * HALF + 1.5          # how far the centre may lie from the middle
    # Object and background are clearly apart in brightness, and either may be the brighter one. So
    # no pixel is bright for one class, and a linear classifier on pixels learns little. Outlines
    # look the same to gradients of either sign.
    low = 0.12 + 0.22 * u[:, 6]
    high = 0.66 + 0.24 * u[:, 7]
    brighter = u[:, 8] < 0.5
    return dict(
        scale=scale,
        rotation=(2 * u[:, 1] - 1) * max_rotation,           # degrees
        x=(2 * u[:, 2] - 1) * room,                          # pixels
        y=(2 * u[:, 3] - 1) * room,
        hue=u[:, 4],
        saturation=u[:, 5],
        brightness=np.where(brighter, high, low),
        background_hue=u[:, 9],
        background=np.where(brighter, low, high),            # its brightness
        texture=(len(TEXTURES) * u[:, 10]).astype(np.int64))


def pixel_grid():
    """-> x, y of each pixel, (S, S) each, from the middle of the image."""
    along = np.arange(SIZE, dtype=np.float32) - (HALF - 0.5)
    y, x = np.meshgrid(along, along, indexing="ij")
    return x, y


def turned(x, y, angle):
    """The coordinates in axes that are turned by `angle` (radians)."""
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def object_share(labels, f):
    """The object's share of each pixel.  labels (c,), factors (c, 1, 1) -> (c, S, S) in [0, 1]

    The share falls from 1 to 0 over one pixel across the outline, which anti-aliases it.
    """
    px, py = pixel_grid()
    unit = f["scale"] * HALF                 # pixels
    x, y = turned((px - f["x"]) / unit, (py - f["y"]) / unit, np.deg2rad(f["rotation"]))
    distance = np.empty_like(x)                                                  # (c, S, S)
    for k, shape in enumerate(SHAPES):
        here = labels == k
        distance[here] = signed_distance(shape, x[here], y[here])
    return np.clip(0.5 - distance * unit, 0, 1)


def background_pattern(texture, u):
    """A regular pattern (c, S, S) in [-1, 1].  texture (c, 1, 1), uniform numbers u (4, c, 1, 1)"""
    px, py = pixel_grid()
    period = 6 + 6 * u[1]                    # pixels
    along, across = turned(px, py, TURN * u[0])
    warp = np.sin(TURN * (along / period + u[2]))
    weft = np.sin(TURN * (across / period + u[3]))
    patterns = [0 * warp, along / HALF, 3 * warp, 3 * warp * weft, 4 * (warp + weft) - 4]
    return np.select([texture == k for k in range(len(TEXTURES))], patterns).clip(-1, 1)


def tint(hue, saturation):
    """What a hue adds to red, green, blue. Their mean, the brightness, stays.  -> (c, 3, 1, 1)"""
    third = np.arange(3, dtype=np.float32)[:, None, None] / 3
    return 0.17 * saturation[:, None] * np.cos(TURN * (hue[:, None] - third))


def draw_shapes(seed, split, index, max_rotation=15.0, change=None):
    """Images `index` (c,) of a split, in one pass.

    -> images (c, 3, S, S) uint8, masks (c, S, S) uint8, labels (c,), factors {name: (c,)}
    Images 0 to 9, 10 to 19, ... hold every class once, so that the first n are balanced.
    change: other values (c,) for some factors, all else equal: {"hue": ..., "class": labels,
    "noise": of which image to take the noise}.
    """
    index = np.asarray(index)
    split = ("train", "val").index(split)
    first = (10 * hashed(seed, split, index // 10, 0, draws=1)[:, 0]).astype(np.int64)
    labels = (index + first) % 10
    noise_of = index
    u = hashed(seed, split, index, 1, draws=16)
    factors = sample_factors(u, max_rotation)
    for name, value in (change or {}).items():
        if name == "class":
            labels = np.asarray(value)
        elif name == "noise":
            noise_of = value
        elif name in factors:
            factors[name] = np.asarray(value, factors[name].dtype)
        else:
            raise ValueError(f"no factor is called {name!r}: there are class, noise, "
                             f"{', '.join(factors)}")

    f = {name: value[:, None, None] for name, value in factors.items()}          # (c, 1, 1) each
    share = object_share(labels, f)                                              # (c, S, S)
    pattern = background_pattern(f["texture"], u.T[11:15, :, None, None])
    ground = (f["background"] + 0.04 * pattern)[:, None]                         # low contrast
    ground = ground + tint(f["background_hue"], f["saturation"])                 # (c, 3, S, S)
    colour = f["brightness"][:, None] + tint(f["hue"], f["saturation"])          # (c, 3, 1, 1)
    image = ground + share[:, None] * (colour - ground)
    noise = hashed(seed, split, noise_of, 2, draws=SIZE * SIZE).reshape(-1, 1, SIZE, SIZE)
    image += 0.04 * (noise - 0.5)
    return to_bytes(image), (share > 0.5).astype(np.uint8), labels, factors


def to_bytes(image):
    """[0, 1] -> uint8; what lies outside becomes 0 or 255."""
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


# --- the same objects, seen in another way --------------------------------------------------------
def unseen_textures(seed, split, index):
    """Patterns that TEXTURES has not: rings, zigzags, bricks, a mosaic.  -> (c, S, S) in [-1, 1]"""
    u = hashed(seed, split, index, 3, draws=5).T[:, :, None, None]               # (5, c, 1, 1)
    tiles = 2 * hashed(seed, split, index, 4, draws=12 * 12) - 1
    kind = 4 * u[0]
    period = 7 + 4 * u[2]
    along = np.arange(SIZE, dtype=np.float32)
    py, px = np.meshgrid(along, along, indexing="ij")
    px, py = px - SIZE * u[3], py - SIZE * u[4]              # from a place of each image's own
    x, y = turned(px, py, np.pi * u[1])                                          # (c, S, S)
    rings = np.sin(TURN * np.hypot(px, py) / period)
    zigzags = np.sin(TURN * (y + np.abs(x % (2 * period) - period)) / period)
    row_shift = period * (y // period % 2)
    joints = np.minimum(y % period, (x + row_shift) % (2 * period))              # between bricks
    tile = np.arange(SIZE) * 12 // SIZE
    mosaic = tiles.reshape(-1, 12, 12)[:, tile][:, :, tile]
    patterns = [2 * rings, 2 * zigzags, 1.6 * joints - 2.2]
    return np.select([kind < 1, kind < 2, kind < 3], patterns, mosaic).clip(-1, 1)


def shift_shapes(shift, seed, split, index, max_rotation=15.0):
    """draw_shapes seen in a way that no training image is: `shift` is one of SHIFTS.

    Class, place and size of the object stay. All randomness follows from (seed, split, index), so
    every run meets the same images.
    """
    from torchvision.transforms.v2 import functional as VF
    if shift not in SHIFTS:
        raise UserError(f"shapes have no shift {shift!r}: there are shapes:"
                        f"{', shapes:'.join(SHIFTS)}")
    number = ("train", "val").index(split)
    plain = dict(texture=np.zeros(len(index))) if shift == "textures" else None
    images, masks, labels, factors = draw_shapes(seed, split, index, max_rotation, change=plain)
    x = torch.from_numpy(images) / 255                                           # (c, 3, S, S)
    inside = torch.from_numpy(masks)[:, None].float()                            # (c, 1, S, S)
    if shift == "noise":                     # of each channel apart, as wide as the contrast
        u = hashed(seed, number, index, 3, draws=3 * SIZE * SIZE)
        x = x + 0.9 * (torch.from_numpy(u).view(x.shape) - 0.5)
    elif shift == "blur":
        x = VF.gaussian_blur(x, [13, 13], [2.5, 2.5])
    elif shift == "textures":                # three times the contrast of those in training
        pattern = torch.from_numpy(unseen_textures(seed, number, index)).float()[:, None]
        x = x + 0.12 * (1 - inside) * pattern
    elif shift == "grey":
        x = VF.rgb_to_grayscale(x, num_output_channels=3)
    elif shift == "contrast":
        x = 0.5 + 0.2 * (x - 0.5)
    elif shift == "sketch":                  # a pencil line at the mask's edge, on white paper
        edge = F.max_pool2d(inside, 3, 1, 1) + F.max_pool2d(-inside, 3, 1, 1)    # 1 there, else 0
        x = VF.gaussian_blur(0.95 - 0.75 * edge, [3, 3], [0.5, 0.5]).expand_as(x)
    return to_bytes(x.numpy()), masks, labels, factors


# --- the data set ---------------------------------------------------------------------------------
class Shapes(InMemory):
    """Ten shapes on regular backgrounds, drawn at start-up in seconds, 83 MB.

    max_rotation=180 is a variant for measuring how codes react to rotation. shift, one of SHIFTS,
    shows the same objects in another way, for measuring what a classifier relies on.
    The seed drives crops and masks. As in any other data set, it does not change the pictures.
    """

    SIZES = {"train": 12_000, "val": 2_000}

    def __init__(self, split, transform=None, seed=0, limit=None, *, max_rotation=15.0, shift=None):
        super().__init__(f"shapes:{shift}" if shift else "shapes", split, transform, seed)
        self.count = min(limit or self.SIZES[split], self.SIZES[split])
        self.max_rotation = max_rotation
        self.shift = shift
        self.classes = list(SHAPES)
        self.labels = torch.from_numpy(self.arrays["labels"])                    # (n,)

    def load(self):
        def draw(start):
            index = np.arange(start, min(start + 250, self.count))
            if self.shift:
                return shift_shapes(self.shift, 0, self.split, index, self.max_rotation)
            return draw_shapes(0, self.split, index, self.max_rotation)

        with ThreadPoolExecutor(os.cpu_count()) as pool:     # 250 images stay in a core's cache
            parts = list(pool.map(draw, range(0, self.count, 250)))
        arrays = {name: np.concatenate([part[i] for part in parts])
                  for i, name in enumerate(("images", "masks", "labels"))}
        factors = {name: np.concatenate([part[3][name] for part in parts]) for name in parts[0][3]}
        return arrays | dict(factors=factors)

    def masks(self, index):
        """Which pixels are the object's: (S, S) uint8, or (m, S, S) for several indices."""
        return torch.from_numpy(self.arrays["masks"][index])

    @property
    def factors(self):
        """What each image was drawn from: {"scale": (n,), "rotation": (n,) degrees, ...}."""
        return self.arrays["factors"]
