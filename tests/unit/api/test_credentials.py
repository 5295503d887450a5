"""Which variables a location sees."""

from __future__ import annotations

import pytest

from finetune_api.credentials import ENDPOINT_VARIABLES, VARIABLES, environment_of, variable_prefix
from finetune_api.spec import Output
from finetune_storage import connect

OWN = Output.model_validate({"uri": "s3://b/x", "credentials": {"secretName": "my-bucket"}})
NONE = Output.model_validate({"uri": "s3://b/x"})
MY, KEY, TOKEN = "FINETUNE_ENV_MY_BUCKET__", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"


def test_the_prefix_of_a_secret_is_a_variable_name() -> None:
    assert variable_prefix("my-bucket") == "FINETUNE_ENV_MY_BUCKET__"
    assert variable_prefix() == "FINETUNE_ENV__"


@pytest.mark.parametrize(
    ("location", "environment", "seen"),
    [
        (NONE, {"AWS_REGION": "a"}, {"AWS_REGION": "a"}),
        (OWN, {"AWS_REGION": "a"}, {"AWS_REGION": "a"}),  # outside of a cluster
        (OWN, {f"{MY}{KEY}": "1", KEY: "2", TOKEN: "3"}, {KEY: "1", TOKEN: "3"}),
        (OWN, {f"{MY}{KEY}": "1", f"FINETUNE_ENV_X__{TOKEN}": "2", f"FINETUNE_ENV__{TOKEN}": "3"}, {KEY: "1"}),
        (OWN, {f"{MY}{KEY}": "1", f"{MY}{TOKEN}": "", TOKEN: "2"}, {KEY: "1", TOKEN: "2"}),
        (OWN, {f"FINETUNE_ENV_MY__{KEY}": "1", KEY: "2"}, {KEY: "2"}),
        (
            NONE,
            {f"FINETUNE_ENV__{KEY}": "1", f"FINETUNE_ENV_X__{KEY}": "2", f"FINETUNE_ENV_X__{TOKEN}": "2"},
            {KEY: "1"},
        ),
    ],
    ids=[
        "no Secret",
        "not in a cluster",
        "its own wins",
        "another's is hidden",
        "an empty one is none",
        "a namesake",
        "none sees the shared ones",
    ],
)
def test_a_location_sees(location: Output, environment: dict[str, str], seen: dict[str, str]) -> None:
    found = environment_of(location, environment)
    assert {name: value for name, value in found.items() if not name.startswith("FINETUNE_ENV_")} == seen


@pytest.mark.parametrize("prefix", [MY, "FINETUNE_ENV__"], ids=["its own Secret", "the shared one"])
@pytest.mark.parametrize(
    "name",
    [
        "AWS_ROLE_ARN",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_SERVICE_ACCOUNT",
        "AZURE_FEDERATED_TOKEN_FILE",
        "AZURE_STORAGE_USE_EMULATOR",
        "FINETUNE_STORAGE_RETRY_SECONDS",
    ],
)
def test_a_key_that_the_table_does_not_list_has_no_effect(prefix: str, name: str) -> None:
    location = OWN if prefix == MY else NONE
    assert name not in environment_of(location, {prefix + name: "of the Secret"})
    given = {prefix + name: "of the Secret", name: "of the pod"}
    assert environment_of(location, given)[name] == "of the pod"


def test_an_identity_that_the_pod_was_given_stays_beside_a_secret() -> None:
    identity = {"AWS_ROLE_ARN": "arn:aws:iam::1:role/x", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token"}
    seen = environment_of(OWN, {**identity, f"{MY}AWS_REGION": "eu-west-1"})
    assert seen.items() >= {**identity, "AWS_REGION": "eu-west-1"}.items()


def test_every_variable_of_a_secret_is_one_that_storage_reads() -> None:
    read = {
        "s3": {*connect._S3_VARIABLES, "AWS_REGION", "AWS_DEFAULT_REGION"},
        "gs": {*connect._GS_VARIABLES},
        "az": {*connect._AZ_VARIABLES},
    }
    read = {scheme: names | {*connect._ENDPOINT_VARIABLES[scheme]} for scheme, names in read.items()}
    # Left out: names of files, which a Secret's variable cannot bring into a pod, and a developer's emulator.
    files = {
        "s3": {"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"},
        "gs": {"GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"},
        "az": {"AZURE_FEDERATED_TOKEN_FILE", "AZURE_STORAGE_USE_EMULATOR"},
    }
    assert {scheme: set(VARIABLES[scheme]) for scheme in read} == {s: read[s] - files[s] for s in read}
    assert {*ENDPOINT_VARIABLES} == {"HF_ENDPOINT"}.union(*connect._ENDPOINT_VARIABLES.values())
    assert set(ENDPOINT_VARIABLES) < {name for names in VARIABLES.values() for name in names}
