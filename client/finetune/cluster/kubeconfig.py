"""Which cluster, which user, which namespace: decided as kubectl does."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client, config

from finetune.cluster.errors import ClusterError

_DEFAULT = "~/.kube/config"
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass(frozen=True)
class Connection:
    """A client for one cluster. ``context`` is empty inside a pod."""

    api: client.ApiClient
    namespace: str
    context: str

    @property
    def server(self) -> str:
        return str(self.api.configuration.host)


def connect(kubeconfig: str | None = None, context: str | None = None, namespace: str | None = None) -> Connection:
    """Build a client; nothing is sent yet.

    Order of kubectl: ``--kubeconfig``, the files listed in ``KUBECONFIG`` (the first that says something wins),
    ``~/.kube/config``, and, where none of them names a cluster, the service account of the pod we run in.

    Raises:
        ClusterError: no configuration, or one that cannot be used.
    """
    logging.getLogger("kubernetes").setLevel(logging.CRITICAL)  # what it logs we say in a sentence
    paths = _paths(kubeconfig, os.environ)
    existing = [path for path in paths if path.exists()]
    if kubeconfig and not existing:
        raise ClusterError(f"the kubeconfig {kubeconfig} does not exist", "name the file that kubectl uses")
    documents = [_read(path) for path in existing]
    if not any(document.get("clusters") for document in documents) and not context:
        return _in_cluster(namespace, paths)
    chosen = context or _first(documents, "current-context")
    if not chosen:
        raise ClusterError(
            f"no current context is set in {_listed(existing)}",
            "choose one: kubectl config use-context NAME, or name it with --context",
        )
    block = _context(documents, chosen, existing)
    settings = _settings()
    try:
        config.load_kube_config(
            config_file=os.pathsep.join(map(str, existing)), context=chosen, client_configuration=settings
        )
    except (config.ConfigException, OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"the context '{chosen}' of {_listed(existing)} cannot be used: {error}") from error
    return Connection(client.ApiClient(settings), namespace or block.get("namespace") or "default", chosen)


def _settings() -> client.Configuration:
    settings = client.Configuration()
    settings.retries = 0  # we say what failed at once; followers try again themselves
    return settings


def _paths(kubeconfig: str | None, environment: Mapping[str, str]) -> list[Path]:
    if kubeconfig:
        return [Path(kubeconfig).expanduser()]
    listed = environment.get("KUBECONFIG", "")
    names = [name for name in listed.split(os.pathsep) if name] or [_DEFAULT]
    return [Path(name).expanduser() for name in names]


def _read(path: Path) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        reason = getattr(error, "strerror", None) or "is not YAML"
        raise ClusterError(f"the kubeconfig {path} cannot be read: {reason}", "repair it or name another") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ClusterError(f"the kubeconfig {path} is no mapping of clusters, contexts and users", "name another")
    return content


def _first(documents: list[Mapping[str, Any]], field: str) -> str:
    return next((str(document[field]) for document in documents if document.get(field)), "")


def _context(documents: list[Mapping[str, Any]], name: str, paths: list[Path]) -> Mapping[str, Any]:
    known = {
        str(entry["name"]): entry.get("context") or {}
        for document in reversed(documents)
        for entry in document.get("contexts") or ()
    }
    if name not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise ClusterError(f"there is no context '{name}' in {_listed(paths)}", f"known there: {listed}")
    block: Mapping[str, Any] = known[name]
    return block


def _in_cluster(namespace: str | None, paths: list[Path]) -> Connection:
    settings = _settings()
    try:
        config.load_incluster_config(client_configuration=settings)
    except config.ConfigException:
        raise ClusterError(
            f"no cluster is configured: {_listed(paths)} names none, and this is not a pod with a service account",
            "set KUBECONFIG or name the file with --kubeconfig",
        ) from None
    own = POD_NAMESPACE.read_text(encoding="utf-8").strip() if POD_NAMESPACE.exists() else ""
    return Connection(client.ApiClient(settings), namespace or own or "default", "")


def _listed(paths: list[Path]) -> str:
    return ", ".join(map(str, paths)) or "no file"
