"""The part of YAML that config/deploy is written in, read strictly; what is not of it is an error.

Mappings, sequences, plain, quoted and block (``|``) scalars, sequences in
brackets, comments, several documents. A parser of all of YAML would be one
more library to install for three files.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

_KEY = re.compile(r"([A-Za-z0-9_./-]+):(?: (.*))?")
_PLAIN = re.compile(r"[A-Za-z0-9/._:@-][^#:{}\[\]&*!|>%`\"']*(?::[^ #]+)*")


class YamlError(Exception):
    """Where it is, and what is wrong."""


class _Line(NamedTuple):
    number: int
    indent: int
    text: str
    """Without the indentation; empty for comments and blank lines."""
    raw: str


def parse(text: str) -> list[Any]:
    """Every document."""
    documents: list[list[_Line]] = [[]]
    for number, raw in enumerate(text.splitlines(), 1):
        if raw == "---":
            documents.append([])
            continue
        if "\t" in raw or raw != raw.rstrip():
            raise YamlError(f"line {number}: a tab, or a blank at the end")
        text_ = raw.lstrip(" ")
        shown = "" if text_.startswith("#") else text_
        documents[-1].append(_Line(number, len(raw) - len(text_), shown, raw))
    return [_Reader(lines).document() for lines in documents if any(line.text for line in lines)]


class _Reader:
    def __init__(self, lines: list[_Line]) -> None:
        self._lines = lines
        self._at = 0

    def document(self) -> Any:
        value = self._block(0)
        left = self._peek()
        if left is not None:
            raise YamlError(f"line {left.number}: indented as nothing before it")
        return value

    def _peek(self) -> _Line | None:
        while self._at < len(self._lines) and not self._lines[self._at].text:
            self._at += 1
        return self._lines[self._at] if self._at < len(self._lines) else None

    def _block(self, indent: int) -> Any:
        line = self._peek()
        if line is None or line.indent < indent:
            raise YamlError("a key without a value")
        return self._sequence(line.indent) if line.text.startswith("- ") else self._mapping(line.indent)

    def _sequence(self, indent: int) -> list[Any]:
        found = []
        while (line := self._peek()) is not None and line.indent == indent and line.text.startswith("- "):
            inner = line.text[2:]
            if _KEY.fullmatch(inner):  # a mapping that begins behind the dash
                self._lines[self._at] = line._replace(indent=indent + 2, text=inner)
                found.append(self._mapping(indent + 2))
            else:
                self._at += 1
                found.append(self._value(inner, line))
        return found

    def _mapping(self, indent: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while (line := self._peek()) is not None and line.indent == indent:
            match = _KEY.fullmatch(line.text)
            if match is None:
                raise YamlError(f"line {line.number}: no key: {line.text}")
            key, rest = match.groups()
            if key in found:
                raise YamlError(f"line {line.number}: {key} stands there twice")
            self._at += 1
            found[key] = self._value(rest, line) if rest else self._block(indent + 1)
        return found

    def _value(self, text: str, line: _Line) -> Any:
        if text == "|":
            return self._literal(line.indent)
        if text[0] in '["':
            return json.loads(text)
        if text in {"true", "false"}:
            return text == "true"
        if re.fullmatch(r"-?[0-9]+", text):
            return int(text)
        if _PLAIN.fullmatch(text) is None:
            raise YamlError(f"line {line.number}: quote this: {text}")
        return text

    def _literal(self, indent: int) -> str:
        taken: list[str] = []
        depth = 0
        while self._at < len(self._lines):
            raw = self._lines[self._at].raw
            if raw:
                here = len(raw) - len(raw.lstrip(" "))
                depth = depth or here
                if here <= indent:
                    break
            taken.append(raw[depth:])
            self._at += 1
        return "\n".join(taken).rstrip("\n") + "\n"
