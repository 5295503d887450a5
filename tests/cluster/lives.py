"""Lives of jobs that the tests of security and of monitoring look at: lived once per run, kept as plain facts.

``whole`` trains, loses a pod whose node does not confirm it, is suspended, resumed, completes and is removed when its
time to live is over. ``refused`` has credentials that the object store does not know. ``unclear`` is invalid. ``idle``
is suspended from the beginning; somebody deletes its Job, and then its spec changes.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pickle
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deploy.local.cluster.object_storage import BUCKET
from tests.cluster.canary import unpacked_release
from tests.cluster.cluster import LocalCluster, undisturbed, wait_for
from tests.cluster.live_monitoring import ask, shipped
from tests.cluster.recording import Recorder, Seen
from tests.cluster.workshop import (
    OPERATOR,
    RELEASE,
    SECRET,
    SYSTEM,
    Workshop,
    operator_pod,
    rank_process,
    steps,
    storage_environment,
    workshop,
)

from finetune_storage import ObjectStore

STRANGERS = "strangers"  # a Secret whose keys the object store does not know
ACCOUNT = f"system:serviceaccount:{SYSTEM}:finetune-operator"
_SECONDS_TO_LIVE = 3
_RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass
class Lives:
    """Facts. Times are unix times."""

    namespace: str
    words: dict[str, str]  # name -> secret word; ``planted`` is the one that the tests put where it does not belong
    began: float = 0.0
    ended: float = 0.0
    seen: Seen = field(default_factory=Seen)
    requests: list[dict[str, Any]] = field(
        default_factory=list
    )  # audit events of the operator, since the cluster began
    operator_began: str = ""  # RFC 3339; of its pod
    violations: set[str] = field(
        default_factory=set
    )  # names of what breaks Pod Security ``restricted``, by the audit log
    places: dict[str, bytes] = field(default_factory=dict)  # all that must hold no secret word
    rules: list[dict[str, Any]] = field(default_factory=list)  # as Prometheus evaluated them
    targets: list[dict[str, Any]] = field(default_factory=list)  # that Prometheus asked while jobs trained
    metrics: str = ""  # the operator's page after all


def lived(cluster: LocalCluster) -> Lives:
    """The facts of this test run; the first worker that asks lives through them."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    file = cluster.layout.state / "lives-of-tests.pickle"
    with (cluster.layout.state / "lives-of-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if file.exists():
            known_run, lives = pickle.loads(file.read_bytes())
            if known_run == run:
                return lives  # type: ignore[no-any-return]
        with undisturbed(exclusive=False), workshop(cluster) as shop:
            lives = _live(shop)
        file.write_bytes(pickle.dumps((run, lives)))
        return lives


def _live(shop: Workshop) -> Lives:
    cluster, lives = shop.cluster, Lives(shop.namespace, _words(shop))
    _prepare(shop, lives)
    recorder = Recorder(cluster.layout, shop.namespace)
    planted = {"record": "planted", "expr": "vector(1)"}
    planted["labels"] = {"namespace": shop.namespace, "word": lives.words["planted"]}  # type: ignore[assignment]
    with shipped(cluster.layout, {"groups": [{"name": "planted", "rules": [planted]}]}):
        lives.began = time.time()
        try:
            _plant(shop, lives.words["planted"])
            _play(shop, lives)
            lives.places |= _places_of_the_moment(shop)
            _leave(shop)
            lives.ended = time.time()
        finally:
            lives.seen = recorder.stop()
        lives.rules = [rule for group in ask("rules")["groups"] for rule in group["rules"]]
        lives.places |= _places_afterwards(shop, lives)
    pod = operator_pod(cluster)["metadata"]
    lives.operator_began = pod["creationTimestamp"]
    lives.metrics = cluster.kubectl(
        "get", "--raw", f"/api/v1/namespaces/{SYSTEM}/pods/{pod['name']}:8080/proxy/metrics"
    )
    lives.requests = [event for event in cluster.audit(ACCOUNT) if "objectRef" in event]
    lives.violations = _violations(cluster, shop.namespace)
    return lives


def _words(shop: Workshop) -> dict[str, str]:
    """Secret words that are nowhere else in the world; the signs make every encoding differ."""
    environment = storage_environment(shop.cluster)
    return {
        "access key": environment["AWS_ACCESS_KEY_ID"],
        "secret key": environment["AWS_SECRET_ACCESS_KEY"],
        "strange access key": "AK" + secrets.token_hex(9).upper(),
        "strange secret key": f"{secrets.token_urlsafe(12)}/+{secrets.token_urlsafe(12)}",
        "token": f"hf_{secrets.token_urlsafe(12)}&=%{secrets.token_urlsafe(12)}",
        "planted": f"{secrets.token_urlsafe(12)}+/={secrets.token_urlsafe(12)}",
    }


def _prepare(shop: Workshop, lives: Lives) -> None:
    words = lives.words
    labels = [f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("audit", "warn")]
    shop.cluster.kubectl("label", "namespace", shop.namespace, *labels)
    keys = {"AWS_ACCESS_KEY_ID": words["strange access key"], "AWS_SECRET_ACCESS_KEY": words["strange secret key"]}
    ours = {"AWS_ACCESS_KEY_ID": words["access key"], "AWS_SECRET_ACCESS_KEY": words["secret key"]}
    region = {"AWS_REGION": storage_environment(shop.cluster)["AWS_REGION"], "HF_TOKEN": words["token"]}
    for name, data in ((STRANGERS, keys), (SECRET, ours)):
        manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data | region}
        shop.cluster.apply(manifest, namespace=shop.namespace)


