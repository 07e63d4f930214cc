"""The recipes of the peers against the protocols that they say they follow.

The tables are written by hand from the published configurations, not from the files: whoever changes a
protocol has to change it here too, and say so at the head of the recipe. Recipes of OG-ReG itself are
in ``test_recipes.py``.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import tomllib
import torch

from ogreg_core.data.mixing import mix
from ogreg_core.data.rand_augment import parse_rand_augment
from ogreg_core.data.transforms import augment
from ogreg_core.models.registry import create_model
from ogreg_core.recipe import Recipe, builtin_recipes, load_recipe
from ogreg_core.training.optim import warmup_cosine
from ogreg_core.training.settings import augmentation_of, mixing_of, optim_of
from tests.core.test_recipes import head

RECIPES = builtin_recipes()
CLASSES = {"kinetics400": 400, "ssv2": 174, "diving48": 48}


class Net(NamedTuple):
    """Whose architecture it is, where it starts, and what is dropped in it."""

    model: str
    weights: str = ""
    drop_path: float = 0.0
    dropout: float = 0.0
    options: Mapping[str, object] = MappingProxyType({})


class Views(NamedTuple):
    """How clips are taken from videos, for training and for the test."""

    sampling: str
    frames: int
    stride: int
    fps: float
    clips: int
    crops: int
    test_side: int
    size: int = 224


class Change(NamedTuple):
    """What is done to training clips."""

    crop: str
    short_side: list[int]
    flip: str
    rand_augment: str = ""
    erasing: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    repeats: int = 1


class Steps(NamedTuple):
    """How the weights move; ``batch`` and ``reference`` in videos."""

    optimizer: str
    lr: float
    batch: int
    reference: int
    epochs: int
    warmup: float
    weight_decay: float
    clip: float
    min_lr: float = 0.0
    backbone_lr: float = 1.0
    head_lr: float = 1.0


class Peer(NamedTuple):
    net: Net
    views: Views
    change: Change
    steps: Steps


RAND7 = "rand-m7-n4-mstd0.5-inc1"
STORED, RESIZED = [0, 0], [256, 256]
WINDOW_16 = {"window": 16}
HALVES = {"segment": 8, "shift_divisor": 8, "time_rows": 8}
WHOLE = {"segment": 16, "shift_divisor": 4, "time_rows": 8}

# fmt: off
#               sampling  frames stride fps  clips crops short side of the test
EIGHT  = Views("uniform",  8,    1,     0.0,  4,   3,    224)
SWIN_K = Views("dense",   32,    2,     0.0,  4,   3,    224)
SWIN_S = Views("uniform", 32,    1,     0.0,  1,   3,    224)
MVIT_K = Views("dense",   16,    4,    30.0,  5,   1,    256)
MVIT_S = Views("uniform", 16,    1,     0.0,  1,   3,    224)
XVIT_K = Views("dense",   16,   16,    30.0,  1,   3,    224)
XVIT_S = Views("uniform", 16,    1,     0.0,  2,   3,    224)
TSM_K  = Views("uniform",  8,    1,     0.0,  1,   3,    224)
TSM_S  = Views("uniform",  8,    1,     0.0,  2,   3,    224)
R21D_K = Views("dense",   16,    1,    15.0,  5,   1,    128, 112)
R21D_S = Views("uniform", 16,    1,     0.0,  2,   3,    112, 112)
S3D_K  = Views("dense",   64,    1,    15.0,  2,   1,    256)
S3D_S  = Views("uniform", 32,    1,     0.0,  2,   3,    224)

#               crop       short side  flip      RandAugment          erase smooth mixup cutmix repeats
FOCAL  = Change("resized", RESIZED,    "random", "",                  0.0,  0.1,   0.8,  1.0)
SWIN   = Change("resized", RESIZED,    "random")
SWIN_2 = Change("resized", RESIZED,    "none",   "torchvision-n4-m7", 0.25, 0.1)
MVIT   = Change("resized", STORED,     "random", RAND7,               0.25, 0.1,   0.8,  1.0,   2)
MVIT_2 = Change("random",  [256, 320], "none",   RAND7,               0.25, 0.1,   0.8,  1.0)
XVIT   = Change("random",  [224, 339], "random", "torchvision-n2-m9", 0.0,  0.3,   0.4)
XVIT_2 = Change("random",  [256, 320], "none",   "torchvision-n2-m9", 0.5)
TSM    = Change("random",  [224, 339], "random")
SMALL  = Change("random",  [128, 128], "random")
LARGE  = Change("random",  [256, 256], "random")

#                           lr      batch ref   epochs warm decay clip  floor  backbone head
FOC_32  = Steps("nesterov", 0.1,    32,  512, 120, 20,  0.0,  5.0,  1e-3)
SWIN_02 = Steps("adamw",    1e-3,   64,   64,  30, 2.5, 0.02, 0.0,  0.0,  0.1)
SWIN_05 = Steps("adamw",    1e-3,   64,   64,  30, 2.5, 0.05, 0.0,  0.0,  0.1)
SWIN_60 = Steps("adamw",    3e-4,   64,   64,  60, 2.5, 0.05, 0.0,  0.0,  0.1)
SWIN_T  = Steps("adamw",    3e-4,  512,  512,  10, 0.8, 0.05, 0.0)
MVIT_A  = Steps("adamw",    1e-4,   16,   16, 200, 30,  0.05, 1.0,  1e-6)
MVIT_N  = Steps("nesterov", 2.5e-3, 16,   16, 100, 3,   1e-4, 0.0,  1e-6)
MVIT_T  = Steps("adamw",    1e-5,   16,   16,  20, 3,   0.05, 1.0,  1e-6)
XVIT_30 = Steps("nesterov", 0.03,   64,   64,  30, 5,   1e-5, 0.0)
XVIT_35 = Steps("nesterov", 0.03,   64,   64,  35, 5,   1e-4, 0.0)
TSM_K50 = Steps("sgd",      0.02,  128,  128,  50, 5,   1e-4, 20.0, 0.0,  1.0, 5.0)
TSM_S50 = Steps("sgd",      0.02,  128,  128,  50, 5,   5e-4, 20.0, 0.0,  1.0, 5.0)
R21D    = Steps("sgd",      0.64,  192, 1536, 225, 50,  1e-4, 0.0)
S3D     = Steps("sgd",      0.2,    96,  768, 225, 50,  1e-4, 0.0)

PEERS = {
    "kinetics400-video-focalnet-t":
        Peer(Net("video-focalnet-t", "", 0.2), EIGHT, FOCAL, FOC_32),
    "kinetics400-video-focalnet-s":
        Peer(Net("video-focalnet-s", "", 0.3), EIGHT, FOCAL, FOC_32._replace(batch=64)),
    "kinetics400-video-focalnet-b":
        Peer(Net("video-focalnet-b", "", 0.5), EIGHT, FOCAL, FOC_32),
    "ssv2-video-focalnet-b":
        Peer(Net("video-focalnet-b", "", 0.5), EIGHT, FOCAL._replace(flip="none"),
             FOC_32._replace(batch=128)),
    "diving48-video-focalnet-b":
        Peer(Net("video-focalnet-b", "", 0.5), EIGHT, FOCAL, FOC_32),
    "kinetics400-xvit-b16":
        Peer(Net("xvit-b16", "vit_b_16", 0.0, 0.5, HALVES), XVIT_K, XVIT, XVIT_30),
    "ssv2-xvit-b16":
        Peer(Net("xvit-b16", "vit_b_16", 0.0, 0.5, WHOLE), XVIT_S, XVIT_2, XVIT_35),
    "kinetics400-gta-r50-8f":
        Peer(Net("gta-r50-8f", "resnet50", 0.0, 0.5), TSM_K, TSM, TSM_K50),
    "kinetics400-gta-r50-16f":
        Peer(Net("gta-r50-16f", "resnet50", 0.0, 0.5), TSM_K._replace(frames=16), TSM, TSM_K50),
    "ssv2-gta-r50-8f":
        Peer(Net("gta-r50-8f", "resnet50", 0.0, 0.5), TSM_S, TSM._replace(flip="swap"), TSM_S50),
    "ssv2-gta-r50-16f":
        Peer(Net("gta-r50-16f", "resnet50", 0.0, 0.5), TSM_S._replace(frames=16),
             TSM._replace(flip="swap"), TSM_S50),
    "kinetics400-swin3d-t":
        Peer(Net("swin3d-t", "swin_t", 0.1, 0.5), SWIN_K, SWIN, SWIN_02),
    "kinetics400-swin3d-s":
        Peer(Net("swin3d-s", "swin_s", 0.1, 0.5), SWIN_K, SWIN, SWIN_02),
    "kinetics400-swin3d-b":
        Peer(Net("swin3d-b", "swin_b", 0.3, 0.5), SWIN_K, SWIN, SWIN_05),
    "ssv2-swin3d-b":
        Peer(Net("swin3d-b", "swin3d_b_22k", 0.4, 0.5, WINDOW_16), SWIN_S, SWIN_2, SWIN_60),
    "kinetics400-mvit-v2-s":
        Peer(Net("mvit-v2-s", "", 0.2, 0.5), MVIT_K, MVIT, MVIT_A),
    "kinetics400-mvit-v1-b":
        Peer(Net("mvit-v1-b", "", 0.2, 0.5), MVIT_K, MVIT, MVIT_A),
    "ssv2-mvit-v2-s":
        Peer(Net("mvit-v2-s", "mvit_v2_s", 0.4, 0.5), MVIT_S, MVIT_2, MVIT_N),
    "kinetics400-r2plus1d-18":
        Peer(Net("r2plus1d-18"), R21D_K, SMALL, R21D),
    "kinetics400-s3d":
        Peer(Net("s3d", "", 0.0, 0.2), S3D_K, LARGE, S3D),
    "ssv2-r2plus1d-18":
        Peer(Net("r2plus1d-18", "r2plus1d_18", 0.0, 0.5), R21D_S, SMALL._replace(flip="swap"),
             TSM_S50),
    "ssv2-s3d":
        Peer(Net("s3d", "s3d", 0.0, 0.5), S3D_S, LARGE._replace(flip="swap"), TSM_S50),
    "kinetics400-mvit-v1-b-stts":
        Peer(Net("mvit-v1-b", "mvit_v1_b", 0.2, 0.5), MVIT_K, MVIT, MVIT_T),
    "kinetics400-swin3d-b-stts":
        Peer(Net("swin3d-b", "swin3d_b_22k", 0.2, 0.5), SWIN_K, SWIN, SWIN_T),
    "ssv2-swin3d-b-stts":
        Peer(Net("swin3d-b", "swin3d_b_22k", 0.4, 0.5, WINDOW_16), SWIN_S, SWIN_2, SWIN_T),
    "kinetics400-stts":
        Peer(Net("ogreg-t", "swin_t", 0.1, 0.5, {"stem": "patch"}), SWIN_K, SWIN,
             SWIN_02._replace(clip=5.0)),
}

# Selections of frames and of windows (place, share), noise, gradient; all others select nothing.
SELECTIONS = {
    "kinetics400-mvit-v1-b-stts": ([(0, 0.5)],   [(4, 0.7367)], 0.1,  "official"),
    "kinetics400-swin3d-b-stts":  ([(0, 0.375)], [],            0.05, "official"),
    "ssv2-swin3d-b-stts":         ([(0, 0.5)],   [],            0.05, "official"),
    "kinetics400-stts":           ([(1, 0.5)],   [(2, 0.7367)], 0.1,  "unbiased"),
}

# The rate of a step of the recipe's size, where the published run states it for that size.
RATES = {
    "kinetics400-video-focalnet-t": 0.00625,  # four GPUs
    "kinetics400-video-focalnet-s": 0.0125,   # eight
    "ssv2-video-focalnet-b":        0.025,    # sixteen
    "kinetics400-r2plus1d-18":      0.08,     # eight, as torchvision's README recommends
    "kinetics400-xvit-b16":         0.03,
    "kinetics400-mvit-v2-s":        1e-4,
}

# Whose protocol the head must name; what has none says that it is ours.
FOLLOWS = {
    "kinetics400-video-focalnet-t": "the protocol of Video-FocalNet-T ",
    "kinetics400-video-focalnet-s": "the protocol of Video-FocalNet-S,",
    "kinetics400-video-focalnet-b": "the protocol of Video-FocalNet-B,",
    "ssv2-video-focalnet-b":        "the protocol of Video-FocalNet-B,",
    "diving48-video-focalnet-b":    "the protocol of Video-FocalNet-B,",
    "kinetics400-xvit-b16":         "the protocol of X-ViT with 16 frames",
    "ssv2-xvit-b16":                "the protocol of X-ViT with 16 frames",
    "kinetics400-gta-r50-8f":       "ours, after the protocol of TSM-R50 in mmaction2",
    "kinetics400-gta-r50-16f":      "ours, as kinetics400-gta-r50-8f.toml",
    "ssv2-gta-r50-8f":              "ours, after the protocol of TSM-R50 in mmaction2",
    "ssv2-gta-r50-16f":             "ours, as ssv2-gta-r50-8f.toml",
    "kinetics400-swin3d-t":         "the protocol of Video-Swin-T ",
    "kinetics400-swin3d-s":         "the protocol of Video-Swin-S,",
    "kinetics400-swin3d-b":         "the protocol of Video-Swin-B from ImageNet-1K weights",
    "ssv2-swin3d-b":                "the protocol of Video-Swin-B ",
    "kinetics400-mvit-v2-s":        "the protocol of MViTv2-S in PySlowFast",
    "kinetics400-mvit-v1-b":        "the protocol of MViT-B 16x4 in PySlowFast",
    "ssv2-mvit-v2-s":               "the protocol of MViTv2-S in PySlowFast",
    "kinetics400-r2plus1d-18":      "the protocol of torchvision's reference training",
    "kinetics400-s3d":              "the protocol of torchvision's reference training",
    "ssv2-r2plus1d-18":             "ours, since torchvision has no training on this data set",
    "ssv2-s3d":                     "ours, since torchvision has no training on this data set",
    "kinetics400-mvit-v1-b-stts":   "the protocol of STTS for MViT-B, setting T0.5-S0.7 ",
    "kinetics400-swin3d-b-stts":    "the protocol of STTS for Video-Swin-B, setting T0.4 ",
    "ssv2-swin3d-b-stts":           "ours, since STTS has released nothing for this data set",
    "kinetics400-stts":             "ours and not measured",
}

# Published starting weights that a name cannot give, or better ones: what the head says to pass.
PASSES = {
    "kinetics400-video-focalnet-t": "--init-from focalnet_tiny_srf.pth",
    "kinetics400-video-focalnet-s": "--init-from FILE, such as focalnet_small_srf.pth",
    "kinetics400-video-focalnet-b": "--init-from FILE, such as focalnet_base_srf.pth",
    "ssv2-video-focalnet-b":        "--init-from FILE, such as focalnet_base_srf.pth",
    "diving48-video-focalnet-b":    "--init-from FILE, such as focalnet_base_srf.pth",
    "kinetics400-xvit-b16":         "--init-from jx_vit_base_patch16_224_in21k-e5005f0a.pth",
    "kinetics400-swin3d-b":         "--init-from FILE",
    "ssv2-swin3d-b":                "--init-from FILE",
    "ssv2-mvit-v2-s":               "a run of kinetics400-mvit-v2-s",
    "ssv2-r2plus1d-18":             "a run of kinetics400-r2plus1d-18",
    "ssv2-s3d":                     "a run of kinetics400-s3d",
    "kinetics400-mvit-v1-b-stts":   "a run of kinetics400-mvit-v1-b,",
    "kinetics400-swin3d-b-stts":    "a run of kinetics400-swin3d-b,",
    "ssv2-swin3d-b-stts":           "a run of ssv2-swin3d-b ",
    "kinetics400-stts":             "a run of kinetics400.",
}
FROM_SCRATCH = {"kinetics400-mvit-v2-s", "kinetics400-mvit-v1-b"} | {
    *("kinetics400-r2plus1d-18", "kinetics400-s3d"),
}
# fmt: on

# Where nothing else is said above.
COLOURS = {"color_jitter": 0.4, "hue": 0.1, "color_probability": 0.8, "grayscale": 0.2}
NO_COLOURS = {"color_jitter": 0.0, "hue": 0.0, "color_probability": 1.0, "grayscale": 0.0}
# A crop by the reciprocal of its short side is a crop whose share of the picture is drawn evenly.
INVERSE = {"kinetics400-xvit-b16", "ssv2-mvit-v2-s"} | {name for name in PEERS if "-gta-" in name}


def recipe_of(name: str) -> Recipe:
    return load_recipe(name).recipe


def parent_of(name: str) -> str | None:
    parent = tomllib.loads(RECIPES[name].read_text()).get("extends")
    return parent and parent.removesuffix(".toml")


def is_peer(name: str) -> bool:
    model = recipe_of(name).model
    return not model.name.startswith("ogreg-") or bool(model.token_selection)


def test_nothing_is_left_over():
    assert set(PEERS) == {name for name in RECIPES if is_peer(name)}


@pytest.mark.parametrize("name", PEERS)
def test_name_is_data_set_model_and_selection(name):
    model, dataset = recipe_of(name).model, recipe_of(name).data.dataset
    shown = dataset if model.name == "ogreg-t" else f"{dataset}-{model.name}"
    assert name == (f"{shown}-stts" if name in SELECTIONS else shown)


@pytest.mark.parametrize("name", PEERS)
def test_protocol(name):
    recipe = recipe_of(name)
    model, data, change, train = recipe.model, recipe.data, recipe.augment, recipe.train
    found = Peer(
        net=Net(model.name, recipe.init.weights, model.drop_path, model.dropout, model.options),
        views=Views(
            *(data.sampling, data.frames, data.stride, data.fps),
            *(recipe.eval.clips, recipe.eval.crops, data.short_side, data.size),
        ),
        change=Change(
            *(change.crop, change.short_side, change.flip, change.rand_augment, change.erasing),
            *(train.label_smoothing, change.mixup, change.cutmix, change.repeats),
        ),
        steps=Steps(
            *(train.optimizer, train.lr, train.batch_size, train.reference_batch, train.epochs),
            *(train.warmup_epochs, train.weight_decay, train.clip_grad, train.min_lr),
            *(train.backbone_lr, train.head_lr),
        ),
    )
    assert found == PEERS[name]


@pytest.mark.parametrize("name", PEERS)
def test_what_all_or_whole_families_share(name):
    recipe = recipe_of(name)
    change, train = recipe.augment, recipe.train
    colours = COLOURS if "focalnet" in name else NO_COLOURS
    assert {key: getattr(change, key) for key in colours} == colours
    assert change.scale == [0.08, 1.0]
    assert change.ratio == pytest.approx([3 / 4, 4 / 3], abs=1e-4)
    assert (change.mix_probability, change.mix_switch) == (1.0, 0.5)
    assert change.inverse == (name in INVERSE)
    clamps = recipe.data.sampling == "dense" and name.split("-")[1] in ("mvit", "xvit")
    assert recipe.data.short == ("clamp" if clamps else "loop")
    assert (train.lr_scaling, train.momentum, train.layer_decay) == ("linear", 0.9, 1.0)
    assert train.accumulate == (8 if "swin3d-b-stts" in name else 1)
    assert (train.ema, train.precision) == (0.0, "auto")
    assert recipe.data.val_split == ("test" if name.startswith("diving48") else "val")


@pytest.mark.parametrize("name", PEERS)
def test_token_selection(name):
    selection = recipe_of(name).model.token_selection
    if name not in SELECTIONS:
        assert not selection
        return
    found = (
        [(keep.before, keep.ratio) for keep in selection.time],
        [(keep.before, keep.ratio) for keep in selection.space],
        selection.sigma,
        selection.gradient,
    )
    assert found == SELECTIONS[name]
    assert selection.samples == 500


@pytest.mark.parametrize("name", RATES)
def test_rate_of_a_step_is_the_published_one(name):
    recipe = recipe_of(name)
    assert optim_of(recipe, recipe.train.batch_size).lr == pytest.approx(RATES[name])


@pytest.mark.parametrize("gpus", [4, 16])
def test_video_focalnet_ends_at_a_hundredth_of_any_rate(gpus):
    # Their code scales the floor like the rate, 0.001 and 0.1 for 512 clips.
    train = recipe_of("kinetics400-video-focalnet-t").train
    lr, floor = (value * train.lr_factor(8 * gpus) for value in (train.lr, train.min_lr))
    assert (lr, floor) == pytest.approx((0.1 * 8 * gpus / 512, 0.001 * 8 * gpus / 512))
    assert lr * warmup_cosine(120, 20, 120, train.min_lr / train.lr) == pytest.approx(floor)
    assert lr * warmup_cosine(0, 20, 120, train.min_lr / train.lr) == pytest.approx(floor)


@pytest.mark.parametrize("name", PEERS)
def test_head_names_protocol_and_departures(name):
    text = head(name)
    title = {
        "kinetics400": "Kinetics-400",
        "ssv2": "Something-Something V2",
        "diving48": "Diving-48",
    }
    assert text.startswith(title[name.partition("-")[0]])
    assert PEERS[name].net.model in text
    assert FOLLOWS[name] in text
    if FOLLOWS[name].startswith("ours"):
        assert re.search("Nothing here is measured|not measured", text)
    # Here, or in a recipe that is named here.
    named = re.findall(r"([\w-]+)\.toml", text)
    assert any("Departures" in words for words in (text, *map(head, named)))
    if recipe_of(name).data.val_split == "test":
        assert "Validated on the test split" in text


@pytest.mark.parametrize("name", PEERS)
def test_head_tells_which_weights_to_pass(name):
    if name in PASSES:
        assert PASSES[name] in head(name)
        assert "--init-from" in head(name)
    # Nothing starts from scratch unless it was published so.
    started = bool(recipe_of(name).init.weights) or name in PASSES
    assert started != (name in FROM_SCRATCH)


@pytest.mark.parametrize("name", PEERS)
def test_a_file_says_only_what_differs(name):
    own = tomllib.loads(RECIPES[name].read_text())
    parent = own.pop("extends", None)
    before = Recipe().flat() if parent is None else recipe_of(parent.removesuffix(".toml")).flat()
    after = recipe_of(name).flat()
    said = {f"{table}.{key}" for table, keys in own.items() for key in keys}
    changed = {key for key in after if after[key] != before[key]}
    # What starts a family may repeat a default, but leaves nothing out.
    assert said >= changed if parent is None else said == changed


def test_families_extend_what_they_are_closest_to():
    roots = {name for name in PEERS if parent_of(name) is None}
    assert roots == {
        *("kinetics400-video-focalnet-t", "kinetics400-xvit-b16", "kinetics400-gta-r50-8f"),
        *("kinetics400-swin3d-t", "kinetics400-mvit-v2-s", "kinetics400-r2plus1d-18"),
    }
    for name in SELECTIONS:
        assert parent_of(name) == name.removesuffix("-stts")


def architectures() -> dict[str, str]:
    """One recipe for each network that is built, frames, size and selection included."""
    found: dict[str, str] = {}
    for name in PEERS:
        recipe = recipe_of(name)
        key = (recipe.model.name, recipe.data.frames, recipe.data.size, recipe.model.architecture())
        found.setdefault(repr(key), name)
    return found


@pytest.mark.parametrize("name", architectures().values())
def test_the_model_takes_the_clips_of_its_recipe(name):
    recipe = recipe_of(name)
    model, data = recipe.model, recipe.data
    classes = CLASSES[data.dataset]
    with torch.device("meta"), torch.no_grad():
        network = create_model(
            model.name,
            classes,
            frames=data.frames,
            size=data.size,
            drop_path=model.drop_path,
            dropout=model.dropout,
            **model.architecture(),
        )
        logits = network.eval()(torch.empty(1, 3, data.frames, data.size, data.size))
    assert logits.shape == (1, classes)


@pytest.mark.parametrize("name", PEERS)
def test_clips_and_labels_go_through_the_augmentation(name):
    recipe = recipe_of(name)
    spec = augmentation_of(recipe, {86: 87, 87: 86})
    low = spec.short_side[0] or 256
    frames = torch.randint(256, (2, 3, low, low * 4 // 3), dtype=torch.uint8)
    rng = random.Random(0)
    pairs = [augment(frames, 86, spec, rng) for _ in range(4)]
    clips = torch.stack([clip for clip, _ in pairs])
    assert clips.shape == (4, 3, 2, recipe.data.size, recipe.data.size)
    labels = torch.tensor([label for _, label in pairs])
    assert set(labels.tolist()) <= ({86, 87} if recipe.augment.flip == "swap" else {86})
    mixed, targets = mix(clips.float(), labels, 174, mixing_of(recipe), rng)
    assert mixed.shape == clips.shape
    assert torch.allclose(targets.sum(dim=1), torch.ones(4))
    if recipe.augment.mixup or recipe.augment.cutmix:
        assert not torch.equal(mixed, clips.float())


def test_rand_augment_of_mvit_is_timm_and_of_xvit_torchvision():
    mvit, xvit = parse_rand_augment(RAND7), parse_rand_augment("torchvision-n2-m9")
    assert (mvit.kind, mvit.num_ops, mvit.magnitude, mvit.noise, mvit.increasing) == (
        *("timm", 4, 7, 0.5),
        True,
    )
    assert (xvit.kind, xvit.num_ops, xvit.magnitude) == ("torchvision", 2, 9)
