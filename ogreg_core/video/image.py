"""Still images, read as clips of one frame that lasts one second.

Pillow decodes. The picture is turned as its EXIF orientation says. Grey, palette, CMYK and 16-bit pixels
become 8-bit RGB, transparency is dropped (as torchvision's ImageFolder does), and of animations and
multi-page files the first picture counts.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ogreg_core.errors import VideoError
from ogreg_core.video.packets import PacketIndex

__all__ = ["IMAGE_RATE", "ImageHeader", "check_image", "image_index", "read_image"]

# Frames per second of a clip of one frame, and so its length in seconds.
IMAGE_RATE = 1.0

# By content, not by name: among the 1.28 million .JPEG files of ImageNet-1K one is a PNG. No others:
# Pillow would hand an EPS to a Postscript interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")

# A JPEG may be decoded at 1/2, 1/4 or 1/8 as long as this many times the wanted size is left. At 2 the
# scaled picture differs from that of a whole decoding by 54 to 56 dB; rounding alone gives 57 to 58. A
# photo of 12 megapixels takes 30 instead of 110 ms.
_REDUCING_GAP = 2

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_DEGREES = {3: 180, 4: 180, 5: 90, 6: 270, 7: 270, 8: 90}


@dataclass(frozen=True)
class ImageHeader:
    """What an image file holds.

    Args:
        width, height: pixels as displayed.
        rotation: degrees by which the stored picture is turned counter-clockwise for display, beside
            a possible reflection.
        codec: Pillow's name of the format in small letters, for example ``jpeg``.
    """

    width: int
    height: int
    rotation: int
    codec: str


def read_image(path: str, size: tuple[int, int] | None = None) -> Tensor:
    """The picture in a file: uint8 ``[H, W, 3]`` RGB, upright.

    Args:
        path: the file.
        size: (height, width) of the result, bilinear and antialiased; None: as stored.

    Raises:
        VideoError: missing, empty, no image, cut off or damaged.
    """
    with _opened(path) as image:
        if size is not None and image.format in ("JPEG", "MPO"):
            height, width = size[::-1] if _orientation(image) in _SIDEWAYS else size
            image.draft(None, (_REDUCING_GAP * width, _REDUCING_GAP * height))
        pixels = torch.from_numpy(_upright_pixels(path, image))
    if size is None or pixels.shape[:2] == size:
        return pixels
    # Not Pillow's resize, which gives the same and takes four times as long.
    batch = pixels.permute(2, 0, 1)[None]
    return F.interpolate(batch, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def check_image(path: str, verification: Literal["quick", "full"] = "quick") -> ImageHeader:
    """What a file holds, after decoding it.

    ``quick`` reads JPEG files at an eighth of their size: all of their data pass through the decoder,
    at half the time. ``full`` decodes every pixel. Neither sees damage that leaves a decodable file.

    Args:
        path: the file.
        verification: how much to decode.

    Raises:
        VideoError: missing, empty, not-an-image, unsupported-codec, truncated, damaged, unreadable.
    """
    with _opened(path) as image:
        stored = image.size
        codec = (image.format or "").lower()
        if verification == "quick":
            image.draft(None, (1, 1))
        reduced = image.size != stored
        height, width = _upright_pixels(path, image).shape[:2]
        orientation = _orientation(image)
    if reduced:
        width, height = stored[::-1] if orientation in _SIDEWAYS else stored
    return ImageHeader(width, height, _DEGREES.get(orientation, 0), codec)


def image_index(path: str) -> PacketIndex:
    """The index of a clip of one frame; only the file's header is read.

    Raises:
        VideoError: missing, empty or no image.
    """
    with _opened(path) as image:
        width, height = image.size
        codec = (image.format or "").lower()
    start = np.zeros(1, np.int64)
    return PacketIndex(
        path=path,
        time_base=Fraction(1),
        pts=start,
        keys=start,
        key_seeks=start,
        frames=1,
        average_rate=IMAGE_RATE,
        container="image",
        codec=codec,
        width=width,
        height=height,
        packets=1,
        stated_seconds=0.0,
        held_seconds=0.0,
        stated_frames=1,
        distrust="an image",
    )


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image of a file, of which only the header is decoded; explains what goes wrong inside."""
    content = _content(path)
    try:
        with warnings.catch_warnings():
            # Of damaged EXIF data and of transparent palettes.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                yield image
    except (VideoError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise VideoError(
            f"{path} is not an image file that can be read",
            code="not-an-image",
            why=f"none of {', '.join(_FORMATS)}, or broken at its beginning",
            fix="check that the file was downloaded completely",
        ) from error
    except Image.DecompressionBombError as error:
        raise VideoError(
            f"{path} has too many pixels",
            code="unsupported-codec",
            why=f"Pillow says: {error}",
            fix="scale it down, or leave it out",
        ) from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and more. The
    # bytes are in memory: the disk has no part in it.
    except Exception as error:
        text = str(error)
        cut = isinstance(error, EOFError) or "truncated" in text.lower()
        raise VideoError(
            f"{path} is cut off" if cut else f"{path} cannot be decoded: the image is damaged",
            code="truncated" if cut else "damaged",
            why=f"Pillow says: {text}" if text else "",
            fix="fetch the file again, or leave it out",
        ) from error


def _content(path: str) -> bytes:
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise VideoError(f"{path} does not exist", code="missing", fix="check the path") from error
    except IsADirectoryError as error:
        raise VideoError(f"{path} is a folder, not an image", code="not-an-image") from error
    except OSError as error:
        raise VideoError(
            f"{path} cannot be read", code="unreadable", why=str(error.strerror)
        ) from error
    if not content:
        raise VideoError(
            f"{path} is empty (0 bytes)", code="empty", fix="fetch or copy the file again"
        )
    return content


def _orientation(image: Image.Image) -> int:
    """EXIF's number from 1 to 8; 1, upright, where there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    # A picture is not lost with its EXIF data, whose damage shows in many ways.
    except Exception:
        return 1


def _upright_pixels(path: str, image: Image.Image) -> np.ndarray:
    """uint8 ``[H, W, 3]``, writable."""
    image.load()
    # After loading: Pillow turns a TIFF by itself and then reports it as upright.
    orientation = _orientation(image)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    if image.mode == "F":
        raise VideoError(
            f"{path} has floating-point pixels",
            code="unsupported-codec",
            why="nothing says which value is white",
            fix="save it with 8 or 16 bits per channel",
        )
    if image.mode.startswith("I"):
        # 16-bit grey, which convert() would cut off at 255.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
