"""Reading against a plain sequential PyAV loop, on files made here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ogreg_core.errors import VideoError
from ogreg_core.video import VideoReader, probe, read_frames, write_video
from tests.conftest import decode_all, moving_frames

# decord and PyAV carry different FFmpegs, whose colour conversions differ by rounding.
TOLERANCE = 2.0

KINDS = {
    "h264.mp4": {},
    "h264_no_b.mkv": {"options": {"bf": "0"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "mpeg4.avi": {"codec": "mpeg4", "gop": 300},
    "mpeg4_keys.avi": {"codec": "mpeg4", "gop": 8},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}},
    "stream.ts": {},
    "program.mpg": {"codec": "mpeg2video"},
    "yuv444.mp4": {"pix_fmt": "yuv444p"},
    "name with 'quotes' [x] ünï.mp4": {},
}


def difference(a, b) -> float:
    return float(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).mean())


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_right_one(name, encode):
    path = encode(name, moving_frames(36, 64, 96), **KINDS[name])
    truth = decode_all(path)
    info = probe(path)
    assert info.frames == len(truth) == 36
    assert (info.width, info.height) == (96, 64)
    assert info.fps == pytest.approx(25, rel=0.01)
    assert not info.variable_rate
    order = [35, 0, 7, 7, 20, 3, 34, 11]
    for decoder in {None, "pyav", info.decoder}:
        found = VideoReader(path, decoder).frames_at(order)
        assert found.shape == (8, 64, 96, 3)
        assert difference(found, truth[order]) < TOLERANCE


def test_guard_keeps_decord_from_files_it_reads_wrongly(encode):
    frames = moving_frames(36, 64, 96)
    expected = {
        "h264.mp4": "decord",
        "vp9.webm": "decord",
        "mpeg4.avi": "pyav",
        "mpeg4_keys.avi": "pyav",
        "open_gop.mp4": "pyav",
        "stream.ts": "pyav",
    }
    for name, decoder in expected.items():
        info = probe(encode(name, frames, **KINDS[name]))
        assert info.decoder == decoder, name
        assert bool(info.reason) == (decoder == "pyav")


@given(data=st.data())
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_indices_of_a_seekable_file(data, tmp_path):
    path = tmp_path / "clip.mp4"
    if not path.exists():
        write_video(path, moving_frames(40, 48, 64), 25, gop=10)
    truth = decode_all(path)
    order = data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=12))
    assert difference(VideoReader(path, "pyav").frames_at(order), truth[order]) == 0


def edit_list_file(folder: Path) -> Path:
    """A stream-copied cut that starts between key frames: the container hides the first packets."""
    source, cut = folder / "source.mp4", folder / "cut.mp4"
    write_video(source, moving_frames(60, 64, 96), 25, gop=20)
    with av.open(str(source)) as container:
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size]
        with av.open(str(cut), "w") as output:
            out = output.add_stream_from_template(stream)
            first = [n for n, packet in enumerate(packets) if packet.is_keyframe][1]
            start = packets[first].pts
            hidden = 8 * packets[first].duration
            for packet in packets[first:]:
                packet.stream = out
                # Negative times make the muxer write an edit list that starts at zero.
                packet.pts -= start + hidden
                packet.dts -= start + hidden
                output.mux(packet)
    return cut


def test_edit_list_presents_only_what_it_should(tmp_path):
    path = edit_list_file(tmp_path)
    truth = decode_all(path)
    info = probe(path)
    assert len(truth) == info.frames
    assert 24 < info.frames < 60
    assert info.decoder == "pyav"
    assert "edit list" in info.reason
    for order in ([24, 0, 15], [15], [0, 1, 2], [info.frames - 1]):
        assert difference(read_frames(path, order), truth[order]) == 0


def test_variable_rate_is_read_by_time(encode):
    """Thirty frames a second for one second, then ten for two."""
    times = [round(i * 1000 / 30) for i in range(30)] + [1000 + 100 * i for i in range(20)]
    path = encode("vfr.mkv", moving_frames(50, 64, 96), pts_ms=times)
    info = probe(path)
    assert info.variable_rate
    assert info.frames == 50
    reader = VideoReader(path)
    assert reader.indices_at([0.0, 0.5, 0.999, 1.0, 1.05, 1.95, 2.9, 99.0]) == [
        0,
        15,
        29,
        30,
        30,
        39,
        49,
        49,
    ]
    truth = decode_all(path)
    assert difference(reader.frames_at_times([0.5, 1.95]), truth[[15, 39]]) < TOLERANCE


# decord refuses rotated files whose sides are no multiples of 32; PyAV steps in.
@pytest.mark.parametrize(("height", "width"), [(48, 80), (64, 96)])
def test_rotation_is_applied_and_reported(height, width, tmp_path):
    """PyAV cannot write a display matrix, so it is patched into the track header of an mp4."""
    path = tmp_path / "rotated.mp4"
    write_video(path, moving_frames(12, height, width), 25)
    upright = decode_all(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    fixed = [0, 1 << 16, 0, (-1 << 16) & 0xFFFFFFFF, 0, 0, 0, 0, 1 << 30]
    content[at : at + 36] = b"".join(value.to_bytes(4, "big") for value in fixed)
    path.write_bytes(bytes(content))
    info = probe(path)
    assert (info.width, info.height) == (height, width)
    assert info.rotation == 270
    for decoder in ("pyav", None):
        found = VideoReader(path, decoder).frames_at([0, 11])
        assert difference(found, np.rot90(upright[[0, 11]], 3, axes=(1, 2))) < TOLERANCE


def test_odd_sizes_are_written_and_read(tmp_path):
    path = tmp_path / "odd.mp4"
    frames = moving_frames(10, 47, 63)
    write_video(path, frames, 12.5)
    found = read_frames(path, range(10))
    assert found.shape == (10, 48, 64, 3)
    assert difference(found[:, :47, :63], frames) < 3
    assert probe(path).fps == pytest.approx(12.5)


def test_single_frame(tmp_path):
    write_video(tmp_path / "one.mp4", moving_frames(1, 48, 64), 30)
    info = probe(tmp_path / "one.mp4")
    assert info.frames == 1
    assert info.duration > 0


class TestBrokenFiles:
    def reason(self, path) -> tuple[str, str]:
        with pytest.raises(VideoError) as caught:
            probe(path)
        assert str(path) in caught.value.what
        assert "\n" not in caught.value.what
        return caught.value.code, caught.value.what

    def test_missing(self, tmp_path):
        assert self.reason(tmp_path / "none.mp4")[0] == "missing"

    def test_folder(self, tmp_path):
        assert self.reason(tmp_path)[0] == "not-a-video"

    def test_empty(self, tmp_path):
        (tmp_path / "zero.mp4").touch()
        assert self.reason(tmp_path / "zero.mp4")[0] == "empty"

    def test_text(self, tmp_path):
        (tmp_path / "text.mp4").write_text("not a video at all\n" * 50)
        assert self.reason(tmp_path / "text.mp4")[0] == "not-a-video"

    def test_audio_only(self, tmp_path):
        path = tmp_path / "sound.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16000)
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate = 16000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        assert self.reason(path)[0] == "no-video-stream"

    @pytest.mark.parametrize("suffix", ["mp4", "mkv"])
    def test_sound_that_outlasts_the_pictures_is_no_cut(self, suffix, tmp_path):
        path = tmp_path / f"long_sound.{suffix}"
        with av.open(str(path), "w") as container:
            video = container.add_stream("libx264", rate=10)
            video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
            audio = container.add_stream("aac", rate=16000)
            for pixels in moving_frames(20, 64, 96):
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(video.encode(None))
            for number in range(6):
                frame = av.AudioFrame.from_ndarray(
                    np.zeros((1, 16000), np.float32), format="fltp", layout="mono"
                )
                frame.sample_rate, frame.pts = 16000, 16000 * number
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
        assert probe(path).frames == 20

    @pytest.mark.parametrize("frames", [1, 4])
    def test_very_slow_files_are_whole(self, frames, tmp_path):
        write_video(tmp_path / "slow.mp4", moving_frames(frames, 48, 64), 0.2)
        assert probe(tmp_path / "slow.mp4").duration == pytest.approx(5 * frames, rel=0.01)

    @pytest.mark.parametrize("suffix", ["mp4", "mkv"])
    def test_cut_off(self, suffix, tmp_path, encode):
        # Noise makes the file large enough for the cut to fall among the frames.
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 255, (75, 96, 128, 3), dtype=np.uint8)
        options = {"movflags": "faststart"}
        path = encode(f"whole.{suffix}", frames, options={})
        if suffix == "mp4":
            whole = tmp_path / "fast.mp4"
            with av.open(str(whole), "w", options=options) as out, av.open(str(path)) as src:
                stream = out.add_stream_from_template(src.streams.video[0])
                for packet in src.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        out.mux(packet)
            path = whole
        content = path.read_bytes()
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes(content[: int(0.6 * len(content))])
        assert self.reason(cut)[0] == "truncated"

    def test_bytes_destroyed_in_the_middle(self, tmp_path):
        path = tmp_path / "bad.mp4"
        write_video(path, moving_frames(60, 96, 128), 25)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle - 2000 : middle + 2000] = b"\xff" * 4000
        path.write_bytes(bytes(content))
        assert self.reason(path)[0] in ("damaged", "truncated", "not-a-video")

    def test_index_past_the_end(self, tmp_path):
        write_video(tmp_path / "clip.mp4", moving_frames(10, 48, 64), 25)
        for decoder in ("pyav", "decord"):
            with pytest.raises(VideoError, match="no frame 10"):
                read_frames(tmp_path / "clip.mp4", [10], decoder)


def test_without_decord_pyav_reads_everything(tmp_path, monkeypatch):
    import ogreg_core.video.decoders as decoders

    write_video(tmp_path / "clip.mp4", moving_frames(10, 48, 64), 25)
    monkeypatch.setattr(decoders, "decord", None)
    reader = VideoReader(tmp_path / "clip.mp4", "decord")
    assert reader.decoder == "pyav"
    assert reader.frames_at([9]).shape == (1, 48, 64, 3)


def test_decord_is_imported_in_one_module_and_after_torch():
    code = (
        "import sys, ogreg_core.video; names = list(sys.modules); "
        "assert names.index('torch') < names.index('decord')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    package = Path(__file__).parents[3]
    users = [
        path.name
        for folder in ("ogreg_core", "ogreg_cli")
        for path in (package / folder).rglob("*.py")
        if re.search(r"import decord\b", path.read_text(encoding="utf-8"))
    ]
    assert users == ["decoders.py"]


def test_interrupted_writing_leaves_nothing(tmp_path):
    def frames():
        yield from moving_frames(5, 48, 64)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_video(tmp_path / "clip.mp4", frames(), 25)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "clip.mp4", [], 25)
    assert list(tmp_path.iterdir()) == []
