"""From a URI and the standard environment variables to a store of the obstore library."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from finetune_api.errors import StorageError
from finetune_api.fields import ENDPOINT_PATTERN
from finetune_api.uris import without_secrets
from finetune_storage.uri import ObjectLocator

AnyStore = AzureStore | GCSStore | LocalStore | S3Store

# Handed over explicitly so that an ``environment`` argument wins over the process environment.
_S3_VARIABLES = {
    "AWS_ACCESS_KEY_ID": "access_key_id",
    "AWS_SECRET_ACCESS_KEY": "secret_access_key",
    "AWS_SESSION_TOKEN": "session_token",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "web_identity_token_file",
    "AWS_ROLE_ARN": "role_arn",
    "AWS_SKIP_SIGNATURE": "skip_signature",
}
_CONTAINER_VARIABLES = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
_GS_VARIABLES = {
    "GOOGLE_APPLICATION_CREDENTIALS": "application_credentials",
    "GOOGLE_SERVICE_ACCOUNT": "service_account",
    "GOOGLE_SERVICE_ACCOUNT_KEY": "service_account_key",
    "GOOGLE_SKIP_SIGNATURE": "skip_signature",
}
_AZ_VARIABLES = {
    "AZURE_STORAGE_ACCOUNT_NAME": "account_name",
    "AZURE_STORAGE_ACCOUNT_KEY": "account_key",
    "AZURE_STORAGE_SAS_KEY": "sas_key",
    "AZURE_STORAGE_SAS_TOKEN": "sas_key",
    "AZURE_CLIENT_ID": "client_id",
    "AZURE_CLIENT_SECRET": "client_secret",
    "AZURE_TENANT_ID": "tenant_id",
    "AZURE_FEDERATED_TOKEN_FILE": "federated_token_file",
    "AZURE_STORAGE_USE_EMULATOR": "use_emulator",
}
# Which server is asked, where the location itself does not say; the first that is set counts.
_ENDPOINT_VARIABLES = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT",),
}
_GOOGLE = "https://storage.googleapis.com"


@dataclass(frozen=True)
class Access:
    """How to reach a store besides its URI; unset fields come from the environment."""

    endpoint: str | None = None
    region: str | None = None
    path_style: bool | None = None
    request_seconds: float = 120.0  # bound of one request, body included

    def resolved(self, scheme: str, environment: Mapping[str, str]) -> Access:
        """Fill endpoint and region from the standard variables and check both: they become parts of a host name."""
        found = (environment.get(name) for name in _ENDPOINT_VARIABLES.get(scheme, ()))
        endpoint, region = self.endpoint or next(filter(None, found), None), self.region
        if scheme == "s3":
            region = region or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION") or None
        if endpoint:
            _check_endpoint(endpoint)
        if region and not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", region):
            raise StorageError(
                "The region (AWS_REGION, AWS_DEFAULT_REGION or the region field) is none; "
                "use letters, digits, '_' and '-', such as eu-central-1."
            )
        return replace(self, endpoint=endpoint.rstrip("/") if endpoint else None, region=region)


def connect(locator: ObjectLocator, access: Access, environment: Mapping[str, str]) -> AnyStore:
    """Build the bucket's store (``file``: rooted at ``/``, ``pvc``: at the claim's mount). Nothing is sent yet."""
    if locator.scheme == "file":
        return LocalStore(Path("/"))
    if locator.scheme == "pvc":
        return LocalStore(locator.claim_directory)
    builders: dict[str, Callable[[ObjectLocator, Access, Mapping[str, str]], AnyStore]]
    builders = {"s3": _connect_s3, "gs": _connect_gs, "az": _connect_az}
    try:
        return builders[locator.scheme](locator, access, environment)
    except StorageError:
        raise
    except Exception:
        # The library's text may repeat a value of the configuration.
        variables = {"s3": _S3_VARIABLES, "gs": _GS_VARIABLES, "az": _AZ_VARIABLES}[locator.scheme]
        present = [name for name in variables if environment.get(name)]
        told = f"one of {', '.join(present)} is malformed" if present else f"set {', '.join(list(variables)[:3])}"
        raise StorageError(f"The credentials for {locator.scheme}://{locator.bucket} cannot be used: {told}.") from None


def _connect_s3(locator: ObjectLocator, access: Access, environment: Mapping[str, str]) -> S3Store:
    config: dict[str, Any] = _from_environment(_S3_VARIABLES, environment)
    if access.endpoint and ".amazonaws.com" not in access.endpoint and not _has_s3_credentials(environment):
        # Only Amazon's own machines offer credentials without variables; asking there would take half a minute.
        raise StorageError(
            f"No credentials for {locator.scheme}://{locator.bucket} at {access.endpoint}: "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_SKIP_SIGNATURE=true for a public bucket)."
        )
    path_style = access.path_style if access.path_style is not None else access.endpoint is not None
    config["virtual_hosted_style_request"] = not path_style
    config["region"] = access.region or "us-east-1"
    if access.endpoint:
        config["endpoint"] = access.endpoint if path_style else _with_bucket(access.endpoint, locator.bucket)
    return S3Store(locator.bucket, config=config, **_transport(access.endpoint, access))  # type: ignore[arg-type]


def _has_s3_credentials(environment: Mapping[str, str]) -> bool:
    names = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE", *_CONTAINER_VARIABLES)
    return any(environment.get(name) for name in names)


def _connect_gs(locator: ObjectLocator, access: Access, environment: Mapping[str, str]) -> GCSStore:
    config: dict[str, Any] = _from_environment(_GS_VARIABLES, environment)
    _check_service_account(environment.get("GOOGLE_SERVICE_ACCOUNT_KEY") or "")
    config["base_url"] = access.endpoint or _GOOGLE  # said explicitly: without it the key could name a server
    return GCSStore(locator.bucket, config=config, **_transport(access.endpoint, access))  # type: ignore[arg-type]


def _check_service_account(text: str) -> None:
    """The key says who, never where. What is no JSON the library refuses."""
    try:
        key = json.loads(text)
    except (ValueError, RecursionError):
        return
    if isinstance(key, dict) and "gcs_base_url" in key:
        raise StorageError(
            "GOOGLE_SERVICE_ACCOUNT_KEY names a server in gcs_base_url; remove it from the key, "
            "and name the server as the endpoint."
        )


def _connect_az(locator: ObjectLocator, access: Access, environment: Mapping[str, str]) -> AzureStore:
    config: dict[str, Any] = _from_environment(_AZ_VARIABLES, environment)
    account = config.get("account_name")
    if account is not None and not re.fullmatch("[a-z0-9]{3,24}", account):  # it begins a host name
        raise StorageError(
            "AZURE_STORAGE_ACCOUNT_NAME is no name of a storage account; write 3 to 24 lower-case letters and digits."
        )
    if access.endpoint:
        config["endpoint"] = access.endpoint
    return AzureStore(locator.bucket, config=config, **_transport(access.endpoint, access))  # type: ignore[arg-type]


def _from_environment(variables: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, Any]:
    return {field: environment[name] for name, field in variables.items() if environment.get(name)}


def _transport(endpoint: str | None, access: Access) -> dict[str, Any]:
    """Short retries of single requests; ObjectStore repeats whole operations for as long as its budget lasts."""
    return {
        "client_options": {
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(seconds=access.request_seconds),
        },
        "retry_config": {
            "max_retries": 3,
            "retry_timeout": timedelta(seconds=access.request_seconds),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
        },
    }


def _with_bucket(endpoint: str, bucket: str) -> str:
    parts = urlsplit(endpoint)
    with suppress(ValueError):
        ipaddress.ip_address(parts.hostname or "")
        raise StorageError(
            f"The storage endpoint '{endpoint}' has a number for a host, which no bucket can stand before; "
            "set pathStyle: true."
        )
    return f"{parts.scheme}://{bucket}.{parts.netloc}{parts.path}"


def _check_endpoint(endpoint: str) -> None:
    if "@" in endpoint.partition("://")[2].partition("/")[0]:
        raise StorageError(
            "The storage endpoint holds user information before '@'; credentials belong in environment variables."
        )
    if not re.fullmatch(ENDPOINT_PATTERN, endpoint):
        raise StorageError(
            f"The storage endpoint '{without_secrets(endpoint)}' is not an http:// or https:// URL; write for instance https://s3.example.com."
        )