# ---- the jobs ----------------------------------------------------------------------------------------------------


def _play(shop: Workshop, lives: Lives) -> None:
    validation = {"validation": {"fraction": 0.2}}
    blocks = shop.slow(max(800, steps()), checkpoint={"everySteps": 50}, runPolicy={"ttlSecondsAfterFinished": 3600})
    blocks["training"]["evaluateEverySteps"] = 50
    shop.submit(shop.manifest("whole", "LoRA", "DDP", dataset=validation, **blocks))
    stranger = {"credentials": {"secretName": STRANGERS}}
    refused = shop.manifest("refused", "LoRA", "DDP", model=stranger, output=stranger)
    refused["spec"]["dataset"]["train"][0] |= stranger
    refused["spec"]["distributed"]["nodes"] = 1
    refused["spec"]["runPolicy"] = {"ttlSecondsAfterFinished": _SECONDS_TO_LIVE}
    shop.submit(refused)
    shop.submit(shop.manifest("unclear", "LoRA", "DDP", model={"trustRemoteCode": True}))
    shop.wait("unclear", "Invalid", seconds=60)
    shop.submit(shop.manifest("idle", "LoRA", "DDP", runPolicy={"suspend": True}))
    shop.wait("idle", "Suspended", seconds=60)
    for act in (
        lambda: shop.cluster.kubectl("delete", "job", "ftj-idle", "-n", shop.namespace),
        lambda: shop.patch("idle", {"checkpoint": {"keep": 7}}),
    ):
        _remade(shop, "idle", act)

    shop.wait_step("whole", 5)
    lives.targets = shop.until("whole", "is not scraped", _asked_targets, 60)
    _lose_pod(shop, "whole", 1)
    shop.until("whole", "does not train again", lambda: _resumed(shop, "whole"), 240)
    shop.patch("whole", {"runPolicy": {"suspend": True}})
    shop.wait("whole", "Suspended", seconds=120)
    shop.patch("whole", {"runPolicy": {"suspend": False}})
    shop.wait("whole", "Complete")


