"""Copies for training: the same frames at the same times, readable by every decoder."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

from ogreg_core.errors import UsageError, VideoError
from ogreg_core.video import VideoReader, probe, write_video
from ogreg_core.video.packets import read_packet_index
from ogreg_core.video.transcode import TranscodeSettings, expected_frames, transcode
from tests.conftest import decode_all, moving_frames
from tests.core.video.test_reader import edit_list_file

SMALL = TranscodeSettings(short_side=48)
# Thirty frames a second for one second, then ten for two.
VARIABLE = [round(i * 1000 / 30) for i in range(30)] + [1000 + 100 * i for i in range(20)]

KINDS = {
    "plain.mp4": {},
    "plain.mkv": {},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "b_frames.avi": {"codec": "mpeg4", "gop": 8, "options": {"bf": "2"}},
    "stream.ts": {"options": {"bf": "2"}},
    "raw.h264": {},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}},
    "variable.mkv": {"pts_ms": VARIABLE},
    "variable.mp4": {"pts_ms": VARIABLE},
}


def psnr(a, b) -> float:
    error = (torch.as_tensor(a).double() - torch.as_tensor(b).double()).square().mean()
    return float(10 * torch.log10(255**2 / error))


def check_copy(source: Path, target: Path, written: int, rounding: float = 0.0) -> None:
    """Same count and times as the source's packet index, trusted by the guard, right pictures."""
    before, after = read_packet_index(source), read_packet_index(target)
    assert after.distrust == ""
    assert written == before.frames == after.frames
    tick = float(after.time_base) + rounding
    np.testing.assert_allclose(after.seconds, before.seconds, rtol=0, atol=tick)
    assert after.pts[0] == 0
    assert np.all(np.diff(after.pts) > 0)
    info = probe(target)
    assert (info.frames, info.codec, info.rotation) == (written, "h264", 0)
    assert info.height % 2 == info.width % 2 == 0
    with av.open(str(target)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        stream = container.streams.video[0]
        assert stream.sample_aspect_ratio == 1
        assert (stream.codec_context.pix_fmt or "").startswith(("yuv420p", "yuvj420p"))
    every = range(written)
    original = torch.stack([frame for _, frame in VideoReader(source)]).movedim(-1, 1)
    expected = transforms.resize(original, [info.height, info.width], antialias=True)
    # Without a decoder named, decord reads what it can.
    for decoder in ("pyav", None):
        copy = VideoReader(target, decoder).frames_at(every).movedim(-1, 1)
        assert psnr(copy, expected) > 35


@pytest.mark.parametrize("name", KINDS)
def test_frames_and_times_are_kept(name, encode, tmp_path):
    source = encode(name, moving_frames(50, 96, 128), **KINDS[name])
    written = transcode(source, tmp_path / "copy.mp4", SMALL)
    check_copy(source, tmp_path / "copy.mp4", written)
    info = probe(tmp_path / "copy.mp4")
    assert (info.width, info.height, info.decoder) == (64, 48, "decord")
    assert info.variable_rate == ("variable" in name)


def test_edit_list_presents_only_what_it_should(tmp_path):
    source = edit_list_file(tmp_path)
    written = transcode(source, tmp_path / "copy.mp4", SMALL)
    assert 24 < written < 60
    check_copy(source, tmp_path / "copy.mp4", written)


def test_single_frame(tmp_path):
    write_video(tmp_path / "one.mp4", moving_frames(1, 48, 64), 30)
    assert transcode(tmp_path / "one.mp4", tmp_path / "copy.mp4", SMALL) == 1
    check_copy(tmp_path / "one.mp4", tmp_path / "copy.mp4", 1)


# Not enlarged: an odd side of a video that is not scaled loses its last row or column.
@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((48, 64), 256, (48, 64)),
        ((47, 63), 256, (46, 62)),
        ((95, 127), 48, (48, 64)),
        ((131, 75), 48, (84, 48)),
        ((49, 333), 48, (48, 326)),
    ],
)
def test_sizes_are_even_and_never_larger(size, short_side, expected, encode, tmp_path):
    frames = moving_frames(6, *size)
    source = encode("odd.mkv", frames, codec="ffv1", pix_fmt="yuv444p")
    transcode(source, tmp_path / "copy.mp4", TranscodeSettings(short_side=short_side))
    copy = decode_all(tmp_path / "copy.mp4")
    assert copy.shape == (6, *expected, 3)
    if short_side == 256:
        assert psnr(copy, frames[:, : expected[0], : expected[1]]) > 35


