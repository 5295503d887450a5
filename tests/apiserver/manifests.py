"""Manifests for the three judges: variations of the smallest useful job, good and bad, beside examples/ and bad/."""

from __future__ import annotations

import copy
from typing import Any

SMALLEST: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "support-bot"},
    "spec": {
        "model": {"uri": "s3://models/base/"},
        "dataset": {"train": [{"uri": "s3://data/train.jsonl"}]},
        "method": {"type": "LoRA"},
        "output": {"uri": "s3://adapters/team"},
    },
}
_COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"
_GPU = {"accelerator": {"count": 4}}


def manifest(*, name: str = "support-bot", metadata: dict[str, Any] | None = None, **blocks: Any) -> dict[str, Any]:
    """The smallest job with whole blocks of the spec replaced or added; ``None`` removes one."""
    result = copy.deepcopy(SMALLEST)
    result["metadata"] = {"name": name, **(metadata or {})}
    for block, value in blocks.items():
        if value is None:
            result["spec"].pop(block)
        else:
            result["spec"][block] = copy.deepcopy(value)
    return result


def _model(**fields: Any) -> dict[str, Any]:
    return manifest(model={"uri": "s3://models/base/", **fields})


def _train(*sources: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return manifest(dataset={"train": list(sources) or [{"uri": "s3://data/train.jsonl"}], **fields})


def _lora(**fields: Any) -> dict[str, Any]:
    return manifest(method={"type": "LoRA", "lora": fields})


def _schedule(**fields: Any) -> dict[str, Any]:
    return manifest(training={"schedule": fields})


def _optimizer(**fields: Any) -> dict[str, Any]:
    return manifest(training={"optimizer": fields})


def _deepspeed(resources: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    strategy = {"type": "DeepSpeed", "deepspeed": fields}
    return manifest(distributed={"strategy": strategy}, resources=resources or _GPU)


def _tolerate(**fields: Any) -> dict[str, Any]:
    return manifest(placement={"tolerations": [fields]})


GOOD: dict[str, dict[str, Any]] = {
    "the smallest job": manifest(),
    "a name of 50 characters": manifest(name="a" * 50),
    "labels and annotations": manifest(metadata={"labels": {"team": "nlp"}, "annotations": {"note": "first try"}}),
    "a model of the hub at a commit": _model(uri=f"hf://org/base@{_COMMIT}"),
    "a model of the hub with a revision": _model(uri="hf://org/base", revision=_COMMIT),
    "a model on a volume": _model(uri="pvc://claim/models/base"),
    "a model from scratch": _model(initialization="Random"),
    "an endpoint of its own": _model(endpoint="http://minio:9000", region="eu-west-1", pathStyle=True),
    "an endpoint of one account": manifest(
        output={"uri": "az://out", "endpoint": "https://ours.blob.core.windows.net/"}
    ),
    "an endpoint with a number": _model(endpoint="http://[fd00::1]:9000"),
    "buckets with all that a name may have": _model(uri="s3://My.bucket_1-a"),
    "wildcards of data": _train({"uri": "s3://data/day=1/part-?.jsonl"}),
    "credentials": _model(credentials={"secretName": "bucket"}),
    "all text formats": _train(*({"uri": f"gs://data/a.{end}"} for end in ("jsonl", "jsonl.gz", "parquet", "csv"))),
    "64 sources": _train(*({"uri": f"s3://data/part-{number}.jsonl"} for number in range(64))),
    "a pattern of files": _train({"uri": "s3://data/*.jsonl", "weight": 0.5, "format": "Text"}),
    "validation by fraction": _train(validation={"fraction": 0.02}),
    "validation by sources": _train(validation={"sources": [{"uri": "s3://data/held-out.jsonl"}]}),
    "fraction with an empty list of sources": _train(validation={"fraction": 0.5, "sources": []}),
    "LoRA with all its fields": _lora(
        rank=8, alpha=16, dropout=0.1, targetModules=["q_proj", "v_proj"], modulesToSave=["lm_head"], useDora=True
    ),
    "QLoRA with FP4": manifest(method={"type": "QLoRA", "quantization": {"type": "FP4"}}),
    "Full with FullModel": manifest(method={"type": "Full"}, output={"uri": "s3://out", "format": "FullModel"}),
    "LoRA with MergedModel": manifest(output={"uri": "s3://out", "format": "MergedModel"}),
    "half an epoch": manifest(training={"epochs": 0.5}),
    "steps": manifest(training={"maxSteps": 10, "schedule": {"warmupSteps": 10}}),
    "no clipping": manifest(training={"maxGradientNorm": None}),
    "no checkpoints by the clock": manifest(checkpoint={"everyMinutes": None, "everySteps": 5}),
    "early stopping": manifest(
        training={"evaluateEverySteps": 10, "earlyStopping": {}},
        dataset={"train": [{"uri": "s3://data/train.jsonl"}], "validation": {"fraction": 0.1}},
    ),
    "a schedule's own field": _schedule(type="Polynomial", power=2),
    "a foreign field of a schedule at its default": _schedule(type="Linear", cycles=1, power=1.0),
    "SGD with momentum": _optimizer(type="SGD", momentum=0.9),
    "momentum zero of AdamW": _optimizer(momentum=0),
    "betas of AdamW": _optimizer(beta1=0.8, beta2=0.95),
    "8-bit AdamW on a GPU": manifest(training={"optimizer": {"type": "AdamW8bit"}}, resources=_GPU),
    "FP16 on a GPU": manifest(training={"precision": "FP16"}, resources=_GPU),
    "two nodes of four GPUs": manifest(distributed={"nodes": 2, "processesPerNode": 4}, resources=_GPU),
    "a batch that divides": manifest(
        training={"globalBatchSize": 48, "microBatchSize": 6}, distributed={"nodes": 2}, resources=_GPU
    ),
    "FSDP, hybrid": manifest(distributed={"strategy": {"type": "FSDP", "fsdp": {"sharding": "Hybrid"}}}),
    "ZeRO-2 with optimizer offload": _deepspeed(zeroStage=2, offloadOptimizer="CPU"),
    "ZeRO-3 with everything offloaded": _deepspeed(zeroStage=3, offloadOptimizer="CPU", offloadParameters="CPU"),
    "NVMe with scratch": _deepspeed({**_GPU, "scratch": "200Gi"}, zeroStage=3, offloadOptimizer="NVMe"),
    "settings of DeepSpeed": _deepspeed(
        configuration={"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 1000}}
    ),
    "selective recomputation under ZeRO-2": manifest(
        training={"gradientCheckpointing": "Selective"},
        distributed={"strategy": {"type": "DeepSpeed", "deepspeed": {"zeroStage": 2}}},
    ),
    "requests equal to limits in other units": manifest(
        resources={"requests": {"cpu": "1000m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1024Mi"}}
    ),
    "a toleration of everything": _tolerate(operator="Exists"),
    "a toleration for a time": _tolerate(key="a", operator="Exists", effect="NoExecute", tolerationSeconds=60),
    "a run policy": manifest(runPolicy={"suspend": True, "activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 0}),
    "managed by another": manifest(managedBy="kueue.x-k8s.io/multikueue"),
}

BAD: dict[str, dict[str, Any]] = {
    "a name with a dot": manifest(name="support.bot"),
    "nothing after the scheme": _model(uri="s3:///"),
    "a path with ..": _model(uri="s3://models/../base"),
    **{
        f"a bucket called {name}": _model(uri=f"s3://{name}/x")
        for name in ("a?", "a#", "a\\", "a:80", "a*", ".a", "-a")
    },
    "a container that ends a host": manifest(output={"uri": "az://evil.example?.ours/x"}),
    "a claim that ends a host": manifest(output={"uri": "pvc://claim?/x"}),
    "an owner that is none": _model(uri="hf://evil?/base"),
    "a model with a query": _model(uri="s3://models/base?X-Amz-Signature=0"),
    "data with a query": _train({"uri": "s3://data/a.jsonl?X-Amz-Signature=0"}),
    "data with a query after a wildcard": _train({"uri": "s3://data/part-?.jsonl?sig=0"}),
    "an output with a query": manifest(output={"uri": "az://out/x?sig"}),
    "an output with a fragment": manifest(output={"uri": "gs://out/x#y"}),
    **{
        f"an endpoint {rest}": _model(endpoint=f"https://s3.example{rest}")
        for rest in ("/?sig=0", "?sig=0", "#x", "/x#y", "\\.evil.example", "/x\\y", ":", ":123456", "%2f.evil.example")
    },
    "an endpoint without a host": _model(endpoint="https:///x"),
    "credentials of a volume": _model(uri="pvc://claim/base", credentials={"secretName": "bucket"}),
    "a region of Google": manifest(output={"uri": "gs://out", "region": "eu-west-1"}),
    "path style of a volume": manifest(output={"uri": "pvc://claim/out", "pathStyle": True}),
    "a model that is a pattern": _model(uri="s3://models/*"),
    "a model that is an ONNX file": _model(uri="s3://models/base.onnx"),
    "three parts on the hub": _model(uri="hf://org/base/extra"),
    "an archive in capitals": _train({"uri": "s3://data/TRAIN.ZIP"}),
    "validation data in a zip": _train(validation={"sources": [{"uri": "s3://data/a.tar.gz"}]}),
    "validation listed twice": _train(validation={"sources": [{"uri": "s3://d/a.csv"}, {"uri": "s3://d/a.csv"}]}),
    "an empty list of sources alone": _train(validation={"sources": []}),
    "65 sources": _train(*({"uri": f"s3://data/part-{number}.jsonl"} for number in range(65))),
    "all-linear saved whole": _lora(modulesToSave=["all-linear"]),
    "saved twice": _lora(modulesToSave=["lm_head", "lm_head"]),
    "all-linear twice": _lora(targetModules=["all-linear", "all-linear"]),
    "peak of the default schedule": _schedule(peakFraction=0.3),
    "a floor under a constant rate": _schedule(type="Constant", minimumFraction=0.1),
    "decay of a cosine": _schedule(type="Cosine", decayFraction=0.5),
    "momentum of the default optimizer": _optimizer(momentum=0.9),
    "beta of SGD": _optimizer(type="SGD", beta1=0.8),
    "second beta of Adafactor": _optimizer(type="Adafactor", beta2=0.9),
    "8-bit AdamW under FSDP": manifest(
        training={"optimizer": {"type": "PagedAdamW8bit"}},
        distributed={"strategy": {"type": "FSDP"}},
        resources=_GPU,
    ),
    "early stopping without validation": manifest(training={"evaluateEverySteps": 5, "earlyStopping": {}}),
    "NVMe at stage 2": _deepspeed({**_GPU, "scratch": "1Gi"}, zeroStage=2, offloadOptimizer="NVMe"),
    "a dotted setting of DeepSpeed": _deepspeed(configuration={"zero_optimization.overlap_comm": True}),
    "a block of settings that is none": _deepspeed(configuration={"zero_optimization": 3}),
    "more micro-batch than ranks allow": manifest(training={"globalBatchSize": 4, "microBatchSize": 8}),
    "a default batch that three nodes cannot share": manifest(distributed={"nodes": 3}),
    "a toleration for a time without effect": _tolerate(key="a", operator="Exists", tolerationSeconds=60),
    "an effect that is none": _tolerate(key="a", operator="Exists", effect="Never"),
    "a negative deadline": manifest(runPolicy={"activeDeadlineSeconds": -1}),
    "a free pod template": manifest(resources={"podTemplate": {"spec": {"hostNetwork": True}}}),
    "too many nodes": manifest(distributed={"nodes": 5000}),
    "an integer far too large": manifest(training={"maxSteps": 2**63}),
}
