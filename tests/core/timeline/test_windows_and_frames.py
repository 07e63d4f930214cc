"""Which frames windows take, and that one pass over a file gives these, whatever the file."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
import torch

from ogreg_core.checkpoint import CheckpointInfo
from ogreg_core.data.loader import Views, load_views
from ogreg_core.data.manifest import Manifest, Row, write_dataset
from ogreg_core.data.sampling import ClipSampling, frame_numbers, positions
from ogreg_core.data.transforms import TestCrops
from ogreg_core.errors import UsageError, VideoError
from ogreg_core.inference import within
from ogreg_core.timeline.source import ahead, open_source, read_windows
from ogreg_core.timeline.windows import Plan, default_window
from ogreg_core.video import VideoReader, probe
from ogreg_core.video.decoders import stream_frames
from tests.conftest import moving_frames

DENSE = ClipSampling("dense", 4, 3)
NOMINAL = ClipSampling("dense", 4, 2, fps=10.0)
UNIFORM = ClipSampling("uniform", 5)


def views_of(sampling: ClipSampling, clips: int = 1, crops: int = 1) -> Views:
    return Views(sampling, clips, TestCrops(32, 36, crops))


def row_of(frames: int, fps: float, *, variable: bool = False) -> Row:
    return Row("x.mp4", 0, frames, fps, frames / fps, 64, 48, "pyav", variable)


def plan_of(row: Row, views: Views, window_s: float, hop_s: float) -> Plan:
    return Plan(row, views, window_s, hop_s, lambda seconds: [int(s * row.fps) for s in seconds])


class TestPlan:
    @pytest.mark.parametrize("sampling", [DENSE, NOMINAL, UNIFORM])
    @pytest.mark.parametrize("clips", [1, 3])
    @pytest.mark.parametrize(("frames", "fps"), [(90, 30.0), (7, 25.0), (53, 23.976), (1, 30.0)])
    def test_a_window_over_everything_takes_what_predict_takes(self, sampling, clips, frames, fps):
        row, views = row_of(frames, fps), views_of(sampling, clips)
        wanted = [
            frame_numbers(clip, row, sampling, lambda _: [])
            for clip in views.indices(positions(row, sampling))
        ]
        for seconds in (row.duration, row.duration + 100):
            plan = plan_of(row, views, seconds, 1.0)
            assert len(plan) == 1
            # Clips that are all alike are scored once.
            alike = all(clip == wanted[0] for clip in wanted)
            assert plan[0].clips == (wanted[:1] if alike else wanted)
            assert (plan[0].start_s, plan[0].end_s) == (0.0, pytest.approx(row.duration))

    def test_dense_frames_keep_their_stride_in_every_window(self):
        plan = plan_of(row_of(300, 30.0), views_of(DENSE), 0.4, 0.2)
        for number in range(len(plan)):
            (clip,) = plan[number].clips
            assert clip == [clip[0] + step for step in (0, 3, 6, 9)]
            assert clip[0] == round(30 * plan[number].start_s)

    def test_a_nominal_rate_keeps_its_seconds(self):
        plan = plan_of(row_of(240, 24.0), views_of(NOMINAL), 0.8, 0.4)
        for number in range(len(plan)):
            (clip,) = plan[number].clips
            # Every 0.2 s, the frame that is on screen then.
            wanted = [int((plan[number].start_s + 0.2 * i) * 24 + 1e-4) for i in range(4)]
            assert clip == wanted

    @pytest.mark.parametrize(("window", "hop"), [(2.0, 1.0), (2.0, 0.3), (1.7, 1.7), (9.0, 4.0)])
    def test_windows_cover_every_instant(self, window, hop):
        row = row_of(1003, 29.97)
        plan = plan_of(row, views_of(UNIFORM), window, hop)
        found = [plan[number] for number in range(len(plan))]
        assert found[0].start_s == 0
        assert found[-1].end_s == pytest.approx(row.duration)
        for before, after in pairwise(found):
            assert 0 < after.start_s - before.start_s <= hop + 1 / 29.97
            assert after.start_s <= before.end_s + 1e-9
            assert after.end_s - after.start_s == pytest.approx(window, abs=1 / 29.97)
        # Errors of a rounded hop do not add up.
        assert found[-2].start_s == pytest.approx((len(found) - 2) * hop, abs=0.5 / 29.97 + 1e-9)

    def test_needed_are_the_frames_of_all_windows(self):
        plan = plan_of(row_of(100, 25.0), views_of(UNIFORM, clips=2), 1.5, 0.5)
        every = {n for k in range(len(plan)) for n in plan[k].frames}
        assert np.flatnonzero(plan.needed()).tolist() == sorted(every)


class TestDefaultWindow:
    def info(self, sampling: ClipSampling, **changes: str) -> CheckpointInfo:
        return CheckpointInfo("ogreg-n", {}, ["a"], sampling, 32, 36, (0,) * 3, (1,) * 3, **changes)

    def test_what_a_dense_clip_spans(self):
        row = row_of(100, 20.0)
        assert default_window(self.info(DENSE), row)[0] == pytest.approx(12 / 20)
        assert default_window(self.info(NOMINAL), row)[0] == pytest.approx(0.8)

    def test_of_uniform_clips_the_training_videos(self, tmp_path):
        row = row_of(100, 20.0)
        rows = [row_of(frames, 10.0) for frames in (20, 90, 31)]
        write_dataset(
            tmp_path,
            dataset="mine",
            video_root=tmp_path,
            labels=["a"],
            splits={"val": rows},
            version="0",
        )
        at_hand = self.info(UNIFORM, data_folder=str(tmp_path), dataset="mine")
        assert default_window(at_hand, row)[0] == pytest.approx(3.1)
        elsewhere = self.info(UNIFORM, data_folder="gone", dataset="ssv2")
        assert default_window(elsewhere, row)[0] == 4.0
        with pytest.raises(UsageError, match="not known") as caught:
            default_window(self.info(UNIFORM, dataset="mine"), row)
        assert "--window 4" in caught.value.fix


UNEVEN = [0, 40, 80, 200, 210, 500, 540, 900, 1000, 1040, 1400, 1440, 1700, 1740, 2000, 2040]


@pytest.fixture(params=["b-frames", "mkv", "variable", "mpeg4.avi", "vp9"])
def video(request, encode):
    frames = moving_frames(16 if request.param == "variable" else 75, 48, 64)
    return {
        "b-frames": lambda: encode("b.mp4", frames, options={"bf": "3"}),
        "mkv": lambda: encode("m.mkv", frames, gop=25),
        "variable": lambda: encode("v.mkv", frames, pts_ms=UNEVEN),
        "mpeg4.avi": lambda: encode("a.avi", frames, codec="mpeg4"),
        "vp9": lambda: encode("v.webm", frames, codec="libvpx-vp9"),
    }[request.param]()


class TestOnePass:
    def test_streamed_frames_are_those_read_by_number(self, video):
        index = VideoReader(video).index
        wanted = np.zeros(index.frames, dtype=bool)
        wanted[[0, 3, 4, 9, index.frames - 1]] = True
        found = dict(stream_frames(index, wanted, (36, 48)))
        assert list(found) == np.flatnonzero(wanted).tolist()
        direct = VideoReader(video, "pyav").frames_at(list(found), (36, 48))
        assert torch.equal(torch.stack(list(found.values())), direct)

    @pytest.mark.parametrize("sampling", [DENSE, NOMINAL, UNIFORM])
    def test_windows_are_what_reading_each_by_itself_gives(self, video, sampling):
        source = open_source(video)
        views = views_of(sampling, clips=2, crops=3)
        plan = Plan(source.row, views, 1.0, 0.4, source.reader.indices_at)
        kept: list[int] = []
        found = list(read_windows(source, plan, lambda: None, kept.append))
        assert len(found) == len(plan) >= 3
        assert kept == np.flatnonzero(plan.needed()).tolist()  # each once, in order
        reader = VideoReader(video, "pyav")
        for item in found:
            clips = [reader.frames_at(clip, (36, 48)) for clip in item.window.clips]
            corners = [
                torch.stack([c[:, 2:34, x : x + 32] for x in (0, 8, 16)]).permute(0, 4, 1, 2, 3)
                for c in clips
            ]
            assert torch.equal(item.views, torch.cat(corners))

    def test_one_window_is_what_load_views_gives(self, encode):
        path = encode("b.mp4", moving_frames(40, 48, 64), options={"bf": "3"})
        source, views = open_source(path), views_of(UNIFORM, clips=2, crops=3)
        plan = Plan(source.row, views, source.row.duration, 1.0, source.reader.indices_at)
        (item,) = read_windows(source, plan, lambda: None, lambda number: None)
        row = Row.from_probe(path.name, probe(path))
        expected = load_views(Manifest(path.parent, "", (row,), ("",)), row, views)
        assert torch.equal(item.views, expected)


class TestReadingAhead:
    def test_items_come_in_order(self):
        assert list(ahead(iter(range(100)), "x", lambda: None)) == list(range(100))

    def test_errors_of_the_thread_are_raised_here(self):
        def broken():
            yield 1
            raise VideoError("x is damaged")

        items = ahead(broken(), "x", lambda: None)
        assert next(items) == 1
        with pytest.raises(VideoError, match="x is damaged"):
            next(items)

    def test_a_hanging_decoder_is_left_behind(self):
        def hanging():
            yield 1
            time.sleep(30)

        begun = time.monotonic()
        with pytest.raises(VideoError, match="no frame came") as caught:
            list(ahead(hanging(), "x.mp4", lambda: None, deadline=0.2))
        assert caught.value.code == "time-out"
        with pytest.raises(VideoError, match="cannot be read in time"):
            within(lambda: time.sleep(30), "x.mp4", 0.2)
        assert time.monotonic() - begun < 5

    def test_only_a_few_are_taken_ahead(self):
        taken: list[int] = []

        def counted():
            for number in range(1000):
                taken.append(number)
                yield number

        items = ahead(counted(), "x", lambda: None)
        next(items)
        time.sleep(0.2)
        assert len(taken) < 15
        items.close()

    def test_who_is_asked_to_stop_may_raise(self):
        def stop():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            next(ahead(iter([1]), "x", stop))
