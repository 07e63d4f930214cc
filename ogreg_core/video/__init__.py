"""From a file to frames: probe, read (decord first, PyAV where decord is not exact), write."""

from ogreg_core.video.reader import VideoInfo, VideoReader, probe, read_frames
from ogreg_core.video.writer import write_video

__all__ = ["VideoInfo", "VideoReader", "probe", "read_frames", "write_video"]
