"""YAML as studies use it: a repeated key is an error, `4e-4` is a number, and errors show the line they mean."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from longspan.foundation.errors import UserError

SHOWN = 100
"""Characters of a faulty line that an error shows."""


class StudyLoader(yaml.SafeLoader):
    """YAML in which a repeated key is an error and `4e-4` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse repeated keys, where the second one stands."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                problem = f"a key that is a {type(key).__name__}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                problem = f"the key `{key}` stands twice, first on line {seen[key]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)


StudyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: with the line that is not YAML, or what the file holds instead of a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = yaml.load(text, Loader=StudyLoader)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start})", "a study file, which is text", "check the path"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        problem, fix = _explained(error)
        raise UserError(f"{path}{_place(error, text)}: {problem}{_line(error, text)}", "readable YAML", fix) from None
    if not isinstance(data, dict):
        held = "nothing" if data is None else f"a {type(data).__name__}, not a mapping"
        raise UserError(
            f"{path} holds {held}", "a mapping with `question:`, `corpus:` ...", "see docs/write-a-study.md"
        )
    return data


def read_override(text: str) -> tuple[str, Any]:
    """Key and value of `key=value`; the value is YAML.

    Raises:
        UserError: there is no `=`, or what follows is not YAML.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(
            f"override {text!r}", "key=value, e.g. training.tokens=1_000_000", "put `=` between key and value"
        )
    try:
        return key, yaml.load(value, Loader=StudyLoader)
    except (yaml.YAMLError, ValueError) as error:
        problem, _ = _explained(error)
        fix = f"""quote it for YAML and the shell: '{key}="{value}"'"""
        if "alias" in problem:
            fix = f"""quote the text for YAML inside the quotes for the shell, e.g. '{key}=["*.txt"]'"""
        elif _is_open(error):
            fix = f"quote the whole for the shell, brackets and all: '{key}=[A, B]'"
        raise UserError(f"override {text!r}: {problem}", "a YAML value after `=`", fix) from None


def _explained(error: Exception) -> tuple[str, str]:
    """What is wrong, and what to do."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split()), "mend that value"
    problem = error.problem or "not YAML"
    if "stands twice" in problem:
        return problem, "keep one of the two"
    if _is_open(error):
        where = "" if error.context_mark is None else f" of line {error.context_mark.line + 1}"
        return f"a bracket{where} is not closed, or a comma is missing before this", "close the bracket"
    if "'\\t'" in problem:
        return "a tab where the indentation should be", "indent with spaces"
    if problem.startswith("mapping values are not allowed"):
        return "a second `: ` on the line", "put text that holds `: ` in quotes"
    if "alias" in (error.context or "") or "found undefined alias" in problem:
        return "`*` begins an alias in YAML", "put the text in quotes"
    return problem, "mend that line"


def _is_open(error: Exception) -> bool:
    return isinstance(error, yaml.MarkedYAMLError) and "expected ',' or" in (error.problem or "")


def _place(error: Exception, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {min(mark.line, len(text.splitlines())) + 1}"


def _line(error: Exception, text: str) -> str:
    """The faulty line with a caret under the place, on lines of their own."""
    mark = getattr(error, "problem_mark", None)
    lines = text.splitlines()
    if mark is None or mark.line >= len(lines):
        return ""
    start = max(0, mark.column - SHOWN // 2)
    return f"\n    {lines[mark.line][start : start + SHOWN]}\n    {' ' * (mark.column - start)}^"
