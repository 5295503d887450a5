"""The demo on Kubernetes: install with Helm, `kubectl apply` one manifest, get one verified adapter.

    1 a cluster: the local one of this repository, or yours ($KUBECONFIG)
    2 a base model: the one of `make demo` if it is there, else it is trained now, on this machine
    3 the operator by `helm upgrade --install`; model and data into object storage
    4 `kubectl apply -f cluster.yaml`: QLoRA under FSDP on two nodes, followed live
    5 what Prometheus saw; the adapter fetched, and judged by plain PEFT in a fresh process

For a cluster of your own set KUBECONFIG, OPERATOR_IMAGE and TRAINER_IMAGE (names that its nodes can pull or hold),
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (an S3 server that its pods and this machine reach) and
DEMO_BUCKET; PROMETHEUS_URL if there is one. Ends with a sentence and exit code 1 if a claim fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import run as demo
from ruamel.yaml import YAML

sys.path.insert(0, str(demo.REPOSITORY))  # `deploy` is a tool of the repository, not part of the distribution

from deploy.local.cluster import cluster as local
from deploy.local.cluster import images, tools
from deploy.local.cluster.layout import PROMETHEUS, ClusterError
from deploy.local.cluster.object_storage import BUCKET, server

from finetune_storage import ObjectStore

NAMESPACE, SYSTEM, NAME = "finetune-demo", "finetune-system", "stdlib-answers"
LIMIT_SECONDS = 900
SERIES = ("finetune_loss", "finetune_tokens_per_second", "finetune_step", 'finetune_operator_jobs{state="Running"}')
FOREIGN = (
    "OPERATOR_IMAGE",
    "TRAINER_IMAGE",
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "DEMO_BUCKET",
)


@dataclass(frozen=True)
class Place:
    """A cluster and the object storage beside it."""

    kubeconfig: str
    images: dict[str, str]  # operator, trainer
    storage: dict[str, str]  # AWS_* variables
    bucket: str
    prometheus: str | None

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.storage, "KUBECONFIG": self.kubeconfig}


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    try:
        with a_cluster() as place:
            on(place)
    except (demo.ClaimFailed, ClusterError) as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo stopped; `make demo-cluster` starts again.", file=sys.stderr)
        return 130
    demo.say(f"\nDone in {time.monotonic() - started:.0f} s.")
    return 0


def on(place: Place) -> None:
    headline(2, "A base model and questions")
    base_model()
    headline(3, "The operator, by Helm")
    install(place)
    upload(place)
    headline(4, "kubectl apply: QLoRA under FSDP on two nodes")
    status, times, seen = apply_and_follow(place)
    headline(5, "What came of it")
    say_seen(place, seen)
    adapter = demo.STATE / "cluster-adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    finetune(place, "fetch", NAME, "--namespace", NAMESPACE, "-o", str(adapter))
    verdict = judge(status, adapter)
    before, after = verdict["baseLoss"], verdict["tunedLoss"]
    demo.say(f"validation loss by plain PEFT: {before:.4f} -> {after:.4f} ({(after - before) / before:+.1%})")
    demo.say("apply -> " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in times.items()))


@contextlib.contextmanager
def a_cluster() -> Iterator[Place]:
    headline(1, "A cluster")
    if os.environ.get("KUBECONFIG"):
        missing = [name for name in FOREIGN if not os.environ.get(name)]
        if missing:
            raise demo.ClaimFailed(
                f"KUBECONFIG names a cluster, so these must be set too: {', '.join(missing)};"
                f" see {Path(__file__).name}. Without KUBECONFIG the demo starts a cluster of its own."
            )
        known = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        names = {"operator": os.environ["OPERATOR_IMAGE"], "trainer": os.environ["TRAINER_IMAGE"]}
        bucket, prometheus = os.environ["DEMO_BUCKET"], os.environ.get("PROMETHEUS_URL")
        yield Place(os.environ["KUBECONFIG"], names, known, bucket, prometheus)
        return
    ran = local.current()
    names = images.build()
    layout = ran or local.up(2)
    try:
        images.load(layout, names.values())
        storage = dict(server(layout).environment)
        yield Place(str(layout.kubeconfig), names, storage, BUCKET, f"http://{PROMETHEUS}")
    finally:
        if ran is None:
            local.down()


def base_model() -> None:
    """`.demo/base-model` and `.demo/data`, as `make demo` leaves them; made now if they are not there."""
    wanted = [demo.STATE / "base-model" / "config.json", demo.STATE / "data" / "questions-train.jsonl"]
    if all(path.is_file() for path in wanted):
        demo.say(f"taken from {demo.STATE} (of the last `make demo`)")
        return
    shutil.rmtree(demo.STATE, ignore_errors=True)
    demo.STATE.mkdir()
    corpus.build(demo.STATE / "data", demo.CORPUS_CHARACTERS)
    with demo.object_storage() as (output, environment):
        base = demo.run_job("base.yaml", output, environment)
        demo.fetch(base, demo.STATE / "base-model", environment)


def install(place: Place) -> None:
    values = {
        "image": {target: image_values(name) for target, name in place.images.items()},
        "fullnameOverride": "finetune-operator",
        "progress": {"intervalSeconds": 2},
    }
    file = demo.STATE / "values.json"
    file.write_text(json.dumps(values))
    chart = str(demo.REPOSITORY / "charts" / "finetune-operator")
    run(
        "helm",
        place,
        "upgrade",
        "--install",
        "finetune",
        chart,
        "-n",
        SYSTEM,
        "--create-namespace",
        "--wait",
        "-f",
        str(file),
    )
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    keys = {name: value for name, value in place.storage.items() if name != "AWS_ENDPOINT_URL"}
    apply(place, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})
    metadata = {"name": "bucket", "namespace": NAMESPACE}
    apply(place, {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": keys})
    demo.say(f"installed; the namespace {NAMESPACE} admits restricted pods only")


def image_values(name: str) -> dict[str, str]:
    """``registry:5000/x:tag``, ``x@sha256:...`` or ``x`` (which is ``x:latest``), as the chart takes images apart."""
    named, _, digest = name.partition("@")
    path, slash, last = named.rpartition("/")
    last, _, tag = last.partition(":")
    version = {"digest": digest} if digest else {"tag": tag or "latest"}
    return {"repository": f"{path}{slash}{last}", **version}


def upload(place: Place) -> None:
    store = ObjectStore.open(f"s3://{place.bucket}/demo", environment=place.storage)
    for path in sorted((demo.STATE / "base-model").iterdir()):
        if path.is_file():
            store.put(f"base-model/{path.name}", path)
    for name in ("questions-train.jsonl", "questions-held-out.jsonl"):
        store.put(name, demo.STATE / "data" / name)
    demo.say(f"model and questions at s3://{place.bucket}/demo")


def manifest(place: Place) -> dict[str, Any]:
    """cluster.yaml with the place's bucket and endpoint."""
    text = (demo.HERE / "cluster.yaml").read_text(encoding="utf-8").replace("s3://finetune/", f"s3://{place.bucket}/")
    document: dict[str, Any] = YAML(typ="safe").load(text)
    spec = document["spec"]
    sources = [*spec["dataset"]["train"], *spec["dataset"]["validation"]["sources"]]
    for block in (spec["model"], spec["output"], *sources):
        block["endpoint"] = place.storage["AWS_ENDPOINT_URL"]
    return document


