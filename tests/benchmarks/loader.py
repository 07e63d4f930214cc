"""Training clips per second from raw files and from their copies, beside plain decord and PyAV loops.

Run by name, not by pytest: ``PYTHONPATH=. python tests/benchmarks/loader.py [--repeats N]``. One process,
one thread, all ways in turn in each round; medians of processor time over the rounds, which other processes
disturb less than wall time (both are recorded). The videos are made here, ten seconds with x264's defaults,
unless ``--video`` names some.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import torch
import torch.nn.functional as F
from torch import Tensor

from ogreg_core.data.loader import ClipDataset
from ogreg_core.data.manifest import Manifest, Row
from ogreg_core.data.order import sample_rng
from ogreg_core.data.sampling import ClipSampling, train_indices
from ogreg_core.data.transforms import Augmentation, scaled_size
from ogreg_core.video import VideoReader, probe
from ogreg_core.video.transcode import TranscodeSettings, transcode
from tests.benchmarks.record import build_parser, finish

import decord  # isort: skip  # after torch, see ogreg_core/video/decoders.py

SHORT_SIDE, CROP = 256, 224
# The recipe's: short side 256 while decoding, random resized crop, flip.
AUGMENTATION = Augmentation(CROP, (SHORT_SIDE, SHORT_SIDE), crop="resized", flip="random")
CLIPS = {
    "dense 32x2": ClipSampling("dense", 32, 2),
    "uniform 16": ClipSampling("uniform", 16),
}
# Height, width and noise in grey levels: 0.5 and 2.2 MB for ten seconds.
MADE = {"raw 340x256": (256, 340, 3.0), "raw 1280x720": (720, 1280, 2.0)}


def texture(height: int, width: int, octaves: int, generator: torch.Generator) -> Tensor:
    """Colour noise with detail at all scales, float ``[3, height, width]``."""
    total = torch.zeros(1, 3, height, width)
    for octave in range(octaves):
        cells = 2 ** (octave + 2)
        shape = (1, 3, max(2, cells * height // width), cells)
        noise = torch.randn(shape, generator=generator)
        total += F.interpolate(noise, size=(height, width), mode="bicubic") * 0.8**octave
    return 128 + 45 * (total[0] - total.mean()) / total.std()


def moving_layers(height: int, width: int, noise: float, frames: int) -> Iterator[Tensor]:
    """Four textured layers that move over each other, under sensor noise: uint8 ``[H, W, 3]``."""
    generator = torch.Generator().manual_seed(0)
    tall, wide = height * 3 // 2, width * 3 // 2
    layers = []
    for depth in range(4):
        shape = texture(tall, wide, 3, generator).mean(0, keepdim=True) > 118 + 25 * depth
        colours = texture(tall, wide, 7, generator)
        layers.append(torch.cat([colours, 255.0 * (shape | (depth == 0))]))
    grain = noise * torch.randn(3, height + 64, width + 64, generator=generator)
    for frame in range(frames):
        image = torch.empty(3, height, width)
        for depth, layer in enumerate(layers):
            # A window that wanders and breathes: motion by fractions of a pixel, as cameras see it.
            phase = frame / 30 * (0.8 + 0.4 * depth) + depth
            share = 0.5 + 0.5 * math.sin(phase), 0.5 + 0.5 * math.cos(0.7 * phase)
            zoom = 1.15 + 0.1 * math.sin(1.3 * phase)
            rows, columns = int(height * zoom), int(width * zoom)
            y, x = int((tall - rows) * share[0]), int((wide - columns) * share[1])
            window = layer[None, :, y : y + rows, x : x + columns]
            seen = F.interpolate(window, size=(height, width), mode="bilinear")[0]
            image = torch.where(seen[3] > 127, seen[:3], image)
        y, x = torch.randint(0, 64, (2,), generator=generator).tolist()
        image = image + grain[:, y : y + height, x : x + width]
        yield image.clamp(0, 255).byte().permute(1, 2, 0)


def make_video(path: Path, height: int, width: int, noise: float, frames: int = 300) -> None:
    """Ten seconds of moving layers, or as many frames as are said, encoded with x264's defaults."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 250  # x264's own; PyAV's FFmpeg says 12.
        for pixels in moving_layers(height, width, noise, frames):
            frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def manifest_of(path: Path, decoder: str | None = None) -> Manifest:
    """A manifest of one video, as ``ogreg prepare`` writes it or with another decoder."""
    info = probe(path)
    row = replace(Row.from_probe(path.name, info), decoder=decoder or info.decoder)
    return Manifest(path.parent, "train", (row,), ("only",))


def crop_and_flip(frames: Tensor, rng: random.Random) -> Tensor:
    """Plain: a random square crop and a flip of uint8 ``[T, 3, H, W]``."""
    height, width = frames.shape[-2:]
    y, x = rng.randint(0, height - CROP), rng.randint(0, width - CROP)
    frames = frames[:, :, y : y + CROP, x : x + CROP]
    frames = frames.flip(-1) if rng.random() < 0.5 else frames
    return frames.transpose(0, 1).contiguous()


