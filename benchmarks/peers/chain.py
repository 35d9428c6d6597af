"""What a training loop does to a picture, as other loaders' users write it; and with our kernel in its place.

All crops are inception crops (Szegedy et al. 2015, section 6) with an area of 0.08 to 1, drawn as torchvision's
RandomResizedCrop draws them, scaled to 224 and mirrored in half of the cases.
"""

import math
import random
from io import BytesIO
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.data.decode import crop_picture

SIDE, AREA, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
# Mean and deviation of ImageNet's pictures, as torchvision's documentation gives them.
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

Pixels = NDArray[np.uint8]


class Box(NamedTuple):
    """A part of a picture."""

    left: int
    top: int
    width: int
    height: int


def crop(width: int, height: int) -> Box:
    """A box of a picture of this size: the first of ten draws that fits, or the largest central one of its shape."""
    for _ in range(10):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(random.randint(0, width - w), random.randint(0, height - h), w, h)
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def cropped(picture: Image.Image) -> Image.Image:
    """Cut, scaled by Pillow's bicubic filter, perhaps mirrored."""
    left, top, width, height = crop(*picture.size)
    cut = picture.crop((left, top, left + width, top + height)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else cut


def opened(data: bytes) -> Image.Image:
    """By Pillow, whole."""
    return Image.open(BytesIO(data)).convert("RGB")


def normalised(picture: Image.Image) -> Tensor:
    """The stock chain from a picture: crop, then (3, 224, 224) float32, mean 0 and deviation 1."""
    pixels = torch.from_numpy(np.array(cropped(picture))).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(255).sub_(MEAN).div_(DEVIATION)


def stock(data: bytes) -> Tensor:
    """The stock chain from a picture's bytes."""
    return normalised(opened(data))


def plain(data: bytes) -> Pixels:
    """As timm's loader has it: crop, then (3, 224, 224) uint8; what is left to do is for the device."""
    return np.asarray(cropped(opened(data))).transpose(2, 0, 1)


def kernel(data: bytes) -> Pixels:
    """The same crop by our kernel: (224, 224, 3) uint8."""
    height, width = map(int, simplejpeg.decode_jpeg_header(data)[:2])
    pixels = np.empty((SIDE, SIDE, 3), np.uint8)
    crop_picture(data, *crop(width, height), pixels, mirrored=random.random() < 0.5)
    return pixels
