"""Images per second: preparing them, and training samples beside torchvision's ImageFolder.

Run by name, not by pytest: ``PYTHONPATH=. python tests/benchmarks/images.py [--images N] [--repeats N]``.
Renders an ImageFolder of JPEG files of ImageNet's usual size (500 x 375 pixels, about 70 kB). Reading: a
random resized crop of 224 pixels and a flip, by the plain way (ImageFolder with Pillow's transforms) and by
ours, in turn, medians over the rounds; in this process on one thread (processor time, which other processes
disturb least) and in a loader with one worker (wall time).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ogreg_core.data.loader import ClipDataset
from ogreg_core.data.manifest import load_manifest
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.data.transforms import Augmentation
from ogreg_core.datasets.imagefolder import list_imagefolder
from ogreg_core.datasets.prepare import PrepareOptions, prepare_listing
from ogreg_core.progress import ignore_progress

HEIGHT, WIDTH, CROP = 375, 500, 224


def render(root: Path, images: int) -> None:
    """Colour noise with detail at all scales, each image another cut-out, in ten classes."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(1, 3, 1024, 1024)
    for octave in range(8):
        cells = 2 ** (octave + 2)
        noise = torch.randn(1, 3, cells, cells, generator=generator)
        total += F.interpolate(noise, size=(1024, 1024), mode="bicubic") * 0.7**octave
    levels = (128 + 45 * (total[0] - total.mean()) / total.std()).clamp(0, 255).byte()
    canvas = levels.permute(1, 2, 0).numpy()
    rng = np.random.default_rng(0)
    for number in range(images):
        y, x = rng.integers(0, 1024 - HEIGHT), rng.integers(0, 1024 - WIDTH)
        folder = root / "train" / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        cut = Image.fromarray(np.ascontiguousarray(canvas[y : y + HEIGHT, x : x + WIDTH]))
        cut.save(folder / f"{number}.JPEG", quality=94)


class Ours(Dataset[Tensor]):
    """Training samples by index, ``[3, 224, 224]``."""

    def __init__(self, root: Path) -> None:
        manifest = load_manifest(root, "train")
        augmentation = Augmentation(CROP, flip="random")
        self.clips = ClipDataset(manifest, ClipSampling("uniform", 1), augmentation, seed=0)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Tensor:
        return self.clips[0, index].clips[0, :, 0]


class Plain(Dataset[Tensor]):
    """The same by torchvision's ImageFolder and its transforms of Pillow images."""

    def __init__(self, root: Path) -> None:
        steps = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip()]
        transform = transforms.Compose([*steps, transforms.PILToTensor()])
        self.images = ImageFolder(root / "train", transform)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.images[index][0]
        return image


def in_process(dataset: Dataset[Tensor]) -> float:
    """Milliseconds of processor time per image."""
    started = time.process_time()
    for index in range(len(dataset)):  # type: ignore[arg-type]
        dataset[index]
    return 1000 * (time.process_time() - started) / len(dataset)  # type: ignore[arg-type]


def in_loader(dataset: Dataset[Tensor]) -> float:
    """Milliseconds of wall time per image, the start of the worker apart."""
    batches = iter(DataLoader(dataset, batch_size=32, num_workers=1))
    images = -len(next(batches))
    started = time.perf_counter()
    images += sum(map(len, batches)) + 32
    return 1000 * (time.perf_counter() - started) / images


def measure(root: Path, repeats: int) -> None:
    """Print medians of both ways of reading."""
    ways: dict[str, Dataset[Tensor]] = {"plain": Plain(root), "ours": Ours(root)}
    kinds: dict[str, Callable[[Dataset[Tensor]], float]] = {
        "one thread, processor time": in_process,
        "loader with one worker, wall time": in_loader,
    }
    for kind, clock in kinds.items():
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(repeats):
            for way, dataset in ways.items():
                found[way].append(clock(dataset))
        middle = {way: statistics.median(times) for way, times in found.items()}
        for way, milliseconds in middle.items():
            say(f"{kind}: {way}: {milliseconds:.2f} ms, {1000 / milliseconds:.0f} images/s")
        say(f"{kind}: {middle['plain'] / middle['ours']:.2f} times as fast")


def say(line: str) -> None:
    """A line on stdout."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        render(root, options.images)
        size = sum(path.stat().st_size for path in root.rglob("*.JPEG"))
        say(f"{options.images} images of {size / options.images / 1000:.0f} kB")
        for verify in ("quick", "full"):
            for workers in (0, 2):
                how = PrepareOptions(
                    out=Path(folder) / f"{verify}{workers}", verify=verify, workers=workers
                )
                report = prepare_listing(list_imagefolder(root), how, ignore_progress)
                each = 1000 * report.seconds / report.checked
                say(f"prepare --verify {verify} --workers {workers}: {each:.2f} ms per image")
        prepare_listing(list_imagefolder(root), PrepareOptions(), ignore_progress)
        measure(root, options.repeats)


if __name__ == "__main__":
    main()
