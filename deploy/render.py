"""``python -m deploy.render [--check]``: what is made from the chart for people without Helm or Prometheus Operator.

deploy/install.yaml (the chart with default values), deploy/prometheus/rules.yaml, deploy/grafana/dashboard.json and
docs/helm-values.md. With ``--check`` nothing is written: differences are printed and the exit code is 1.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts/finetune-operator"
NAMESPACE = "finetune-system"

_INSTALL_HEADER = f"""\
# Made from charts/finetune-operator with its default values by `make deploy-manifests`; edit the chart instead.
#     sed 's#registry.invalid/#YOUR-REGISTRY/#' deploy/install.yaml | kubectl apply --server-side -f -
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
  labels:
    pod-security.kubernetes.io/enforce: restricted
    pod-security.kubernetes.io/warn: restricted
"""
_HELM_ONLY = re.compile(r"^ +(app\.kubernetes\.io/managed-by: Helm|helm\.sh/chart: .*)\n", re.MULTILINE)

_VALUES_HEADER = """\
# Values of the Helm chart

Made from `charts/finetune-operator/values.yaml` by `make deploy-manifests`. A key that is not here is refused:

    Error: values don't meet the specifications of the schema(s) in the following chart(s):
    finetune-operator:
    - at '': additional properties 'replicaCount' not allowed
"""


class HelmMissing(Exception):
    """There is no Helm on this machine."""


def helm() -> str:
    """The Helm binary: ``$HELM``, else the pinned version that the local cluster uses, built now if need be.

    Raises:
        HelmMissing: there is none and it cannot be built.
    """
    from deploy.local.cluster.layout import ClusterError
    from deploy.local.cluster.tools import program

    try:
        return os.environ.get("HELM") or str(program("helm"))
    except ClusterError as error:
        raise HelmMissing(f"{error} Or set HELM to a Helm binary.") from None


def install_manifest() -> str:
    """The chart with default values as one file: its namespace first, without what only Helm reads."""
    command = [helm(), "template", "finetune-operator", str(CHART), "--namespace", NAMESPACE, "--skip-tests"]
    done = subprocess.run([*command, "--set", "crds.keep=false"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    text = re.sub(r"^# Source: .*\n", "", done.stdout, flags=re.MULTILINE)
    text = re.sub(r"\n{2,}(?=---\n|\Z)", "\n", _HELM_ONLY.sub("", text))
    return _INSTALL_HEADER + text


@dataclass(frozen=True)
class Value:
    """One line of values.yaml."""

    path: str
    default: str
    comment: str


def values() -> Iterator[tuple[str, list[Value]]]:
    """Every section's title and values, in the order of values.yaml."""
    sections: list[tuple[str, list[Value]]] = []
    parents: list[str] = []
    for line in (CHART / "values.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("# ---- "):
            sections.append((line.strip("# -"), []))
        elif found := re.match(r"^( *)([A-Za-z]+):(?: +(.*?))??(?:\s+# (.*))?$", line):
            indent, key, default, comment = found.groups()
            parents = [*parents[: len(indent) // 2], key]
            sections[-1][1].append(Value(".".join(parents), default or "", comment or ""))
        elif line.strip() and not line.startswith("#"):
            raise SystemExit(f"{CHART / 'values.yaml'}: this line is not 'key: value  # comment': {line}")
    yield from sections


def values_page() -> str:
    """docs/helm-values.md."""
    lines = [_VALUES_HEADER]
    for title, section in values():
        lines += [f"## {title[:1].upper()}{title[1:]}", "", "| value | default | meaning |", "|---|---|---|"]
        for value in section:
            if not value.default and not value.comment:
                continue  # only a parent
            default = f"`{value.default}`" if value.default else ""
            lines.append(f"| `{value.path}` | {default} | {value.comment.replace('|', 'or')} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _chart_file(name: str) -> Callable[[], str]:
    return lambda: (CHART / "files" / name).read_text(encoding="utf-8")


FILES: dict[str, Callable[[], str]] = {
    "deploy/install.yaml": install_manifest,
    "deploy/prometheus/rules.yaml": _chart_file("rules.yaml"),
    "deploy/grafana/dashboard.json": _chart_file("dashboard.json"),
    "docs/helm-values.md": values_page,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.render", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is not fresh")
    options = parser.parse_args(arguments)
    stale = 0
    for name, build in FILES.items():
        path = ROOT / name
        try:
            new = build()
        except HelmMissing as error:
            print(f"{name}: NOT CHECKED: {error}" if options.check else f"{name}: {error}", file=sys.stderr)
            stale += not options.check or bool(os.environ.get("CI") or os.environ.get("FINETUNE_REQUIRE_CLUSTER"))
            continue
        if options.check:
            old = path.read_text(encoding="utf-8") if path.exists() else ""
            if old != new:
                stale += 1
                print("\n".join(difflib.unified_diff(old.splitlines(), new.splitlines(), name, "fresh", lineterm="")))
                print(f"{name}: not fresh; run 'make deploy-manifests'", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(new, encoding="utf-8")
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