def _asked_targets() -> list[dict[str, Any]]:
    """What Prometheus asks, as soon as it had good answers of the operator and of both pods of ``whole``.

    On a busy machine one is late, or fails once.
    """
    targets: list[dict[str, Any]] = ask("targets", state="active")["activeTargets"]
    ours = [target for target in targets if target["labels"].get("finetune_job") == "whole"]
    ours += [target for target in targets if target["scrapePool"] == "finetune-operator"]
    found = {(target["scrapePool"], target["labels"].get("finetune_node")) for target in ours}
    wanted = {("finetune-operator", None), ("finetune-trainer", "0"), ("finetune-trainer", "1")}
    return targets if wanted <= found and all(target["health"] == "up" for target in ours) else []


def _resumed(shop: Workshop, name: str) -> bool:
    attempts = shop.status(name).get("attempts", [])
    return len(attempts) > 1 and "resumedFromStep" in attempts[-1] and "endedAt" not in attempts[-1]


def _remade(shop: Workshop, name: str, act: Callable[[], object]) -> None:
    """After ``act`` the operator makes the Job of a job again, and finds the other children there."""

    def uid() -> str | None:
        job = shop.cluster.get("job", f"ftj-{name}", shop.namespace)
        return str(job["metadata"]["uid"]) if job else None

    before = uid()
    act()
    wait_for(lambda: uid() not in {None, before}, 60, f"the Job of {name} is not made again")


def _lose_pod(shop: Workshop, name: str, index: int) -> None:
    """Delete a pod that hangs with its runtime: the node never confirms, and the operator removes it by force."""
    pod = shop.pod(name, index)
    uid = pod["metadata"]["uid"]
    with _hung(shop.cluster, pod):
        words = ["delete", "pod", pod["metadata"]["name"], "-n", shop.namespace, "--grace-period=1", "--wait=false"]
        shop.cluster.kubectl(*words)
        gone = "keeps the pod that its node cannot end"
        shop.until(name, gone, lambda: uid not in [each["metadata"]["uid"] for each in shop.pods(name)], 90)


@contextmanager
def _hung(cluster: LocalCluster, pod: dict[str, Any]) -> Iterator[None]:
    """A pod's processes, and containerd's process that stands between them and the runtime, are stopped."""
    rank = rank_process(cluster, pod)
    pids = [_shim_of(rank)]
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if pod["metadata"]["uid"] in (path / "cgroup").read_text():
                pids.append(int(path.name))
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in reversed(pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _shim_of(pid: int) -> int:
    while not Path(f"/proc/{pid}/comm").read_text().startswith("containerd-shim"):
        status = Path(f"/proc/{pid}/status").read_text()
        pid = int(status.split("PPid:\t", 1)[1].split("\n", 1)[0])
    return pid


def _leave(shop: Workshop) -> None:
    """The time of the finished jobs is over, and Prometheus has noticed."""
    shop.patch("whole", {"runPolicy": {"ttlSecondsAfterFinished": 1}})
    for name in ("whole", "refused"):
        wait_for(lambda name=name: shop.cluster.get("finetunejob", name, shop.namespace) is None, 60, f"{name} stays")
    wait_for(lambda: not shop.pods("whole") and not shop.pods("refused"), 60, "pods stay", pause=0.5)


# ---- where secret words could be ---------------------------------------------------------------------------------


def _plant(shop: Workshop, word: str) -> None:
    """Put ``word`` where it does not belong, in other spellings."""
    url = f"https://somebody:{word}@example.com"
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "planted"}}
    shop.cluster.apply(
        config_map | {"data": {"url": base64.b64encode(url.encode()).decode()}}, namespace=shop.namespace
    )
    store = ObjectStore.open(f"s3://{BUCKET}/tests/out/{shop.namespace}", environment=storage_environment(shop.cluster))
    store.put("planted/manifest.json", json.dumps({"source": url}).encode())
    image = shop.cluster.get("deployment", "finetune-operator", SYSTEM)
    assert image is not None
    container = {
        "name": "planted",
        "image": image["spec"]["template"]["spec"]["containers"][0]["image"],
        "imagePullPolicy": "Never",
        "command": ["python", "-c", "import os; print(os.environ['WORD'].encode().hex())"],
        "env": [{"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "planted", "key": "word"}}}],
        "securityContext": _RESTRICTED,
    }
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "planted"}, "stringData": {"word": word}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "planted"}}
    pod["spec"] = {"restartPolicy": "Never", "containers": [container], "automountServiceAccountToken": False}
    shop.cluster.apply(secret, pod, namespace=shop.namespace)
    # a write that fails is in the audit log, with its name
    path = f"/api/v1/namespaces/{shop.namespace}/configmaps/{quote(word, safe='')}"
    shop.cluster.kubectl("delete", "--raw", path, check=False)
    # refused, and audited, because they break the rules of the namespace
    root = pod | {"metadata": {"name": "root"}, "spec": {"containers": [{"name": "root", "image": "root"}]}}
    template = {"spec": root["spec"] | {"restartPolicy": "Never"}}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "root"}, "spec": {"template": template}}
    words = ["create", "-n", shop.namespace, "--dry-run=server", "-f", "-"]
    said = shop.cluster.kubectl(*words, text=json.dumps(root), check=False)
    assert 'pods "root" is forbidden: violates PodSecurity "restricted:latest"' in said, said
    shop.cluster.kubectl(*words, text=json.dumps(job))