@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)]
)
@pytest.mark.parametrize("short_side", [32, 256])
def test_rotation_is_applied_to_the_pixels(matrix, turns, short_side, tmp_path):
    """PyAV 17 cannot write a display matrix, so it is patched into the track header of an mp4."""
    source = tmp_path / "rotated.mp4"
    write_video(source, moving_frames(8, 48, 80), 25)
    upright = decode_all(source)
    content = bytearray(source.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    values = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    content[at : at + 36] = b"".join((v & 0xFFFFFFFF).to_bytes(4, "big") for v in values)
    source.write_bytes(bytes(content))
    assert probe(source).rotation == 90 * turns
    written = transcode(source, tmp_path / "copy.mp4", TranscodeSettings(short_side=short_side))
    check_copy(source, tmp_path / "copy.mp4", written)
    if short_side == 256:
        turned = np.rot90(upright, turns, axes=(1, 2))
        assert psnr(decode_all(tmp_path / "copy.mp4"), turned.copy()) > 38


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("full_range.mp4", "libx264", "yuvj420p"),
        ("yuv444.mp4", "libx264", "yuv444p"),
        ("ten_bit.mp4", "libx264", "yuv420p10le"),
        ("ten_bit_422.mp4", "libx264", "yuv422p10le"),
        ("grey.mp4", "libx264", "gray"),
        ("grey.mkv", "ffv1", "gray"),
        ("rgb.mp4", "libx264rgb", "rgb24"),
        ("bgr0.mkv", "ffv1", "bgr0"),
        ("mjpeg.avi", "mjpeg", "yuvj420p"),
    ],
)
def test_colours_do_not_change(name, codec, pix_fmt, encode, tmp_path):
    source = encode(name, moving_frames(12, 96, 128), codec=codec, pix_fmt=pix_fmt)
    written = transcode(source, tmp_path / "copy.mp4", SMALL)
    check_copy(source, tmp_path / "copy.mp4", written)


def test_the_encoder_chooses_the_key_frames(encode, tmp_path):
    """A source of key frames alone must not make a copy of key frames alone."""
    still = moving_frames(2, 96, 128)[:1].repeat(40, 0)
    source = encode("still.mkv", still, codec="ffv1", pix_fmt="gray", gop=1)
    assert len(read_packet_index(source).keys) > 30
    transcode(source, tmp_path / "copy.mp4", SMALL)
    assert len(read_packet_index(tmp_path / "copy.mp4").keys) == 3
    transcode(source, tmp_path / "copy.mp4", TranscodeSettings(gop=10))
    assert len(read_packet_index(tmp_path / "copy.mp4").keys) == 4


