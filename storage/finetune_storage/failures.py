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
_BAD_KEY_CODES = {
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
    "XAdminUserNotFound",  # Versity S3 Gateway
}
_REGION_CODES = {"AuthorizationHeaderMalformed", "PermanentRedirect", "IllegalLocationConstraintException"}
_ABSENT_CODES = {"", "NoSuchKey", "NoSuchVersion", "BlobNotFound"}
_LASTING_STATUS = {301, 307, 400, 404, 405, 409, 411, 413, 414, 416, 501}


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
    if isinstance(error, FileNotFoundError) and code in _ABSENT_CODES and "NoSuchBucket" not in text:
        return Failure(Verdict.ABSENT, "it does not exist")
    if locator.scheme in {"file", "pvc"}:
        return _judge_file(text)
    if any(host in text for host in _METADATA_HOSTS):
        return Failure(Verdict.REFUSED, "no credentials were found", f"set {_CREDENTIAL_HELP[locator.scheme]}")
    status = int(match.group(1)) if (match := _STATUS.search(text)) else 0
    place = f"{f' ({code or status})' if code or status else ''}{f' at {endpoint}' if endpoint else ''}"
    refused = _refusal(error, code, status, locator)
    if refused:
        return Failure(Verdict.REFUSED, refused[0] + place, refused[1])
    if isinstance(error, exceptions.PreconditionError):
        return Failure(Verdict.RETRY, "it changed while it was read")
    reason = next((said for sign, said in _NETWORK_ERRORS.items() if sign in text), "")
    reason = reason or ("the server failed" if code or status else "the connection failed")
    return Failure(Verdict.RETRY, reason + place, "check the endpoint and that the server runs")


def _refusal(error: Exception, code: str, status: int, locator: ObjectLocator) -> tuple[str, str] | None:
    """Reason and remedy where another try cannot help."""
    credentials = f"check {_CREDENTIAL_HELP[locator.scheme]}"
    if code in {"NoSuchBucket", "ContainerNotFound"}:
        return (
            f"bucket '{locator.bucket}' does not exist",
            "create it, or correct the bucket in the URI or the endpoint",
        )
    if code == "InvalidBucketName":
        return f"'{locator.bucket}' is not a valid bucket name", "correct the URI"
    if code == "RequestTimeTooSkewed":
        return "the clocks of this machine and the server differ", "set this machine's clock"
    if code in _BAD_KEY_CODES or isinstance(error, exceptions.UnauthenticatedError):
        return "the credentials were not accepted", credentials
    if code in _REGION_CODES:
        return f"bucket '{locator.bucket}' is in another region", "set AWS_REGION or the region field"
    if status in {401, 403} or isinstance(error, exceptions.PermissionDeniedError):
        return f"access to bucket '{locator.bucket}' was denied", f"grant these credentials access or {credentials}"
    if status in _LASTING_STATUS or isinstance(error, ValueError | FileNotFoundError):
        return "the request was refused", "check region, endpoint and path"
    return None


def _judge_file(text: str) -> Failure:
    reason = next((said for sign, said in _SYSTEM_ERRORS.items() if sign in text), "the file system refused")
    return Failure(Verdict.REFUSED, reason, "check the path and its permissions")
