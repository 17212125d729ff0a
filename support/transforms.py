"""What each stage does to an image before a network sees it.

    VQKDTransform      stage 1: a random window, flipped half of the time
    MIMTransform       stage 2: colours shaken, then one window for the backbone and the tokenizer
    FinetuneTransform  stage 3: a random window, RandAugment, erasing
    EvalTransform      every stage, without chance: the centre, or the whole of a small image
    MIMEvalTransform   stage 2: that, for the backbone and the tokenizer

An image is (3, H, W) uint8 before and after, apart from erasing, which gives float32 in [0, 1].
A JPEG comes as a Photo, not yet decoded: a window is drawn first, then decoded as far as needed.
Every draw comes from torch's global generator (RandAugment: also from `random` and numpy); the
data set seeds all of them before each image. torchvision is slow to import, so it is imported
where it is used. Segmentation, which moves images and label maps alike, has its own: scenes.py.
"""
import torch

from model import IMAGENET_MEAN, IMAGENET_STD
from support.files import UserError
from support.images import Photo
from support.positions import sides

RANDAUGMENT = "rand-m9-mstd0.5-inc1"     # the authors' RandAugment, as timm describes it
# Interpolations have Pillow's numbers here, and BICUBIC computes as Pillow, which the authors use.
NEAREST, BILINEAR = 0, 2
BICUBIC = dict(interpolation=3, antialias=True)
# A window of a Photo is decoded with so many times the pixels, a side, that its view has, or more.
MARGIN = 1.5


def cut(image, window, size):
    """The pixels of a window that will be resized to `size`: size x size, or (height, width).

    image: (3, H, W) uint8, or a Photo, which is decoded at 1/s of its size: s is 1, 2, 4 or 8, the
    largest that leaves MARGIN * size pixels to each side of the window.
    Differs from the recipe, which decodes all pixels of a JPEG, which takes longer.
    -> pixels of the window (3, h / s, w / s), the whole image (3, H / s, W / s)
    """
    s = 1
    if isinstance(image, Photo):
        height, width = sides(size)
        room = min(window["height"] / height, window["width"] / width)
        while s < 8 and room >= 2 * s * MARGIN:
            s *= 2
        image = image.decode(s)
    # If s > 1, an edge is rounded to a coarse pixel: by a third of a pixel of the view at most.
    top = round(window["top"] / s)
    left = round(window["left"] / s)
    bottom = round((window["top"] + window["height"]) / s)
    right = round((window["left"] + window["width"]) / s)
    return image[:, top:bottom, left:right], image


class RandomCrop:
    """A random window, resized (bicubic) to each of `sizes`: a tensor for one size, else a tuple.

    A size is a side of a square, or (height, width); all of them have the same aspect.
    The window has an area of `scale` times the image's, and an aspect of 3/4 to 4/3 times that of
    the sizes. After ten draws that do not fit into the image, the window is the largest one around
    the centre.
    """

    def __init__(self, sizes, scale):
        from torchvision.transforms import v2
        self.sizes = sizes
        height, width = sides(sizes[0])
        self.aspect = width / height
        aspects = 3 / 4 * self.aspect, 4 / 3 * self.aspect
        self.window = v2.RandomResizedCrop((height, width), scale, aspects)

    def draw(self, image):
        """-> dict(top, left, height, width), in pixels"""
        height, width = image.shape[-2:]
        if self.window.scale[0] == 1 and height * self.aspect == width:
            # Only the whole image has its own area, so there is nothing to draw.
            return dict(top=0, left=0, height=height, width=width)
        return self.window.make_params([torch.empty(3, height, width, device="meta")])

    def views(self, pixels, flipped=False):
        from torchvision.transforms.v2 import functional as VF
        views = []
        for size in self.sizes:
            view = VF.resize(pixels, list(sides(size)), **BICUBIC)
            views.append(view.flip(-1) if flipped else view)
        return tuple(views) if len(views) > 1 else views[0]

    def __call__(self, image):
        pixels, _ = cut(image, self.draw(image), max(self.sizes))
        return self.views(pixels)


