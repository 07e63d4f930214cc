"""From a file to frames: probe, read (decord first, PyAV where decord is not exact; images), write."""

from ogreg_core.video.probe import Verification, VideoInfo, probe
from ogreg_core.video.reader import VideoReader, read_frames
from ogreg_core.video.writer import write_video

__all__ = ["Verification", "VideoInfo", "VideoReader", "probe", "read_frames", "write_video"]