def apply_and_follow(place: Place) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """(final status, seconds since `kubectl apply` by milestone, newest value of each series that Prometheus had)."""
    run("kubectl", place, "delete", "finetunejob", NAME, "-n", NAMESPACE, "--ignore-not-found", "--wait")
    begun = time.monotonic()
    apply(place, manifest(place), "-n", NAMESPACE)
    times: dict[str, float] = {}
    seen: dict[str, float] = {}
    told = ""
    while True:
        now = time.monotonic() - begun
        try:
            found = json.loads(run("kubectl", place, "get", "finetunejob", NAME, "-n", NAMESPACE, "-o", "json"))
        except demo.ClaimFailed as failure:  # an API server may be away for a moment
            if now > LIMIT_SECONDS:
                raise
            demo.say(f"{now:6.1f} s  asked again: {failure}")
            time.sleep(2)
            continue
        status = found.get("status", {})
        state = status.get("state", "")
        for what, reached in (
            ("pods running", state in {"Running", "Publishing", "Complete"}),
            ("first step", status.get("progress", {}).get("step", 0) > 0),
            ("Complete", state == "Complete"),
        ):
            if reached:
                times.setdefault(what, now)
        line = f"{state}: {status.get('message', '')}"
        if line != told:
            demo.say(f"{now:6.1f} s  {line}")
            told = line
        if state in {"Complete", "Failed", "Invalid"}:
            break
        if now > LIMIT_SECONDS:
            raise demo.ClaimFailed(f"{NAME} was not complete after {LIMIT_SECONDS} s: {line}")
        seen |= query(place)
        time.sleep(0.5)
    if state != "Complete":
        raise demo.ClaimFailed(f"{NAME} ended as {state}: {status.get('message')}")
    return status, times, seen


