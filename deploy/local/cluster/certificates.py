"""Certificates and kubeconfigs of the cluster: EC P-256 keys by openssl (RSA takes ten times as long)."""

from __future__ import annotations

import base64
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deploy.local.cluster.layout import API_PORT, API_SERVICE, HOST, Layout
from deploy.local.cluster.processes import run

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
_DAYS = "3650"


@dataclass(frozen=True)
class Certificate:
    """A leaf: who it names and what it is for."""

    name: str
    subject: str
    usage: str = "clientAuth"
    alternatives: str = ""
    authority: str = "ca"


CLIENTS = {
    "admin": "/O=system:masters/CN=admin",
    "controller-manager": "/CN=system:kube-controller-manager",
    "scheduler": "/CN=system:kube-scheduler",
    "proxy": "/CN=system:kube-proxy",
    "coredns": "/CN=finetune-cluster:coredns",
    "prometheus": "/CN=finetune-cluster:prometheus",
}
"""Who gets a kubeconfig under ``pki/<name>.kubeconfig``; nodes too."""


def make(layout: Layout) -> None:
    """All keys, certificates and kubeconfigs of ``layout``."""
    layout.pki.mkdir(mode=0o700)
    (layout.pki / "openssl.cnf").write_text("[req]\ndistinguished_name = names\n[names]\n")
    # openssl runs as a process each and takes most of its time starting
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda name: _authority(layout.pki, name), ("ca", "front-proxy-ca")))
        tokens = pool.submit(_token_key, layout.pki)
        list(pool.map(lambda certificate: _leaf(layout.pki, certificate), _leaves(layout)))
        tokens.result()
    for name in (*CLIENTS, *(node.name for node in layout.nodes)):
        _write_kubeconfig(layout, name, layout.pki / f"{name}.kubeconfig")
    _write_kubeconfig(layout, "admin", layout.kubeconfig)


def _leaves(layout: Layout) -> list[Certificate]:
    dns = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    dns.append("kubernetes.default.svc.cluster.local")
    names = [f"DNS:{name}" for name in dns] + [f"IP:{ip}" for ip in ("127.0.0.1", API_SERVICE, HOST)]
    leaves = [
        Certificate("apiserver", "/CN=kube-apiserver", "serverAuth", ",".join(names)),
        Certificate("apiserver-kubelet", "/O=system:masters/CN=kube-apiserver-kubelet-client"),
        Certificate("front-proxy-client", "/CN=front-proxy-client", authority="front-proxy-ca"),
    ]
    leaves += [Certificate(name, subject) for name, subject in CLIENTS.items()]
    for node in layout.nodes:
        leaves.append(Certificate(node.name, f"/O=system:nodes/CN=system:node:{node.name}"))
        names = [f"DNS:{node.name}", f"IP:{node.address}"]
        leaves.append(Certificate(f"{node.name}-serving", f"/CN={node.name}", "serverAuth", ",".join(names)))
    return leaves


def _authority(pki: Path, name: str) -> None:
    extensions = ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"]
    _request(pki, name, f"/CN={name}", extensions)


def _leaf(pki: Path, certificate: Certificate) -> None:
    extensions = ["basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature"]
    extensions.append(f"extendedKeyUsage={certificate.usage}")
    if certificate.alternatives:
        extensions.append(f"subjectAltName={certificate.alternatives}")
    _request(pki, certificate.name, certificate.subject, extensions, certificate.authority)


def _request(pki: Path, name: str, subject: str, extensions: list[str], authority: str | None = None) -> None:
    signer = ["-CA", pki / f"{authority}.crt", "-CAkey", pki / f"{authority}.key"] if authority else []
    added = [word for extension in extensions for word in ("-addext", extension)]
    files = ["-keyout", pki / f"{name}.key", "-out", pki / f"{name}.crt"]
    config = ["-config", pki / "openssl.cnf", "-days", _DAYS, "-subj", subject]
    run("openssl", "req", "-x509", *_NEW_KEY, *config, *signer, *added, *files)


def _token_key(pki: Path) -> None:
    """The key pair that signs service account tokens."""
    run("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", pki / "tokens.key")
    run("openssl", "pkey", "-in", pki / "tokens.key", "-pubout", "-out", pki / "tokens.pub")


def _write_kubeconfig(layout: Layout, name: str, path: Path) -> None:
    def data(file: str) -> str:
        return base64.b64encode((layout.pki / file).read_bytes()).decode()

    server = {"server": f"https://{HOST}:{API_PORT}", "certificate-authority-data": data("ca.crt")}
    user = {"client-certificate-data": data(f"{name}.crt"), "client-key-data": data(f"{name}.key")}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "local", "cluster": server}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": "local", "context": {"cluster": "local", "user": name}}],
        "current-context": "local",
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))  # JSON is YAML
    os.chmod(path, 0o600)
