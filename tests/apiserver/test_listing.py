"""The mirror filled by LIST on a real API server: what broken watches missed comes to light."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path

import pytest
from kubernetes.aio.config import kube_config
from tests.apiserver.kube import Kube as Administrator
from tests.apiserver.manifests import manifest

from finetune_operator import kube as operator_kube
from finetune_operator.kube import Kube
from finetune_operator.listing import Restored, list_everything
from finetune_operator.store import Store


def test_a_listing_in_pages_finds_what_is_new_what_changed_and_what_is_gone(
    kube: Administrator, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))  # $KUBECONFIG at its import
    monkeypatch.setattr(operator_kube, "PAGE", 2)
    namespace = kube.namespace
    made = {name: kube.create(manifest(name=name)) for name in ("same", "changed", "missed", "new-1", "new-2")}
    store = Store()
    for name in ("same", "changed", "missed"):
        store.saw_resource(made[name])
    ghost = copy.deepcopy(made["same"])
    ghost["metadata"] |= {"name": "ghost", "uid": "00000000-0000-4000-8000-000000000000"}
    store.saw_resource(ghost)
    kube.patch("FineTuneJob", "changed", {"spec": {"runPolicy": {"suspend": True}}})
    kube.delete("FineTuneJob", "missed")

    async def listed() -> set[tuple[str, str]]:
        client = await Kube.connect()
        try:
            return await list_everything(client, store, namespace)
        finally:
            await client.close()

    changed = {(namespace, name) for name in ("changed", "missed", "new-1", "new-2", "ghost")}
    assert asyncio.run(listed()) == changed
    assert sorted(store.keys()) == [(namespace, name) for name in ("changed", "new-1", "new-2", "same")]
    assert store.get((namespace, "changed")).resource["spec"]["runPolicy"]["suspend"] is True  # type: ignore[union-attr]
    assert asyncio.run(listed()) == set(), "a second listing finds nothing"

    later = kube.get("FineTuneJob", "same")
    later["metadata"]["resourceVersion"] = str(10**15)  # seen before etcd was restored from a backup
    store.saw_resource(later)
    with pytest.raises(Restored, match=r"is at resourceVersion \d+, and was at 1000000000000000 before"):
        asyncio.run(listed())
