from __future__ import annotations

import re
import subprocess
import sys

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st

from ogreg_core.errors import UsageError
from ogreg_core.recipe import Recipe, builtin_recipes, load_recipe, parse_model_options


def problems(*overrides, recipe="demo") -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe, overrides)
    return caught.value.why


def test_needs_no_torch():
    code = (
        "import sys; from ogreg_core.recipe import load_recipe; load_recipe('demo'); "
        "assert not {'torch', 'numpy', 'decord'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", builtin_recipes())
def test_built_in_recipes_validate_and_round_trip(name, tmp_path):
    loaded = load_recipe(name)
    copy = tmp_path / "copy.toml"
    copy.write_text(loaded.recipe.to_toml())
    assert load_recipe(str(copy)).recipe == loaded.recipe
    assert load_recipe(str(copy)).recipe.sha256 == loaded.recipe.sha256
    annotated = tmp_path / "annotated.toml"
    annotated.write_text(loaded.annotated())
    assert load_recipe(str(annotated)).recipe == loaded.recipe


def test_names_and_paths_find_the_same_recipe(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = ("demo", "demo.toml", "recipes/demo", "recipes/demo.toml")
    assert len({load_recipe(name).recipe.sha256 for name in names}) == 1
    with pytest.raises(UsageError, match="no recipe nothing"):
        load_recipe("nothing.toml".removesuffix(".toml"))
    with pytest.raises(UsageError, match=r"no recipe demo\.json"):
        load_recipe("demo.json")
    with pytest.raises(UsageError) as caught:
        load_recipe("recipes/dmeo.toml")
    assert "'demo'" in caught.value.why


def test_overrides_follow_toml_and_the_schema():
    recipe = load_recipe(
        "demo",
        [
            "train.lr=5e-4",
            "train.epochs=3",
            "data.root=/some where/else",
            "data.dataset=2024-01-01",
            "data.sampling=dense",
            "augment.scale=[0.5, 1.0]",
            "model.name=ogreg-t",
            "model.options.stem=patch",
            "model.options.strides=[2,2,2,1]",
        ],
    ).recipe
    assert recipe.train.lr == 5e-4
    assert recipe.train.epochs == 3
    assert recipe.data.root == "/some where/else"
    assert recipe.data.dataset == "2024-01-01"
    assert recipe.data.sampling == "dense"
    assert recipe.model.options == {"strides": [2, 2, 2, 1], "stem": "patch"}


def test_overrides_win_over_flags():
    loaded = load_recipe("demo", ["seed=5"], ["seed=3", "init.weights=x"])
    assert loaded.recipe.seed == 5
    assert loaded.origins["seed"] == "override"
    assert loaded.origins["init.weights"] == "flag"


def test_model_options_from_the_command_line():
    assert parse_model_options("ogreg-n", ["stem=patch", "strides=[2,2,1,1]"]) == {
        "stem": "patch",
        "strides": [2, 2, 1, 1],
    }
    assert parse_model_options("ogreg-n", []) == {}
    with pytest.raises(UsageError, match="key=value"):
        parse_model_options("ogreg-n", ["stem"])
    with pytest.raises(UsageError, match="no option"):
        parse_model_options("ogreg-n", ["x=1"])


def test_an_integer_will_do_for_a_float():
    assert load_recipe("demo", ["train.lr=1"]).recipe.train.lr == 1.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", "did you mean 'train.lr'?"),
        ("epochs=1", "did you mean 'train.epochs'?"),
        ("train.epochs=1.5", "train.epochs"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=0", "train.epochs"),
        ("train.lr=.5x", "train.lr"),
        ("data.sampling=densse", "data.sampling"),
        ("model.name=ogreg_t", "did you mean 'ogreg-t'?"),
        ("model.options.stm=patch", "did you mean 'stem'?"),
        ("model.options.stem=patsch", "one of conv, patch"),
        ("model.options.strides=[4,2,1]", "4 positive integers"),
        ("augment.scale=[1.0, 0.5]", "scale must be"),
        ("augment.scale=[1.0]", "augment.scale"),
        ("data.size=512", "smaller than size"),
        ("eval.crops=2", "eval.crops"),
        ("train", "key=value"),
        ("seed.x=1", "seed"),
        ("train.precision=fp8", "train.precision"),
    ],
)
def test_each_mistake_is_named(override, words):
    assert words in problems(override)


def test_all_problems_at_once():
    text = problems("train.lrr=1", "data.siz=3")
    assert "train.lrr" in text
    assert "data.siz" in text
    text = problems("train.epochs=0", "train.batch_size=-1")
    assert "train.epochs" in text
    assert "train.batch_size" in text


@given(st.text(max_size=30))
def test_any_override_is_taken_or_refused_with_a_sentence(text):
    try:
        load_recipe("demo", [text])
        refused = None
    except UsageError as error:
        refused = error
    assert refused is None or refused.why


