"""The model's tokenizer: loading it, checking it against the model, turning records into token ids and loss masks."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.errors import DataError, ModelError
from finetune_api.spec import DataFormat, LossOn
from finetune_trainer.data.chat import DEFAULT_CHAT_TEMPLATE, ChatRenderer, Span, special_tokens
from finetune_trainer.data.formats import Record

_TEXT_PROMPT_TOKENS = 32  # of a Text row, when it serves as a sample of the report
_PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@dataclass(frozen=True)
class Encoded:
    """One sample. ``mask`` says which tokens carry loss; the first never does, for nothing predicts it."""

    ids: NDArray[np.int32]  # (T,)
    mask: NDArray[np.uint8]  # (T,)
    prompt_tokens: int  # before the last completion: what a sample of the report is answered from
    straddling: bool  # a token reaches over the start of a completion and therefore carries no loss


@dataclass(frozen=True)
class TokenizerFacts:
    """What ``check_tokenizer`` found. End tokens are what a completion ends with."""

    end_of_text: int  # id, ends Text and PromptCompletion rows
    end_of_turn: int | None  # id, ends assistants' turns of Messages rows; None: no such rows
    chat_template: str  # "tokenizer" or "default"
    bos: str  # text put before Text and PromptCompletion rows, as the tokenizer itself would; "" if it adds none


def load_tokenizer(model_directory: Path, label: str | None = None) -> Any:
    """The tokenizer in ``model_directory``, with the default chat template where it has none.

    Raises:
        ModelError: there is no tokenizer, or it cannot say which characters a token covers.
    """
    from transformers import AutoTokenizer

    label = label or str(model_directory)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_directory), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
        raise ModelError(
            f"{label}: no tokenizer can be loaded ({reason}); put tokenizer.json beside config.json"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{label}: the tokenizer has no tokenizer.json, so tokens cannot be traced to text; convert it"
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    return tokenizer


def check_tokenizer(
    tokenizer: Any, model_directory: Path, formats: Collection[DataFormat] = tuple(DataFormat), label: str | None = None
) -> TokenizerFacts:
    """Compares the tokenizer with the model and proves that the end tokens of these formats can be learned.

    Raises:
        ModelError: no end token, more tokens than the model has embeddings, or generation would not stop at the
            token that training ends with.
    """
    label = label or str(model_directory)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            f"{label}: the tokenizer has no eos_token, so the model could never learn to stop; "
            "add one to tokenizer_config.json"
        )
    if tokenizer.encode(tokenizer.eos_token, add_special_tokens=False) != [eos]:
        raise ModelError(
            f"{label}: the tokenizer splits its own eos_token {tokenizer.eos_token!r}; "
            "add it to added_tokens of tokenizer.json"
        )
    config = _read_json(model_directory / "config.json")
    vocabulary = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    largest = max(tokenizer.get_vocab().values()) + 1
    if vocabulary is not None and largest > vocabulary:
        raise ModelError(
            f"{label}: the tokenizer has {largest} tokens but the model has embeddings for {vocabulary}; "
            "use the tokenizer that belongs to the model, or resize its embeddings"
        )
    default = tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
    turn = _end_of_turn(tokenizer, label) if DataFormat.MESSAGES in formats else None
    ends = _generation_ends(model_directory, config)
    if turn is not None:
        _check_generation_stops(tokenizer, turn, "turns", ends, label)
    if set(formats) - {DataFormat.MESSAGES}:
        _check_generation_stops(tokenizer, eos, "texts", ends, label)
    return TokenizerFacts(eos, turn, "default" if default else "tokenizer", _bos(tokenizer))


def _end_of_turn(tokenizer: Any, label: str) -> int:
    """Id of the token that the mask of a probe conversation ends with."""
    try:
        chat = ChatRenderer(tokenizer).render(Record(messages=_PROBE), label)
    except DataError as error:
        raise ModelError(str(error)) from error
    encoded = _encode(tokenizer, [chat.text], [chat.spans])[0]
    last = int(np.flatnonzero(encoded.mask)[-1])
    return int(encoded.ids[last])


def _bos(tokenizer: Any) -> str:
    if tokenizer.bos_token_id is None:
        return ""
    with_special = tokenizer.encode("a", add_special_tokens=True)
    return tokenizer.bos_token if with_special[:1] == [tokenizer.bos_token_id] else ""


def _generation_ends(model_directory: Path, config: dict[str, Any]) -> list[int]:
    """``eos_token_id`` of generation_config.json, else of config.json; may be a list; empty: the model names none."""
    for settings in (_read_json(model_directory / "generation_config.json"), config):
        named = settings.get("eos_token_id")
        if named is not None:
            return list(named) if isinstance(named, list) else [named]
    return []


def _check_generation_stops(tokenizer: Any, used: int, what: str, ends: list[int], label: str) -> None:
    if ends and used not in ends:
        named = ", ".join(f"{end} ({tokenizer.convert_ids_to_tokens(end)!r})" for end in ends)
        token = tokenizer.convert_ids_to_tokens(used)
        raise ModelError(
            f"{label}: training ends {what} with token {used} ({token!r}) but generation stops at {named}; "
            f"add {used} to eos_token_id in generation_config.json"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as error:
        raise ModelError(f"{path.name}: not valid JSON; copy the file from the base model again") from error
    return value if isinstance(value, dict) else {}


class RecordEncoder:
    """Records of one format to tokens. Texts are tokenised as a whole; masks come from the offsets of the tokens."""

    def __init__(self, tokenizer: Any, facts: TokenizerFacts, kind: DataFormat, loss_on: LossOn) -> None:
        self._tokenizer = tokenizer
        self._facts = facts
        self._kind = kind
        self._loss_on = loss_on
        self._chat = ChatRenderer(tokenizer)
        self._special = re.compile("|".join(map(re.escape, special_tokens(tokenizer))))

    def render(self, record: Record, place: str) -> tuple[str, tuple[Span, ...]]:
        """The text to tokenise and the spans of it that the model must learn to write."""
        if self._kind is DataFormat.MESSAGES:
            chat = self._chat.render(record, place, spans_needed=self._loss_on is LossOn.COMPLETION)
            return chat.text, chat.spans
        if self._kind is DataFormat.PROMPT_COMPLETION:
            prompt = self._begun(record.prompt)
            text = self._ended(prompt + record.completion)
            return text, ((len(prompt), len(text)),)
        text = self._ended(self._begun(record.text))
        return text, ((0, len(text)),)

    def encode(self, rendered: Sequence[tuple[str, tuple[Span, ...]]]) -> list[Encoded]:
        """Tokenises a batch of rendered records with all cores."""
        encoded = _encode(self._tokenizer, [text for text, _ in rendered], [spans for _, spans in rendered])
        if self._kind is DataFormat.TEXT:
            encoded = [
                Encoded(one.ids, one.mask, min(_TEXT_PROMPT_TOKENS, len(one.ids) // 2), False) for one in encoded
            ]
        if self._loss_on is LossOn.ALL:
            for one in encoded:
                one.mask[1:] = 1
        return encoded

    def end_tokens(self, encoded: Encoded) -> int:
        """How many labels of a sample teach an end token."""
        end = self._facts.end_of_turn if self._kind is DataFormat.MESSAGES else self._facts.end_of_text
        return int(np.count_nonzero((encoded.ids == end) & (encoded.mask != 0)))

    def spells_special_token(self, record: Record) -> bool:
        """Whether a row's own text contains a special token, which is then read as one."""
        return any(self._special.search(text) is not None for text in record.texts())

    def _begun(self, text: str) -> str:
        return text if text.startswith(self._facts.bos) else self._facts.bos + text

    def _ended(self, text: str) -> str:
        eos: str = self._tokenizer.eos_token
        return text if text.endswith(eos) else text + eos


def _encode(tokenizer: Any, texts: list[str], spans: list[tuple[Span, ...]]) -> list[Encoded]:
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [_masked(encoding, wanted) for encoding, wanted in zip(encodings, spans, strict=True)]


def _masked(encoding: Any, spans: tuple[Span, ...]) -> Encoded:
    """A token carries loss when every character it stands for lies in one span.

    Tokenizers may leave white space out of a token's offsets, so a token is taken to begin where the one before ended.
    """
    ids = np.array(encoding.ids, dtype=np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = offsets[:, 0], offsets[:, 1]
    if len(starts):
        reached = np.maximum.accumulate(ends)
        starts = np.minimum(starts, np.concatenate([[0], reached[:-1]]))
    mask = np.zeros(len(ids), dtype=np.uint8)
    straddling = False
    for start, end in spans:
        mask[(starts >= start) & (ends <= end) & (ends > starts)] = 1
        straddling |= bool(np.any((starts < start) & (ends > start)))
    last_start = spans[-1][0] if spans else 0
    prompt_tokens = int(np.searchsorted(starts, last_start, side="left")) if spans else len(ids)
    mask[:1] = 0
    return Encoded(ids, mask, prompt_tokens, straddling)
