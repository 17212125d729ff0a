"""What each stage does to an image before a network sees it.
"""

import torch

from model import IMAGENET_MEAN, IMAGENET_STD

NEAREST, BILINEAR = 0, 2                     # interpolations have Pillow's numbers there

BICUBIC = dict(interpolation=3, antialias=True)      # as Pillow's, which the authors use


# -------------------------------------------------------------------------------------------------------- transforms
class RandomCrop:
    """A window of random area (`scale` of the image) and aspect (3/4 to 4/3; ten tries, then the central crop), resized
    (bicubic) once to each of `sizes`; then flipped with probability `flip`. One tensor for one size, else a tuple.
    Of a square image a scale of 1 leaves nothing to draw: ten tries miss the aspect, then it is taken whole."""

    def __init__(self, sizes, scale, flip):
        from torchvision.transforms import v2
        self.window, self.sizes, self.flip = v2.RandomResizedCrop(sizes[0], scale), sizes, flip

    def __call__(self, image):
        from torchvision.transforms.v2 import functional as VF
        whole = self.window.scale[0] == 1 and image.shape[-2] == image.shape[-1]
        window = dict(top=0, left=0, height=image.shape[-2], width=image.shape[-1]) if whole else (
            self.window.make_params([image]))
        views = [VF.resized_crop(image, **window, size=[size, size], **BICUBIC) for size in self.sizes]
        if torch.rand(()) < self.flip:
            views = [view.flip(-1) for view in views]
        return views[0] if len(views) == 1 else tuple(views)


def vqkd_transform(size, scale=(0.08, 1.0), flip=0.5):
    """Stage 1: random resized crop -> flip. No colour jitter."""
    return RandomCrop([size], scale, flip)


def jitter(image, strength):
    """Brightness, contrast and saturation of an image (3, H, W) uint8, each times U(1 - strength, 1 + strength), in
    random order. Contrast is the distance from the image's mean grey, saturation that from the pixel's own grey.

    Written out, as this is most of the loader's work: five times faster than torchvision's on 500 x 375 pixels, since
    numbers become bytes once. Differs from the recipe, which rounds after each of the three: by a few levels."""
    order, factors = torch.randperm(3).tolist(), (1 + strength * (2 * torch.rand(3) - 1)).tolist()
    x = image.to(torch.float32, memory_format=torch.contiguous_format)
    for which in order:
        factor = factors[which]
        if which == 0:
            x.mul_(factor)
        else:
            grey = 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]            # (H, W)
            x.mul_(factor).add_(grey.mean() if which == 1 else grey, alpha=1 - factor)
        x.clamp_(0, 255)
    return x.round_().to(torch.uint8)


class MIMTransform:
    """Stage 2: colour jitter of the WHOLE image (no hue) -> flip -> ONE window, resized for the backbone and for the
    tokenizer, so that patch i is the same place in both; where both take one size, one tensor serves both."""

    def __init__(self, sizes, scale, color_jitter, flip):
        self.color_jitter, self.flip, self.crop = color_jitter, flip, RandomCrop(sizes, scale, 0.0)

    def __call__(self, image):
        if self.color_jitter:
            image = jitter(image, self.color_jitter)
        if torch.rand(()) < self.flip:
            image = image.flip(-1)
        return self.crop(image)


def mim_transform(size, tokenizer_size=None, scale=(0.2, 1.0), color_jitter=0.4, flip=0.5):
    return MIMTransform([size] if tokenizer_size in (None, size) else [size, tokenizer_size], scale, color_jitter, flip)


def posterize(image, bits, **_):
    """timm asks for 0 bits at magnitude 10: black, as Pillow made it when the authors ran this. Pillow 13 refuses 0."""
    from PIL import Image, ImageOps
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


class FinetuneTransform:
    """Stage 3: random resized crop -> flip -> RandAugment -> erasing. Result: uint8 without erasing, else float32.

    RandAugment is timm's, as the authors call it (moves of up to 0.45 of the side, holes filled with the mean colour,
    bicubic): torchvision's magnitude 9 is another strength. Erasing (one box of 2 to 33 % of the area, aspect 0.3 to
    1/0.3) sets pixels to N(0, 1) AFTER mean and std are taken off: mean + std * N(0, 1) where images are in [0, 1]."""

    def __init__(self, size, scale=(0.08, 1.0), randaugment="rand-m9-mstd0.5-inc1", erasing=0.25, flip=0.5):
        from torchvision.transforms import v2
        self.crop, self.augment, self.erasing = RandomCrop([size], scale, flip), None, erasing
        if randaugment:
            from timm.data.auto_augment import rand_augment_transform
            fill = tuple(round(255 * m) for m in IMAGENET_MEAN)
            self.augment = rand_augment_transform(        # 3: bicubic, in Pillow's numbers
                randaugment, dict(translate_pct=0.45, img_mean=fill, interpolation=3))
            for op in self.augment.ops:
                if op.name == "PosterizeIncreasing":
                    op.aug_fn = posterize
        self.box = v2.RandomErasing(1.0, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")

    def __call__(self, image):
        from torchvision.transforms.v2 import functional as VF
        image = self.crop(image)
        if self.augment:
            image = VF.pil_to_tensor(self.augment(VF.to_pil_image(image)))
        if not self.erasing:
            return image
        image = image.float() / 255
        if torch.rand(()) < self.erasing:
            box = self.box.make_params([image])              # i, j, h, w, and v: N(0, 1) noise (3, h, w)
            if box["v"] is not None:
                mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
                image = VF.erase(image, **{**box, "v": mean + std * box["v"]})
        return image



class EvalTransform:
    """Resize the shorter side to 256/224 of `size` (bicubic) -> crop the centre; from 384 on straight to size x size.

    Differs from the recipe for images of at most 64 px a side (shapes, CIFAR): they are shown whole, since their
    objects fill them to the edge; and one that has the size already is left untouched."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        size, whole = [self.size, self.size], self.size >= 384 or max(image.shape[-2:]) <= 64
        if whole and list(image.shape[-2:]) == size:
            return image
        from torchvision.transforms.v2 import functional as VF
        if whole:
            return VF.resize(image, size, **BICUBIC)
        longest = 8 * min(image.shape[-2:])                  # of a strip, say 20,000 x 10, the crop shows the middle:
        if max(image.shape[-2:]) > longest:                  # enlarged as a whole it would fill the memory
            image = VF.center_crop(image, [min(side, longest) for side in image.shape[-2:]])
        return VF.center_crop(VF.resize(image, [self.size * 256 // 224], **BICUBIC), size)