def query(place: Place) -> dict[str, float]:
    """What Prometheus says now, by series; empty where there is no Prometheus."""
    values: dict[str, float] = {}
    for series in SERIES if place.prometheus else ():
        url = f"{place.prometheus}/api/v1/query?" + urllib.parse.urlencode({"query": series})
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            result = json.load(answer)["data"]["result"]
            if result:
                values[series] = float(result[0]["value"][1])
    return values


def say_seen(place: Place, seen: dict[str, float]) -> None:
    if place.prometheus is None:
        demo.say("PROMETHEUS_URL is not set: not asked what it saw")
        return
    missing = [series for series in SERIES if series not in seen]
    if missing:
        raise demo.ClaimFailed(f"Prometheus at {place.prometheus} has no {', '.join(missing)}.")
    demo.say("Prometheus: " + ", ".join(f"{series} = {value:.4g}" for series, value in seen.items()))


def judge(status: dict[str, Any], adapter: Path) -> dict[str, Any]:
    """Plain PEFT measures what the status claims."""
    command = [sys.executable, str(demo.HERE / "verify.py"), "--base", str(demo.STATE / "base-model")]
    questions = demo.STATE / "data" / "questions-held-out.jsonl"
    command += ["--adapter", str(adapter), "--questions", str(questions)]
    command += ["--ask", *(f"What does {name} do?" for name in corpus.SHOWN)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "TQDM_DISABLE": "1"}, check=False)
    if done.returncode != 0:
        raise demo.ClaimFailed(f"plain PEFT could not load the fetched adapter (exit code {done.returncode}).")
    verdict: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    demo.judge(verdict, {name: float(value) for name, value in status["metrics"].items()})
    return verdict


def apply(place: Place, document: dict[str, Any], *words: str) -> None:
    text = io.StringIO()
    YAML().dump(document, text)
    run("kubectl", place, "apply", *words, "-f", "-", text=text.getvalue())


def finetune(place: Place, *words: str) -> None:
    demo.say(f"$ finetune {' '.join(words)}")
    command = [str(Path(sys.executable).with_name("finetune")), *words]
    if subprocess.run(command, env=place.environment, check=False).returncode != 0:
        raise demo.ClaimFailed(f"`finetune {words[0]}` failed.")


def run(program: str, place: Place, *words: str, text: str | None = None) -> str:
    path = shutil.which(program) if os.environ.get("KUBECONFIG") else str(tools.program(program))
    if path is None:
        raise demo.ClaimFailed(f"{program} is not on PATH; install it.")
    done = subprocess.run(
        [path, *words], env=place.environment, input=text, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise demo.ClaimFailed(f"`{program} {' '.join(words)}`: {done.stderr.strip()}")
    return done.stdout


def headline(number: int, text: str) -> None:
    demo.say(f"\n[{number}/5] {text}")


if __name__ == "__main__":
    sys.exit(main())
