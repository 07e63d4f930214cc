"""The recipes that come with the package against the protocols that they say they follow.

The table is written by hand from the published configurations, not from the files: whoever changes a
protocol has to change it here too, and say so at the head of the recipe.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import tomllib

from ogreg_core.data.rand_augment import parse_rand_augment
from ogreg_core.datasets.catalogue import CATALOGUE
from ogreg_core.models.registry import MODELS
from ogreg_core.recipe import builtin_recipes, load_recipe

MEASURED = ("demo", "folder")  # from scratch on two cores; no published protocol
IMAGES = ("imagenet1k",)  # see below
DATASETS = ("kinetics400", "kinetics600", "ssv2", "diving48", "ucf101", "hmdb51")
RECIPES = builtin_recipes()


class Protocol(NamedTuple):
    model: str
    weights: str
    sampling: str
    stride: int
    clips: int
    epochs: int
    flip: str
    rand_augment: str
    erasing: float
    smoothing: float
    drop_path: float
    weight_decay: float
    lr: float
    val_split: str


T, S, B = ("ogreg-t", "swin_t"), ("ogreg-s", "swin_s"), ("ogreg-b", "swin_b")
DENSE, UNIFORM = ("dense", 2, 4), ("uniform", 1, 1)  # sampling, stride, test clips
NINE, SEVEN = "rand-m9-n4", "torchvision-n4-m7"

# fmt: off
PROTOCOLS = {
    #                                 epochs flip   RandAugment erase smooth drop  decay   lr    val
    "kinetics400":   Protocol(*T, *DENSE,   30, "random", "",    0.0,  0.0,  0.1, 0.02, 1e-3, "val"),
    "kinetics400-s": Protocol(*S, *DENSE,   30, "random", "",    0.0,  0.0,  0.1, 0.02, 1e-3, "val"),
    "kinetics400-b": Protocol(*B, *DENSE,   30, "random", "",    0.0,  0.0,  0.3, 0.05, 1e-3, "val"),
    "kinetics600":   Protocol(*T, *DENSE,   30, "random", "",    0.0,  0.0,  0.1, 0.02, 1e-3, "val"),
    "kinetics600-s": Protocol(*S, *DENSE,   30, "random", "",    0.0,  0.0,  0.1, 0.02, 1e-3, "val"),
    "kinetics600-b": Protocol(*B, *DENSE,   30, "random", "",    0.0,  0.0,  0.3, 0.05, 1e-3, "val"),
    "ssv2":          Protocol(*T, *UNIFORM, 30, "skip",   NINE,  0.25, 0.1,  0.1, 0.02, 1e-3, "val"),
    "ssv2-s":        Protocol(*S, *UNIFORM, 30, "skip",   NINE,  0.25, 0.1,  0.2, 0.02, 1e-3, "val"),
    "ssv2-b":        Protocol(*B, *UNIFORM, 60, "skip",   SEVEN, 0.25, 0.1,  0.4, 0.05, 3e-4, "val"),
    "diving48":      Protocol(*T, *UNIFORM, 30, "random", NINE,  0.25, 0.02, 0.1, 0.02, 1e-3, "test"),
    "diving48-s":    Protocol(*S, *UNIFORM, 30, "random", NINE,  0.25, 0.02, 0.2, 0.02, 1e-3, "test"),
    "diving48-b":    Protocol(*B, *UNIFORM, 30, "random", NINE,  0.25, 0.02, 0.3, 0.05, 3e-4, "test"),
    "ucf101":        Protocol(*T, *DENSE,   30, "random", "",    0.0,  0.1,  0.1, 0.02, 1e-3, "test"),
    "ucf101-s":      Protocol(*S, *DENSE,   30, "random", "",    0.0,  0.1,  0.1, 0.02, 1e-3, "test"),
    "ucf101-b":      Protocol(*B, *DENSE,   30, "random", "",    0.0,  0.1,  0.3, 0.05, 1e-3, "test"),
    "hmdb51":        Protocol(*T, *DENSE,   50, "random", "",    0.0,  0.1,  0.1, 0.02, 1e-3, "test"),
    "hmdb51-s":      Protocol(*S, *DENSE,   50, "random", "",    0.0,  0.1,  0.1, 0.02, 1e-3, "test"),
    "hmdb51-b":      Protocol(*B, *DENSE,   50, "random", "",    0.0,  0.1,  0.3, 0.05, 1e-3, "test"),
}
# fmt: on

# The same in every published row that we follow, Video-Swin's and PST's alike.
COMMON = {
    "data.frames": 32,
    "data.size": 224,
    "data.short_side": 224,
    "data.fps": 0.0,
    "data.short": "loop",
    "data.train_split": "train",
    "augment.short_side": [256, 256],
    "augment.crop": "resized",
    "augment.scale": [0.08, 1.0],
    "augment.ratio": [0.75, 1.3333],
    "augment.color_jitter": 0.0,
    "augment.hue": 0.0,
    "augment.grayscale": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
    "augment.repeats": 1,
    "model.dropout": 0.5,
    "model.options": {"stem": "patch"},
    "train.batch_size": 64,
    "train.warmup_epochs": 2.5,
    "train.min_lr": 0.0,
    "train.backbone_lr": 0.1,
    "train.head_lr": 1.0,
    "train.layer_decay": 1.0,
    "train.reference_batch": 64,
    "train.accumulate": 1,
    "train.ema": 0.0,
    "train.clip_grad": 5.0,
    "eval.crops": 3,
    "eval.every": 5,
}

# What size s and b may change of size t, and do.
SIZE = {"model.name", "init.weights"}
TO_B = SIZE | {"model.drop_path", "train.weight_decay"}
DIFFERENCES = {
    "kinetics400": (SIZE, TO_B),
    "kinetics600": (SIZE, TO_B),
    "ssv2": (
        SIZE | {"model.drop_path"},
        TO_B | {"train.epochs", "train.lr", "augment.rand_augment"},
    ),
    "diving48": (SIZE | {"model.drop_path"}, TO_B | {"train.lr"}),
    "ucf101": (SIZE, TO_B),
    "hmdb51": (SIZE, TO_B),
}

# Whose protocol the head must name; those without a published one are ours.
FOLLOWS = {
    "kinetics400": "the protocol of Video-Swin",
    "kinetics600": "the protocol of Video-Swin",
    "ssv2": "the protocol of PST-T",
    "ssv2-b": "the protocol of Video-Swin-B",
    "diving48": "the protocol of PST-T",
    "ucf101": "ours",
    "hmdb51": "ours",
}


def resolved(name: str) -> dict[str, object]:
    tables = load_recipe(name).recipe.model_dump()
    flat = {"seed": tables.pop("seed")}
    for table, values in tables.items():
        flat |= {f"{table}.{key}": value for key, value in values.items()}
    return flat


def is_ogreg(name: str) -> bool:
    """Whether it trains the plain OG-ReG; all others are in ``test_peer_recipes.py``."""
    model = load_recipe(name).recipe.model
    return model.name.startswith("ogreg-") and not model.token_selection


def head(name: str) -> str:
    """The comment at the top, without its marks, in one line."""
    lines = []
    for line in RECIPES[name].read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def own_keys(name: str) -> set[str]:
    values = tomllib.loads(RECIPES[name].read_text())
    values.pop("extends", None)
    return {f"{table}.{key}" for table, keys in values.items() for key in keys}


def test_every_data_set_has_three_sizes_and_nothing_is_left_over():
    wanted = {f"{dataset}{size}" for dataset in DATASETS for size in ("", "-s", "-b")}
    assert set(PROTOCOLS) == wanted
    own = {name for name in RECIPES if is_ogreg(name)}
    assert own == wanted | set(MEASURED) | set(IMAGES)


def test_the_catalogue_goes_on_with_recipes_that_exist():
    assert {entry.recipe for entry in CATALOGUE.values()} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_names_what_exists(name):
    recipe = load_recipe(name).recipe
    assert recipe.model.name in MODELS
    assert recipe.init.weights in ("", *MODELS[recipe.model.name].weights)
    if name in MEASURED:
        assert recipe.data.dataset in ("demo", "")
    else:
        assert recipe.data.dataset == name.partition("-")[0]
        assert recipe.data.dataset in CATALOGUE


@pytest.mark.parametrize("name", RECIPES)
def test_says_at_its_head_what_it_is(name):
    assert len(head(name)) > 40
    assert max(map(len, RECIPES[name].read_text().splitlines())) < 120
    # The recipes that a comment sends the reader to; "data.dataset=ucf101-2" is a data set.
    for other in re.findall(r"\b([\w-]+)\.toml|a run of ([\w-]+)", head(name)):
        assert "".join(other) in RECIPES


@pytest.mark.parametrize("name", PROTOCOLS)
def test_head_names_protocol_departures_and_model(name):
    text = head(name)
    dataset, _, size = name.partition("-")
    assert f"ogreg-{size or 't'}" in text
    assert FOLLOWS.get(name, FOLLOWS[dataset]) in text
    assert re.search(r"[Dd]epartures|Validated on the test split", text)
    if not dataset.startswith("kinetics"):
        assert "--init-from RUN" in text
    if PROTOCOLS[name].val_split == "test":
        assert re.search(r"validat\w+ on the test split", text, re.IGNORECASE)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol(name):
    values = resolved(name)
    found = Protocol(
        model=values["model.name"],
        weights=values["init.weights"],
        sampling=values["data.sampling"],
        stride=values["data.stride"],
        clips=values["eval.clips"],
        epochs=values["train.epochs"],
        flip=values["augment.flip"],
        rand_augment=values["augment.rand_augment"],
        erasing=values["augment.erasing"],
        smoothing=values["train.label_smoothing"],
        drop_path=values["model.drop_path"],
        weight_decay=values["train.weight_decay"],
        lr=values["train.lr"],
        val_split=values["data.val_split"],
    )
    assert found == PROTOCOLS[name]
    assert {key: values[key] for key in COMMON} == COMMON


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("size", [0, 1], ids=["s", "b"])
def test_sizes_differ_in_nothing_else(dataset, size):
    small, large = resolved(dataset), resolved(f"{dataset}-{'sb'[size]}")
    assert {key for key in small if small[key] != large[key]} == DIFFERENCES[dataset][size]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_file_says_only_what_differs(name):
    text = RECIPES[name].read_text()
    parent = re.search(r'^extends = "(.+)\.toml"$', text, re.MULTILINE)
    if name == "kinetics400":
        assert parent is None
        return
    before, after = resolved(parent[1]), resolved(name)
    assert own_keys(name) == {key for key in after if after[key] != before[key]}


def test_rand_augment_is_the_nearest_to_imgaug():
    # PST: two operations at level 9 of 10, always applied. timm applies half of those it draws, and
    # only its policy without "inc" has imgaug's strengths for posterize, solarize and the colours.
    pst = parse_rand_augment(NINE)
    assert (pst.kind, pst.num_ops * 0.5, pst.magnitude / 10, pst.noise) == ("timm", 2, 0.9, 0)
    assert not pst.increasing
    # Video-Swin-B on SSv2: imgaug's RandAugment(n=4, m=7), whose strengths go up to 30.
    swin = parse_rand_augment(SEVEN)
    assert (swin.kind, swin.num_ops, swin.magnitude) == ("torchvision", 4, 7)


def test_images_follow_swin():
    """Swin-T's published configuration on ImageNet-1K."""
    values = resolved("imagenet1k")
    expected = {
        "data.frames": 1,
        "data.size": 224,
        "data.short_side": 256,
        "augment.rand_augment": "rand-m9-mstd0.5-inc1",
        "augment.erasing": 0.25,
        "augment.mixup": 0.8,
        "augment.cutmix": 1.0,
        "model.name": "ogreg-t",
        "model.drop_path": 0.2,
        "train.epochs": 300,
        "train.batch_size": 1024,
        "train.reference_batch": 1024,
        "train.lr": 1e-3,
        "train.min_lr": 1e-5,
        "train.warmup_epochs": 20,
        "train.weight_decay": 0.05,
        "train.clip_grad": 5.0,
        "train.label_smoothing": 0.1,
        "eval.clips": 1,
        "eval.crops": 1,
    }
    assert {key: values[key] for key in expected} == expected
    assert "the protocol of Swin-T" in head("imagenet1k")
