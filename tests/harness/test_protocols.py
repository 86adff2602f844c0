import dataclasses

import pytest

from harness.errors import UserError
from harness.protocols import Protocol, Recipe, Sampling, built_in, count, from_dict, get_protocol, override
from harness.systems.read import get_system

MINIMAL = {
    "name": "mine", "dataset": "digits", "resolution": 8, "image_channels": 1, "num_classes": 10,
    "input_size": 8, "in_channels": 1, "samples": 500, "suite": "embedded",
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("250", 250),
        ("400k", 400_000),
        ("7M", 7_000_000),
        ("1.5k", 1500),
        ("9007199254740993", 2**53 + 1),
        ("9007199254740993k", 9007199254740993000),
    ],
)
def test_counts(text, number):
    assert count(text) == number


@pytest.mark.parametrize("text", ["", "k", "-3", "1.5", "0.0001k", "many", "nan"])
def test_what_is_no_count(text):
    with pytest.raises((ValueError, OverflowError)):
        count(text)


def test_the_paper_recipe_is_the_default():
    recipe = Recipe()
    assert (recipe.batch, recipe.learning_rate, recipe.weight_decay) == (256, 1e-4, 0.0)
    assert (recipe.ema_decay, recipe.ema_ramp, recipe.label_dropout, recipe.flip) == (0.9999, False, 0.1, True)
    assert (recipe.warmup_steps, recipe.clip_norm, recipe.diffusion_steps) == (0, 0.0, 1000)
    for name in ("imagenet-256", "imagenet-512"):
        assert get_protocol(name).recipe == recipe
        assert get_protocol(name).sampling == Sampling()
        assert get_protocol(name).samples == 50_000


@pytest.mark.parametrize("protocol", built_in(), ids=lambda protocol: protocol.name)
def test_built_in_protocols_survive_the_round_trip(protocol):
    assert isinstance(protocol, Protocol)
    assert from_dict(protocol.as_dict(), "test") == protocol


def test_a_users_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        "\n".join(f"{name} = {value!r}".replace("'", '"') for name, value in MINIMAL.items())
        + "\n[recipe]\nlearning_rate = 3e-4\n[sampling]\nsteps = [5, 9]\n"
    )
    protocol = get_protocol(str(path))
    assert protocol.recipe.learning_rate == 3e-4
    assert protocol.sampling.steps == (5, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": {"learning_rat": 1}}, "unknown item 'learning_rat'; did you mean learning_rate"),
        ({"samples": "many"}, "samples = 'many' must be of type int"),
        ({"samples": True}, "must be of type int"),
        ({"space": "voxels"}, "'voxels' is not one of pixels, latents"),
        ({"input_size": 16}, "must equal"),
        ({"sampling": {"label_policy": "sorted"}}, "unknown label_policy 'sorted'"),
        ({"recipe": {"batch": 0}}, "batch must be positive"),
        ({"recipe": 3}, "must be a table"),
        ({"name": "a\0b"}, "must be printable text"),
        ({"name": " "}, "must be printable text"),
        ({"name": "x" * 101}, "at most 100 characters"),
        ({"samples": 10**30}, "samples = 10+ is out of range"),
        ({"recipe": {"learning_rate": 10**400}}, r"learning_rate = 10+\.\.\. is out of range"),
        ({"recipe": {"steps": 10**400}}, r"steps = 10+\.\.\. is out of range"),
        ({"sampling": {"eta": 3.0}}, r"eta must lie in \[0, 1\], not 3"),
        ({"sampling": {"seed": -1}}, "seed must not be negative"),
    ],
)
def test_mistakes_in_a_protocol_are_named(change, message):
    with pytest.raises(UserError, match=message):
        from_dict({**MINIMAL, **change}, "mine.toml")


def test_a_missing_item_is_named():
    with pytest.raises(UserError, match=r"mine.toml: samples is missing"):
        from_dict({name: value for name, value in MINIMAL.items() if name != "samples"}, "mine.toml")


@pytest.mark.parametrize("data", [["d"], "digits", [["name", "digits"]], None])
def test_what_is_no_table_in_a_run_file_is_named(data):
    with pytest.raises(UserError, match="run.json: a protocol is a table of items, not "):
        from_dict(data, "run.json")


def test_files_that_are_no_toml(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        get_protocol(str(tmp_path / "absent.toml"))
    path = tmp_path / "broken.toml"
    for text in ("name = ", "a = " + "9" * 10_000, "a = " + "[" * 100_000):
        path.write_text(text)
        for load in (get_protocol, get_system):
            with pytest.raises(UserError, match="not valid TOML"):
                load(str(path))


def test_every_recipe_item_can_be_overridden_from_text():
    recipe = Recipe(ema_widths="0.1")  # without them there are no ema_snapshots
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        word = {"ema_widths": "0.05:0.2", "objective": "x0", "auxiliary": "repa:none:blocks.0"}.get(item.name, "cosine")
        text = {bool: "false", int: "17", float: "0.5", str: word}[type(value)]
        changed = override(recipe, {item.name: text})
        assert getattr(changed, item.name) == {bool: False, int: 17, float: 0.5, str: word}[type(value)]
    with pytest.raises(UserError, match="did you mean learning_rate"):
        override(recipe, {"lerning_rate": "1"})
    with pytest.raises(UserError, match="cannot be read as float"):
        override(recipe, {"learning_rate": "fast"})
