"""Configs and recipes: what they refuse, in which words, and that they come back from YAML as they were."""

import copy
import itertools
import os
import re
import time
from pathlib import Path

import pytest
import yaml

from sitdist.config.experiment import Config
from sitdist.config.load import dump_yaml, load_yaml, parse
from sitdist.config.recipe import Recipe
from sitdist.config.schema import schemas_in
from sitdist.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
CONFIG = {
    "name": "tiny",
    "data": "datasets/tiny",
    "model": {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2},
    "train": {"steps": 10, "global_batch": 8},
}
RECIPE = {
    "name": "tiny",
    "image_size": 16,
    "codec": {"kind": "pca"},
    "splits": {"train": {"kind": "scene", "views": 20}},
}


def changed(values, key, value):
    """`values` with a.b.c set to a value; the value ... removes it."""
    first, _, rest = key.partition(".")
    if rest:
        return values | {first: changed(values.get(first, {}), rest, value)}
    return {k: v for k, v in (values | {first: value}).items() if v is not ...}


def refusal(schema, values):
    with pytest.raises(ConfigError) as caught:
        parse(schema, values, "file.yaml")
    message = str(caught.value)
    assert message.startswith("file.yaml: ")
    assert "\n" not in message
    return message.removeprefix("file.yaml: ")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        # unknown keys, with the nearest right one
        ("train.step", 3, "unknown key 'train.step'; did you mean 'steps'?"),
        ("train.optimizer", {"learning": 1}, "unknown key 'train.optimizer.learning'; known keys: betas, clip_norm,"),
        ("trian", {}, "unknown key 'trian'; did you mean 'train'?"),
        # wrong types: nothing is cast
        ("train.steps", "10", "train.steps = '10': input should be a valid integer"),
        ("train.steps", True, "train.steps = True: input should be a valid integer"),
        ("train.optimizer", {"betas": [0.9, "0.99"]}, "train.optimizer.betas.1 = '0.99': input should be a valid"),
        # out of range
        ("train.steps", 0, "train.steps = 0: input should be greater than 0"),
        ("flow.sigma", -0.1, "flow.sigma = -0.1: input should be greater than or equal to 0"),
        ("flow.sigma", float("nan"), "flow.sigma = nan: input should be a finite number"),
        ("train.precision", "fp8", "train.precision = 'fp8': input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        # keys that are wrong together
        ("flow", {"share_at_one": 0.7, "share_at_zero": 0.5}, "flow: share_at_one + share_at_zero is 1.2, more than 1"),
        (
            "flow",
            {"endpoint": "gaussian", "sigma": 0.1},
            "flow: the gaussian endpoint is N(0, 1) and packs no pose, but",
        ),
        (
            "flow",
            {"endpoint": "gaussian", "share_at_one": 1.0, "share_at_zero": 0.0},
            "flow: the gaussian endpoint at t = 1 alone neither renders nor reads poses; lower share_at_one",
        ),
        ("flow", {"weight_at_one": 10, "share_at_one": 0}, "flow: weight_at_one is 10, but no times are 1; raise"),
        ("flow", {"path": "vp"}, "flow: the vp path's velocity is infinite at t = 1; set both shares"),
        ("flow", {"prediction": "score"}, "flow: prediction score needs the gaussian endpoint, not 'pose', because"),
        ("flow", {"loss_weight": "velocity"}, "flow: loss_weight velocity weights the errors of x0 or the score, and"),
        (
            *("flow", {"prediction": "x0", "loss_weight": "likelihood", "share_at_zero": 0.0}),
            "flow: at t = 1 the likelihood weight is infinite; set share_at_one to 0",
        ),
        (
            *("flow", {"prediction": "x0", "loss_weight": "velocity"}),
            "flow: at t = 0 the velocity weight is infinite; set share_at_zero to 0",
        ),
        ("model", {"preset": "SiT-B/3"}, "model.preset = 'SiT-B/3': 'SiT-B/3' is not a published size; did you mean"),
        ("model.preset", "SiT-B/8", "model: preset SiT-B/8 already fixes ['depth', 'hidden_size', 'num_heads',"),
        ("model.depth", ..., "model: give preset, or all of patch_size, hidden_size, depth, num_heads; missing: "),
        ("model.num_heads", 3, "model: hidden_size 16 is no multiple of num_heads 3"),
        ("data", "a\0b", "data = 'a\\x00b': holds a NUL, which no name can have"),
        # missing
        ("train.steps", ..., "'train.steps' is missing; it is required"),
    ],
)
def test_a_wrong_config_is_one_line_with_the_key_the_value_and_the_remedy(key, value, message):
    parse(Config, CONFIG, "file.yaml")
    assert refusal(Config, changed(CONFIG, key, value)).startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image_sise", 3, "unknown key 'image_sise'; did you mean 'image_size'?"),
        (
            "splits.npz",
            {"kind": "scene", "views": 2, "foV_deg": 3},
            "unknown key 'splits.npz.foV_deg'; did you mean 'fov",
        ),
        ("codec", {"kind": "vae", "paht": "x"}, "unknown key 'codec.paht'; did you mean 'path'? (and 1 more)"),
        ("splits.train.kind", "scen", "splits.train.kind = 'scen': should be one of 'scene', 'npz', 'transforms'"),
        ("splits.train.radius", [5, 3], "splits.train: radius [5.0, 3.0] runs backwards; write [smaller, larger]"),
        ("splits", {}, "Recipe: splits has no 'train'; the pose statistics and the codec come from the training views"),
        (
            "splits.test",
            {"kind": "scene", "views": 5},
            "Recipe: splits 'train' and 'test' have the same seed 0, so the",
        ),
        ("image_size", 20, "Recipe: image_size 20 is no multiple of 8 (twice codec.patch)"),
    ],
)
def test_a_wrong_recipe_is_one_line_with_the_key_the_value_and_the_remedy(key, value, message):
    parse(Recipe, RECIPE, "file.yaml")
    assert refusal(Recipe, changed(RECIPE, key, value)).startswith(message)


