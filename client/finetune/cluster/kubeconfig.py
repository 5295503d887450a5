"""Which cluster, which user, which namespace: decided as kubectl does."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes import client, config

from finetune.cluster.errors import ClusterError

_DEFAULT = "~/.kube/config"
_PARTS = (("clusters", "cluster"), ("users", "user"), ("contexts", "context"))
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
    plugin = (_entries(documents, "users", "user").get(str(block.get("user"))) or {}).get("exec")
    settings = _settings()
    with _credentials(settings, chosen, plugin):
        try:
            config.load_kube_config(
                config_file=os.pathsep.join(map(str, existing)), context=chosen, client_configuration=settings
            )
        except (config.ConfigException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ClusterError(f"the context '{chosen}' of {_listed(existing)} cannot be used: {error}") from error
    _refresh_aloud(settings, chosen, plugin)
    return Connection(client.ApiClient(settings), namespace or str(block.get("namespace") or "default"), chosen)


@contextmanager
def _credentials(settings: client.Configuration, context: str, plugin: Any) -> Iterator[None]:
    """Raise what a credential plugin says when it fails: the library logs it and goes on without credentials."""
    heard = _Heard(logging.ERROR)
    logging.root.addHandler(heard)  # also keeps the library from making a handler that prints
    try:
        yield
    finally:
        logging.root.removeHandler(heard)
    has_some = bool(settings.api_key or settings.cert_file)
    if not plugin or (has_some and not heard.messages):
        return
    command = plugin.get("command") if isinstance(plugin, dict) else plugin
    said = " ".join(heard.messages[-1].removeprefix("exec: ").split()) if heard.messages else "it gave no credentials"
    hint = plugin.get("installHint") if isinstance(plugin, dict) and "No such file" in said else ""
    raise ClusterError(
        f"the credential plugin '{command}' of the context '{context}' failed: {said}",
        str(hint or "log in again, or name another --context"),
    )


class _Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _refresh_aloud(settings: Any, context: str, plugin: Any) -> None:
    """The same when credentials have expired and the plugin is asked again."""
    refresh = settings.refresh_api_key_hook
    if refresh is None or not plugin:
        return

    def aloud(current: Any) -> None:
        try:
            with _credentials(current, context, plugin):
                refresh(current)
        finally:
            current.refresh_api_key_hook = aloud  # the library has put its own there again

    settings.refresh_api_key_hook = aloud


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
    for part, kind in _PARTS:
        if fault := _fault(content.get(part), kind):
            raise ClusterError(f"the kubeconfig {path} is malformed: {part}{fault}", "repair it or name another")
    return content


def _fault(entries: Any, kind: str) -> str:
    """What is wrong with a list of named clusters, users or contexts, or nothing."""
    if entries is None:
        return ""
    if not isinstance(entries, list):
        return " is no list"
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not entry.get("name"):
            return f"[{index}] is no mapping with a name"
        if entry.get(kind) is not None and not isinstance(entry[kind], dict):
            return f"[{index}].{kind} is no mapping"
    return ""


def _first(documents: list[Mapping[str, Any]], field: str) -> str:
    return next((str(document[field]) for document in documents if document.get(field)), "")


def _context(documents: list[Mapping[str, Any]], name: str, paths: list[Path]) -> Mapping[str, Any]:
    known = _entries(documents, "contexts", "context")
    if name not in known:
        listed = ", ".join(sorted(known)) or "none"
        raise ClusterError(f"there is no context '{name}' in {_listed(paths)}", f"known there: {listed}")
    return known[name]


def _entries(documents: list[Mapping[str, Any]], part: str, kind: str) -> dict[str, Mapping[str, Any]]:
    """Contexts or users by name; the first document that names one wins."""
    return {
        str(entry["name"]): entry.get(kind) or {}
        for document in reversed(documents)
        for entry in document.get(part) or ()
    }


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
