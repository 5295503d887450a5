"""The administrator's rules, word for word."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.operator.build_shapes import IMAGE, SETTINGS, SHAPES, examples, smallest

from finetune_api.errors import SpecError
from finetune_api.validation import Place, parse_spec
from finetune_operator.policy import policy_problems
from finetune_operator.settings import OperatorSettings


@pytest.mark.parametrize(("name", "job"), list(examples()), ids=[name for name, _ in examples()])
def test_an_example_may_run_where_nothing_is_forbidden(name: str, job: dict[str, Any]) -> None:
    assert problems(job["spec"], metadata=job["metadata"]) == []


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_these_tests_may_run(name: str) -> None:
    spec, settings = SHAPES[name]
    assert policy_problems(parse_spec(spec, place=Place.CLUSTER), settings) == []


def test_a_scheme_that_is_not_listed_is_refused_wherever_it_stands() -> None:
    spec = smallest(
        model={"uri": "hf://org/model"},
        dataset={
            "train": [{"uri": "s3://a/x.jsonl"}, {"uri": "gs://a/x.jsonl"}],
            "validation": {"sources": [{"uri": "az://a/x.jsonl"}]},
        },
    )
    assert problems(spec, schemes=["s3", "pvc"]) == [
        "spec.model.uri: hf:// is not allowed in this cluster ('hf://org/model'); use s3://, pvc://",
        "spec.dataset.train[1].uri: gs:// is not allowed in this cluster ('gs://a/x.jsonl'); use s3://, pvc://",
        "spec.dataset.validation.sources[0].uri: az:// is not allowed in this cluster ('az://a/x.jsonl'); "
        "use s3://, pvc://",
    ]


def test_a_bucket_that_is_not_listed_is_refused() -> None:
    spec = smallest(model={"uri": "hf://stranger/model"}, output={"uri": "s3://team.example.evil/x"})
    assert problems(spec, hosts=["data", "*.example"]) == [
        "spec.model.uri: repository owner 'stranger' is not allowed in this cluster ('hf://stranger/model'); "
        "use data, *.example",
        "spec.output.uri: bucket 'team.example.evil' is not allowed in this cluster ('s3://team.example.evil/x'); "
        "use data, *.example",
    ]


@pytest.mark.parametrize(
    ("bucket", "rule", "allowed"),
    [
        ("data", "data", True),
        ("data2", "data", False),
        ("a.data", "*.data", True),
        ("a.b.data", "*.data", True),
        ("data", "*.data", False),
        ("adata", "*.data", False),
        ("x", "*", False),
    ],
)
def test_a_bucket_is_compared_whole_or_by_its_last_labels(bucket: str, rule: str, allowed: bool) -> None:
    spec = parse_spec(smallest(output={"uri": f"s3://{bucket}/x"}))
    settings = OperatorSettings.model_validate({"trainerImage": IMAGE, "uris": {"hosts": ["models", "data.", rule]}})
    refused = [problem.path for problem in policy_problems(spec, settings)]
    assert ("spec.output.uri" not in refused) is allowed


def test_a_claim_belongs_to_the_namespace_and_needs_no_listing() -> None:
    spec = smallest(
        model={"uri": "pvc://models/base"},
        dataset={"train": [{"uri": "pvc://data/x.jsonl"}]},
        output={"uri": "pvc://out/x"},
    )
    assert problems(spec, hosts=["only-this"], endpoints=["https://only.example"]) == []


def test_an_endpoint_that_is_not_listed_is_refused_and_so_is_none() -> None:
    spec = smallest(
        dataset={"train": [{"uri": "s3://data/x.jsonl", "endpoint": "https://S3.example:443/"}]},
        output={"uri": "s3://out/x", "endpoint": "https://s3.example.evil"},
    )
    assert problems(spec, endpoints=["https://s3.example"]) == [
        "spec.model.endpoint: is missing, and this cluster allows only listed endpoints; use https://s3.example",
        "spec.output.endpoint: is not allowed in this cluster ('https://s3.example.evil'); use https://s3.example",
    ]


def test_an_endpoint_that_the_administrator_has_set_for_everybody_need_not_be_named() -> None:
    settings = OperatorSettings.model_validate(
        {
            "trainerImage": IMAGE,
            "uris": {"endpoints": ["https://other.example"]},
            "podDefaults": {"environment": {"AWS_ENDPOINT_URL": "http://s3.storage:7070"}},
        }
    )
    assert policy_problems(parse_spec(smallest()), settings) == []


def test_a_container_of_azure_has_to_name_its_account_where_endpoints_are_listed() -> None:
    account = "https://ours.blob.core.windows.net"
    data = {"train": [{"uri": "az://data/x.jsonl", "endpoint": account}]}
    spec = smallest(model={"uri": "pvc://models/base"}, dataset=data, output={"uri": "az://out/x"})
    assert problems(spec, hosts=["data", "out"], endpoints=[account]) == [
        f"spec.output.endpoint: is missing, and this cluster allows only listed endpoints; use {account}"
    ]
    assert problems(spec, hosts=["data"]) == [
        "spec.output.uri: container 'out' is not allowed in this cluster ('az://out/x'); use data"
    ]
    for variable, count in (("AZURE_STORAGE_ENDPOINT", 0), ("AWS_ENDPOINT_URL", 1)):
        rules = {"uris": {"endpoints": [account]}, "podDefaults": {"environment": {variable: account}}}
        settings = OperatorSettings.model_validate({"trainerImage": IMAGE, **rules})
        assert len(policy_problems(parse_spec(spec), settings)) == count


@pytest.mark.parametrize("bucket", [".data", "evil.example?.data", "evil.example#.data", "evil\\.data", "evil:80.data"])
@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_a_bucket_cannot_end_a_host_name_before_the_listed_one(scheme: str, bucket: str) -> None:
    with pytest.raises(SpecError):
        problems(smallest(output={"uri": f"{scheme}://{bucket}/x"}), hosts=["models", "*.data"])


def test_a_hub_or_a_cloud_of_one_owner_needs_no_endpoint_but_may_not_be_another() -> None:
    output = {"uri": "s3://out/x", "endpoint": "https://s3.example"}
    data = {"train": [{"uri": "gs://data/x.jsonl"}]}
    spec = smallest(model={"uri": "hf://org/model"}, dataset=data, output=output)
    assert problems(spec, endpoints=["https://s3.example"]) == []
    mirror = {"uri": "hf://org/model", "endpoint": "https://mirror.example"}
    assert problems(spec | {"model": mirror}, endpoints=["https://s3.example"]) == [
        "spec.model.endpoint: is not allowed in this cluster ('https://mirror.example'); use https://s3.example"
    ]


def test_code_of_a_model_needs_consent() -> None:
    spec = smallest(model={"uri": "s3://models/base/", "trustRemoteCode": True})
    assert problems(spec) == [
        "spec.model.trustRemoteCode: code of a model runs here only with the administrator's consent (true); "
        "remove it, or ask for trustRemoteCode in the operator's settings"
    ]
    consent = OperatorSettings(trainer_image=IMAGE, trust_remote_code=True)
    assert policy_problems(parse_spec(spec), consent) == []


def test_what_kubernetes_would_refuse_of_the_children_is_said_first() -> None:
    spec = smallest(
        model={"uri": "pvc://Models/base"},
        placement={
            "nodeSelector": {"no label": "x", "zone": "-a"},
            "tolerations": [{"key": "a//b", "operator": "Exists"}, {"effect": "NoSchedule"}],
            "priorityClassName": "High",
            "schedulerName": "my_scheduler",
            "topologyKey": "/rack",
        },
        resources={"accelerator": {"resourceName": "kubernetes.io/batteries"}},
    )
    assert problems(spec) == [
        "spec.model.uri: names no PersistentVolumeClaim ('pvc://Models/base'); write pvc://CLAIM/PATH in lower case",
        "spec.placement.nodeSelector.no label: is no label of a node ('no label'); "
        "write it as NAME or PREFIX/NAME, such as example.com/rack",
        "spec.placement.topologyKey: is no label of a node ('/rack'); "
        "write it as NAME or PREFIX/NAME, such as example.com/rack",
        "spec.placement.tolerations[0].key: is no label of a node ('a//b'); "
        "write it as NAME or PREFIX/NAME, such as example.com/rack",
        "spec.placement.nodeSelector.zone: is no label value ('-a'); use letters, digits, '-', '_' and '.'",
        "spec.placement.priorityClassName: is no name ('High'); use lower-case letters, digits, '-' and '.'",
        "spec.placement.schedulerName: is no name ('my_scheduler'); use lower-case letters, digits, '-' and '.'",
        "spec.placement.tolerations[1].operator: must be Exists where no key is named; name a key, or set Exists",
        "spec.resources.accelerator.resourceName: is no extended resource ('kubernetes.io/batteries'); "
        "name the one that the device plugin offers, such as nvidia.com/gpu",
    ]


@pytest.mark.parametrize(
    ("name", "is_extended"),
    [
        ("nvidia.com/gpu", True),
        ("nvidia.com/mig-1g.10gb", True),
        ("nodes.kubernetes.io/x", False),
        ("mykubernetes.io/x", False),
        ("requests.nvidia.com/gpu", False),
        ("nvidia.com/_gpu", False),
        ("-nvidia.com/gpu", False),
    ],
)
def test_an_accelerator_is_an_extended_resource(name: str, is_extended: bool) -> None:
    found = problems(smallest(resources={"accelerator": {"resourceName": name}}))
    assert (found == []) is is_extended


def test_labels_and_annotations_that_are_copied_are_bounded() -> None:
    many = {f"finetune.dev/{number}": "x" for number in range(33)}
    long = {"finetune.dev/note": "x" * 20_000, "team": "y" * 200_000}
    assert problems(smallest(), metadata={"labels": many, "annotations": long}) == [
        "metadata.labels: has 33 entries (518 B) to be copied to the Job; "
        "keep at most 32 and 16.0 KiB of finetune.dev/",
        "metadata.annotations: has 1 entry (19.5 KiB) to be copied to the Job; "
        "keep at most 32 and 16.0 KiB of finetune.dev/",
    ]
    assert problems(smallest(), metadata={"annotations": {"team": "y" * 200_000}}) == []


def problems(spec: dict[str, Any], *, metadata: dict[str, Any] | None = None, **uris: Any) -> list[str]:
    settings = OperatorSettings.model_validate({"trainerImage": IMAGE, "uris": uris}) if uris else SETTINGS
    return [str(problem) for problem in policy_problems(parse_spec(spec), settings, metadata)]
