"""`helm test`: the operator answers through its Service, and the API server serves FineTuneJobs.

Arguments: the operator's health URL, its metrics URL. Prints one line per check; the exit code is 1 if one failed.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request

ACCOUNT = os.environ.get("SERVICE_ACCOUNT_DIRECTORY", "/var/run/secrets/kubernetes.io/serviceaccount")
SECONDS = float(os.environ.get("CHECK_SECONDS", "60"))  # per check: a Service needs a moment to know its pods


def fetch(url, token="", context=None):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, timeout=5, context=context) as answer:
        return answer.read().decode()


def operator_is_ready(health_url):
    fetch(f"{health_url}/readyz")
    return "the operator is ready"


def operator_has_metrics(metrics_url):
    if "finetune_operator_build_info" not in fetch(f"{metrics_url}/metrics"):
        raise ValueError(f"{metrics_url}/metrics has no finetune_operator_build_info")
    return "the operator serves its metrics"


def api_server_knows_finetunejobs():
    host = os.environ["KUBERNETES_SERVICE_HOST"]
    host = f"[{host}]" if ":" in host else host
    url = f"https://{host}:{os.environ['KUBERNETES_SERVICE_PORT']}/apis/finetune.dev/v1alpha1"
    with open(f"{ACCOUNT}/token", encoding="utf-8") as file:
        token = file.read().strip()
    found = json.loads(fetch(url, token, ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")))
    names = {resource["name"] for resource in found["resources"]}
    if not {"finetunejobs", "finetunejobs/status"} <= names:
        raise ValueError(f"{url} has {sorted(names)}, not finetunejobs; install the CRD (crds.install)")
    return "the API server serves FineTuneJobs"


def checked(check, *arguments):
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            print(f"ok: {check(*arguments)}", flush=True)
            return True
        except (OSError, ValueError, KeyError, urllib.error.URLError) as error:
            if time.monotonic() > deadline:
                print(f"FAILED: {check.__name__.replace('_', ' ')}: {error}", flush=True)
                return False
        time.sleep(1)


def main(health_url, metrics_url):
    results = [
        checked(operator_is_ready, health_url),
        checked(operator_has_metrics, metrics_url),
        checked(api_server_knows_finetunejobs),
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
