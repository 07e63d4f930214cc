"""Images as clips of one frame, against what Pillow gives by itself."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ogreg_core.data.manifest import Row
from ogreg_core.data.transforms import resize_short_side
from ogreg_core.errors import VideoError
from ogreg_core.files import IMAGE_SUFFIXES
from ogreg_core.video import VideoReader, probe, read_frames
from tests.conftest import moving_frames

ORIENTATION = 0x0112


def picture(height: int = 48, width: int = 64) -> Image.Image:
    return Image.fromarray(moving_frames(3, height, width)[1])


def reference(path: Path) -> np.ndarray:
    """The first picture as torchvision's ImageFolder loads it, upright."""
    with Image.open(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def decibel(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = (found.double() - expected.double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


KINDS = {
    "colour.jpg": lambda image: image,
    "colour.JPEG": lambda image: image,
    "grey.jpg": lambda image: image.convert("L"),
    "print.jpg": lambda image: image.convert("CMYK"),
    "colour.png": lambda image: image,
    "grey.png": lambda image: image.convert("L"),
    "two levels.png": lambda image: image.convert("1"),
    "palette.png": lambda image: image.convert("P"),
    "transparent.png": lambda image: transparent(image),
    "transparent grey.png": lambda image: transparent(image).convert("LA"),
    "palette and transparency.png": lambda image: transparent(image).quantize(8),
    "colour.webp": lambda image: image,
    "colour.bmp": lambda image: image,
    "colour.tiff": lambda image: image,
    "colour.tif": lambda image: image.convert("CMYK"),
    "colour.ppm": lambda image: image,
    "grey.pgm": lambda image: image.convert("L"),
}


def transparent(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


@pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_becomes_rgb(name, tmp_path):
    path = tmp_path / name
    KINDS[name](picture()).save(path)
    assert np.array_equal(read_frames(path, [0])[0].numpy(), reference(path))
    for verification in ("quick", "full"):
        info = probe(path, verification)
        assert (info.width, info.height, info.frames) == (64, 48, 1)
        assert (info.decoder, info.reader, info.container) == ("image", "image", "image")


def test_all_endings_are_tried():
    assert {Path(name).suffix.lower() for name in KINDS} == IMAGE_SUFFIXES


def test_content_counts_and_not_the_name(tmp_path):
    """As with n02105855_2933.JPEG of ImageNet-1K, a PNG."""
    path = tmp_path / "n02105855_2933.JPEG"
    picture().save(path, "PNG")
    assert probe(path).codec == "png"
    assert np.array_equal(read_frames(path, [0])[0].numpy(), np.array(picture()))


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    levels = np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 21
    for name in ("deep.png", "deep.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        found = read_frames(tmp_path / name, [0])[0].numpy()
        assert np.array_equal(found[..., 0], levels // 256)
        assert np.array_equal(found[..., 1], found[..., 2])
        assert probe(tmp_path / name).width == 64


def test_sixteen_bit_colour(tmp_path):
    """Pillow does not write it: a PNG by hand."""
    levels = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    found = read_frames(tmp_path / "deep.png", [0])[0].numpy()
    assert np.array_equal(found, levels // 256)


@pytest.mark.parametrize("suffix", ["webp", "png", "tiff", "jpg"])
def test_of_animations_the_first_picture_counts(suffix, tmp_path):
    path = tmp_path / f"many.{suffix}"
    if suffix == "jpg":  # a GIF under another name
        suffix = "gif"
    first, second = picture(), ImageOps.invert(picture())
    first.save(path, suffix.upper(), save_all=True, append_images=[second])
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert np.array_equal(read_frames(path, [0])[0].numpy(), reference(path))
    assert probe(path).frames == 1


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, suffix, tmp_path):
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    picture().save(path, exif=exif)
    expected = reference(path)
    assert expected.shape[:2] == ((64, 48) if orientation > 4 else (48, 64))
    assert np.array_equal(read_frames(path, [0])[0].numpy(), expected)
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]
    small = read_frames(path, [0], size=(info.height // 2, info.width // 2))
    whole = torch.from_numpy(expected).permute(2, 0, 1)[None]
    scaled = resize_short_side(whole, 24)[0].permute(1, 2, 0)
    assert decibel(small[0], scaled) > 40


def test_broken_exif_data_cost_no_picture(tmp_path):
    path = tmp_path / "odd.jpg"
    picture().save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        expected = reference(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_frames(path, [0])[0].numpy(), expected)
        assert probe(path).rotation == 0


@pytest.mark.parametrize("size", [(32, 43), (48, 64), (256, 341), (70, 20)])
def test_scaled_while_read(size, tmp_path):
    path = tmp_path / "one.png"
    picture(120, 160).save(path)
    whole = torch.from_numpy(np.array(picture(120, 160))).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(whole, size=size, mode="bilinear", antialias=True)
    found = read_frames(path, [0], size=size)
    assert found.shape == (1, *size, 3)
    # Half a level of rounding in each of two passes.
    assert float((found.double().permute(0, 3, 1, 2) - expected).abs().max()) <= 1.01


@pytest.mark.parametrize(("height", "reduced"), [(480, False), (1200, True)])
def test_large_photos_are_decoded_at_a_part_of_their_size(height, reduced, tmp_path):
    path = tmp_path / "photo.jpg"
    grain = np.random.default_rng(0).normal(0, 15, (height // 3, height // 3, 1))
    fine = np.asarray(picture(height // 3, height // 3), np.float64) + grain
    photo = Image.fromarray(np.clip(fine, 0, 255).astype(np.uint8))
    photo.resize((4 * height // 3, height), Image.Resampling.BICUBIC).save(path, quality=92)
    whole = torch.from_numpy(reference(path)).permute(2, 0, 1)[None]
    expected = resize_short_side(whole, 256)[0].permute(1, 2, 0)
    found = read_frames(path, [0], size=(256, 341))[0]
    assert torch.equal(found, expected) is not reduced
    assert decibel(found, expected) > 45


def test_an_image_is_a_clip_of_one_frame(tmp_path):
    path = tmp_path / "one.jpg"
    picture().save(path)
    reader = VideoReader(path)
    assert len(reader) == 1
    assert reader.decoder == "image"
    assert reader.indices_at([0.0, 0.5, 99.0]) == [0, 0, 0]
    first = reader.frames_at([0])
    assert torch.equal(reader.frames_at([0, 0, 0]), first.expand(3, -1, -1, -1))
    assert torch.equal(reader.frames_at_times([0.2]), first)
    ((seconds, frame),) = list(reader)
    assert seconds == 0
    assert torch.equal(frame, first[0])
    for index in (1, -1):
        with pytest.raises(VideoError, match="no frame") as caught:
            reader.frames_at([0, index])
        assert caught.value.code == "index"
    row = Row.from_probe("one.jpg", probe(path))
    assert (row.frames, row.fps, row.duration) == (1, 1.0, 1.0)
    assert (row.decoder, row.codec, row.variable_rate) == ("image", "jpeg", False)
    # What the manifest says holds, whatever the name: a data set may have images without ending.
    path.rename(tmp_path / "one")
    assert torch.equal(read_frames(tmp_path / "one", [0], "image"), first)


class TestBrokenImages:
    def reason(self, path, **options) -> tuple[str, str]:
        codes = set()
        for read in (probe, lambda p: probe(p, "full"), lambda p: read_frames(p, [0], **options)):
            with pytest.raises(VideoError) as caught:
                read(path)
            assert str(path) in caught.value.what
            assert "\n" not in str(caught.value)
            codes.add(caught.value.code)
        assert len(codes) == 1
        return codes.pop(), str(caught.value)

    def test_missing(self, tmp_path):
        assert self.reason(tmp_path / "none.jpg")[0] == "missing"

    def test_folder(self, tmp_path):
        (tmp_path / "folder.jpg").mkdir()
        assert self.reason(tmp_path / "folder.jpg")[0] == "not-an-image"

    def test_empty(self, tmp_path):
        (tmp_path / "zero.jpg").touch()
        assert self.reason(tmp_path / "zero.jpg")[0] == "empty"

    def test_text(self, tmp_path):
        (tmp_path / "text.jpg").write_text("<html>not found</html>" * 50)
        assert self.reason(tmp_path / "text.jpg")[0] == "not-an-image"

    def test_postscript_is_not_handed_to_an_interpreter(self, tmp_path):
        picture().save(tmp_path / "program.eps")
        (tmp_path / "program.eps").rename(tmp_path / "program.jpg")
        with Image.open(tmp_path / "program.jpg") as image:
            assert image.format == "EPS"
        assert self.reason(tmp_path / "program.jpg")[0] == "not-an-image"

    @pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
    @pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
    def test_cut_off(self, suffix, share, tmp_path):
        rng = np.random.default_rng(0)
        whole = tmp_path / f"whole.{suffix}"
        Image.fromarray(rng.integers(0, 255, (96, 128, 3), dtype=np.uint8)).save(whole)
        content = whole.read_bytes()
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(content[: int(share * len(content))])
        code, text = self.reason(cut)
        assert code == "truncated"
        assert f"{cut} is cut off" in text

    @pytest.mark.parametrize(("suffix", "code"), [("jpg", "not-an-image"), ("png", "truncated")])
    def test_cut_off_within_the_header(self, suffix, code, tmp_path):
        picture().save(tmp_path / f"whole.{suffix}")
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes((tmp_path / f"whole.{suffix}").read_bytes()[:20])
        assert self.reason(cut)[0] == code

    def test_a_download_that_was_only_begun(self, tmp_path):
        """The right length, zeros from the middle on."""
        picture(300, 400).save(tmp_path / "whole.jpg")
        content = (tmp_path / "whole.jpg").read_bytes()
        half = len(content) // 2
        (tmp_path / "zeros.jpg").write_bytes(content[:half] + bytes(len(content) - half))
        assert self.reason(tmp_path / "zeros.jpg")[0] in ("truncated", "damaged")

    def test_damaged(self, tmp_path):
        picture(300, 400).save(tmp_path / "whole.png")
        content = bytearray((tmp_path / "whole.png").read_bytes())
        middle = len(content) // 2
        content[middle : middle + 50] = bytes(50)
        (tmp_path / "bad.png").write_bytes(content)
        assert self.reason(tmp_path / "bad.png")[0] == "damaged"

    def test_floating_point_pixels(self, tmp_path):
        Image.fromarray(np.random.rand(8, 8).astype(np.float32)).save(tmp_path / "float.tiff")
        assert self.reason(tmp_path / "float.tiff")[0] == "unsupported-codec"

    def test_a_picture_that_would_fill_the_memory(self, tmp_path, monkeypatch):
        picture().save(tmp_path / "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        code, text = self.reason(tmp_path / "bomb.png")
        assert code == "unsupported-codec"
        assert "exceeds limit of 2000 pixels" in text

    @pytest.mark.skipif(
        not Path("/proc/self/mem").exists(), reason="a file whose reading fails, on Linux"
    )
    def test_the_disk_is_not_the_image(self, tmp_path):
        (tmp_path / "disk.jpg").symlink_to("/proc/self/mem")
        assert self.reason(tmp_path / "disk.jpg")[0] == "unreadable"
