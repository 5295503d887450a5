"""FineTuneJobs on the local cluster: the product installed by Helm, a tiny model and data in S3, jobs to their end."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deploy.local.cluster import images, tools
from deploy.local.cluster.object_storage import BUCKET
from ruamel.yaml import YAML
from tests.builders import build_model, conversations, write_jsonl
from tests.cluster.cluster import LocalCluster, only_one, wait_for

from finetune_storage import ObjectStore, fetch_artifact

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "charts" / "finetune-operator"
RELEASE, SYSTEM = "finetune", "finetune-system"
OPERATOR = "deployment/finetune-operator"
OPERATOR_PODS = "app.kubernetes.io/component=operator"
SECRET = "bucket"
MODEL, DATA = f"s3://{BUCKET}/tests/model", f"s3://{BUCKET}/tests/train.jsonl"
PROGRESS_SECONDS = 2  # the product's default is 10; tests want to see more of a short job
GRACE_SECONDS = 15  # of a training pod; 120 by default, but a tiny job's checkpoint is written in no time

# The job that several tests live through, undisturbed or not: its adapter is always the same.
EVERY = 20  # steps between checkpoints
SECONDS = 18  # that it trains for, about, on two free cores: see `steps`
FILES = ("adapter_model.safetensors", "adapter_config.json")

Adapter = dict[str, bytes]

STRATEGIES: dict[str, dict[str, Any]] = {
    "DDP": {"type": "DDP"},
    "FSDP": {"type": "FSDP"},
    "ZeRO-2": {"type": "DeepSpeed", "deepspeed": {"zeroStage": 2}},
    "ZeRO-3": {"type": "DeepSpeed", "deepspeed": {"zeroStage": 3}},
    "ZeRO-3 offloaded": {
        "type": "DeepSpeed",
        "deepspeed": {"zeroStage": 3, "offloadOptimizer": "CPU", "offloadParameters": "CPU"},
    },
}
METHODS: dict[str, dict[str, Any]] = {
    "Full": {"type": "Full"},
    "LoRA": {"type": "LoRA", "lora": {"rank": 4}},
    "QLoRA": {"type": "QLoRA", "lora": {"rank": 4}},
}


def install(cluster: LocalCluster, *, values: dict[str, Any] | None = None, upgrade: bool = True) -> None:
    """`helm upgrade --install` of this working tree: images built and loaded if need be. Once per run and change."""
    with only_one("install"):
        names = images.build()
        releases = helm(cluster, "list", "--namespace", SYSTEM, "--output", "json")
        wanted = json.dumps([names, values or {}], sort_keys=True)
        mark = installed(cluster)
        if RELEASE in releases and not (upgrade and values) and mark.exists() and mark.read_text() == wanted:
            return
        images.load(cluster.layout, names.values())
        text = json.dumps(_values(names) | (values or {}))
        file = cluster.layout.state / "test-values.json"
        file.write_text(text)
        command = ["upgrade", "--install", RELEASE, str(CHART), "--namespace", SYSTEM, "--create-namespace"]
        helm(cluster, *command, "--values", str(file), "--wait", "--timeout", "120s")
        mark.write_text(wanted)


def installed(cluster: LocalCluster) -> Path:
    """What is installed; without this file the next `install` installs again."""
    return cluster.layout.state / "installed-by-tests"


def helm(cluster: LocalCluster, *words: str) -> str:
    """The output of Helm; AssertionError with its words if it fails."""
    command = [str(tools.program("helm")), *words]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"helm {words[0]}: {done.stderr.strip()}"
    return done.stdout


def _values(names: dict[str, str]) -> dict[str, Any]:
    image = {}
    for target, name in names.items():
        repository, _, tag = name.rpartition(":")
        image[target] = {"repository": repository, "tag": tag}
    return {
        "image": image,
        "fullnameOverride": "finetune-operator",
        "log": {"format": "text", "level": "info"},
        "progress": {"intervalSeconds": PROGRESS_SECONDS},
        "training": {"terminationGracePeriodSeconds": GRACE_SECONDS},
        "collectiveTimeoutSeconds": 60,
        "rendezvousTimeoutSeconds": 240,
        # the node that tests break is n2: the operator lives on n1
        "nodeSelector": {"kubernetes.io/hostname": "n1"},
    }


def put_ground(cluster: LocalCluster, folder: Path) -> None:
    """The tiny model and the data in the cluster's bucket; the same bytes every time."""
    with only_one("ground"):
        store = ObjectStore.open(f"s3://{BUCKET}/tests", environment=storage_environment(cluster))
        if store.exists("train.jsonl"):
            return
        model = folder / "model"
        build_model(model)
        write_jsonl(folder / "train.jsonl", conversations(60))
        for path in sorted(model.iterdir()):
            store.put(f"model/{path.name}", path)
        store.put("train.jsonl", folder / "train.jsonl")


