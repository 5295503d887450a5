"""Conversations as text, and which characters of it the model must learn to write.

A chat template is a program; nothing says which of its output is the assistant's. Three ways, in this order:

1. ``{% generation %}`` markers in the template.
2. Prefixes: what the template writes for the first messages with a generation prompt is what the model is given, and
   what it writes for one message more is what the model must have written. Exact where both are prefixes of the whole.
3. A sentinel: the turn's content is replaced by a mark, and what stands before and after the mark must stand before
   and after the turn in the whole. Needed where a template rewrites earlier turns (drops their thinking).

Where none of them proves the place of a turn, the row is refused rather than guessed at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from finetune_api.errors import DataError
from finetune_trainer.data.formats import Record

# Used where the tokenizer has no chat template; documented in docs/data.md. Plain Jinja, for any server to read.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + '\n' }}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SENTINEL = "\ue00cturn\ue00d"
_REMEDY = "use a chat template with {% generation %} markers, or lossOn: All"

Message = dict[str, Any]
Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text. ``spans`` are what assistants wrote, end-of-turn tokens included, in order."""

    text: str
    spans: tuple[Span, ...]


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts that the tokenizer reads as one special token, longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special | {tokenizer.eos_token}, key=lambda token: (-len(token), token))


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template and finds the assistants' turns."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._names = dict(tokenizer.special_tokens_map)
        self._usual_prompt = ""
        self._is_special = "|".join(map(re.escape, special_tokens(tokenizer)))
        self._ends_special = re.compile(f"(?:{self._is_special})(\\s*)$")
        self._starts_special = re.compile(f"\\s*(?:{self._is_special})")

    def render(self, record: Record, place: str, spans_needed: bool = True) -> RenderedChat:
        """Text and spans of a row; DataError names ``place`` when the template refuses or a needed span is unproven."""
        template = self._tokenizer.get_chat_template(None, record.tools or None)
        writer = _Writer(template, record.tools, self._names, place)
        messages = record.messages
        if _GENERATION.search(template):
            text, spans = writer.write_marked(messages)
            spans = [(start, self._end_of_turn(text, start, end)) for start, end in spans if end > start]
        else:
            text = writer.write(messages)
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            found = [self._find(writer, messages, turn, text, spans_needed) for turn in turns]
            spans = [span for span in found if span is not None]
        spans = _joined(spans)
        if messages[-1]["role"] == "assistant" and (spans or spans_needed):
            if not spans:
                raise DataError(f"{place}: the chat template marks no assistant turn of this row; {_REMEDY}")
            text, spans = self._with_end_token(text, spans)
        return RenderedChat(text, tuple(spans))

    def _find(self, writer: _Writer, messages: list[Message], turn: int, text: str, needed: bool) -> Span | None:
        span = self._by_prefix(writer, messages, turn, text) or self._by_sentinel(writer, messages, turn, text)
        if span is None and needed:
            raise DataError(
                f"{writer.place}: the chat template rewrites messages[{turn}] so that its place in the text cannot be "
                f"proven; {_REMEDY}"
            )
        return span

    def _by_prefix(self, writer: _Writer, messages: list[Message], turn: int, text: str) -> Span | None:
        given = writer.try_write(messages[:turn], prompt=True) if turn else None
        through = text if turn == len(messages) - 1 else writer.try_write(messages[: turn + 1])
        if given is None or through is None or not text.startswith(through) or not through.startswith(given):
            return None
        start = len(given)
        if not self._has_prompt(writer, messages[:turn], given):  # then a header may come before the content
            found = self._by_sentinel(writer, messages, turn, text)
            if found is None:
                return None
            if text[start : found[0]].strip():
                start = found[0]
        return start, self._without_tail(text, start, len(through))

    def _has_prompt(self, writer: _Writer, messages: list[Message], given: str) -> bool:
        """Whether the template wrote a generation prompt; the usual one is remembered to save a rendering."""
        if self._usual_prompt and given.endswith(self._usual_prompt):
            return True
        self._usual_prompt = self._generation_prompt(writer, messages)
        return given != writer.try_write(messages)

    def _by_sentinel(self, writer: _Writer, messages: list[Message], turn: int, text: str) -> Span | None:
        content = messages[turn].get("content") or ""
        marked = [*messages[:turn], {**messages[turn], "content": _SENTINEL}, *messages[turn + 1 :]]
        written = writer.try_write(marked)
        if written is None or written.count(_SENTINEL) != 1:
            return None
        before, after = written.split(_SENTINEL)
        end = len(text) - len(after)
        if not (text.startswith(before) and text.endswith(after) and len(before) <= end):
            return None
        inside = text[len(before) : end]
        if not inside.strip() or inside.strip() not in content:
            return None
        start = len(before)
        prompt = self._generation_prompt(writer, messages[:turn]) if turn else ""
        if prompt and prompt in before:
            place = before.rindex(prompt) + len(prompt)
            if not re.search(self._is_special, before[place:]):
                start = place  # the model also writes what the template puts between its prompt and the content
        return start, self._end_of_turn(text, start, end)

    def _generation_prompt(self, writer: _Writer, messages: list[Message]) -> str:
        without, with_prompt = writer.try_write(messages), writer.try_write(messages, prompt=True)
        if without is None or with_prompt is None or not with_prompt.startswith(without):
            return ""
        return with_prompt[len(without) :]

    def _without_tail(self, text: str, start: int, end: int) -> int:
        """White space after the end-of-turn token is the template's, not the model's."""
        found = self._ends_special.search(text, start, end)
        return end - len(found.group(1)) if found else end

    def _end_of_turn(self, text: str, start: int, end: int) -> int:
        """Includes the end-of-turn token that follows the content."""
        if self._ends_special.search(text, start, end):
            return self._without_tail(text, start, end)
        found = self._starts_special.match(text, end)
        return found.end() if found else end

    def _with_end_token(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Appends the tokenizer's end token where the template writes none after the last turn."""
        start, end = spans[-1]
        if self._ends_special.search(text, start, end):
            return text, spans
        token = self._tokenizer.eos_token
        return text[:end] + token + text[end:], [*spans[:-1], (start, end + len(token))]


class _Writer:
    """One conversation's view of the template."""

    def __init__(self, template: str, tools: list[dict[str, Any]], names: dict[str, Any], place: str) -> None:
        self._template = template
        self._tools = tools or None
        self._names = names
        self.place = place

    def write(self, messages: list[Message], prompt: bool = False) -> str:
        try:
            return self._render(messages, add_generation_prompt=prompt)[0][0]
        except Exception as error:  # a template may raise anything: it is a program of its own
            raise DataError(
                f"{self.place}: the chat template refuses the row ({_first_line(error)}); correct the row"
            ) from error

    def try_write(self, messages: list[Message], prompt: bool = False) -> str | None:
        """None where the template refuses, which it may for a part of a conversation."""
        try:
            return self._render(messages, add_generation_prompt=prompt)[0][0]
        except Exception:
            return None

    def write_marked(self, messages: list[Message]) -> tuple[str, list[Span]]:
        """Text and the spans of its ``{% generation %}`` blocks."""
        try:
            texts, spans = self._render(messages, return_assistant_tokens_mask=True)
        except Exception as error:
            raise DataError(
                f"{self.place}: the chat template refuses the row ({_first_line(error)}); correct the row"
            ) from error
        return texts[0], spans[0]

    def _render(self, messages: list[Message], **options: bool) -> Any:
        return render_jinja_template([messages], self._tools, chat_template=self._template, **options, **self._names)


def _joined(spans: list[Span]) -> list[Span]:
    """Sorted, without overlaps."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
