"""The crop of a picture, straight from its bytes: no more of a JPEG is decoded than the crop needs.

`crop.c` says how; it is compiled when the project is installed and libjpeg-turbo's headers are there. Where it has not
been, the whole picture is decoded and OpenCV scales the box: the same crop, and a test states how near.
"""

from pipeline.data.image import Crops, Pixels, decode, scale

try:
    import vitscale_crop
except ImportError:  # not compiled, or for a machine that has libjpeg-turbo
    vitscale_crop = None

BY = "vitscale_crop" if vitscale_crop is not None else "simplejpeg and OpenCV"
"""What decodes here; the pixels of JPEGs differ slightly between the two."""


def cut_from(data: bytes, crops: Crops, i: int, out: Pixels, *, antialiased: bool = True) -> None:
    """Write crop `i` of the picture in `data`, scaled to the size of `out` (h, w, 3), into `out`."""
    left, top, width, height = crops.left.item(i), crops.top.item(i), crops.width.item(i), crops.height.item(i)
    mirrored = crops.mirrored.item(i)
    crop_picture(data, left, top, width, height, out, mirrored=mirrored, antialiased=antialiased)


def crop_picture(
    data: bytes,
    left: int,
    top: int,
    width: int,
    height: int,
    out: Pixels,
    *,
    mirrored: bool = False,
    antialiased: bool = True,
) -> None:
    """Write a box of the picture in `data`, scaled to the size of `out`, into `out` (h, w, 3), which is contiguous.

    `antialiased` weighs what lies around a pixel's place by a triangle as wide as the scale (Pillow's BILINEAR);
    otherwise it looks at two neighbours along each axis alone, whatever the scale. ValueError where the bytes are no
    picture, or the box reaches beyond it. Damage beyond the rows of the box may be overlooked, a missing end is not.
    """
    assert out.flags.c_contiguous and out.shape[2:] == (3,), "the kernel writes row after row"
    if vitscale_crop is not None and data[:2] == b"\xff\xd8":
        try:
            vitscale_crop.crop(data, out, left, top, width, height, *out.shape[:2], mirrored, antialiased)
            return
        except ValueError:
            pass  # as in `decode`: others know more kinds of JPEG, and forgive more
    scale(decode(data), left, top, width, height, out, mirrored=mirrored, antialiased=antialiased)
