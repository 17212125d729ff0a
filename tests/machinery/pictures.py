"""Pictures and folders that several tests write."""
import os

import numpy as np
import pytest
import torch
from PIL import Image

from support.files import UserError

ODD_NAMES = ["two words", "it's \"quoted\"", "two\nlines", "\rback\tand\x1bforth",
             "line\u2028separator", "große Katze 🐈", os.fsdecode(b"no \xff text")]


def noise(height=20, width=20, seed=0):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def photo(height=60, width=80):
    """A smooth colour image (3, H, W): red rises to the right, green rises downwards."""
    red = torch.linspace(0, 255, width).expand(height, width)
    green = torch.linspace(0, 255, height)[:, None].expand(height, width)
    return torch.stack([red, green, torch.full((height, width), 128.0)]).byte()


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def fill(root, classes=("cat", "dog"), each=3):
    """root/train/CLASS/* and root/val/CLASS/* with pictures of noise."""
    folders = [root / split / name for split in ("train", "val") for name in classes]
    for k, folder in enumerate(folders):
        for i in range(each):
            save(folder / f"{i}.png", noise(seed=100 * k + i))
    return root


def sentence(call, *arguments, **options):
    """The text of the UserError that a call ends with; it is one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)
