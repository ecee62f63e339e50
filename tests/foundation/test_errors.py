from __future__ import annotations

import pickle

import pytest

from longspan.engines.base import UnusableAnswer
from longspan.engines.server import ServerGone
from longspan.foundation.config import ConfigError, unknown_key
from longspan.foundation.errors import (
    DataError,
    DivergenceError,
    LongspanError,
    MachineError,
    Stopped,
    SubjectError,
    UserError,
    sendable,
)
from longspan.foundation.extras import EXTRAS, MissingExtra
from longspan.training.ranks import LostRank

WITH_ADVICE = (UserError, DataError, MachineError, UnusableAnswer, ServerGone, LostRank)
ERRORS: list[LongspanError] = [
    *(kind("heads = 3", "a divisor of 32", "use 4") for kind in WITH_ADVICE),
    *(kind("what happened") for kind in (LongspanError, SubjectError, DivergenceError, Stopped)),
    *(MissingExtra(extra) for extra in EXTRAS),
    unknown_key("training.stepz", "stepz", ["steps"]).under("study"),
]


def kinds(of: type[LongspanError]) -> set[type[LongspanError]]:
    return {of, *(each for kind in of.__subclasses__() for each in kinds(kind))}


def test_every_kind_of_error_is_tried_here() -> None:
    ours = {kind for kind in kinds(LongspanError) if kind.__module__.startswith("longspan.")}
    assert ours == {type(error) for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_say_the_same_in_another_process(error: LongspanError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert str(there) == str(error)
    assert there.exit_code == error.exit_code
    assert sendable(error) is error


def test_the_path_of_an_error_still_grows_there() -> None:
    there = pickle.loads(pickle.dumps(unknown_key("stepz", "stepz", ["steps"])))
    assert isinstance(there, ConfigError)
    assert there.under("training").given == "unknown key `training.stepz`"


class Odd(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def test_an_error_that_no_process_could_read_goes_as_what_it_says() -> None:
    assert str(sendable(Odd(1, 2))) == "Odd: 1 and 2"
