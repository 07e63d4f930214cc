"""The frame index that an mp4's own table gives, against the one from its packets; and reading by it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ogreg_core.errors import VideoError
from ogreg_core.video import VideoReader, decoders, read_frames, write_video
from ogreg_core.video.packets import (
    FrameIndex,
    _from_packets,
    _from_table,
    open_video,
    read_frame_index,
    read_packet_index,
)
from ogreg_core.video.transcode import TranscodeSettings, transcode
from tests.conftest import decode_all, moving_frames
from tests.core.video.test_reader import edit_list_file

NO_B = {"options": {"bf": "0"}}
UNEVEN = [0, 40, 50, 200, 210, 220, 900, 1000, 1001, 1500, 1520, 1530, 2000, 2100, 2101, 3000]

# Files whose table serves, and files for which the packets have to be read.
CERTAIN = {
    "no_b.mp4": NO_B,
    "no_b.mov": NO_B,
    "all_keys.mp4": {"gop": 1, **NO_B},
    "one_key.mp4": {"gop": 300, **NO_B},
    "uneven.mp4": {"pts_ms": UNEVEN, **NO_B},
    "late.mp4": {"pts_ms": [5000 + 40 * i for i in range(16)], **NO_B},
    "mpeg4.mp4": {"codec": "mpeg4"},
    "vp9.mp4": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "bframes=0:log-level=0"}},
    "intra_refresh.mp4": {"options": {"bf": "0", "x264-params": "intra-refresh=1"}},
}
UNCERTAIN = {
    "b_frames.mp4": {},
    "b_frames.mov": {"options": {"bf": "1"}},
    "no_b.mkv": NO_B,
    "no_b.avi": {"codec": "mpeg4"},
    "stream.ts": NO_B,
}


def noisy(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that are predicted from each other and yet differ."""
    noise = np.random.default_rng(0).integers(0, 12, (frames, height, width, 3), dtype=np.uint8)
    return moving_frames(frames, height, width) // 2 + noise


def remuxed(path: Path, movflags: str) -> Path:
    """The same packets in an mp4 that is laid out in another way."""
    target = path.with_name(f"remuxed {path.name}")
    with (
        av.open(str(path)) as source,
        av.open(str(target), "w", options={"movflags": movflags}) as container,
    ):
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return target


def indices_of(path: Path) -> tuple[FrameIndex | None, FrameIndex]:
    """From the table and from the packets."""
    container, stream = open_video(str(path))
    with container:
        return _from_table(str(path), container, stream), _from_packets(
            str(path), container, stream
        )


def check_same(table: FrameIndex | None, packets: FrameIndex) -> None:
    assert table is not None
    for name in ("pts", "keys", "key_seeks", "seconds"):
        np.testing.assert_array_equal(getattr(table, name), getattr(packets, name), name)
    for name in ("path", "time_base", "frames", "average_rate", "sequential"):
        assert getattr(table, name) == getattr(packets, name), name


@pytest.mark.parametrize("name", CERTAIN)
def test_table_says_what_the_packets_say(name, encode):
    path = encode(name, noisy(16), **CERTAIN[name])
    table, packets = indices_of(path)
    check_same(table, packets)
    order = [15, 0, 7, 7, 3]
    assert torch.equal(read_frames(path, order, "pyav"), torch.from_numpy(decode_all(path)[order]))


@pytest.mark.parametrize("name", UNCERTAIN)
def test_packets_are_read_where_the_table_may_differ(name, encode):
    path = encode(name, noisy(16), **UNCERTAIN[name])
    assert indices_of(path)[0] is None
    order = [15, 0, 7, 7, 3]
    assert torch.equal(read_frames(path, order, "pyav"), torch.from_numpy(decode_all(path)[order]))


