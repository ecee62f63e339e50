"""A name finds its class; one that nothing has is answered with what there is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from longspan.foundation.errors import UserError
from longspan.foundation.registry import Registry


class Animal:
    pass


def filled() -> Registry[Animal]:
    animals: Registry[Animal] = Registry("animal", names=("cat", "cow", "dog"))
    for name in ("dog", "cat"):
        animals.register(name)(type(name, (Animal,), {}))
    return animals


def test_a_name_finds_its_class() -> None:
    assert filled().find("dog").__name__ == "dog"
    assert set(filled().all()) == {"dog", "cat"}


def test_an_unknown_name_is_answered_with_all_names_and_the_nearest() -> None:
    with pytest.raises(UserError) as caught:
        filled().find("dot", "zoo")
    assert caught.value.given == "zoo: no animal is called 'dot'"
    assert caught.value.allowed == "cat, dog"
    assert caught.value.fix == "did you mean `dog`?"
    with pytest.raises(UserError, match="name one of these, or load your own file under `plugins:`"):
        filled().find("elephant")


def test_a_second_class_of_one_name_is_refused_with_the_free_names() -> None:
    with pytest.raises(UserError, match="second animal called 'dog'") as caught:
        filled().register("dog")(type("Wolf", (Animal,), {}))
    assert caught.value.allowed == "cow"
    assert caught.value.fix.endswith("test_registry.dog")


def test_a_class_may_be_registered_again() -> None:
    """As when its module is loaded a second time."""
    animals = filled()
    again = animals.register("dog")(type("dog", (Animal,), {}))
    assert animals.find("dog") is again


def test_the_modules_of_a_package_register_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "longspan_zoo"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from longspan.foundation.registry import Registry\nANIMALS = Registry('animal', package='longspan_zoo')\n"
    )
    # It asks for all while it is imported itself, with `cow` still to come.
    (package / "cat.py").write_text(
        "from longspan_zoo import ANIMALS\n@ANIMALS.register('cat')\nclass Cat: ...\nFOUND = ANIMALS.all()\n"
    )
    (package / "cow.py").write_text("from longspan_zoo import ANIMALS\n@ANIMALS.register('cow')\nclass Cow: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        animals = __import__("longspan_zoo").ANIMALS
        assert set(animals.all()) == {"cat", "cow"}
    finally:
        for name in [name for name in sys.modules if name.startswith("longspan_zoo")]:
            del sys.modules[name]
