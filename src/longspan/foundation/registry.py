"""Classes by the names that users write: mixers, probes, tasks; those of a package, and those of a user's own files."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

from longspan.foundation.config import did_you_mean
from longspan.foundation.errors import UserError

Kind = TypeVar("Kind")
AnyClass = TypeVar("AnyClass", bound=type)


class Registry(Generic[Kind]):
    """name → class.

    Args:
        what: one of them in errors, e.g. `probe`.
        package: whose modules register theirs when they are imported; it is read at the first question. Empty: the
            package imports them itself.
        names: all names that there can be, where they are few.
    """

    def __init__(self, what: str, package: str = "", names: Iterable[str] = ()) -> None:
        self.what = what
        self._package, self._names = package, tuple(names)
        self._classes: dict[str, type[Kind]] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[AnyClass], AnyClass]:
        """Class decorator: users may write `name` for this class.

        Raises:
            UserError: another class has that name.
        """

        def add(cls: AnyClass) -> AnyClass:
            taken = self._classes.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
                free = ", ".join(each for each in self._names if each not in self._classes)
                problem = f"a second {self.what} called {name!r}"
                by = f"{taken.__module__}.{taken.__qualname__}"
                raise UserError(problem, free or "names that are free", f"rename it; {name!r} is {by}")
            self._classes[name] = cls
            return cls

        return add

    def all(self) -> Mapping[str, type[Kind]]:
        """Every class by its name."""
        if self._package and not self._complete:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            # Only now: an import may ask while the others are still to come.
            self._complete = True
        return dict(self._classes)

    def find(self, name: str, where: str = "") -> type[Kind]:
        """The class of a name.

        Args:
            name: as the user wrote it.
            where: the place in a study, for the error.

        Raises:
            UserError: no class has it; names all, and the nearest.
        """
        classes = self.all()
        if name not in classes:
            fix = "name one of these, or load your own file under `plugins:`"
            raise unknown_name(self.what, name, sorted(classes), fix, where)
        return classes[name]


def unknown_name(
    what: str, name: str, allowed: Iterable[str], otherwise: str = "name one of these", where: str = ""
) -> UserError:
    """The error for a name that nothing has: what there is, and the nearest.

    Args:
        what: what was to be named, e.g. `probe`.
        name: as the user wrote it.
        allowed: all names, in the order they are shown.
        otherwise: what to do where none is near.
        where: the place in a study; empty for none.
    """
    allowed = list(allowed)
    place = f"{where}: " if where else ""
    fix = did_you_mean(name, allowed, otherwise)
    return UserError(f"{place}no {what} is called {name!r}", ", ".join(allowed), fix)
