from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ogreg_core.checkpoint import CheckpointInfo
from ogreg_core.data.loader import load_views
from ogreg_core.data.sampling import ClipSampling
from ogreg_core.datasets import demo_scene
from ogreg_core.errors import UsageError, VideoError
from ogreg_core.gaze import (
    Query,
    boxes_in_video,
    localising_map,
    look,
    mass_boxes,
    meanings_of,
    select_blocks,
)
from ogreg_core.inference import Predictor, single_video
from ogreg_core.models.registry import create_model
from ogreg_core.video import write_video
from tests.conftest import moving_frames


def predictor_of(model: str = "ogreg-n", size: int = 64, **options) -> Predictor:
    torch.manual_seed(0)
    info = CheckpointInfo(
        model=model,
        options=options,
        labels=["[red] one", "two", "three"],
        sampling=ClipSampling("uniform", 8),
        size=size,
        short_side=size,
        mean=(0.45, 0.45, 0.45),
        std=(0.225, 0.225, 0.225),
    )
    built = create_model(model, 3, frames=8, size=size, **options)
    return Predictor(built, info, torch.device("cpu"))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return predictor_of(strides=[2, 1, 1, 1])


def square_clip(tmp_path):
    """A bright square that moves along the top of a still picture."""
    frames = np.full((16, 64, 64, 3), 60, np.uint8)
    for t in range(16):
        frames[t, 4:20, 2 * t + 4 : 2 * t + 20] = 220
    path = tmp_path / "square [x].mp4"
    write_video(path, frames, 8, crf=10)
    return path


