"""Structured logs: every line about a job carries its namespace, name and uid."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from finetune_operator.settings import LogFormat, LogSettings

_LIBRARIES = {"kopf.objects": logging.WARNING, "kopf.activities": logging.WARNING, "aiohttp.access": logging.WARNING}


class _JobLogger(logging.LoggerAdapter[logging.Logger]):
    def process(self, message: Any, keywords: Any) -> tuple[Any, Any]:
        return message, {**keywords, "extra": {**(self.extra or {}), **keywords.get("extra", {})}}


def log_of(resource: Mapping[str, Any]) -> _JobLogger:
    """The logger of one FineTuneJob."""
    metadata = resource["metadata"]
    about = {"namespace": metadata["namespace"], "job": metadata["name"], "uid": metadata["uid"]}
    return _JobLogger(logging.getLogger("finetune_operator"), about)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        namespace, job = getattr(record, "namespace", None), getattr(record, "job", None)
        uid = getattr(record, "uid", "")
        return f"{text} [{namespace}/{job}{uid and ' '}{uid}]" if job else text


def set_up(settings: LogSettings) -> None:
    """Everything to standard error, in the format asked for."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.format is LogFormat.JSON:
        # a record's own `name` is its logger's; no `extra` may be called so, hence `job`
        renamed = {"levelname": "level", "asctime": "time", "name": "logger", "job": "name"}
        handler.setFormatter(JsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", rename_fields=renamed))
    else:
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)-7s %(message)s"))
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    if settings.level != "debug":
        for name, level in _LIBRARIES.items():
            logging.getLogger(name).setLevel(level)
