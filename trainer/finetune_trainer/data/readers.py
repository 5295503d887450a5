"""Rows of a file, one at a time: JSONL (plain, gzip, Zstandard), CSV, Parquet, Arrow. No file is held as a whole."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import zstandard

from finetune_api.errors import DataError

Row = tuple[int, dict[str, Any]]  # line (JSONL, CSV) or row number, 1-based; column values

LONGEST_LINE = 64 * 2**20  # bytes
_BATCH_ROWS = 1024
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_rows(path: Path, name: str) -> Iterator[Row]:
    """Every row of a file with its line or row number.

    Raises:
        DataError: the file is damaged or a row is not what its kind of file promises; names ``name:line``.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{name}: the file is empty; remove it from the source or fill it")
    kind = name.lower().removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)[-1]
    reader = _READERS.get(kind, _read_jsonl)
    try:
        yield from reader(path, name)
    except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise DataError(f"{name}: the compressed file is damaged or cut off ({error}); write it again") from error
    except (pyarrow.ArrowInvalid, pyarrow.ArrowSerializationError, OSError) as error:
        if isinstance(error, PermissionError):
            raise DataError(f"{name}: the file may not be read; give the job permission to read it") from error
        detail = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{name}: the file is damaged or not a {kind} file ({detail}); write it again") from error


def _read_jsonl(path: Path, name: str) -> Iterator[Row]:
    with _open(path) as file:
        for number, text in _lines(file, name):
            if not text.strip():
                continue
            try:
                value = json.loads(text.rstrip(), parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                raise DataError(_bad_json(f"{name}:{number}", text, error)) from error
            if not isinstance(value, dict):
                raise DataError(_not_an_object(f"{name}:{number}", value))
            yield number, value


def _read_csv(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_LINE)
    with _open(path) as file:
        reader = csv.reader((text for _, text in _lines(file, name)), strict=True)
        try:
            header = next(reader, [])
            repeated = sorted({column for column in header if header.count(column) > 1})
            if repeated:
                raise DataError(f"{name}:1: the column {repeated[0]} stands twice in the header; rename one")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{name}:{reader.line_num}: {len(cells)} cells, but the header has {len(header)} columns; "
                        "quote cells that hold commas, or remove the row"
                    )
                yield reader.line_num, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise DataError(f"{name}:{reader.line_num}: not valid CSV ({error}); correct the quoting") from error


def _read_parquet(path: Path, _: str) -> Iterator[Row]:
    file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    yield from _number(file.iter_batches(batch_size=_BATCH_ROWS))


def _read_arrow(path: Path, _: str) -> Iterator[Row]:
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
        else:
            source.seek(0)
            batches = iter(pyarrow.ipc.open_stream(source))
        yield from _number(part for batch in batches for part in _slices(batch))


def _slices(batch: pyarrow.RecordBatch) -> Iterator[pyarrow.RecordBatch]:
    for start in range(0, batch.num_rows, _BATCH_ROWS):
        yield batch.slice(start, _BATCH_ROWS)


def _number(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield number, row


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    "csv": _read_csv,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "feather": _read_arrow,
    "ipc": _read_arrow,
}


def _open(path: Path) -> io.BufferedReader:
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(path), 2**20)
    if path.name.lower().endswith(".zst"):
        return io.BufferedReader(_ZstandardFile(path.open("rb")), 2**20)
    return io.BufferedReader(path.open("rb", buffering=0), 2**20)


class _ZstandardFile(io.RawIOBase):
    """Decompressed bytes of one or more frames; unlike zstandard's own reader it notices a file that is cut off."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: Any = None
        self._rest = b""
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            if not self._more():
                return 0
        size = min(len(buffer), len(self._out))
        buffer[:size] = self._out[:size]
        self._out = self._out[size:]
        return size

    def _more(self) -> bool:
        data = self._rest or self._file.read(2**17)
        self._rest = b""
        if not data:
            if self._frame is not None:
                raise EOFError("the last frame is not complete")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._out = memoryview(self._frame.decompress(data))
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _lines(file: io.BufferedReader, name: str) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers. A UTF-8 byte order mark is skipped; any other encoding is refused."""
    position = number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(f"{name}:{number}: the line is longer than {LONGEST_LINE >> 20} MiB; split the row")
        if number == 1 and line.startswith(_UTF16):
            raise DataError(f"{name}: the file is UTF-16; save it as UTF-8")
        text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        try:
            yield number, text.decode()
        except UnicodeDecodeError as error:
            offset = position + len(line) - len(text) + error.start
            raise DataError(
                f"{name}:{number}: byte 0x{text[error.start]:02x} at offset {offset} of the file is not UTF-8; "
                "save the file as UTF-8"
            ) from error
        position += len(line)


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")


def _bad_json(place: str, text: str, error: Exception) -> str:
    if text.strip() in {"{", "["}:
        return f"{place}: a JSON document over several lines; write one object per line (jq -c '.[]' converts an array)"
    if isinstance(error, json.JSONDecodeError):
        told = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        return f"{place}: not valid JSON ({told}); correct or remove the line"
    if isinstance(error, RecursionError):
        return f"{place}: nested too deeply; correct or remove the line"
    return f"{place}: {error}; correct or remove the line"


def _not_an_object(place: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{place}: a JSON array, not an object; write one object per line (jq -c '.[]' converts an array)"
    return f"{place}: {json.dumps(value)[:60]} is not a JSON object; write one object per line"