def lone_shape(motion: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A clip of the demo whose background stands still, and where its shape is: ``[T, H, W]``."""
    rng = np.random.default_rng(seed)
    frames, size = 32, 112
    shape, backdrop = demo_scene.random_shape(rng), demo_scene.noise_texture(rng, 4)
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    still = (0.08 + 0.3 * demo_scene.sample(backdrop, x, y))[..., None] * rng.uniform(0.3, 1, 3)
    white = replace(shape, texture=np.ones((256, 256)), tint=np.ones(3))
    clip = np.empty((frames, size, size, 3), np.uint8)
    places = np.zeros((frames, size, size), bool)
    tracks = demo_scene.poses(motion, rng, np.linspace(0, 1, frames))
    for t in range(frames):
        image, outline = still.copy(), np.zeros_like(still)
        for track in tracks:
            demo_scene.draw_shape(image, shape, track[t], x, y, 2 / size)
            demo_scene.draw_shape(outline, white, track[t], x, y, 2 / size)
        clip[t] = np.clip(255 * image, 0, 255)
        places[t] = outline[..., 0] > 0.02
    return clip, places


class TestGaze:
    @pytest.mark.parametrize("motion", ["move_right", "orbit_clockwise", "grow", "open"])
    def test_lies_on_the_only_thing_that_moves(self, motion, tmp_path):
        """In a video file, with all that compression adds; untrained, at the usual size."""
        clip, places = lone_shape(motion, seed=4)
        path = tmp_path / "shape.mp4"
        write_video(path, clip, 16)
        found = look(predictor_of(size=112), path, opening=True)
        swept = places[found.indices[0] : found.indices[-1] + 1].any(axis=0)
        assert swept.mean() < 0.45
        for kind in ("gaze", "opening"):
            assert (found.maps[kind] * swept).sum() / found.maps[kind].sum() > 0.8, kind
        # The boxes of single frames lie where the shape is around that time.
        for box, number in zip(mass_boxes(found.maps["gaze"]), found.indices, strict=True):
            near = places[max(number - 8, 0) : number + 9].any(axis=0)
            rows, columns = near.any(axis=1).nonzero()[0], near.any(axis=0).nonzero()[0]
            middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            assert columns[0] <= middle[0] <= columns[-1] + 1
            assert rows[0] <= middle[1] <= rows[-1] + 1
        # It beats both baselines on the pixels that move.
        assert found.motion.maps["gaze"] > found.motion.uniform
        assert found.motion.maps["gaze"] > found.motion.centre

    def test_of_chosen_blocks_and_their_curves(self, predictor, tmp_path):
        path = square_clip(tmp_path)
        found = look(predictor, path, ["stage1"])
        assert found.maps["gaze"].shape == found.maps["glance"].shape == (8, 64, 64)
        assert found.indices == [1, 3, 5, 7, 9, 11, 13, 15]
        assert found.maps["gaze"][:, :28].sum() / found.maps["gaze"].sum() > 0.7
        assert not found.still
        assert list(found.profiles) == ["stage1.block1"]
        assert found.profiles["stage1.block1"]["d"].shape == (3,)
        # Token frames stand on frames 0, 2, 4, 6, which the stem sees with their neighbours.
        assert found.positions["stage1.block1"].tolist() == [1, 3, 5]
        assert found.maps["glance"].mean() == pytest.approx(1, abs=0.05)
        by_default = look(predictor, path)
        assert len(by_default.profiles) == 6
        assert by_default.blocks["gaze"] == ["stage1.block1"]
        assert by_default.blocks["glance"] == list(by_default.profiles)
        np.testing.assert_array_equal(by_default.maps["gaze"], found.maps["gaze"])

    def test_opening_is_the_modulation_at_each_position(self, predictor, tmp_path):
        found = look(predictor, square_clip(tmp_path), ["stage2"], opening=True)
        gaze = predictor.model.stages[1][0].gaze
        inputs = []
        hook = gaze.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
        _, manifest = single_video(square_clip(tmp_path))
        clip = load_views(manifest, manifest.rows[0], predictor.info.views())
        predictor.model((clip / 255 - 0.45) / 0.225)
        hook.remove()
        y = inputs[0][0]
        d = 1 - torch.cosine_similarity(y[:-1], y[1:], dim=-1)
        floor = gaze.offset.sigmoid()
        m = ((gaze.sharpness * d[..., None] + gaze.offset).sigmoid() - floor) / (1 - floor)
        m = m.mean(-1).detach()
        # At the centre of a token, 3 and 4 of 8 down and across: half way between pixels.
        per_token = torch.cat([m[:1], (m[1:] + m[:-1]) / 2, m[-1:]])
        drawn = found.maps["opening"]
        for frame, token in ((0, 0), (2, 1), (4, 2)):
            square = drawn[frame, 3 * 8 + 2 : 3 * 8 + 3, 4 * 8 + 2 : 4 * 8 + 3].mean()
            assert square == pytest.approx(float(per_token[token, 3, 4]), abs=1e-4)
        assert 0 <= drawn.min() < drawn.max() <= 1

    def test_still_video_is_flat_and_said_to_be(self, predictor, tmp_path):
        write_video(tmp_path / "still.mp4", np.repeat(moving_frames(1, 64, 64), 12, 0), 8)
        frames = torch.full((1, 3, 8, 64, 64), 0.3)
        _, maps = predictor.model.forward_with_maps(frames)
        assert all(found.gaze.abs().max() < 1e-5 for found in maps.values())
        found = look(predictor, tmp_path / "still.mp4", opening=True)
        assert found.still
        assert found.motion is None
        # Below the range that colours stand for at least.
        assert found.maps["gaze"].max() < found.least_range["gaze"] / 5

    def test_single_frame_video(self, predictor, tmp_path):
        write_video(tmp_path / "one.mp4", moving_frames(1, 64, 64), 8)
        found = look(predictor, tmp_path / "one.mp4", opening=True, gradcam=True)
        assert found.still
        assert found.maps["gaze"].max() < 1e-5


class TestScores:
    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_label_and_score_are_those_of_predict(self, precision, tmp_path):
        seeing = predictor_of(strides=[2, 1, 1, 1])
        seeing.precision = precision
        seeing.model.head.weight.data *= 50
        path = square_clip(tmp_path)
        predicted = seeing.predict(path, seeing.info.views(clips=1, crops=1))
        found = look(seeing, path)
        assert (found.label, found.score) == predicted.top[0]
        np.testing.assert_array_equal(found.scores, predicted.scores.numpy())


class TestGradCam:
    def test_of_the_predicted_class_or_a_named_one(self, predictor, tmp_path):
        path = square_clip(tmp_path)
        plain = look(predictor, path, gradcam=True)
        assert plain.cam_label == plain.label
        assert plain.maps["gradcam"].shape == (8, 64, 64)
        other = next(label for label in predictor.info.labels if label != plain.label)
        named = look(predictor, path, gradcam=True, label=other)
        assert (named.label, named.cam_label) == (plain.label, other)
        assert not np.array_equal(plain.maps["gradcam"], named.maps["gradcam"])
        assert max(named.maps["gradcam"].max(), plain.maps["gradcam"].max()) == pytest.approx(1)
        assert meanings_of(predictor.info, named)["gradcam"] == f"Grad-CAM of {other}"

    def test_of_selected_tokens_is_nothing_where_none_is_left(self, tmp_path):
        keep = {"time": [{"before": 1, "ratio": 0.5}], "space": [{"before": 2, "ratio": 0.6}]}
        seeing = predictor_of(strides=[2, 1, 1, 1], token_selection=keep)
        found = look(seeing, square_clip(tmp_path), gradcam=True, opening=True, label="two")
        assert set(found.maps) == {"kept", "gradcam"}
        assert (found.maps["gradcam"] > 1e-3)[found.maps["kept"] == 0].sum() == 0

    def test_unknown_class_is_refused_with_the_nearest(self, predictor, tmp_path):
        with pytest.raises(UsageError, match=r"no class 'tow'.*'two'"):
            look(predictor, square_clip(tmp_path), gradcam=True, label="tow")


class TestQuery:
    def test_marks_its_token_in_the_clip(self, predictor, tmp_path):
        wide = moving_frames(16, 64, 96)
        write_video(tmp_path / "wide.mp4", wide, 8)
        found = look(predictor, tmp_path / "wide.mp4", glance="query", query=Query(56, 20, 6))
        # The crop begins at 16; the clip has frames 1, 3, 5, 7 ...
        assert (found.query.x, found.query.y) == (40, 20)
        assert found.indices[int(found.query.frame)] in (5, 7)
        assert found.maps["glance"].mean() == pytest.approx(1, abs=0.1)
        rolled = look(predictor, tmp_path / "wide.mp4", glance="rollout", query=Query(56, 20))
        assert int(rolled.query.frame) == 3
        words = meanings_of(predictor.info, rolled)["glance"]
        assert words == "attention rolled out over the blocks, from the marked token"

    @pytest.mark.parametrize(
        ("query", "words"),
        [
            (Query(3, 20), "outside of what the model sees; why: it sees x from 16 to 80"),
            (Query(40, 64), "outside"),
            (Query(40, 20, 16), "frame 16; why: the file has frames 0 to 15"),
            (Query(40, 20, -1), "frame -1"),
        ],
    )
    def test_outside_of_crop_or_file_is_refused(self, query, words, predictor, tmp_path):
        write_video(tmp_path / "wide.mp4", moving_frames(16, 64, 96), 8)
        with pytest.raises(UsageError, match=words):
            look(predictor, tmp_path / "wide.mp4", glance="query", query=query)


def test_broken_file_is_one_error(predictor, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    with pytest.raises(VideoError):
        look(predictor, tmp_path / "broken.mp4")


def test_map_that_localises_best(predictor, tmp_path):
    path = square_clip(tmp_path)
    _, manifest = single_video(path)
    clip = load_views(manifest, manifest.rows[0], predictor.info.views())
    kind, maps = localising_map(predictor, clip)
    assert kind == "gaze"
    found = look(predictor, path)
    np.testing.assert_array_equal(maps, found.maps["gaze"])
    boxes = boxes_in_video(mass_boxes(maps), maps.shape[1:], found.geometry)
    assert (boxes[:, 3] <= 30).all()
    assert localising_map(predictor_of("xvit-n"), clip)[0] == "glance"


def test_unknown_blocks_are_refused(predictor):
    maps = predictor.model.forward_with_maps(torch.zeros(1, 3, 4, 32, 32))[1]
    assert list(select_blocks(maps, ["stage3"])) == [f"stage3.block{i}" for i in (1, 2, 3)]
    assert list(select_blocks(maps, ["stage3.block2", "stage1"])) == [
        "stage1.block1",
        "stage3.block2",
    ]
    with pytest.raises(UsageError, match="no block 'stage9'"):
        select_blocks(maps, ["stage9"])


def test_every_kind_of_map_has_a_meaning(predictor, tmp_path):
    """Global temporal attention gives a glance to models without one, token selection what is kept."""
    found = look(predictor, square_clip(tmp_path))
    kinds = ("gaze", "glance", "kept", "opening", "gradcam")
    maps = dict.fromkeys(kinds, found.maps["gaze"])
    info = replace(predictor.info, model="r2plus1d-18")
    meanings = meanings_of(info, replace(found, maps=maps))
    assert meanings["gaze"] == "strength of the features"
    assert meanings["glance"] == "attention received"
    assert "selection" in meanings["kept"]
    assert "m" in meanings["opening"].split()