class TestFiles:
    def test_extends_merges_and_remembers_origins(self, tmp_path):
        (tmp_path / "base.toml").write_text("seed = 3\n[train]\nepochs = 7\nlr = 0.5\n")
        (tmp_path / "child.toml").write_text('extends = "base.toml"\n[train]\nlr = 0.25\n')
        loaded = load_recipe(str(tmp_path / "child.toml"), ["data.frames=4"])
        assert (loaded.recipe.seed, loaded.recipe.train.epochs, loaded.recipe.train.lr) == (
            3,
            7,
            0.25,
        )
        assert loaded.origins["train.epochs"] == "base.toml"
        assert loaded.origins["train.lr"] == "child.toml"
        assert loaded.origins["data.frames"] == "override"
        text = loaded.annotated()
        assert "lr = 0.25  # child.toml" in text
        assert "batch_size = 8  # built-in" in text
        assert tomllib.loads(text)["train"]["epochs"] == 7

    def test_circles_and_broken_files(self, tmp_path):
        (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
        (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
        with pytest.raises(UsageError, match="extends itself"):
            load_recipe(str(tmp_path / "a.toml"))
        (tmp_path / "c.toml").write_text('extends = "none.toml"\n')
        with pytest.raises(UsageError, match="cannot be read"):
            load_recipe(str(tmp_path / "c.toml"))
        (tmp_path / "d.toml").write_text("[train\n")
        with pytest.raises(UsageError, match="not valid TOML"):
            load_recipe(str(tmp_path / "d.toml"))
        (tmp_path / "e.toml").write_bytes(b"\xff\xfe")
        with pytest.raises(UsageError, match="cannot be read"):
            load_recipe(str(tmp_path / "e.toml"))
        (tmp_path / "f.toml").write_text("extends = 3\n")
        with pytest.raises(UsageError, match="path of one recipe"):
            load_recipe(str(tmp_path / "f.toml"))

    def test_hash_sees_every_value(self):
        base = Recipe()
        assert base.sha256 == Recipe().sha256
        assert base.sha256 != load_recipe("demo").recipe.sha256
        assert load_recipe("demo", ["seed=1"]).recipe.sha256 != load_recipe("demo").recipe.sha256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["augment.mixup=inf"], "mixup"),
        (["train.lr=inf"], "lr"),
        (["data.stride=4"], "stride has no effect"),
        (["data.fps=30.0"], "fps has no effect"),
        (['data.short="clamp"'], "short has no effect"),
        (["augment.color_jitter=0.0", "augment.color_probability=0.5"], "no effect without"),
        (["augment.mix_switch=0.3", "augment.mixup=0.2"], "no effect unless"),
        (["augment.mix_probability=0.3"], "no effect without mixup"),
        (["augment.crop=random", "augment.short_side=[80,90]"], "scale has no effect"),
        (["augment.crop=random"], "needs a short_side"),
        (["augment.inverse=true"], "needs a short_side with a range"),
        (["augment.short_side=[40,50]"], "smaller than data.size"),
        (["augment.short_side=[90,80]"], "low <= high"),
        (["augment.rand_augment=rand-x9"], "rand_augment|rand-m"),
        (["augment.mixup=0.2", "train.batch_size=1"], "two clips"),
        (["train.min_lr=1.0"], "above lr"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_contradicts_itself_or_does_nothing_is_refused(changes, words):
    with pytest.raises(UsageError) as caught:
        load_recipe("demo", changes)
    assert re.search(words, caught.value.why)


def test_repetitions_of_an_experiment_have_one_hash():
    def digest(*overrides):
        return load_recipe("demo", overrides).recipe.experiment_sha256

    plain = digest()
    assert (
        digest("seed=3", "data.root=elsewhere", "train.checkpoint_stages=[1]", "train.accumulate=2")
        == plain
    )
    assert digest("train.lr=2e-3") != plain
    assert digest("data.frames=8") != plain


def test_learning_rates_follow_the_batch():
    def factor(*overrides):
        table = load_recipe("demo", ["train.reference_batch=64", *overrides]).recipe.train
        return table.lr_factor(16)

    assert load_recipe("demo").recipe.train.lr_factor(128) == 1
    assert factor() == 0.25
    assert factor("train.lr_scaling=sqrt") == 0.5
    assert factor("train.lr_scaling=none") == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.accumulate=3", "not a multiple of accumulate 3"),
        ("train.lr_scaling=sqrt", "lr_scaling has no effect without reference_batch"),
        ("train.momentum=0.5", "momentum has no effect"),
        ("train.ema=1.0", "train.ema"),
        ("train.layer_decay=0.0", "train.layer_decay"),
        ("train.checkpoint_stages=[0]", "train.checkpoint_stages"),
        ("train.precision=int8", "train.precision"),
    ],
)
def test_training_keys_that_make_no_sense_are_refused(override, words):
    with pytest.raises(UsageError) as caught:
        load_recipe("demo", [override])
    assert words in caught.value.why


KEEP_HALF = "model.token_selection.time=[{before=1, ratio=0.5}]"


def test_token_selection_becomes_arguments_of_the_model():
    recipe = load_recipe("demo", [KEEP_HALF, "model.token_selection.sigma=0.2"]).recipe
    arguments = recipe.model.architecture()
    assert arguments.pop("token_selection") == {
        "time": [{"before": 1, "ratio": 0.5}],
        "space": [],
        "sigma": 0.2,
        "samples": 500,
        "gradient": "unbiased",
    }
    assert arguments == load_recipe("demo").recipe.model.architecture()
    assert Recipe.model_validate(tomllib.loads(recipe.to_toml())) == recipe
    assert recipe.experiment_sha256 != load_recipe("demo").recipe.experiment_sha256


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.token_selection.sigma=0.2"], "has no effect without time or space"),
        (["model.token_selection.time=[{before=1, ratio=1.5}]"], "less than or equal to 1"),
        (["model.token_selection.time=[{before=1, keep=0.5}]"], "keep"),
        (["model.name=mvit-v2-s", "model.options={}", KEEP_HALF], "no place for token_selection"),
        (["model.gta.stages=[2]", KEEP_HALF], "do not go together"),
        (["model.gta.options={regions=0}"], "has no effect without stages"),
        (["model.gta.stages=[2]", "model.gta.options={region=0}"], "did you mean 'regions'"),
        (["model.gta.stages=[2]", "model.gta.options={heads=-1}"], "not negative"),
        (["model.gta.stages=[0]"], "greater than 0"),
    ],
)
def test_extensions_of_a_model_that_make_no_sense_are_refused(overrides, words):
    assert words in problems(*overrides)
