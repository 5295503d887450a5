"""How a Secret that a manifest names reaches the code that opens a URI: one table of names, one way to keep two apart.

In a pod the keys of every Secret stand under a prefix of its own, and nowhere else: a model and an output in two stores
may use the same keys, and no library picks up those of the wrong one. What a location without a Secret sees stands
under the prefix without a name.
"""

from __future__ import annotations

from collections.abc import Mapping

from finetune_api.spec import ObjectLocation

# The variables that are read for a scheme (docs/storage.md). Others cannot enter a pod through a Secret.
VARIABLES: Mapping[str, tuple[str, ...]] = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_SKIP_SIGNATURE",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
    ),
    "gs": ("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BASE_URL", "GOOGLE_SKIP_SIGNATURE"),
    "az": (
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_CLIENT_ID",
        "AZURE_CLIENT_SECRET",
        "AZURE_TENANT_ID",
        "AZURE_STORAGE_ENDPOINT",
    ),
    "hf": ("HF_TOKEN", "HF_ENDPOINT"),
}
# Those that say where, not who: an administrator's list of endpoints must not be passed by through a Secret.
ENDPOINT_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "GOOGLE_BASE_URL",
    "AZURE_STORAGE_ENDPOINT",
    "HF_ENDPOINT",
)
_PREFIX = "FINETUNE_ENV_"
_KNOWN = frozenset(name for names in VARIABLES.values() for name in names)


def variable_prefix(secret_name: str = "") -> str:
    """What the keys of a Secret are prefixed with: ``my-bucket`` -> ``FINETUNE_ENV_MY_BUCKET__``."""
    return f"{_PREFIX}{secret_name.upper().replace('-', '_')}__" if secret_name else f"{_PREFIX}_"


def environment_of(location: ObjectLocation, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables as ``location`` sees them: in a pod those of its own Secret win, elsewhere there are none.

    Of a Secret only what ``VARIABLES`` lists: another key could name a file or a role of the pod, or an emulator. What
    the pod itself was given (workload identity) stays.
    """
    prefix = variable_prefix(location.credentials.secret_name if location.credentials else "")
    own = {name: environment.get(prefix + name) for name in _KNOWN}
    return {**environment, **{name: value for name, value in own.items() if value}}