def resized(frames: Tensor) -> Tensor:
    """Plain: uint8 ``[T, H, W, 3]`` to ``[T, 3, H, W]`` of the short side."""
    frames = frames.permute(0, 3, 1, 2)
    size = scaled_size(*frames.shape[-2:], SHORT_SIDE)
    if size == tuple(frames.shape[-2:]):
        return frames
    return F.interpolate(frames, size=size, mode="bilinear", antialias=True)


def plain_decord(path: Path, indices: list[int], rng: random.Random) -> Tensor:
    """What a user writes with decord."""
    reader = decord.VideoReader(str(path), num_threads=1)
    return crop_and_flip(resized(torch.from_numpy(reader.get_batch(indices).asnumpy())), rng)


def plain_pyav(path: Path, indices: list[int], rng: random.Random) -> Tensor:
    """What a user writes with PyAV: seek to the first frame, decode up to the last."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        ticks = 1 / (stream.average_rate * stream.time_base)
        first = stream.start_time or 0
        container.seek(first + int(indices[0] * ticks), stream=stream)
        wanted, found = set(indices), []
        for frame in container.decode(stream):
            position = round((frame.pts - first) / ticks)
            if position in wanted:
                found.append(torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1)))
            if position >= indices[-1]:
                break
    return crop_and_flip(resized(torch.stack(found)), rng)


def loader(dataset: ClipDataset, epoch: int) -> Tensor:
    """One item, all included."""
    return dataset[epoch, 0].clips


def reading(path: Path, decoder: str, size: tuple[int, int], indices: list[int]) -> Tensor:
    """Frames alone, at the size that the loader asks for."""
    return VideoReader(path, decoder).frames_at(indices, size)


Way = Callable[[int, list[int]], Tensor]


def ways_of(raw: Path, copy: Path, sampling: ClipSampling) -> dict[str, Way]:
    """All that is compared on one video, each called with (round, frame numbers)."""
    ways: dict[str, Way] = {
        "plain decord, raw": lambda n, chosen: plain_decord(raw, chosen, random.Random(n)),
        "plain PyAV, raw": lambda n, chosen: plain_pyav(raw, chosen, random.Random(n)),
    }
    for name, path, decoder in (
        ("raw", raw, "decord"),
        ("raw", raw, "pyav"),
        ("copy", copy, "decord"),
        ("copy", copy, "pyav"),
    ):
        manifest = manifest_of(path, decoder)
        row = manifest.rows[0]
        size = scaled_size(row.height, row.width, SHORT_SIDE)
        dataset = ClipDataset(manifest, sampling, AUGMENTATION, seed=0)
        ways[f"loader ({decoder}), {name}"] = functools.partial(
            lambda dataset, n, chosen: loader(dataset, n), dataset
        )
        ways[f"reading ({decoder}), {name}"] = functools.partial(
            lambda path, decoder, size, n, chosen: reading(path, decoder, size, chosen),
            path,
            decoder,
            size,
        )
    return ways


def compare(
    name: str, raw: Path, copy: Path, sampling: ClipSampling, repeats: int
) -> dict[str, Any]:
    """Medians of all ways on one video; in each round all read the clip that the loader draws."""
    ways = ways_of(raw, copy, sampling)
    total = probe(raw).frames
    wall: dict[str, list[float]] = {way: [] for way in ways}
    cpu: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(repeats + 1):
        chosen = train_indices(total, sampling, sample_rng(0, number, 0))
        for way, run in ways.items():
            started, worked = time.perf_counter(), time.process_time()
            run(number, chosen)
            if number:  # the first round warms up
                wall[way].append(time.perf_counter() - started)
                cpu[way].append(time.process_time() - worked)
    seconds = {way: statistics.median(values) for way, values in cpu.items()}
    plain = seconds["plain decord, raw"]
    return {
        "video": name,
        "raw_bytes": raw.stat().st_size,
        "copy_bytes": copy.stat().st_size,
        "clips_per_cpu_second": {way: round(1 / value, 2) for way, value in seconds.items()},
        "clips_per_second": {
            way: round(1 / statistics.median(values), 2) for way, values in wall.items()
        },
        "times_plain_decord": {way: round(plain / value, 2) for way, value in seconds.items()},
    }


def rows_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per way of reading one video."""
    about = {key: result[key] for key in ("video", "clip", "raw_bytes", "copy_bytes")}
    return [
        about
        | {"way": way}
        | {key: result[key][way] for key in result if isinstance(result[key], dict)}
        for way in result["times_plain_decord"]
    ]


def main() -> None:
    """Make the videos and their copies, and compare all ways of reading them."""
    parser = build_parser(__doc__, repeats=7)
    parser.add_argument("--video", type=Path, action="append", default=[], help="instead of made")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        videos = {path.name: path.resolve() for path in arguments.video}
        for name, made in ({} if videos else MADE).items():
            videos[name] = Path(folder, f"{name}.mp4")
            make_video(videos[name], *made)
        for name, raw in videos.items():
            copy = Path(folder, f"copy of {raw.stem}.mp4")
            transcode(raw, copy, TranscodeSettings(short_side=SHORT_SIDE))
            for clip, sampling in CLIPS.items():
                result = {"clip": clip} | compare(name, raw, copy, sampling, arguments.repeats)
                results.append(result)
    finish("loader", arguments, [row for result in results for row in rows_of(result)])


if __name__ == "__main__":
    main()
