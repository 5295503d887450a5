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


URI_PATTERN = r"^(hf|s3|gs|az|pvc|file)://[^\s@]+(@[0-9a-f]{40})?$"
DATA_URI_PATTERN = r"^(s3|gs|az|pvc|file)://[^\s@]+$"
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"

ModelUri = Annotated[str, Field(min_length=6, max_length=1024, pattern=URI_PATTERN)]
ObjectUri = Annotated[str, Field(min_length=6, max_length=1024, pattern=DATA_URI_PATTERN)]
Quantity = Annotated[str, Field(min_length=1, max_length=32, pattern=QUANTITY_PATTERN)]
DnsLabel = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")]
ModuleName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.*-]+$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