def _places_of_the_moment(shop: Workshop) -> dict[str, bytes]:
    """All objects of all kinds but the Secrets themselves, and the object store, while the finished jobs exist."""
    kinds = shop.cluster.kubectl("api-resources", "--verbs=list", "--namespaced", "-o", "name").split()
    listed = shop.cluster.kubectl("get", ",".join(kinds), "-n", shop.namespace, "-o", "json", "--show-managed-fields")
    ours = {SECRET, STRANGERS, "planted"}
    found = {
        f"{item['kind']} {item['metadata']['name']}": json.dumps(item).encode()
        for item in json.loads(listed)["items"]
        if not (item["kind"] == "Secret" and item["metadata"]["name"] in ours)
    }
    root = shop.cluster.s3().directory
    places = [root / kind / BUCKET / "tests" / "out" / shop.namespace for kind in ("buckets", "metadata")]
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        found[f"object {path.relative_to(root)}"] = path.read_bytes()
    return found


def _places_afterwards(shop: Workshop, lives: Lives) -> dict[str, bytes]:
    """Versions of objects, logs, command lines, audit log, labels of Prometheus, Helm's release."""
    cluster, seen = shop.cluster, lives.seen
    found = {f"versions of {kind}": json.dumps(versions).encode() for kind, versions in seen.versions.items()}
    found |= {f"log of {pod}": text.encode() for pod, text in seen.logs.items()}
    found["command lines"] = "\n".join(process.command for process in seen.processes).encode()
    found["log of the operator"] = cluster.kubectl("logs", "-n", SYSTEM, OPERATOR).encode()
    found["audit log"] = cluster.layout.audit_log.read_bytes()
    selectors = [f'{{namespace=~"{shop.namespace}|{SYSTEM}"}}', '{__name__=~"finetune_.+"}']
    times = {"start": f"{lives.began:.0f}", "end": f"{time.time():.0f}"}
    found["labels of Prometheus"] = json.dumps(ask("series", **{"match[]": selectors}, **times)).encode()
    for secret in cluster.list("secrets", SYSTEM, f"owner=helm,name={RELEASE}"):
        name = secret["metadata"]["name"]
        found[f"release {name}"] = unpacked_release(secret["data"]["release"])
    return found


def _violations(cluster: LocalCluster, namespace: str) -> set[str]:
    name = "pod-security.kubernetes.io/audit-violations"
    events = (
        json.loads(line)
        for line in cluster.layout.audit_log.read_text(encoding="utf-8").splitlines(keepends=True)
        if name in line and namespace in line and line.endswith("\n")
    )
    return {f"{event['objectRef']['resource']}/{event['objectRef'].get('name', '')}" for event in events}