def test_a_val_split_and_val_views_exclude_each_other():
    values = changed(RECIPE, "splits.val", {"kind": "scene", "views": 5, "seed": 1})
    parse(Recipe, values, "file.yaml")
    assert "both a 'val' split and val_views" in refusal(Recipe, values | {"val_views": 3})
    parse(Recipe, values | {"val_views": 0}, "file.yaml")


def test_the_gaussian_endpoint_has_sigma_one():
    flow = parse(Config, CONFIG | {"flow": {"endpoint": "gaussian"}}, "file.yaml").flow
    assert flow.sigma == 1.0
    assert flow.why_no_picture() is None
    assert "holds no pose" in (flow.why_no_pose() or "")


def test_a_changed_config_is_checked_too():
    config = parse(Config, CONFIG, "file.yaml")
    with pytest.raises(ValueError, match="greater than 0"):
        config.train.steps = -1


def test_a_preset_gives_the_published_sizes():
    model = parse(Config, CONFIG | {"model": {"preset": "SiT-XL/2"}}, "file.yaml").model
    assert model.sizes() == {"patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16}
    assert parse(Config, CONFIG, "file.yaml").model.sizes() == CONFIG["model"]


# ------------------------------------------------------------------------------------------------------- YAML files


def write(folder, text):
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml"


def test_set_changes_single_keys_with_the_types_of_yaml(tmp_path):
    path = write(tmp_path, yaml.safe_dump(CONFIG))
    optimizer = ["lr=1e-3", "betas=[0.8, 0.9]", "clip_norm=null"]
    overrides = ["train.steps=20", "data=a=b", *(f"train.optimizer.{each}" for each in optimizer)]
    config = load_yaml(Config, path, overrides)
    assert (config.train.steps, config.data) == (20, "a=b")
    assert config.train.optimizer.lr == 1e-3
    assert config.train.optimizer.betas == (0.8, 0.9)
    assert config.train.optimizer.clip_norm is None
    assert config.train.global_batch == 8  # the rest is as it was


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "--set train.steps: expected KEY=VALUE, such as --set train.steps=100"),
        ("train.stpes=3", "unknown key 'train.stpes'; did you mean 'steps'?"),
        ("name.first=x", "--set name.first=x: name is 'tiny', which has no keys below it"),
        ("train.steps=[1", "--set train.steps=[1: '[1' is not a YAML value"),
    ],
)
def test_a_wrong_set_is_named(tmp_path, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_yaml(Config, write(tmp_path, yaml.safe_dump(CONFIG)), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ndata: x\nname: b\n", r"not valid YAML: .*key 'name' is given twice .*line 3"),
        ("", r"holds NoneType, not a mapping"),
    ],
)
def test_a_file_that_is_no_config_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=r"config\.yaml: .*(" + message + ")") as caught:
        load_yaml(Config, write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"name: 2020-13-45", "'data' is missing"),  # a name like any other
        (b"seed: !!int abc", "tags, anchors and aliases are not read; write the value itself .*line 1, column 7"),
        (b"a: !!python/object/apply:os.system [touch x]", "tags, anchors and aliases are not read"),
        (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "tags, anchors and aliases are not read"),
        (b"<<: {name: a}", "unknown key '<<'"),
        (b"seed: " + b"9" * 5000, "not valid YAML: .*5000 digits"),
        (b"name: a\n? 0x" + b"f" * 100_000 + b"\n: 1", "keys should be strings|is missing"),
        (b"[" * 10_000, "nested too deeply .*column 33"),
        (b"".join(b" " * depth + b"a:\n" for depth in range(500)), "nested too deeply"),
        ("name: a".encode("utf-16"), "can't decode byte"),
        (b"\xef\xbb\xbfname: a", "'data' is missing"),  # a byte order mark
        (b'data: "\\0"\nname: a', "data = .*holds a NUL, which no name can have"),
        (b'name: "\\ud800"', "name = .*ud800': input should be a valid string"),
        (b'"\\ud800": 1', "ud800"),
        (b"name: " + b"x" * 2**20, "at most 262,144 are read"),
    ],
)
def test_yaml_that_strangers_write_is_one_short_line(tmp_path, data, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(data)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        load_yaml(Config, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 700
    assert time.monotonic() - begun < 5.0


def test_what_is_no_file_or_too_large_for_one_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**30)
    for path, message in (
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "large", "at most 262,144 are read"),
        ("a\0b", "cannot be read .*; give the path of a YAML config"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_yaml(Config, path)


def every_key(values, before=()):
    """The places of all keys and items in nested values."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from every_key(value, (*before, key))


ABSURD = [
    *(None, True, -1, 10**400, float("nan"), "", "a\0b", "\ud800", "x" * 9999, [], {}, [[]], {1: 2}, {"kind": [1]}),
    *([2, 1], list(range(1000)), {"train": []}, {"\ud800": 1}, {"x" * 9999: 1}),
]


@pytest.mark.parametrize(("schema", "values"), [(Config, CONFIG), (Recipe, RECIPE)])
def test_whatever_stands_at_a_key_is_explained(schema, values):
    """The explanation itself never fails, is one line and is short."""
    whole = parse(schema, values, "file.yaml").model_dump(mode="json")
    explained = []
    for place, absurd in itertools.product(every_key(whole), ABSURD):
        changed_values = copy.deepcopy(whole)
        inner = changed_values
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = absurd
        try:
            parse(schema, changed_values, "file.yaml")
        except ConfigError as error:
            explained.append(str(error))
    assert max(map(len, explained)) < 1000
    assert len(explained) > 10 * len(list(every_key(whole)))


def test_what_is_dumped_is_read_back_the_same(tmp_path):
    values = changed(CONFIG, "train.optimizer", {"lr": 1e-7, "betas": [0.5, 0.75], "clip_norm": None})
    config = parse(Config, changed(values, "model", {"preset": "SiT-S/4"}), "file.yaml")
    assert load_yaml(Config, write(tmp_path, dump_yaml(config))) == config
    splits = {
        "train": {"kind": "scene", "views": 20, "radius": [1, 2.5]},
        "a": {"kind": "npz", "paths": ["x", "y"], "label": 1},
        "b": {"kind": "transforms", "path": "z", "background": [0, 0.5, 1]},
    }
    recipe = parse(Recipe, RECIPE | {"splits": splits, "codec": {"kind": "vae", "path": "x/y"}}, "file.yaml")
    assert load_yaml(Recipe, write(tmp_path, dump_yaml(recipe))) == recipe


@pytest.mark.parametrize(
    "name", ["0E0", "1e5", "-1e-4", "1_0", "0x1F", "0o7", "1:30", "2020-01-01", "null", "on", "~", "=", "<<", ".inf"]
)
def test_names_that_look_like_numbers_stay_names(tmp_path, name):
    config = parse(Config, {**CONFIG, "data": name}, "test")
    assert load_yaml(Config, write(tmp_path, dump_yaml(config))) == config


def test_every_key_has_a_help():
    schemas, keys = [Config, Recipe], 0
    for schema in schemas:
        for name, field in schema.model_fields.items():
            assert (field.description or "").endswith("."), f"{schema.__name__}.{name}"
            schemas += [inner for inner in schemas_in(field.annotation) if inner not in schemas]
            keys += 1
    assert keys > 120


@pytest.mark.parametrize("folder", ["configs", "shards"])
def test_every_shipped_file_loads_under_its_own_name(folder):
    files = sorted((REPOSITORY / folder).glob("*.yaml"))
    assert len(files) >= 3
    for file in files:
        assert load_yaml(Config if folder == "configs" else Recipe, file).name == file.stem