def test_matrix_and_range_are_carried_over(tmp_path):
    source = tmp_path / "bt709.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.colorspace = 1
        stream.codec_context.color_range = 2
        for pixels in moving_frames(6, 96, 128):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range=2)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    written = transcode(source, tmp_path / "copy.mp4", SMALL)
    check_copy(source, tmp_path / "copy.mp4", written)
    with av.open(str(tmp_path / "copy.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 2)


class TestTimes:
    def retimed(self, folder: Path, times: list[int]) -> Path:
        """Motion JPEG in Matroska whose packets carry the given milliseconds."""
        path = folder / "retimed.mkv"
        options = {"avoid_negative_ts": "disabled"}
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream("mjpeg", rate=25)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuvj420p"
            frames = moving_frames(len(times), 96, 128)
            packets = []
            for pixels in frames:
                packets += stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
            packets += stream.encode(None)
            for packet, when in zip(packets, times, strict=True):
                packet.time_base = Fraction(1, 1000)
                packet.pts = packet.dts = when
                container.mux(packet)
        return path

    @pytest.mark.parametrize(
        "times",
        [
            [-400 + 40 * i for i in range(20)],
            [5000 + 40 * i for i in range(20)],
            [40 * (i - i % 2) for i in range(20)],
        ],
        ids=["negative", "late", "repeated"],
    )
    def test_unusual_timestamps(self, times, tmp_path):
        source = self.retimed(tmp_path, times)
        repeated = len(set(times)) < len(times)
        assert read_packet_index(source).sequential == repeated
        written = transcode(source, tmp_path / "copy.mp4", SMALL)
        assert written == 20
        check_copy(source, tmp_path / "copy.mp4", written)

    def test_long_files_stay_within_what_decord_reads(self, encode, tmp_path):
        times = [i * 9_000_001 for i in range(20)] + [171_000_020]
        source = encode("long.mkv", moving_frames(21, 96, 128), pts_ms=times)
        assert transcode(source, tmp_path / "copy.mp4", SMALL) == 21
        check_copy(source, tmp_path / "copy.mp4", 21)

    def test_constant_rate_shows_what_was_on_screen(self, encode, tmp_path):
        source = encode("variable.mkv", moving_frames(50, 96, 128), pts_ms=VARIABLE)
        settings = TranscodeSettings(short_side=48, fps=20)
        written = transcode(source, tmp_path / "copy.mp4", settings)
        info = probe(tmp_path / "copy.mp4")
        assert info.frames == written == expected_frames(read_packet_index(source), settings)
        assert info.fps == pytest.approx(20)
        assert not info.variable_rate
        assert info.reason == ""
        expected = [frame for frame, start in enumerate(VARIABLE) for _ in ticks_of(frame)]
        # The mean grey tells the frame number: 120 grey levels over 49 steps.
        levels = decode_all(tmp_path / "copy.mp4").mean((1, 2, 3))
        originals = decode_all(source).mean((1, 2, 3))
        shown = np.abs(levels[:, None] - originals[None]).argmin(1)
        assert shown.tolist() == expected

    def test_constant_rate_of_a_constant_file_changes_nothing(self, encode, tmp_path):
        source = encode("plain.mkv", moving_frames(40, 96, 128), fps=30)
        settings = TranscodeSettings(short_side=48, fps=30)
        assert transcode(source, tmp_path / "copy.mp4", settings) == 40
        check_copy(source, tmp_path / "copy.mp4", 40, rounding=0.0005)
        with av.open(str(tmp_path / "copy.mp4")) as container:
            assert container.streams.video[0].average_rate == 30


def ticks_of(frame: int) -> list[int]:
    """Twentieths of a second at which a frame of ``VARIABLE`` is on screen."""
    ends = [*VARIABLE[1:], VARIABLE[-1] + 33]
    return [i for i in range(100) if VARIABLE[frame] <= i * 50 < ends[frame]]


class TestDamage:
    def damaged(self, folder: Path, start: float, end: float) -> Path:
        path = folder / "bad.mp4"
        rng = np.random.default_rng(0)
        noise = rng.integers(0, 60, (60, 96, 128, 3), dtype=np.uint8)
        write_video(path, moving_frames(60, 96, 128) // 2 + noise, 25, gop=10)
        content = bytearray(path.read_bytes())
        first = content.index(b"mdat") + 4
        size = len(content) - first
        a, b = first + int(start * size), first + int(end * size)
        content[a:b] = b"\xff" * (b - a)
        path.write_bytes(bytes(content))
        return path

    def test_what_decodes_is_written(self, tmp_path):
        source = self.damaged(tmp_path, 0.5, 0.6)
        index = read_packet_index(source)
        written = transcode(source, tmp_path / "copy.mp4", SMALL)
        assert 30 < written < expected_frames(index, SMALL) == index.frames == 60
        copy = read_packet_index(tmp_path / "copy.mp4")
        assert (copy.frames, copy.distrust) == (written, "")
        # The frames behind the gap keep their times.
        places = copy.seconds * 25
        np.testing.assert_allclose(places, places.round(), atol=1e-6)
        assert places[-1] == pytest.approx(59)

    def test_nothing_decodes(self, tmp_path):
        source = self.damaged(tmp_path, 0.0, 1.0)
        with pytest.raises(VideoError) as caught:
            transcode(source, tmp_path / "copy.mp4", SMALL)
        assert caught.value.code == "damaged"
        assert list(tmp_path.iterdir()) == [source]

    def test_no_video(self, tmp_path):
        (tmp_path / "text.mp4").write_text("not a video\n" * 50)
        with pytest.raises(VideoError) as caught:
            transcode(tmp_path / "text.mp4", tmp_path / "copy.mp4", SMALL)
        assert caught.value.code == "not-a-video"


def test_the_same_source_gives_the_same_bytes(tmp_path):
    """Widths that are no multiple of 16 brought out an x264 fault that differs in every run."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 90, (32, 43, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)[:, :170]
    frames = moving_frames(60, 128, 170) // 2
    frames += np.stack([np.roll(texture, (i // 2, 2 * i), (0, 1)) for i in range(60)])
    write_video(tmp_path / "clip.mp4", frames, 25)
    contents = set()
    for number in range(4):
        # Dirties the memory that the run is given.
        rng.integers(0, 255, (20, 128, 170 + number, 3), dtype=np.uint8)
        target = tmp_path / f"copy{number}.mp4"
        transcode(tmp_path / "clip.mp4", target, TranscodeSettings())
        contents.add(target.read_bytes())
    assert len(contents) == 1
    assert b"Lavf" not in contents.pop()
    with av.open(str(tmp_path / "copy0.mp4")) as container:
        assert all(packet.pts == packet.dts for packet in container.demux(video=0))


class TestFiles:
    def test_killed_in_the_middle(self, tmp_path):
        rng = np.random.default_rng(0)
        source, folder = tmp_path / "clip.mp4", tmp_path / "out"
        folder.mkdir()
        noise = rng.integers(0, 255, (120, 192, 256, 3), dtype=np.uint8)
        write_video(source, noise, 25, preset="ultrafast")
        content = source.read_bytes()
        target = folder / "clip.mp4"
        code = (
            "import sys; from ogreg_core.video.transcode import *; "
            "transcode(sys.argv[1], sys.argv[2], TranscodeSettings(preset='veryslow'))"
        )
        child = subprocess.Popen([sys.executable, "-c", code, source, target])
        deadline = time.monotonic() + 120
        while not list(folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        (leftover,) = folder.iterdir()
        assert leftover.name.startswith(".")
        assert leftover.suffix == ".tmp"
        assert source.read_bytes() == content
        assert transcode(source, target, TranscodeSettings(preset="ultrafast")) == 120
        assert list(folder.iterdir()) == [target]
        assert probe(target).frames == 120
        assert source.read_bytes() == content

    def test_failure_keeps_the_old_target(self, tmp_path, monkeypatch):
        import ogreg_core.video.transcode as module

        write_video(tmp_path / "clip.mp4", moving_frames(10, 48, 64), 25)
        (tmp_path / "copy.mp4").write_text("old")
        presented = module._presented

        def fails(index):
            for position, frame in presented(index):
                if position == 5:
                    raise KeyboardInterrupt
                yield position, frame

        monkeypatch.setattr(module, "_presented", fails)
        with pytest.raises(KeyboardInterrupt):
            transcode(tmp_path / "clip.mp4", tmp_path / "copy.mp4", SMALL)
        assert (tmp_path / "copy.mp4").read_text() == "old"
        assert len(list(tmp_path.iterdir())) == 2

    def test_missing_folder(self, tmp_path):
        write_video(tmp_path / "clip.mp4", moving_frames(5, 48, 64), 25)
        with pytest.raises(OSError, match="No such file"):
            transcode(tmp_path / "clip.mp4", tmp_path / "none" / "copy.mp4", SMALL)

    def test_source_is_never_the_target(self, tmp_path):
        write_video(tmp_path / "clip.mp4", moving_frames(5, 48, 64), 25)
        (tmp_path / "link.mp4").symlink_to(tmp_path / "clip.mp4")
        for target in ("clip.mp4", "link.mp4"):
            with pytest.raises(UsageError, match="source itself"):
                transcode(tmp_path / "clip.mp4", tmp_path / target, SMALL)


def test_settings():
    assert TranscodeSettings().describe() == "h264-s256-times-crf20-veryfast-gop15"
    assert TranscodeSettings(fps=29.97).describe() == "h264-s256-29.97fps-crf20-veryfast-gop15"
    bad = [{"short_side": 255}, {"short_side": 0}, {"fps": -1}, {"fps": float("nan")}]
    for values in [*bad, {"crf": 52}, {"gop": 0}]:
        with pytest.raises(UsageError):
            TranscodeSettings(**values)
