"""What a row means: Messages, PromptCompletion or Text; detection from the columns, validation of the values."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import Any

from finetune_api.errors import DataError
from finetune_api.spec import DataFormat, LossOn

COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.MESSAGES: ("messages",),
    DataFormat.PROMPT_COMPLETION: ("prompt", "completion"),
    DataFormat.TEXT: ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
_NEEDS = "; ".join(f"{kind} needs {' and '.join(columns)}" for kind, columns in COLUMNS.items())


@dataclass(frozen=True)
class Record:
    """A valid row. Which fields are filled depends on its format."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    prompt: str = ""
    completion: str = ""
    text: str = ""

    def answers(self) -> bool:
        """Whether an assistant speaks."""
        return any(message["role"] == "assistant" for message in self.messages)

    def texts(self) -> list[str]:
        """The row's own text, without keys and structure."""
        contents = [message.get("content") or "" for message in self.messages]
        return [*contents, self.prompt, self.completion, self.text]

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that identical content shares, whatever file it stands in and however its keys are ordered."""
        content = [self.messages, self.tools, self.prompt, self.completion, self.text]
        canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return blake2b(canonical.encode(), digest_size=16).digest()


def detect_format(columns: list[str], place: str, file_name: str) -> DataFormat:
    """The one format whose columns are all there. ``place`` names the source in the spec."""
    fitting = [kind for kind, needed in COLUMNS.items() if all(column in columns for column in needed)]
    if len(fitting) == 1:
        return fitting[0]
    found = ", ".join(columns[:12]) or "none"
    if fitting:
        named = " and ".join(fitting)
        raise DataError(f"{file_name}: the columns ({found}) fit {named}; set {place}.format to the one that is meant")
    raise DataError(f"{file_name}: no format has the columns ({found}): {_NEEDS}; rename the columns")


def parse_record(row: dict[str, Any], kind: DataFormat, loss_on: LossOn, place: str) -> Record:
    """Checks a row and takes what its format needs. ``place`` is ``file:line``.

    Raises:
        DataError: a column is absent or a value has the wrong type or is empty.
    """
    for column in COLUMNS[kind]:
        if column not in row:
            found = ", ".join(list(row)[:12]) or "none"
            raise DataError(f"{place}: no column {column}, which {kind} needs (columns: {found}); add it or set format")
    record = _PARSERS[kind](row, place)
    if kind is DataFormat.MESSAGES and loss_on is LossOn.COMPLETION and not record.answers():
        raise DataError(f"{place}: no assistant message, so there is nothing to learn; add one or set lossOn: All")
    try:
        record.digest  # noqa: B018 - computed here because it proves that the content is JSON
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: the text holds a lone surrogate (U+{ord(error.object[error.start]):04X}), "
            "which is not a character; remove it"
        ) from error
    except TypeError as error:
        raise DataError(f"{place}: a value is not JSON ({error}); write tools and tool calls as JSON") from error
    return record


def _parse_text(row: dict[str, Any], place: str) -> Record:
    return Record(text=_filled(row["text"], "text", place))


def _parse_prompt_completion(row: dict[str, Any], place: str) -> Record:
    if isinstance(row["prompt"], list):
        raise DataError(f"{place}: prompt is a list of messages; put them with the answer into one column messages")
    return Record(
        prompt=_string(row["prompt"], "prompt", place), completion=_filled(row["completion"], "completion", place)
    )


def _parse_messages(row: dict[str, Any], place: str) -> Record:
    messages = _from_json(row["messages"], "messages", place)
    if not isinstance(messages, list):
        raise DataError(f"{place}: messages must be a list of messages, not {_shown(messages)}; correct the row")
    if not messages:
        raise DataError(f"{place}: messages is empty; add a user and an assistant message or remove the row")
    checked = [_parse_message(message, f"messages[{i}]", place) for i, message in enumerate(messages)]
    return Record(messages=checked, tools=_parse_tools(row.get("tools"), place))


def _parse_message(message: Any, name: str, place: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(
            f"{place}: {name} must be an object with role and content, not {_shown(message)}; correct the row"
        )
    message = {key: value for key, value in message.items() if value is not None}  # Arrow fills absent keys with null
    role = message.get("role")
    if role not in ROLES:
        remedy = "use " + ", ".join(ROLES[:-1]) + f" or {ROLES[-1]}"
        raise DataError(f"{place}: {name}.role is {'absent' if role is None else _shown(role)}; {remedy}")
    if "content" not in message and not (role == "assistant" and message.get("tool_calls")):
        raise DataError(f"{place}: {name}.content is absent or null; give it text")
    if "content" in message:
        content = _string(message["content"], f"{name}.content", place)
        if role == "assistant" and not content.strip() and not message.get("tool_calls"):
            raise DataError(f"{place}: {name}.content of the assistant is empty; give it text or remove the row")
    return message


def _parse_tools(tools: Any, place: str) -> list[dict[str, Any]]:
    tools = _from_json(tools, "tools", place)
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{place}: tools must be a list of JSON schemas, not {_shown(tools)}; correct the row")
    return tools


def _from_json(value: Any, name: str, place: str) -> Any:
    """CSV cells, and often Parquet columns, hold nested values as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{place}: {name} is text that is not JSON, {_shown(value)}; write a JSON list") from error


def _filled(value: Any, name: str, place: str) -> str:
    text = _string(value, name, place)
    if not text.strip():
        described = "only white space" if text else "empty"
        raise DataError(f"{place}: {name} is {described}; fill it or remove the row")
    return text


def _string(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} must be a string, not {_shown(value)}; correct the value")
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


_PARSERS: dict[DataFormat, Callable[[dict[str, Any], str], Record]] = {
    DataFormat.MESSAGES: _parse_messages,
    DataFormat.PROMPT_COMPLETION: _parse_prompt_completion,
    DataFormat.TEXT: _parse_text,
}
