"""YAML as a scientist reads it: 5e-5 is a number, and a key that is there twice is a mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class StudyError(ValueError):
    """A study file that does not say what to run. The message names the file, the key and what is near."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader follows YAML 1.1, where `5e-5` is text. And it keeps the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `StudyError` with file and line when there is none."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise StudyError(f"{path.name}{line}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path.name} must hold `key: value` lines, e.g. `study: {path.stem}`")
    return content


def parse(text: str) -> Any:
    """One YAML value, e.g. of a command line."""
    return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader: builds plain values only