def storage_environment(cluster: LocalCluster) -> dict[str, str]:
    return dict(cluster.s3().environment)


@functools.cache
def steps() -> int:
    """Of the long job: some SECONDS of training whatever this machine can do today, the same number in all of a run.

    A fault must come before its end, and an operator that looks every two seconds must see each of its attempts.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(build_model(Path(folder)))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.ones((4, 64), dtype=torch.long)

    def seconds(number: int) -> float:
        began = time.monotonic()
        for _ in range(number):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.monotonic() - began

    fastest = min(seconds(10) for _ in range(20)) / 10  # whoever interrupts makes a sample longer, never shorter
    a_second = 0.35 / fastest  # a rank does as much once more: gradients to its peer, checkpoints, reports
    return max(600, round(SECONDS * a_second / EVERY) * EVERY)


class Workshop:
    """Jobs of one test in a namespace of its own, with the bucket's Secret in it."""

    def __init__(self, cluster: LocalCluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        environment = storage_environment(cluster)
        keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
        self.cluster.apply(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": SECRET},
                "stringData": {name: environment[name] for name in keys},
            },
            namespace=namespace,
        )

    # ---- manifests

    def manifest(self, name: str, method: str, strategy: str, **blocks: dict[str, Any]) -> dict[str, Any]:
        """A job of two pods with one rank each; ``blocks`` are merged into the spec's blocks."""
        place = {"endpoint": storage_environment(self.cluster)["AWS_ENDPOINT_URL"]}
        access = {**place, "credentials": {"secretName": SECRET}}
        spec: dict[str, Any] = {
            "model": {"uri": MODEL, **access},
            "dataset": {"train": [{"uri": DATA, **access}], "maxSequenceLength": 128, "packing": False},
            "method": METHODS[method],
            "training": {"maxSteps": 20, "globalBatchSize": 8, "precision": "FP32", "learningRate": 3e-3},
            "distributed": {"nodes": 2, "processesPerNode": 1, "strategy": STRATEGIES[strategy]},
            "resources": {"requests": {"cpu": "200m", "memory": "1Gi"}, "sharedMemory": "256Mi"},
            "checkpoint": {"everySteps": 5},
            "output": {"uri": f"s3://{BUCKET}/tests/out/{self.namespace}", **access},
        }
        for block, changes in blocks.items():
            spec[block] = {**spec.get(block, {}), **changes}
        return {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name},
            "spec": spec,
        }

    def slow(self, number: int | None = None, **blocks: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Blocks of a job that trains long enough to be disturbed and checkpoints often."""
        training = {"maxSteps": number or steps(), "globalBatchSize": 8, "precision": "FP32", "learningRate": 3e-3}
        return {"training": training, "checkpoint": {"everySteps": EVERY}, **blocks}

    def long_job(self) -> dict[str, Any]:
        """``job``: of `steps` steps, with a checkpoint after EVERY."""
        return self.manifest("job", "LoRA", "DDP", **self.slow())

    # ---- life

    def submit(self, manifest: dict[str, Any]) -> str:
        """`kubectl apply`; the job's name."""
        self.cluster.apply(manifest, namespace=self.namespace)
        return str(manifest["metadata"]["name"])

    def patch(self, name: str, spec: dict[str, Any]) -> None:
        words = ["patch", "finetunejob", name, "-n", self.namespace, "--type=merge", "-p", json.dumps({"spec": spec})]
        self.cluster.kubectl(*words)

    def status(self, name: str) -> dict[str, Any]:
        found = self.cluster.get("finetunejob", name, self.namespace)
        return {} if found is None else dict(found.get("status", {}))

    def pods(self, name: str) -> list[dict[str, Any]]:
        return self.cluster.list("pods", self.namespace, f"finetune.dev/job={name}")

    def pod(self, name: str, index: int) -> dict[str, Any]:
        """The newest living pod of an index."""
        living = [pod for pod in self.pods(name) if _index(pod) == index and "deletionTimestamp" not in pod["metadata"]]
        return max(living, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def wait(self, name: str, state: str, seconds: float = 300) -> dict[str, Any]:
        """The status as soon as the job is in ``state``; fails at once if it ends otherwise, with the whole story."""

        def arrived() -> dict[str, Any] | None:
            status = self.status(name)
            now = status.get("state")
            if now in {"Failed", "Invalid", "Complete"} and now != state:
                raise AssertionError(f"{name} is {now}, not {state}")
            return status if now == state else None

        found: dict[str, Any] = self.until(name, f"is not {state}", arrived, seconds)
        return found

    def wait_step(self, name: str, step: int, seconds: float = 240) -> None:
        """Until the status tells of this step (the job is up to two seconds further)."""

        def reached() -> bool:
            status = self.status(name)
            if status.get("state") in {"Failed", "Invalid", "Complete"}:
                raise AssertionError(f"{name} ended before step {step}")
            return int(status.get("progress", {}).get("step", 0)) >= step

        self.until(name, f"does not reach step {step}", reached, seconds)

    def until(self, name: str, problem: str, condition: Callable[[], Any], seconds: float) -> Any:
        """The first true answer; where there is none, or the condition itself fails, the job's whole story."""
        try:
            return wait_for(condition, seconds, f"{name} {problem}", pause=0.3)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.story(name)}") from None

    def story(self, name: str) -> str:
        """Everything one wants to read when a job went wrong."""
        parts = [json.dumps(self.status(name), indent=1)]
        parts.append(self.cluster.kubectl("get", "pods,events", "-n", self.namespace, "-o", "wide", check=False))
        for pod in self.pods(name):
            words = ["logs", "-n", self.namespace, pod["metadata"]["name"], "--tail=40"]
            parts.append(f"--- {pod['metadata']['name']}\n" + self.cluster.kubectl(*words, check=False))
        parts.append(self.cluster.kubectl("logs", "-n", SYSTEM, OPERATOR, "--tail=40", check=False))
        return "\n".join(parts)

    # ---- results

    def fetch(self, status: dict[str, Any], directory: Path) -> Path:
        """The published artifact, every digest checked."""
        artifacts = status["artifacts"]
        store = ObjectStore.open(artifacts["uri"], environment=storage_environment(self.cluster))
        fetch_artifact(store, directory, manifest_sha256=artifacts["manifestSha256"])
        return directory

    def adapter(self, status: dict[str, Any], directory: Path) -> Adapter:
        """The published adapter's bytes."""
        self.fetch(status, directory)
        return {name: (directory / name).read_bytes() for name in FILES}

    def run_locally(self, manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
        """`finetune run` of the same manifest on this machine, writing elsewhere; its result as JSON."""
        place = manifest["spec"]["output"]
        elsewhere = {**place, "uri": f"{place['uri']}/local"}
        manifest = {**manifest, "spec": {**manifest["spec"], "output": elsewhere}}
        text = io.StringIO()
        YAML().dump(manifest, text)
        command = [str(Path(sys.executable).with_name("finetune")), "run", "-", "--output", "json"]
        environment = {**os.environ, **storage_environment(self.cluster), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--state-dir", str(folder)],
            input=text.getvalue(),
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def operator_pod(cluster: LocalCluster) -> dict[str, Any]:
    """The newest that nobody has deleted: one of before an upgrade may still be on its way out."""
    pods = cluster.list("pods", SYSTEM, OPERATOR_PODS)
    living = [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]
    return max(living, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))


def _index(pod: dict[str, Any]) -> int:
    return int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])


def rank_process(cluster: LocalCluster, pod: dict[str, Any]) -> int:
    """The process id, on this machine, of a rank inside a pod (cgroups name the pod)."""
    uid = pod["metadata"]["uid"]
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"finetune_trainer.worker" in words and uid in (path / "cgroup").read_text():
                return int(path.name)
    raise AssertionError(f"no rank of {pod['metadata']['name']} runs on this machine")


@contextlib.contextmanager
def held(shop: Workshop, name: str) -> Iterator[None]:
    """A job stands still: one of its ranks is stopped, and the others wait for it (for 60 s, then they give up)."""
    rank = rank_process(shop.cluster, shop.pod(name, 0))
    os.kill(rank, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)


@contextlib.contextmanager
def workshop(cluster: LocalCluster) -> Iterator[Workshop]:
    """A workshop in a new ``restricted`` namespace."""
    with cluster.namespace("jobs") as namespace:
        yield Workshop(cluster, namespace)