class VQKDTransform:
    """Stage 1: random window -> flip. No colour jitter."""

    def __init__(self, size, scale=(0.08, 1.0)):
        from torchvision.transforms import v2
        self.crop = RandomCrop([size], scale)
        self.flip = v2.RandomHorizontalFlip(0.5)

    def __call__(self, image):
        return self.flip(self.crop(image))


def draw_jitter(strength):
    """-> the order of brightness (0), contrast (1) and saturation (2), and the factor of each."""
    order = torch.randperm(3).tolist()
    factors = (1 + strength * (2 * torch.rand(3) - 1)).tolist()
    return order, factors


def grey_of(x):
    return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]                            # (H, W)


def jitter(pixels, whole, order, factors):
    """Shake brightness, contrast and saturation of pixels (3, h, w) uint8, in the order drawn.

    Each is multiplied by its factor. Contrast is the distance from the mean grey of the whole
    image (3, H, W), saturation the distance from the pixel's own grey.

    Differs from the recipe, torchvision's ColorJitter, which rounds to bytes after each of the
    three. We round once, and the result differs by a few levels.
    """
    # For the mean grey, every k-th pixel of every k-th row is enough: at least 64 x 64 of them.
    k = max(1, min(whole.shape[-2:]) // 64)
    floats = dict(dtype=torch.float32, memory_format=torch.contiguous_format)
    few = whole[:, ::k, ::k].to(**floats)
    x = pixels.to(**floats)
    for which in order:                      # 0 brightness, 1 contrast, 2 saturation
        factor = factors[which]
        mean = grey_of(few).mean()
        for part in (x, few):                # the whole image changes, too, and so its mean
            if which == 0:
                part.mul_(factor)
            if which == 1:
                part.mul_(factor).add_(mean, alpha=1 - factor)
            if which == 2:
                grey = grey_of(part)
                part.mul_(factor).add_(grey, alpha=1 - factor)
            part.clamp_(0, 255)
    return x.round_().to(torch.uint8)


class MIMTransform:
    """Stage 2: colour jitter (no hue) of the WHOLE image -> flip -> one random window.

    The window is resized for the backbone and for the tokenizer, so that patch i is the same place
    in both: (view of `size`, view of `tokenizer_size`). If both sizes are equal, the result is one
    tensor that serves both.

    That is the order of the draws. Only the window's pixels are computed: cut, shake, resize, flip.
    Differs from the plain order: the mean grey is that of fewer pixels, which at 500 x 375 changes
    values by 0.03 levels of 255 on average, none by more than 3. A large Photo also has coarse
    pixels. At 1500 x 1125 they change the view of a window by 0.5 levels, 2 % of the values by more
    than 3. Rounding the window's edges to them makes that 1.6 levels and 12 %.
    """

    def __init__(self, size, tokenizer_size=None, scale=(0.2, 1.0), color_jitter=0.4):
        same = tokenizer_size in (None, size)
        self.color_jitter = color_jitter
        self.crop = RandomCrop([size] if same else [size, tokenizer_size], scale)

    def __call__(self, image):
        drawn = draw_jitter(self.color_jitter) if self.color_jitter else None
        flipped = bool(torch.rand(1) < 0.5)
        window = self.crop.draw(image)
        if flipped:
            window["left"] = image.shape[-1] - window["left"] - window["width"]
        pixels, whole = cut(image, window, max(self.crop.sizes))
        if drawn:
            pixels = jitter(pixels, whole, *drawn)
        return self.crop.views(pixels, flipped)


def posterize(image, bits, **_):
    """Keep `bits` bits of each channel. timm asks for 0 at magnitude 10, which Pillow 13 refuses:
    a black image, as Pillow made it when the authors ran this."""
    from torchvision.transforms.v2 import functional as VF
    return VF.to_pil_image(VF.posterize(VF.pil_to_tensor(image), bits))


def rand_augment(recipe):
    """timm's RandAugment as the authors call it: shifts of up to 0.45 of the side, holes filled
    with the mean colour, bicubic. torchvision's magnitude 9 has another strength.

    recipe: as timm describes it. UserError if timm does not understand it.
    """
    from timm.data.auto_augment import rand_augment_transform
    mean_colour = tuple(round(255 * m) for m in IMAGENET_MEAN)
    options = dict(translate_pct=0.45, img_mean=mean_colour, interpolation=BICUBIC["interpolation"])
    try:
        augment = rand_augment_transform(recipe, options)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(f"--randaugment {recipe} is not understood by timm: give {RANDAUGMENT}, "
                        f"for example, or none") from error
    for op in augment.ops:
        if op.name == "PosterizeIncreasing":
            op.aug_fn = posterize
    return augment


class FinetuneTransform:
    """Stage 3: random window -> flip -> RandAugment (None: without) -> erasing.

    An image is erased with probability `erasing`: one box of 2 to 33 % of the area, aspect 0.3 to
    1/0.3, filled with N(0, 1) AFTER mean and std are taken off. Images are in [0, 1] here, so the
    box holds mean + std * N(0, 1). With erasing 0 the result is uint8, else float32.
    """

    def __init__(self, size, scale=(0.08, 1.0), randaugment=RANDAUGMENT, erasing=0.25):
        from torchvision.transforms import v2
        self.crop = RandomCrop([size], scale)
        self.flip = v2.RandomHorizontalFlip(0.5)
        self.augment = rand_augment(randaugment) if randaugment else None
        self.erasing = erasing
        self.box = v2.RandomErasing(1.0, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")

    def __call__(self, image):
        from torchvision.transforms.v2 import functional as VF
        image = self.flip(self.crop(image))
        if self.augment:
            image = VF.pil_to_tensor(self.augment(VF.to_pil_image(image)))
        if not self.erasing:
            return image
        image = image.float() / 255
        if torch.rand(()) < self.erasing:
            box = self.box.make_params([image])              # i, j, h, w, and v: noise (3, h, w)
            if box["v"] is not None:                         # None: no box fits (images of 1 pixel)
                mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
                std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
                box["v"] = mean + std * box["v"]
                image = VF.erase(image, **box)
        return image


def pixels_of(image):
    return image.decode() if isinstance(image, Photo) else image


class EvalTransform:
    """Resize to 256/224 of `size` (bicubic) -> crop the centre, size x size or (height, width).

    A square decides by the shorter side of the image. From 384 pixels on, the whole image is
    resized to size x size instead.
    Differs from the recipe for images of at most 64 px a side (shapes, CIFAR): they are shown
    whole, since their objects fill them to the edge. An image that has the size already is left
    untouched.
    """

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        from torchvision.transforms.v2 import functional as VF
        image = pixels_of(image)
        shape = list(image.shape[-2:])
        target = list(sides(self.size))
        if min(target) >= 384 or max(shape) <= 64:
            return image if shape == target else VF.resize(image, target, **BICUBIC)
        # Of a strip, say 20,000 x 10, the crop shows the middle. We cut it before resizing:
        # enlarged as a whole, the strip would fill the memory.
        longest = 8 * min(shape)
        if max(shape) > longest:
            image = VF.center_crop(image, [min(side, longest) for side in shape])
        image = VF.resize(image, self.covering(target, *image.shape[-2:]), **BICUBIC)
        return VF.center_crop(image, target)

    def covering(self, target, height, width):
        """The least size of the image's aspect whose sides are 256/224 of the target's, or more."""
        least_height, least_width = [side * 256 // 224 for side in target]
        if least_height * width >= least_width * height:     # the height decides
            return [least_height, int(least_height * width / height)]
        return [int(least_width * height / width), least_width]


class MIMEvalTransform:
    """Stage 2 without chance: an EvalTransform for the backbone, one for the tokenizer.

    As from MIMTransform, the result is (view of `size`, view of `tokenizer_size`), or one tensor
    if both are equal.
    """

    def __init__(self, size, tokenizer_size):
        sizes = [size] if size == tokenizer_size else [size, tokenizer_size]
        self.transforms = [EvalTransform(side) for side in sizes]

    def __call__(self, image):
        image = pixels_of(image)
        views = [transform(image) for transform in self.transforms]
        return tuple(views) if len(views) > 1 else views[0]
