"""Errors of configurations: the key as it is written, what is allowed in plain words, the nearest key."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, model_validator

from longspan.foundation.config import MOST_KEYS, Config, nearest, unknown_key
from longspan.foundation.errors import UserError


class Inner(Config):
    rate: float = Field(0.5, gt=0, le=1)
    mode: Literal["full", "none"] = "full"
    steps: int | None = Field(None, ge=1)


class Outer(Config):
    width: int = 8
    inner: Inner | None = Inner()
    path: Path | tuple[Path, ...] = Path(".")
    pair: tuple[float, float] = (0.0, 1.0)
    share: int | float = 1
    named: dict[str, Inner] = Field(default_factory=dict)
    flag: bool = False
    either: str | dict[str, str] = ""
    sizes: dict[int, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _nested(cls, data: dict) -> dict:
        if "nested" in data:
            return {**data, "inner": Inner.parse(data.pop("nested"), "nested")}
        return data


def refusal(data: object, where: str = "") -> UserError:
    with pytest.raises(UserError) as caught:
        Outer.parse(data, where)
    return caught.value


@pytest.mark.parametrize(
    ("data", "given", "allowed"),
    [
        ({"width": "abc"}, "width = 'abc'", "a whole number"),
        ({"width": 1.5}, "width = 1.5", "a whole number"),
        ({"inner": {"rate": -1}}, "inner.rate = -1", "a number above 0"),
        ({"inner": {"rate": 2}}, "inner.rate = 2", "a number of 1 or less"),
        ({"inner": {"rate": float("inf")}}, "inner.rate = inf", "a finite number"),
        ({"inner": {"steps": 0}}, "inner.steps = 0", "a whole number of 1 or more or null"),
        ({"inner": {"mode": "ful"}}, "inner.mode = 'ful'", "full, none"),
        ({"inner": 3}, "inner = 3", "a mapping with keys of: rate, mode, steps or null"),
        ({"path": 5}, "path = 5", "the path of a file or folder or a list, e.g. `[a, b]`"),
        ({"pair": 3}, "pair = 3", "a list, e.g. `[a, b]`"),
        ({"pair": [1, "x"]}, "pair.1 = 'x'", "a number"),
        ({"share": "x"}, "share = 'x'", "a whole number or a number"),
        ({"flag": 3}, "flag = 3", "true or false"),
        ({"pair": [1]}, "pair = [1]", "a list of at least 2"),
        ({"named": 5}, "named = 5", "a mapping, e.g. `{key: value}`"),
        ({"either": {"a": 1}}, "either.a = 1", "text"),
        ({"either": 5}, "either = 5", "text or a mapping, e.g. `{key: value}`"),
        ({"sizes": {"no": {"such": 1}}}, "sizes.no = 'no'", "a whole number"),
        ({"width": True}, "width = true", "a number, not true or false"),
        ({"share": False}, "share = false", "a number, not true or false"),
        ({"inner": {"rate": True}}, "inner.rate = true", "a number, not true or false"),
        ({"inner": {"steps": True}}, "inner.steps = true", "a number, not true or false"),
        ({"pair": [0.5, True]}, "pair = [0.5, True]", "a number, not true or false"),
        ({"named": {"a": {"rate": True}}}, "named.a.rate = true", "a number, not true or false"),
        ({"named": {"a": {"rate": None}}}, "named.a.rate = null", "a number"),
    ],
)
def test_a_wrong_value_is_explained_without_the_words_of_the_library(data, given, allowed):
    error = refusal(data)
    assert (error.given, error.allowed) == (given, allowed)
    assert "Input" not in str(error)
    assert "pydantic" not in str(error)


def test_the_path_begins_with_what_the_section_is_called():
    assert refusal({"inner": {"rate": -1}}, "model").given == "model.inner.rate = -1"


def test_a_configuration_inside_a_validator_keeps_its_whole_path():
    error = refusal({"nested": {"rate": -1}}, "model")
    assert error.given == "model.nested.rate = -1"
    assert error.fix == "change `model.nested.rate`"


def test_an_unknown_key_names_the_nearest_one():
    error = refusal({"inner": {"rat": 1}})
    assert error.given == "unknown key `inner.rat`"
    assert error.allowed == "mode, rate, steps"
    assert error.fix == "did you mean `rate`?"


def test_many_allowed_keys_are_not_listed():
    keys = [f"key_{number}" for number in range(MOST_KEYS + 1)]
    error = unknown_key("kay_3", "kay_3", keys)
    assert "key_3" in error.allowed
    assert len(error.allowed) < 120
    assert "docs/write-a-study.md" in error.allowed


KEYS = ("tied", "tokens", "peak_lr", "heads", "norm_eps", "match", "batch_tokens", "dedup", "splits", "none", "nope")


@pytest.mark.parametrize("word", ["distributed", "nonsense", "dump", "plugins", "epochs", "rate_of_learning", "x", ""])
def test_a_word_that_is_near_no_key_gets_no_suggestion(word):
    assert nearest(word, KEYS) == []
    assert "did you mean" not in unknown_key(word, word, KEYS).fix


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("tokns", "tokens"), ("Tokens", "tokens"), ("tide", "tied"), ("lr", "peak_lr"), ("batch", "batch_tokens"),
        ("num_heads", "heads"), ("norm", "norm_eps"), ("mtach", "match"), ("non", "none"),
    ],
)  # fmt: skip
def test_a_misspelt_begun_or_partial_key_is_suggested_first(word, meant):
    assert nearest(word, KEYS)[0] == meant


def test_a_misspelt_choice_names_the_nearest_one():
    assert refusal({"inner": {"mode": "ful"}}).fix == "did you mean `full`?"


def test_a_list_where_one_value_belongs_says_how_to_vary_it():
    assert refusal({"width": [8, 16]}).fix == "give one value, or make a subject of each with `vary.width=[...]`"
