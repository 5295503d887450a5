"""YAML 1.2 text -> plain data with line numbers, and every reason why not. Safe by construction: no tags, no classes.

The text is composed to nodes once; scalars are resolved here, so that ``2e-4`` is a number and ``no`` is a word.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

from finetune_api.errors import Problem, SpecError
from finetune_api.introspect import Path

MAXIMUM_BYTES = 200 * 1024
MAXIMUM_DEPTH = 32
MAXIMUM_NODES = 20_000  # after aliases are expanded

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"^[-+]?(0|[1-9][0-9]*)$")
_BASED = re.compile(r"^0(x[0-9a-fA-F]+|o[0-7]+)$")
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
_CONSTANTS: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}
_SYNTAX: tuple[tuple[str, str, str], ...] = (  # part of the scanner's words, rule, remedy
    (r"'\t' that cannot start", "a tab is used for indentation", "indent with spaces"),
    ("cannot start any token", "a value starts with a character that has a meaning in YAML", "quote the value"),
    (
        "mapping values are not allowed",
        "a ': ' stands where no field can begin",
        "quote the value, or check the indentation",
    ),
    ("expected a single document", "the file holds more than one document ('---')", "keep one job per file"),
    ("undefined alias", "an alias ('*name') has no anchor", "write the value out"),
    ("expected ',' or", "a list or mapping in brackets is not closed", "add the missing ',' or closing bracket"),
    (
        "but found '<stream end>'",
        "a list or mapping in brackets is not closed",
        "add the missing ',' or closing bracket",
    ),
    ("end of stream", "a quote is not closed", "close it"),
    ("expected <block end>", "the indentation does not fit the lines above", "align the fields of one block"),
    ("could not find expected ':'", "a line is neither 'name: value' nor part of one", "add the ':' or quote the text"),
    ("expected the node content", "a bracket, comma or '-' stands where a value is expected", "quote the value"),
    ("scanning an anchor", "a value starts with '&', which has a meaning in YAML", "quote the value"),
    ("scanning an alias", "a value starts with '*', which has a meaning in YAML", "quote the value"),
    ("tag", "a value starts with '!', which has a meaning in YAML", "quote the value"),
    ("block scalar", "a value starts with '|' or '>', which has a meaning in YAML", "quote the value"),
    ("are not allowed here", "a '?' or '-' stands where no item can begin", "quote the value"),
    ("directive", "a line starts with '%', which has a meaning in YAML", "remove it"),
    ("expected '<document start>'", "the text goes on after its end", "check the brackets and the indentation"),
    ("unacceptable character", "the text holds control characters", "remove them"),
    ("special characters", "the text holds control characters", "remove them"),
    ("unknown escape character", r"a text in double quotes holds an unknown '\' escape", "use single quotes"),
)


@dataclass
class Document:
    """Plain data, the 1-based line of every path, and what was wrong with the text."""

    source: str
    data: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read_yaml(text: str | bytes, source: str) -> Document:
    """Read one YAML 1.2 (or JSON) document.

    Raises:
        SpecError: text that is no single YAML document at all; smaller trouble stands in ``Document.problems``.
    """
    from ruamel.yaml import YAML  # loaded only where text is read: the planner needs none of it
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    decoded = _decode(text, source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor that is given twice: the last one counts
            node = YAML(typ="safe", pure=True).compose(decoded)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        words = f"{error.context} {error.problem}"
        raise _syntax_error(source, words, mark.line + 1 if mark else None) from None
    except RecursionError:
        raise _refused(source, f"is nested deeper than {MAXIMUM_DEPTH} levels", "flatten it") from None
    except (YAMLError, ValueError) as error:
        raise _syntax_error(source, str(error), None) from None
    document = Document(source)
    if node is not None:
        document.data = _Builder(document).build(node, (), 0)
    return document


def _decode(text: str | bytes, source: str) -> str:
    size = len(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    if size > MAXIMUM_BYTES:
        limit = MAXIMUM_BYTES // 1024
        raise _refused(source, f"is {size // 1024} KiB and a manifest has at most {limit} KiB", "shorten it")
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise _refused(source, f"is not UTF-8 text (byte {error.start + 1})", "save it as UTF-8", line) from None


def _refused(source: str, rule: str, remedy: str, line: int | None = None) -> SpecError:
    return SpecError([Problem(source, None, rule, remedy, line)])


def _syntax_error(source: str, words: str, line: int | None) -> SpecError:
    for part, rule, remedy in _SYNTAX:
        if part in words:
            return _refused(source, rule, remedy, line)
    return _refused(source, "is not valid YAML", "check this line and the one above it", line)


class _Builder:
    """Nodes to data, noting lines and trouble on the way."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes = 0

    def build(self, node: Any, path: Path, depth: int) -> Any:
        self.nodes += 1
        line = node.start_mark.line + 1
        self.document.lines.setdefault(path, line)
        if depth > MAXIMUM_DEPTH:
            raise _refused(self.document.source, f"is nested deeper than {MAXIMUM_DEPTH} levels", "flatten it", line)
        if self.nodes > MAXIMUM_NODES:
            rule = f"holds more than {MAXIMUM_NODES} values once its aliases are expanded"
            raise _refused(self.document.source, rule, "write less, without aliases", line)
        if node.id == "mapping":
            return self._mapping(node, path, depth)
        if node.id == "sequence":
            return [self.build(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]
        return self._scalar(node, path, line)

    def _mapping(self, node: Any, path: Path, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = key.value if key.id == "scalar" and str(key.tag) == f"{_TAG}str" else None
            if name is None:
                self._key_problem(key, path, line)
                continue
            here = (*path, name)
            if name in result:
                first = self.document.lines[here]
                self._problem(here, None, f"is given twice (first on line {first})", "keep one of them", line)
                continue
            self.document.lines[here] = line
            result[name] = self.build(value, here, depth + 1)
        return result

    def _key_problem(self, key: Any, path: Path, line: int) -> None:
        if key.id == "scalar" and str(key.tag) == f"{_TAG}merge":
            self._problem(path, None, "'<<' merges are not part of YAML 1.2", "write the fields out", line)
        elif key.id == "scalar":
            self._problem(
                (*path, key.value), None, "is a field name that is not text", f"quote it: '{key.value}'", line
            )
        else:
            self._problem(path, None, "a list or mapping is used as a field name", "use plain names", line)

    def _scalar(self, node: Any, path: Path, line: int) -> Any:
        tag, text = str(node.tag), node.value
        if node.style in {"'", '"', "|", ">"} and not tag.startswith("!"):
            return text
        if not tag.startswith(_TAG):
            self._problem(path, text, f"carries the tag {tag}", "remove the tag", line)
            return text
        kind = tag.removeprefix(_TAG)
        if kind not in {"str", "int", "float", "bool", "null", "timestamp", "merge", "value"}:
            self._problem(path, text, f"carries the tag !!{kind}", "remove the tag", line)
            return text
        return self._plain(text, path, line) if kind != "str" else text

    def _plain(self, text: str, path: Path, line: int) -> Any:
        if text.lower() in _CONSTANTS and text in {text.lower(), text.upper(), text.capitalize()}:
            return _CONSTANTS[text.lower()]
        if _INTEGER.match(text):
            return int(text) if len(text) <= 40 else text
        if _BASED.match(text):
            return int(text, 0)
        if text.lower().lstrip("+-") in {".inf", ".nan"} or (_FLOAT.match(text) and math.isinf(float(text))):
            self._problem(path, text, "must be a finite number", "write a number", line)
            return 0
        return float(text) if _FLOAT.match(text) else text

    def _problem(self, path: Path, value: Any, rule: str, remedy: str, line: int) -> None:
        self.document.problems.append(Problem(spell(path) or self.document.source, value, rule, remedy, line))


def spell(path: Path) -> str:
    """A path the way a user would write it: ``spec.dataset.train[0].uri``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", part):
            text += f".{part}" if text else part
        else:
            text += f"[{part!r}]"
    return text
