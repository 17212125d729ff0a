"""Pre-training's loader beside two others, for python -m extras.bench --stage loader.

    ours                support/transforms.py: the window is drawn first, then decoded
    torchvision         its transforms on a Pillow image, in the recipe's order; bytes, as ours
    the authors' steps  the same, and each view made float32, mean and std taken off
"""
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from model import IMAGENET_MEAN, IMAGENET_STD
from support import transforms
from support.images import open_photo

SIZES = (224, 112)                           # of the two views, in pixels a side
PICTURES = ((500, 375, 16), (1500, 1125, 8), (4000, 3000, 2))            # width, height, how many

class OnPillow:
    """Pre-training's two views as torchvision makes them of a Pillow image: path -> views."""

    def __init__(self, finish):
        from torchvision.transforms import v2
        self.colours = v2.ColorJitter(0.4, 0.4, 0.4)
        self.flip = v2.RandomHorizontalFlip()
        self.window = v2.RandomResizedCrop(SIZES[0], (0.2, 1.0))
        self.finish = finish                 # what becomes of a view

    def __call__(self, path):
        from PIL import Image
        from torchvision.transforms.v2 import functional as VF
        with Image.open(path) as file:
            image = file.convert("RGB")
        image = self.flip(self.colours(image))
        window = self.window.make_params([image])
        views = [VF.resized_crop(image, **window, size=[size, size], interpolation=3)
                 for size in SIZES]
        return [self.finish(view) for view in views]


def normalised(image):
    """What the authors' loader makes of a view: float32, mean and std taken off."""
    from torchvision.transforms.v2 import functional as VF
    pixels = VF.to_dtype(VF.pil_to_tensor(image), torch.float32, scale=True)
    return VF.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))


def seconds_each(loaders, paths, repeats, now):
    """-> {name: seconds an image in each of `repeats` rounds, in which the loaders take turns}"""
    seconds = {name: [] for name in loaders}
    for repeat in range(repeats + 1):
        for name, load in loaders.items():
            torch.manual_seed(repeat)
            begin = now()
            for path in paths:
                load(path)
            seconds[name].append((now() - begin) / len(paths))
    return {name: times[1:] for name, times in seconds.items()}          # the first warms up


def compare_loaders(repeats, now, tell, pictures=PICTURES):
    """Images a second of each loader, and how many times faster ours is: medians."""
    from torchvision.transforms.v2 import functional as VF
    ours = transforms.MIMTransform(*SIZES)
    loaders = {"ours": lambda path: ours(open_photo(path)),
               "torchvision": OnPillow(VF.pil_to_tensor),
               "the authors' steps": OnPillow(normalised)}
    for width, height, count in pictures:
        with tempfile.TemporaryDirectory() as folder:
            write_pictures(Path(folder), count, height, width)
            seconds = seconds_each(loaders, sorted(Path(folder).iterdir()), repeats, now)
        print(f"two views of {width} x {height}, images/s:", end="")
        for name, times in seconds.items():
            rate = 1 / statistics.median(times)
            faster = statistics.median(t / own for t, own in zip(times, seconds["ours"],
                                                                 strict=True))
            print(f" {name} {rate:.1f} ({faster:.2f} x)", end="")
            tell(stage="loader", name=f"{width} x {height}, {name}", images_per_s=rate,
                 ours_is_faster=faster)
        print()


def write_pictures(folder, count, height=375, width=500):
    """JPEGs, of ImageNet's usual size: smooth with some noise, so that a file is about as long."""
    from PIL import Image
    for i in range(count):
        coarse = torch.rand(1, 3, 12, 16)
        smooth = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
        image = smooth + 0.04 * torch.randn(1, 3, height, width)
        pixels = (255 * image[0].clamp(0, 1)).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:03}.jpg", quality=92)
