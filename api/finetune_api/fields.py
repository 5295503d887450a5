"""Bounded field types that the schema is made of. Every string, list, map and number has a bound."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class SchemaModel(BaseModel):
    """Base of everything a user or another process writes: camelCase names, unknown fields refused, immutable."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_enum_values=False,
        defer_build=True,  # a command that never meets a model does not pay for its validator
    )


# A bucket becomes a part of a host name, and is compared with the administrator's list: no character that ends a host
# may be in it. A query could be a signature; data may have '?' as a wildcard, so there it is a query if '=' follows.
AUTHORITY = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MODEL_URI_PATTERN = rf"^((hf|s3|gs|az|pvc)://{AUTHORITY}(/[^\s@?#]*)?(@[0-9a-f]{{40}})?|file://[^\s@?#]+)$"
DATA_URI_PATTERN = rf"^((s3|gs|az|pvc)://{AUTHORITY}(/[^\s@?#]*(\?[^\s@?#=]*)*)?|file://[^\s@?#]+(\?[^\s@?#=]*)*)$"
OUTPUT_URI_PATTERN = rf"^((s3|gs|az|pvc)://{AUTHORITY}(/[^\s@?#]*)?|file://[^\s@?#]+)$"
ENDPOINT_PATTERN = r"^https?://([A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[^\s@?#\\]*)?$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"

ModelUri = Annotated[str, Field(min_length=6, max_length=1024, pattern=MODEL_URI_PATTERN)]
DataUri = Annotated[str, Field(min_length=6, max_length=1024, pattern=DATA_URI_PATTERN)]
OutputUri = Annotated[str, Field(min_length=6, max_length=1024, pattern=OUTPUT_URI_PATTERN)]
Endpoint = Annotated[str, Field(max_length=512, pattern=ENDPOINT_PATTERN)]
Quantity = Annotated[str, Field(min_length=1, max_length=32, pattern=QUANTITY_PATTERN)]
DnsLabel = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
ModuleName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.*-]+$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
