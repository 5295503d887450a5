"""Headers of safetensors files against their sizes and the shard index: a truncated or altered header is noticed early.

Format: 8 bytes little-endian header length, JSON header (name to dtype, shape, data_offsets), data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune_api.errors import ModelError

_LONGEST_HEADER = 100_000_000  # the format's own bound
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16}
_BITS |= {"BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4}
_INDEX = "model.safetensors.index.json"


def check_weights(directory: Path, uri: str) -> None:
    """Check every weight file that the model consists of; reads headers only.

    Raises:
        ModelError: names the file and what is wrong with it.
    """
    index = directory / _INDEX
    if not index.is_file():
        for file in weight_files(directory):
            read_header(file, uri)
        return
    shards = _shards(index, uri)
    for name in sorted(set(shards.values())):
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise ModelError(f"The base model {uri} lacks the shard {name} that {_INDEX} names; upload it again.")
        held = read_header(file, uri)
        lacking = sorted(tensor for tensor, shard in shards.items() if shard == name and tensor not in held)
        if lacking:
            raise ModelError(
                f"The shard {name} of the base model {uri} lacks {len(lacking)} tensors that {_INDEX} promises "
                f"({lacking[0]}, ...); index and shards are of different models."
            )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model without an index, sorted."""
    files = sorted(directory.glob("*.safetensors"))
    return [
        file for file in files if not file.name.startswith("consolidated") and file.name != "adapter_model.safetensors"
    ]


def read_header(file: Path, uri: str) -> dict[str, Any]:
    """Tensor entries of one file, checked to lie inside it without gaps and to have the size of dtype and shape.

    Raises:
        ModelError: the file is truncated or its header is damaged.
    """
    size = file.stat().st_size
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise _damaged(file, uri, f"it has {size} bytes but announces a header of {length}")
        try:
            header = json.loads(source.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            spans = sorted(_span(name, entry) for name, entry in tensors.items())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(file, uri, f"its header is not valid ({error})") from None
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise _damaged(file, uri, f"tensor {name} begins at byte {start} instead of {end}")
        end = stop
    if 8 + length + end != size:
        raise _damaged(file, uri, f"it has {size} bytes instead of {8 + length + end}")
    return tensors


def _shards(index: Path, uri: str) -> dict[str, str]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(shard) for tensor, shard in shards.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{_INDEX} of the base model {uri} is not readable; upload it again.") from None


def _span(name: str, entry: dict[str, Any]) -> tuple[int, int, str]:
    start, stop = entry["data_offsets"]
    elements = 1
    for extent in entry["shape"]:
        elements *= extent
    expected = elements * _BITS[entry["dtype"]] // 8
    if stop - start != expected:
        raise ValueError(f"tensor {name} has {stop - start} bytes instead of {expected}")
    return start, stop, name


def _damaged(file: Path, uri: str, reason: str) -> ModelError:
    return ModelError(f"{file.name} of the base model {uri} is damaged: {reason}; upload it again.")
