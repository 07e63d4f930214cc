"""One model, several, and a sweep, all tiny; what goes wrong at one batch size, model or value is told."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import nn

from ogreg_core.errors import EnvironmentFault, OutOfMemory, UsageError
from ogreg_core.profiling import comparison, one_model, passes, sweep
from ogreg_core.profiling.passes import BatchCost, Settings, compiling, expect_room
from ogreg_core.profiling.subject import Subject
from ogreg_core.profiling.timing import Timing

CPU = torch.device("cpu")
QUICK = Settings(batches=(1, 2), repeats=1, warmup=1)


def tiny(model="ogreg-n", frames=2):
    return Subject.fresh(model, {}, 5, frames, 32)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, clip):
        return self.head(clip.mean(dim=(2, 3, 4)))


def profiled(settings, subject=None):
    subject = subject or tiny()
    return one_model.profile_model(subject, subject.build(), CPU, settings).document()


@pytest.fixture
def no_room(monkeypatch):
    """Batches of more than so many clips do not fit."""

    def limit(most):
        def refuse(batch, known, device):
            if batch > most:
                raise MemoryError("about 9.0 GB needed, 1.0 GB free")

        monkeypatch.setattr(passes, "expect_room", refuse)

    return limit


def test_one_model():
    subject = tiny()
    model = subject.build()
    settings = Settings((1, 2), repeats=2, warmup=1, train=True, depth=2, operators=3)
    found = one_model.profile_model(subject, model, CPU, settings).document()
    assert found["schema"] == "ogreg.profile.v2"
    assert found["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["gflops_per_view"] == 2 * found["gmacs_per_view"]
    assert found["gmacs_per_video"] == found["gmacs_per_view"]
    assert {row["depth"] for row in found["modules"]} == {1, 2}
    top = [row for row in found["modules"] if row["depth"] == 1]
    assert sum(row["gmacs"] for row in top) == pytest.approx(found["gmacs_per_view"])
    assert sum(row["activations_m"] for row in top) == pytest.approx(found["activations_m"])
    latency, throughput = found["latency"], found["throughput"]
    assert (latency["batch"], latency["repeats"], latency["warmup"]) == (1, 2, 1)
    assert latency["compile_s"] is None
    assert [row["batch"] for row in throughput] == [1, 2]
    assert throughput[0]["ms_p50"] == latency["ms_p50"]
    for row in (*throughput, found["training"]):
        assert row["clips_per_s"] == pytest.approx(1000 * row["batch"] / row["ms_p50"])
    assert found["training"]["batch"] == 2
    # Gradients and both moments in float32, at least.
    assert found["training"]["peak_memory_mb"] > 3 * 4 * found["params"] / 2**20
    assert len(found["operators"]) == 3
    assert 0 < found["matrix_product_share_pct"] < 100
    assert found["clip"] is None
    assert not model.training


def test_mixed_precision_runs_in_it(monkeypatch):
    subject = tiny()
    model = subject.build()
    seen = set()
    model.head.register_forward_hook(lambda _m, _i, out: seen.add(out.dtype))
    passes.forward_pass(subject, model, 1, CPU, "bf16")()
    passes.forward_pass(subject, model, 1, CPU, "float32")()
    assert seen == {torch.bfloat16, torch.float32}


def test_a_batch_that_does_not_fit_is_a_row(no_room):
    no_room(2)
    found = profiled(Settings(batches=(1, 4, 8), repeats=1, warmup=1, train=True))
    first, second, third = found["throughput"]
    assert first["clips_per_s"] > 0
    assert second == {
        "batch": 4,
        "error": "out of memory: about 9.0 GB needed, 1.0 GB free",
    }
    assert third == {**second, "batch": 8}
    assert found["training"]["batch"] == 1


def test_not_even_one_clip(no_room):
    no_room(0)
    with pytest.raises(OutOfMemory, match="one clip of 2x32x32") as caught:
        profiled(QUICK)
    assert caught.value.exit_code == 5


def test_no_room_for_training_is_told(monkeypatch):
    def refuse(*_arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(one_model, "training_passes", refuse)
    found = profiled(Settings(batches=(1,), repeats=1, warmup=1, train=True))
    assert found["training"] is None
    assert "can't allocate memory" in found["training_error"]


def test_room_is_judged_by_a_smaller_batch(monkeypatch):
    monkeypatch.setattr(passes, "available_mb", lambda device: 1024.0)
    known = BatchCost(2, Timing(1, 1, 1, 1), peak_mb=300.0)
    expect_room(6, known, CPU)
    with pytest.raises(MemoryError, match=r"about 1\.2 GB needed, 1\.0 GB free"):
        expect_room(8, known, CPU)
    expect_room(8, None, CPU)


def test_errors_of_the_compiler_are_the_machines(monkeypatch):
    def fail():
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, OSError("no g++"), None)

    with pytest.raises(EnvironmentFault) as caught, compiling(True):
        fail()
    assert "no g++" in caught.value.why
    assert "--compile" in caught.value.fix
    with pytest.raises(ZeroDivisionError), compiling(True):
        _ = 1 / 0


def test_compiled_passes_tell_the_first_one_apart(monkeypatch):
    """A backend that compiles nothing: how often it is asked is what counts."""
    monkeypatch.setattr(Subject, "build", lambda self: Small())
    subject, asked = tiny(), []
    model = subject.build()

    def backend(graph, _examples):
        asked.append(1)
        return graph.forward

    compile = model.compile
    monkeypatch.setattr(
        type(model), "compile", lambda self, **kw: compile(backend=backend, **kw), raising=True
    )
    settings = Settings(batches=(1, 2), repeats=1, warmup=1, compile=True)
    found = one_model.profile_model(subject, model, CPU, settings).document()
    assert found["compiled"]
    assert found["latency"]["compile_s"] > found["latency"]["ms_p50"] / 1000
    # Anew for each shape, and never while it is timed.
    assert len(asked) == 2


def test_models_side_by_side():
    settings = Settings(batches=(1, 2), repeats=1, warmup=1, train=True)
    subjects = [tiny(), tiny("s3d"), tiny("r2plus1d-18")]
    found = comparison.compare_models(subjects, CPU, settings).document()
    assert found["schema"] == "ogreg.profile-compare.v2"
    first, second = found["models"]
    assert (first["model"], second["model"]) == ("ogreg-n", "r2plus1d-18")
    # S3D's poolings leave nothing of two frames.
    assert [row["model"] for row in found["left_out"]] == ["s3d"]
    assert first["latency_ratio"] == first["best"]["ratio"] == first["training_ratio"] == 1
    assert second["latency_ratio"] == second["latency_ms_p50"] / first["latency_ms_p50"]
    best = max(second["throughput"], key=lambda row: row["clips_per_s"])
    assert second["best"]["batch"] == best["batch"]
    ratio = second["best"]["clips_per_s"] / first["best"]["clips_per_s"]
    assert second["best"]["ratio"] == ratio
    assert second["training_ratio"] == second["training_ms_p50"] / first["training_ms_p50"]


def test_a_model_without_room_leaves_the_comparison(monkeypatch):
    real = comparison.forward_pass

    def refuse(subject, model, batch, device, dtype):
        if subject.model == "ogreg-n" or batch > 1:
            raise RuntimeError("out of memory")
        return real(subject, model, batch, device, dtype)

    monkeypatch.setattr(comparison, "forward_pass", refuse)
    subjects = [tiny(), tiny("r2plus1d-18")]
    found = comparison.compare_models(subjects, CPU, QUICK).document()
    assert found["left_out"] == [{"model": "ogreg-n", "error": "out of memory: out of memory"}]
    (only,) = found["models"]
    assert only["latency_ratio"] == 1
    assert [row["batch"] for row in only["throughput"] if "error" in row] == [2]
    with pytest.raises(OutOfMemory):
        comparison.compare_models(subjects[:1], CPU, QUICK)


def test_no_model_takes_the_input():
    with pytest.raises(UsageError, match="4 frames"):
        comparison.compare_models([tiny("s3d", 4)], CPU, QUICK)


def test_training_needs_room_for_moments(monkeypatch):
    monkeypatch.setattr(comparison, "available_mb", lambda device: 10.0)
    settings = Settings(batches=(1,), repeats=1, warmup=1, train=True)
    (row,) = comparison.compare_models([tiny()], CPU, settings).document()["models"]
    assert row["training_ms_p50"] is row["training_ratio"] is None
    assert "weights and moments" in row["training_error"]


def test_sweep_over_frames():
    found = sweep.sweep_models([tiny(), tiny("s3d")], "frames", (2, 8), CPU, QUICK).document()
    assert (found["schema"], found["over"]) == ("ogreg.profile-sweep.v1", "frames")
    ours, other = found["models"]
    assert [point["value"] for point in ours["points"]] == [2, 8]
    assert ours["frames"] is None
    few, many = ours["points"]
    assert 3 < many["gmacs_per_view"] / few["gmacs_per_view"] < 5
    assert many["activations_m"] > few["activations_m"]
    assert other["points"][0]["error"] == "its poolings leave nothing of less than 5"
    assert other["points"][1]["gflops_per_view"] > 0


def test_sweep_over_size_and_batch():
    found = sweep.sweep_models([tiny()], "size", (32, 64), CPU, QUICK).document()
    few, many = found["models"][0]["points"]
    assert many["gmacs_per_view"] / few["gmacs_per_view"] == pytest.approx(4, rel=0.1)
    found = sweep.sweep_models([tiny()], "batch", (1, 3), CPU, QUICK).document()
    few, many = found["models"][0]["points"]
    assert many["gmacs_per_view"] == few["gmacs_per_view"]
    assert many["clips_per_s"] == pytest.approx(3000 / many["latency_ms_p50"])


def test_a_sweep_that_leads_nowhere():
    with pytest.raises(UsageError):
        sweep.sweep_models([tiny("s3d")], "frames", (1, 2), CPU, QUICK)
