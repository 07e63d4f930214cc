"""The weights in the package, and torchvision's by a model's name."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import get_weight
from torchvision.models.video import s3d

from ogreg_core.checkpoint import load_checkpoint, load_model
from ogreg_core.datasets.demo import PAIRS
from ogreg_core.errors import UsageError
from ogreg_core.inference import Predictor
from ogreg_core.models.registry import MODELS
from ogreg_core.models.weights import PRETRAINED
from ogreg_core.pretrained import BUILT_IN, PUBLISHED, load_pretrained, names_of


class TestBuiltIn:
    def test_is_small_and_tells_no_secrets(self):
        assert BUILT_IN.stat().st_size <= 8_000_000
        _, info = load_checkpoint(BUILT_IN)
        assert info.data_folder == ""
        assert info.recipe == "demo"
        assert sorted(info.labels) == sorted(name for pair in PAIRS for name in pair)

    def test_its_card_gives_its_figures(self):
        card = (BUILT_IN.parent / "README.md").read_text(encoding="utf-8")
        model, info = load_model(BUILT_IN)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        for words in (
            info.model,
            f"{parameters / 1e6:.2f} M",
            f"{BUILT_IN.stat().st_size / 1e6:.1f} MB",
            f"{info.metrics['top1']:.1f} % top-1",
            f"epoch {info.epoch}",
            f"{info.sampling.frames} frames of {info.size} x {info.size}",
        ):
            assert words in card

    def test_tells_motions_apart_that_it_has_never_seen(self, tmp_path):
        from ogreg_core.datasets.demo import FPS, render_clip
        from ogreg_core.video import write_video

        predictor = Predictor.from_checkpoint(BUILT_IN, torch.device("cpu"))
        right = 0
        # Turning is what it is bad at, see its card.
        motions = [pair[0] for pair in PAIRS if pair[0] != "turn_clockwise"]
        for number, motion in enumerate(motions):
            file = tmp_path / f"{motion}.mp4"
            write_video(file, render_clip(motion, seed=90_000 + number), FPS)
            right += predictor.predict(file).top[0][0] == motion
        assert right >= len(motions) - 1


class TestPublished:
    def test_names_are_the_models_own(self):
        named = {model: names_of(model) for model in MODELS if names_of(model)}
        assert set(named.values()) <= set(PRETRAINED)
        assert {"swin3d-t", "swin3d-b", "mvit-v2-s", "r2plus1d-18", "s3d"} <= set(named)
        assert set(named) <= set(PUBLISHED)
        assert "ogreg-t" not in named

    def test_equals_torchvision_with_its_labels(self, tmp_path, monkeypatch):
        weights = get_weight(PRETRAINED["s3d"])
        reference = s3d(num_classes=400).eval()
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        torch.save(reference.state_dict(), folder / weights.url.rsplit("/", 1)[1])
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        model, info = load_pretrained("s3d")
        clip = torch.randn(1, 3, 16, 224, 224)
        with torch.inference_mode():
            torch.testing.assert_close(model(clip), reference(clip))
        assert info.labels == list(weights.meta["categories"])
        assert (info.sampling.frames, info.sampling.fps, info.size) == (128, 15, 224)

    def test_a_model_without_them_is_refused(self):
        with pytest.raises(UsageError, match="no published weights of ogreg-t"):
            load_pretrained("ogreg-t")
