"""What a kubeconfig says wrongly, and what its credential plugins say when they fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from tests.unit.client.client_rig import finetune

from finetune.cluster.errors import ClusterError
from finetune.cluster.kubeconfig import connect

SERVER = "http://127.0.0.1:9"


def write_kubeconfig(folder: Path, **changes: Any) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "lab", "cluster": {"server": SERVER}}],
        "users": [{"name": "me", "user": {"token": "secret"}}],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "me"}}],
        "current-context": "lab",
        **changes,
    }
    with (folder / "kubeconfig").open("w", encoding="utf-8") as file:
        YAML().dump(content, file)
    return folder / "kubeconfig"


def write_plugin(folder: Path, program: str, **fields: Any) -> Path:
    """A kubeconfig whose user has a credential plugin: a Python program."""
    plugin = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": sys.executable,
        "args": ["-c", f"import json, os, sys\n{program}"],
        "interactiveMode": "Never",
        **fields,
    }
    return write_kubeconfig(folder, users=[{"name": "me", "user": {"exec": plugin}}])


def say(**status: str) -> str:
    answer = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": status}
    return f"print({json.dumps(json.dumps(answer))})"


@pytest.mark.parametrize(
    ("program", "fields", "complaint"),
    [
        (
            "sys.exit('the session of this user\\nhas expired')",
            {},
            f"'{sys.executable}' of the context 'lab' failed: process returned 1. the session of this user has expired;"
            " log in again, or name another --context",
        ),
        (
            "print('hello')",
            {},
            f"'{sys.executable}' of the context 'lab' failed: failed to decode process output:"
            " Expecting value: line 1 column 1 (char 0); log in again, or name another --context",
        ),
        (
            say(),
            {},
            f"'{sys.executable}' of the context 'lab' failed: missing token or clientCertificateData field in plugin"
            " output; log in again, or name another --context",
        ),
        (
            "",
            {"command": "cloud-login", "installHint": "install the tools of the cloud"},
            "'cloud-login' of the context 'lab' failed: [Errno 2] No such file or directory: 'cloud-login';"
            " install the tools of the cloud",
        ),
    ],
    ids=["fails", "babbles", "says nothing", "is absent"],
)
def test_a_credential_plugin_that_fails_is_told_and_nobody_goes_on_anonymously(
    tmp_path: Path, program: str, fields: dict[str, Any], complaint: str
) -> None:
    ended = finetune("list", "--kubeconfig", write_plugin(tmp_path, program, **fields), cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"the credential plugin {complaint}\n")


def test_a_credential_plugin_that_works_is_used(tmp_path: Path) -> None:
    connection = connect(str(write_plugin(tmp_path, say(token="secret"))))
    assert connection.api.configuration.api_key == {"BearerToken": "Bearer secret"}


def test_a_credential_plugin_that_fails_later_is_told_too(tmp_path: Path) -> None:
    expired = say(token="first", expirationTimestamp="2020-01-01T00:00:00Z")
    fails = f"if os.path.exists('{tmp_path}/logged-out'): sys.exit('logged out')\n"
    settings = connect(str(write_plugin(tmp_path, fails + expired))).api.configuration
    for _ in range(2):
        assert settings.get_api_key_with_prefix("BearerToken") == "Bearer first"
    (tmp_path / "logged-out").touch()
    for _ in range(2):
        with pytest.raises(ClusterError) as caught:
            settings.get_api_key_with_prefix("BearerToken")
        assert str(caught.value) == (
            f"the credential plugin '{sys.executable}' of the context 'lab' failed: process returned 1. logged out"
        )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"contexts": ["lab"]}, "contexts[0] is no mapping with a name"),
        ({"contexts": [{"name": "lab", "context": "lab"}]}, "contexts[0].context is no mapping"),
        ({"contexts": {"lab": {}}}, "contexts is no list"),
        ({"users": [{"user": {"token": "x"}}]}, "users[0] is no mapping with a name"),
    ],
)
def test_a_malformed_kubeconfig_is_told_in_a_sentence(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    path = write_kubeconfig(tmp_path, **changes)
    with pytest.raises(ClusterError) as caught:
        connect(str(path))
    assert (str(caught.value), caught.value.hint) == (
        f"the kubeconfig {path} is malformed: {fault}",
        "repair it or name another",
    )
