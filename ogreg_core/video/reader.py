"""Reading video and image files: what every command uses to get from a path to frames."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from ogreg_core.errors import VideoError
from ogreg_core.files import IMAGE_SUFFIXES
from ogreg_core.video.decoders import (
    decord_available,
    index_error,
    iterate_frames,
    read_with_decord,
    read_with_pyav,
)
from ogreg_core.video.image import image_index, read_image
from ogreg_core.video.packets import PacketIndex, read_packet_index

__all__ = ["VideoReader", "read_frames"]


class VideoReader:
    """Random access to the frames of one file, by index or by time; an image has one frame.

    Args:
        path: the file.
        decoder: ``decord``, ``pyav``, ``image``, or None to let the name and the packets decide.
            Passing the decoder that ``probe`` found saves reading the packets again when decord
            serves.
        index: the packet index if it was read before.

    Raises:
        VideoError: on first use, if the file cannot be read.
    """

    def __init__(
        self, path: str | Path, decoder: str | None = None, index: PacketIndex | None = None
    ) -> None:
        self.path = str(path)
        self._decoder = decoder
        # Reading frames alone may need less than all packets: not read before somebody asks.
        self._index = index

    @property
    def index(self) -> PacketIndex:
        """The packet index, read on first use."""
        if self._index is None:
            read = image_index if self._is_image else read_packet_index
            self._index = read(self.path)
        return self._index

    @cached_property
    def decoder(self) -> str:
        """The decoder in use."""
        if self._is_image:
            return "image"
        if self._decoder == "decord" and decord_available():
            return "decord"
        if self._decoder == "pyav" or not decord_available() or self.index.distrust:
            return "pyav"
        return "decord"

    @property
    def _is_image(self) -> bool:
        by_name = Path(self.path).suffix.lower() in IMAGE_SUFFIXES
        return self._decoder == "image" or (self._decoder is None and by_name)

    def __len__(self) -> int:
        return self.index.frames

    def frames_at(self, indices: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """Frames by index, in any order, repeats allowed: uint8 ``[len(indices), H, W, 3]`` RGB,
        upright.

        Args:
            indices: 0-based.
            size: (height, width) to which frames are scaled while they are decoded, which is much
                cheaper than scaling RGB frames afterwards; None: as stored.

        Raises:
            VideoError: unreadable file, or an index past its end.
        """
        indices = [int(i) for i in indices]
        if not indices:
            raise VideoError(f"no frames of {self.path} were asked for", code="index")
        if self._is_image:
            if any(indices):
                raise index_error(self.path, max(indices), 1)
            return read_image(self.path, size).expand(len(indices), -1, -1, -1).contiguous()
        if self.decoder == "decord":
            if not Path(self.path).is_file():
                raise VideoError(
                    f"{self.path} does not exist", code="missing", fix="check the path"
                )
            try:
                return read_with_decord(self.path, indices, size)
            except VideoError as error:
                # decord takes some small pictures (48 or 72 pixels wide) for ones of four channels.
                if error.code != "damaged" or (self._decoder and size is None):
                    raise
        return read_with_pyav(self.path, indices, size, self._index)

    def indices_at(self, seconds: Sequence[float]) -> list[int]:
        """The frame on screen at each time, counted in seconds from the first frame; clamped to the
        file.
        """
        starts = self.index.seconds
        # A hair of slack: a time computed as i / fps may land just before the frame it names.
        found = (
            np.searchsorted(starts, np.asarray(seconds, dtype=np.float64) + 1e-6, side="right") - 1
        )
        return [int(i) for i in np.clip(found, 0, len(starts) - 1)]

    def frames_at_times(self, seconds: Sequence[float]) -> Tensor:
        """Frames on screen at the given times: uint8 ``[len(seconds), H, W, 3]`` RGB."""
        return self.frames_at(self.indices_at(seconds))

    def __iter__(self):  # type: ignore[no-untyped-def]
        """All frames in order as (seconds, uint8 ``[H, W, 3]``)."""
        if self._is_image:
            return iter([(0.0, read_image(self.path))])
        return iterate_frames(self.index)


def read_frames(
    path: str | Path,
    indices: Sequence[int],
    decoder: str | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Frames of one file by index: uint8 ``[len(indices), H, W, 3]``; see :class:`VideoReader`."""
    return VideoReader(path, decoder).frames_at(indices, size)