@pytest.mark.parametrize(
    ("movflags", "certain"),
    [
        ("+faststart", True),
        ("+frag_keyframe+empty_moov", False),
        ("+frag_keyframe", False),
        ("+negative_cts_offsets", True),
    ],
)
def test_other_layouts(movflags, certain, encode):
    path = remuxed(encode("clip.mp4", noisy(16), gop=4, **NO_B), movflags)
    table, packets = indices_of(path)
    assert (table is not None) == certain
    if certain:
        check_same(table, packets)
    order = [15, 0, 7, 7, 3]
    assert torch.equal(read_frames(path, order, "pyav"), torch.from_numpy(decode_all(path)[order]))


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_lone_intra_pictures_are_no_starts(suffix, encode):
    """x264 codes a scene cut soon after a key frame as one, to which the container does not seek."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (6, 48, 64, 3), dtype=np.uint8)
    frames = pictures.repeat(8, axis=0)
    path = encode(f"cuts.{suffix}", frames, gop=250, options={"bf": "0", "refs": "1"})
    container, stream = open_video(str(path))
    with container:
        assert sum(packet.is_keyframe for packet in container.demux(stream)) > 2
    index = read_packet_index(path)
    assert len(index.keys) <= 3
    assert index.distrust == ""
    if suffix == "mp4":
        check_same(*indices_of(path))
    truth = torch.from_numpy(decode_all(path))
    for i in range(48):
        assert torch.equal(read_frames(path, [i], "pyav"), truth[[i]])


@pytest.mark.parametrize("fps", [0.0, 10.0])
def test_copies_are_read_from_their_table(fps, encode, tmp_path):
    source = encode("source.mkv", noisy(50), pts_ms=[40 * i + i % 7 for i in range(50)])
    transcode(source, tmp_path / "copy.mp4", TranscodeSettings(32, fps=fps, gop=8))
    check_same(*indices_of(tmp_path / "copy.mp4"))


def test_edit_lists_are_left_to_the_packets(tmp_path):
    assert indices_of(edit_list_file(tmp_path))[0] is None


def test_a_table_of_bytes_that_are_not_there_is_not_believed(encode):
    path = remuxed(encode("cut.mp4", noisy(16), **NO_B), "+faststart")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 5])
    table, packets = indices_of(path)
    assert table is None
    assert packets.frames < 16


def test_sound_beside_the_pictures_changes_nothing(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=16000)
        video = container.add_stream("libx264", rate=10, options={"bf": "0"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for number, pixels in enumerate(noisy(20)):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            sound = av.AudioFrame.from_ndarray(
                np.zeros((1, 1600), np.float32), format="fltp", layout="mono"
            )
            sound.sample_rate, sound.pts = 16000, 1600 * number
            container.mux(audio.encode(sound))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    check_same(*indices_of(path))


@pytest.mark.parametrize("where", ["nowhere", "size 0", "large size"])
def test_strange_boxes(where, encode):
    path = encode("strange.mp4", noisy(16), **NO_B)
    content = path.read_bytes()
    start = content.index(b"moov") - 4
    assert content[start:][: struct.unpack(">I", content[start:][:4])[0]] == content[start:]
    if where == "nowhere":
        path.write_bytes(content[:start])
        with pytest.raises(VideoError):
            read_frames(path, [0], "pyav")
        return
    if where == "size 0":  # up to the end of the file
        content = content[:start] + bytes(4) + content[start + 4 :]
    else:  # sizes of 64 bits, for a box in front
        free = struct.pack(">I4sQ", 1, b"free", 24) + bytes(8)
        content = content[:start] + free + content[start:]
    path.write_bytes(content)
    check_same(*indices_of(path))


# Which pictures x264 marks as no reference, and how it orders them.
STRUCTURES = {
    "default": "bframes=3",
    "many": "bframes=8:b-adapt=0",
    "pyramid": "bframes=5:b-pyramid=strict:b-adapt=0",
    "flat": "bframes=3:b-pyramid=none:b-adapt=0",
    "open": "bframes=3:b-adapt=0:open-gop=1",
    "refresh": "bframes=0:intra-refresh=1",
    "interlaced": "bframes=3:tff=1:b-adapt=0",
    "references": "bframes=3:ref=8:b-adapt=0:weightp=2",
    "slices": "bframes=2:slices=4:b-adapt=0",
}


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_pictures_left_out_change_no_other(structure, suffix, encode, tmp_path):
    options = {"x264-params": STRUCTURES[structure] + ":scenecut=0"}
    path = encode(f"clip.{suffix}", noisy(60), gop=24, options=options)
    truth = torch.from_numpy(decode_all(path))
    rng = random.Random(0)
    orders = [[i] for i in range(0, 60, 7)]
    orders += [rng.choices(range(60), k=rng.randint(1, 12)) for _ in range(20)]
    for order in orders:
        assert torch.equal(read_frames(path, order, "pyav"), truth[order]), order


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.flv"])
@pytest.mark.parametrize("options", ["", ":bframes=3", ":intra-refresh=1:bframes=0"])
def test_decord_is_kept_from_streams_refreshed_bit_by_bit(options, name, encode):
    """It shows the pictures after a recovery point before they are complete."""
    path = encode(name, noisy(60), gop=24, options={"x264-params": f"scenecut=0{options}"})
    index = read_packet_index(path)
    assert len(index.keys) == 3
    expected = "key frames that are no clean starts" if "refresh" in options else ""
    assert index.distrust == expected


def test_pictures_are_left_out(encode, monkeypatch):
    """Of a file whose every second picture is no reference, half of the pictures are decoded."""
    options = {"x264-params": "bframes=1:b-adapt=0:scenecut=0"}
    path = encode("clip.mp4", noisy(60), gop=60, options=options)
    decoded = []
    packets = decoders._packets

    class Counted:
        def __init__(self, packet):
            self.pts, self.is_keyframe, self._packet = packet.pts, packet.is_keyframe, packet

        def decode(self):
            frames = self._packet.decode()
            decoded.extend(frames)
            return frames

    monkeypatch.setattr(decoders, "_packets", lambda *rest: map(Counted, packets(*rest)))
    read_frames(path, [58], "pyav")
    assert 25 < len(decoded) < 35


def test_frames_lost_with_pictures_left_out_are_read_again(encode, monkeypatch):
    path = encode("clip.mp4", noisy(30))
    put, lost = decoders._Clip.put, []

    def forgetful(clip, index, frame):
        if index == 20 and not lost:
            lost.append(index)
        else:
            put(clip, index, frame)

    monkeypatch.setattr(decoders._Clip, "put", forgetful)
    order = [3, 20, 29]
    assert torch.equal(read_frames(path, order, "pyav"), torch.from_numpy(decode_all(path)[order]))
    assert lost


@pytest.mark.parametrize("name", ["b.mp4", "no_b.mp4", "b.mkv", "open.mp4", "vp9.webm"])
def test_seeking_finds_the_very_key_frame(name, encode):
    kinds = {
        "b": {},
        "no_b": NO_B,
        "open": {"options": {"x264-params": "open-gop=1:bframes=3:b-adapt=0:scenecut=0"}},
        "vp9": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    }
    path = encode(name, noisy(60), gop=12, **kinds[Path(name).stem])
    container, stream = open_video(str(path))
    with container:
        index = read_frame_index(str(path), container, stream)
        assert len(index.keys) >= 5
        for key in (3, 0, 4, 1, 2):
            first = next(decoders._packets(index, container, stream, key))
            assert first.pts == index.keys[key]


def test_near_groups_are_decoded_in_one_go(encode):
    path = encode("clip.mp4", noisy(60), gop=10, options={"x264-params": "bframes=0:scenecut=0"})
    index = indices_of(path)[1]
    starts = np.searchsorted(index.pts, index.keys)
    np.testing.assert_array_equal(starts, np.arange(0, 60, 10))
    assert decoders._groups(index, [0, 3, 9, 11]) == [(0, [0, 3, 9, 11])]
    assert decoders._groups(index, [1, 7, 12]) == [(0, [1, 7]), (1, [12])]
    assert decoders._groups(index, [8, 25, 28, 31]) == [(0, [8]), (2, [25, 28, 31])]


def test_an_index_that_is_known_is_not_read_again(encode, monkeypatch):
    path = encode("clip.mp4", noisy(16))
    reader = VideoReader(path)
    assert reader.index.frames == 16
    monkeypatch.setattr(decoders, "read_frame_index", None)
    assert VideoReader(path, "decord").frames_at([3]).shape == (1, 48, 64, 3)
    reader.__dict__["decoder"] = "pyav"
    assert reader.frames_at([3]).shape == (1, 48, 64, 3)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.double() - b.double()).square().mean()))


# Sharp reductions go by way of yuv444p, the others straight to RGB.
@pytest.mark.parametrize("size", [(60, 108), (61, 107), (96, 170), (180, 320), (240, 426)])
@pytest.mark.parametrize(
    "colours", [{}, {"colorspace": "bt709"}, {"color_range": "pc"}, {"colorspace": "smpte170m"}]
)
def test_scaling_while_decoding(size, colours, encode):
    still = moving_frames(1, 180, 320)[0].astype(np.int16)
    detail = np.random.default_rng(0).integers(-40, 40, (23, 40, 3)).repeat(8, 0).repeat(8, 1)
    frames = np.clip(np.stack([still + detail[:180]] * 3), 0, 255).astype(np.uint8)
    path = encode("clip.mp4", frames, options={"crf": "10", "bf": "0", **colours})
    whole = read_frames(path, [0, 2], "pyav").permute(0, 3, 1, 2)
    expected = F.interpolate(whole, size=size, mode="bilinear", antialias=True)
    for decoder in ("pyav", "decord"):
        found = read_frames(path, [0, 2], decoder, size)
        assert found.shape == (2, *size, 3)
        assert psnr(found.permute(0, 3, 1, 2), expected) > (32 if decoder == "pyav" else 28)


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_repeated_frames(decoder, encode):
    path = encode("clip.mp4", noisy(20))
    order = [5, 6, 7, 0, 1, 5, 5, 19, 0]
    found = read_frames(path, order, decoder)
    assert torch.equal(found, torch.stack([read_frames(path, [i], decoder)[0] for i in order]))


def test_a_picture_that_changes_its_size_is_refused(tmp_path):
    path = tmp_path / "joined.ts"
    parts = []
    for name, width in (("a.ts", 64), ("b.ts", 96)):
        write = tmp_path / name
        with av.open(str(write), "w") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
            for pixels in noisy(10, 48, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        parts.append(write.read_bytes())
    path.write_bytes(b"".join(parts))
    with pytest.raises(VideoError, match="damaged"):
        read_frames(path, range(20), "pyav")
    assert read_frames(path, [0, 15], "pyav", (48, 64)).shape == (2, 48, 64, 3)


def test_files_are_closed(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, noisy(10), 25)
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc")
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        read_frames(path, [3], "pyav")
        with pytest.raises(VideoError):
            read_frames(path, [10], "pyav")
    assert len(list(descriptors.iterdir())) == before
