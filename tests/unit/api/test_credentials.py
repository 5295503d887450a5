"""Which variables a location sees."""

from __future__ import annotations

import pytest

from finetune_api.credentials import ENDPOINT_VARIABLES, VARIABLES, environment_of, variable_prefix
from finetune_api.spec import Output
from finetune_storage import connect

OWN = Output.model_validate({"uri": "s3://b/x", "credentials": {"secretName": "my-bucket"}})
NONE = Output.model_validate({"uri": "s3://b/x"})


def test_the_prefix_of_a_secret_is_a_variable_name() -> None:
    assert variable_prefix("my-bucket") == "FINETUNE_ENV_MY_BUCKET__"
    assert variable_prefix() == "FINETUNE_ENV__"


@pytest.mark.parametrize(
    ("location", "environment", "seen"),
    [
        (NONE, {"AWS_REGION": "a"}, {"AWS_REGION": "a"}),
        (OWN, {"AWS_REGION": "a"}, {"AWS_REGION": "a"}),  # outside of a cluster
        (OWN, {"FINETUNE_ENV_MY_BUCKET__A": "1", "A": "2", "B": "3"}, {"A": "1", "B": "3"}),
        (OWN, {"FINETUNE_ENV_MY_BUCKET__A": "1", "FINETUNE_ENV_X__B": "2", "FINETUNE_ENV__C": "3"}, {"A": "1"}),
        (OWN, {"FINETUNE_ENV_MY_BUCKET__A": "1", "FINETUNE_ENV_MY_BUCKET__B": "", "B": "2"}, {"A": "1", "B": "2"}),
        (OWN, {"FINETUNE_ENV_MY__A": "1", "A": "2"}, {"A": "2"}),
        (NONE, {"FINETUNE_ENV__A": "1", "FINETUNE_ENV_X__A": "2", "FINETUNE_ENV_X__B": "2"}, {"A": "1"}),
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


def test_every_variable_of_a_secret_is_one_that_storage_reads() -> None:
    read = {
        "s3": {*connect._S3_VARIABLES, "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"},
        "gs": {*connect._GS_VARIABLES},
        "az": {*connect._AZ_VARIABLES},
    }
    # Left out: names of files, which a Secret's variable cannot bring into a pod, and a developer's emulator.
    files = {
        "s3": {"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN"},
        "gs": {"GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT"},
        "az": {"AZURE_FEDERATED_TOKEN_FILE", "AZURE_STORAGE_USE_EMULATOR"},
    }
    assert {scheme: set(VARIABLES[scheme]) for scheme in read} == {s: read[s] - files[s] for s in read}
    assert set(ENDPOINT_VARIABLES) < {name for names in VARIABLES.values() for name in names}
