"""What a failed request means: refused for good, absent, or worth another try. Texts never repeat a server's answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from obstore import exceptions

from finetune_storage.uri import ObjectLocator

_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>")
_STATUS = re.compile(r"\b(?:status(?: code)?:? |StatusCode\(|status: )([1-5][0-9]{2})\b")
_SYSTEM_ERRORS = {
    "Permission denied": "permission denied",
    "No space left": "no space left on the device",
    "Read-only file system": "the file system is read-only",
    "Not a directory": "a part of the path is a file",
    "Is a directory": "it is a directory",
    "File name too long": "the name is too long",
    "Disk quota exceeded": "the disk quota is used up",
}
_NETWORK_ERRORS = {
    "ConnectionRefused": "connection refused",
    "ConnectionReset": "connection reset",
    "BrokenPipe": "connection cut",
    "dns error": "host name not found",
    "TimedOut": "timed out",
    "operation timed out": "timed out",
    "IncompleteMessage": "connection cut",
    "UnexpectedEof": "connection cut",
    "InvalidCertificate": "the certificate is not trusted",
}
_CREDENTIAL_HELP = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN where one is used)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT_KEY",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_KEY",
}
_METADATA_HOSTS = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")
_BAD_KEY_CODES = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}


class Verdict(Enum):
    """What to do about a failed request."""

    ABSENT = "absent"
    REFUSED = "refused"
    RETRY = "retry"


@dataclass(frozen=True)
class Failure:
    """``reason`` is a clause for a sentence, ``remedy`` a whole clause of advice; neither can contain a secret."""

    verdict: Verdict
    reason: str
    remedy: str = ""


def judge(error: Exception, locator: ObjectLocator, endpoint: str | None) -> Failure:
    """Classify what the object-store library raised."""
    text = str(error)
    code = match.group(1) if (match := _CODE.search(text)) else ""
    if code == "NoSuchBucket" or "ContainerNotFound" in text:
        return Failure(
            Verdict.REFUSED,
            f"bucket '{locator.bucket}' does not exist{_at(endpoint)}",
            "create it, or correct the bucket in the URI or the endpoint",
        )
    if isinstance(error, FileNotFoundError):
        return Failure(Verdict.ABSENT, "it does not exist")
    if locator.scheme == "file":
        return _judge_file(text)
    if any(host in text for host in _METADATA_HOSTS):
        return Failure(Verdict.REFUSED, "no credentials were found", f"set {_CREDENTIAL_HELP[locator.scheme]}")
    return _judge_remote(error, text, code, locator, endpoint)


def _judge_remote(error: Exception, text: str, code: str, locator: ObjectLocator, endpoint: str | None) -> Failure:
    status = int(match.group(1)) if (match := _STATUS.search(text)) else 0
    shown = f" ({code or status})" if code or status else ""
    denied = isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError)
    if code in _BAD_KEY_CODES or isinstance(error, exceptions.UnauthenticatedError):
        return Failure(
            Verdict.REFUSED,
            f"the credentials were not accepted{shown}{_at(endpoint)}",
            f"check {_CREDENTIAL_HELP[locator.scheme]}",
        )
    if denied or status in {401, 403}:
        return Failure(
            Verdict.REFUSED,
            f"access to bucket '{locator.bucket}' was denied{shown}{_at(endpoint)}",
            f"grant these credentials access or check {_CREDENTIAL_HELP[locator.scheme]}",
        )
    if isinstance(error, exceptions.PreconditionError):
        return Failure(Verdict.RETRY, "it changed while it was read")
    if status in {301, 307, 400, 405, 409, 411, 413, 414, 416, 501} or isinstance(error, ValueError):
        return Failure(
            Verdict.REFUSED,
            f"the request was refused{shown}{_at(endpoint)}",
            "check the region, the endpoint and the path",
        )
    reason = next((said for sign, said in _NETWORK_ERRORS.items() if sign in text), "")
    if not reason:
        reason = f"the server failed{shown}" if shown else "the connection failed"
    return Failure(Verdict.RETRY, reason + _at(endpoint), "check the endpoint and that the server runs")


def _judge_file(text: str) -> Failure:
    reason = next((said for sign, said in _SYSTEM_ERRORS.items() if sign in text), "the file system refused")
    return Failure(Verdict.REFUSED, reason, "check the path and its permissions")


def _at(endpoint: str | None) -> str:
    return f" at {endpoint}" if endpoint else ""
