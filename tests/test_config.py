"""The record of a run: it survives JSON, and what it does not know is refused."""

import json
from typing import Any

import pytest

from pipelines.config import (
    FREE_TO_CHANGE,
    RunConfig,
    changed,
    from_record,
    to_flat,
    to_record,
)
from pipelines.errors import DataError, UserError
from pipelines.recipes import RECIPES, recipe, text_tiny

KEYS = sorted(to_flat(to_record(text_tiny())))
CHANGEABLE = [key for key in KEYS if not key.endswith("kind") and key != "images.corruption"]
"""A kind decides which other keys there are, and only single rows can be corrupted."""
SECTIONS = sorted({key.rpartition(".")[0] for key in KEYS})


def leaf(record: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the innermost dictionary that a dotted key is in, and its last part."""
    *outer, name = key.split(".")
    for part in outer:
        record = record[part]
    return record, name


def tiny(key: str, value: Any) -> dict[str, Any]:
    """Return the record of the tiny recipe with one value put in."""
    record = to_record(text_tiny())
    inner, name = leaf(record, key)
    inner[name] = value
    return record


def otherwise(key: str) -> RunConfig:
    """Return the tiny recipe with another valid value for one key."""
    value = to_flat(to_record(text_tiny()))[key]
    candidates: list[Any]
    if isinstance(value, bool):
        candidates = [not value]
    elif isinstance(value, int):
        candidates = [value + 1, value - 1, value * 2, value - 2]
    elif isinstance(value, float):
        candidates = [value + 0.001, value / 2]
    elif isinstance(value, list):
        candidates = [
            [*value, "more"],
            [*value, 2.0],
            [*value[:-1], value[-1] * 0.9] if value else [],
        ]
    elif value is None:
        candidates = [0.5]
    else:
        values = ("blank-line", "cpu", "quarantine", "sentence-order", "cosine", "pieces", "single")
        candidates = [*values, f"{value}x"]
    for candidate in candidates:
        try:
            return from_record(tiny(key, candidate))
        except DataError:
            continue
    raise AssertionError(f"found no other value for {key} than {value!r}")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    config = recipe(name)
    assert config.recipe == name
    record = to_record(config)
    assert from_record(json.loads(json.dumps(record))) == config
    assert to_record(from_record(record)) == record


@pytest.mark.parametrize("key", CHANGEABLE)
def test_every_changed_value_survives_json(key: str) -> None:
    config = otherwise(key)
    assert config != text_tiny()
    assert from_record(json.loads(json.dumps(to_record(config)))) == config


@pytest.mark.parametrize("key", KEYS)
def test_an_unknown_key_is_refused_with_the_right_one(key: str) -> None:
    typo = f"{key}x"
    with pytest.raises(DataError) as refused:
        from_record(tiny(typo, 1))
    assert f"{typo}: unknown key. Did you mean {key!r}?" in str(refused.value)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_key_unlike_any_other_is_refused_at_every_level(section: str) -> None:
    key = f"{section}.zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz".removeprefix(".")
    with pytest.raises(DataError, match=rf"recorded config: {key}: unknown key"):
        from_record(tiny(key, 1))


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_refused_and_not_guessed(key: str) -> None:
    record = to_record(text_tiny())
    inner, name = leaf(record, key)
    del inner[name]
    with pytest.raises(DataError, match=rf"recorded config: .*{key}"):
        from_record(record)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "many"),
        ("steps", 2.5),
        ("steps", None),
        ("seed", [1]),
        ("name", 7),
        ("data", "corpus/*.jsonl"),
        ("data", [1]),
        ("verbose", "perhaps"),
        ("device", "tpu"),
        ("order", 4),
        ("order.slots", {}),
        ("source.heldout_ratio", "some"),
        ("source.txt_documents", "line"),
        ("objective.encoder.hidden_size", []),
        ("optimizer.learning_rate", "fast"),
        ("text.kind", "image"),
    ],
)
def test_a_wrong_type_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(DataError, match=rf"recorded config: {key}"):
        from_record(tiny(key, value))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("checkpoint_every", 0, "checkpoint_every must be at least 1"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("name", "a/../../b", r"name 'a/\.\./\.\./b': use letters"),
        ("name", ".index", r"name '\.index': use letters"),
        ("register", "a/b", r"register 'a/b': use letters"),
        ("register", "", r"register '': use letters"),
        ("workers", 0, r"workers must be in 1\.\.4, the slots of this recipe, got 0"),
        ("workers", 5, r"got 5; more workers need more --order\.slots"),
        ("weights", [1.0, 0.0], r"weights must be above 0, got \(1\.0, 0\.0\)"),
        ("weights", [-1.0], r"weights must be above 0"),
        ("weights", [float("inf")], r"weights must be above 0"),
        ("text.max_length", 64, r"64 is more than the encoder's 32; raise --objective\.encoder"),
    ],
)
def test_values_that_cannot_go_together_are_refused(key: str, value: object, said: str) -> None:
    with pytest.raises(DataError, match=said):
        from_record(tiny(key, value))


@pytest.mark.parametrize("key", CHANGEABLE)
def test_a_change_is_named_unless_it_is_free(key: str) -> None:
    before, after = text_tiny(), otherwise(key)
    old, new = (to_flat(to_record(config))[key] for config in (before, after))
    expected = [] if key in FREE_TO_CHANGE else [f"{key}: {old} -> {new}"]
    assert changed(before, after) == expected


def test_what_is_free_to_change_cannot_change_a_batch_or_a_step() -> None:
    assert set(KEYS) >= FREE_TO_CHANGE
    assert not {key.partition(".")[0] for key in KEYS if "." in key} & FREE_TO_CHANGE
    assert not {"recipe", "seed", "steps", "threads_per_worker"} & FREE_TO_CHANGE


def test_each_pattern_has_a_weight_or_none_has() -> None:
    record = tiny("data", ["a", "b"])
    assert from_record(record | {"weights": [2.0, 0.5]}).weights == (2.0, 0.5)
    with pytest.raises(DataError, match="3 weights for 2 patterns of --data"):
        from_record(record | {"weights": [2.0, 0.5, 1.0]})


def test_every_change_is_named() -> None:
    after = from_record(tiny("order.blocks_per_order", 5) | {"seed": 3, "workers": 2})
    assert changed(text_tiny(), after) == ["seed: 0 -> 3", "order.blocks_per_order: 4 -> 5"]


def test_flat_keys_are_dotted() -> None:
    assert to_flat({"a": 1, "b": {"c": {"d": 2}, "e": [3]}}) == {"a": 1, "b.c.d": 2, "b.e": [3]}


def test_an_unknown_recipe_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no recipe 'text-mimi'\. Did you mean 'text-mini'\?"):
        recipe("text-mimi")
    known = ", ".join(sorted(RECIPES))
    with pytest.raises(UserError, match=rf"no recipe 'zz'\. Known: {known}\."):
        recipe("zz")


def test_a_record_of_images_names_the_wrong_key_of_a_choice() -> None:
    record = to_record(recipe("image-tiny"))
    record["objective"]["loss"]["margn"] = record["objective"]["loss"].pop("margin")
    with pytest.raises(DataError, match=r"objective\.loss\.margn: unknown key\. Did you mean"):
        from_record(record)


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("image-tiny", "images.channels", 1, "images.channels 1 is not the encoder's 3"),
        ("image-tiny", "images.rows", "single", "contrastive needs 'pairs'"),
        ("image-tiny", "order.rows_per_step", 4, "slots of 1 row"),
        ("image-tiny", "init_from", "models:/a@b", "init_from is for text"),
        ("imagenet-vit", "images.views.size", 100, "100 is no multiple .* patches of 16"),
        ("image-tiny-autoencoder", "images.rows", "pairs", "autoencoder needs 'single'"),
        ("image-tiny-autoencoder", "images.views.size", 32, "32 is not the decoder's 16"),
    ],
)
def test_pictures_and_what_is_trained_on_them_fit(
    name: str, key: str, value: object, said: str
) -> None:
    record = to_record(recipe(name))
    inner, last = leaf(record, key)
    inner[last] = value
    with pytest.raises(DataError, match=said):
        from_record(record)


def test_another_objective_is_a_change() -> None:
    found = changed(text_tiny(), recipe("image-tiny"))
    assert "objective.kind: mlm-nsp -> contrastive" in found
    assert "objective.loss.kind: not there -> triplet" in found
