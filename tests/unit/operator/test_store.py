"""The mirror of what the watches said: news is told from echoes, ghosts are removed, ended jobs cost little."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_operator.observe import JOB_LABEL
from finetune_operator.store import Store, Traffic

KEY = ("team", "a")


def _resource(version: int, uid: str = "u1", name: str = "a", **more: Any) -> dict[str, Any]:
    metadata = {"namespace": "team", "name": name, "uid": uid, "resourceVersion": str(version), "generation": 1}
    return {"metadata": {**metadata, "managedFields": [{"manager": "kubectl"}]}, "spec": {"x": 1}, **more}


def _job(version: int, uid: str = "j1", name: str = "a", active: int = 0, owner: str = "u1") -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "team",
            "name": f"ftj-{name}",
            "uid": uid,
            "resourceVersion": str(version),
            "creationTimestamp": "2026-11-21T10:00:00Z",
            "labels": {JOB_LABEL: name},
            "ownerReferences": [{"kind": "FineTuneJob", "name": name, "uid": owner, "controller": True}],
        },
        "spec": {"completions": 2, "template": {"spec": {"volumes": [{"configMap": {"name": "ftj-a-12345678"}}]}}},
        "status": {"active": active},
    }


def test_our_own_write_coming_back_is_no_news() -> None:
    store = Store()
    assert store.saw_resource(_resource(5))
    assert store.saw_resource(_resource(9, status={"state": "Pending"}))  # the answer to our write
    assert not store.saw_resource(_resource(9, status={"state": "Pending"}))  # the same by the watch
    assert not store.saw_resource(_resource(5))
    assert store.get(KEY).resource["status"]["state"] == "Pending"  # type: ignore[union-attr]


def test_managed_fields_are_not_kept() -> None:
    store = Store()
    store.saw_resource(_resource(5))
    assert "managedFields" not in store.get(KEY).resource["metadata"]  # type: ignore[union-attr]


def test_a_new_job_of_the_same_name_replaces_the_old_one_and_survives_its_late_deletion() -> None:
    store = Store()
    store.saw_resource(_resource(5, uid="old"))
    assert store.saw_resource(_resource(3, uid="new"))
    assert not store.forget_resource(KEY, "old")
    assert store.get(KEY) is not None
    assert store.forget_resource(KEY, "new")
    assert store.get(KEY) is None


def test_a_changed_spec_is_planned_anew() -> None:
    store = Store()
    store.saw_resource(_resource(5))
    store.get(KEY).planned = ("spec", "plan")  # type: ignore[assignment,union-attr]
    changed = _resource(6)
    changed["metadata"]["generation"] = 2
    store.saw_resource(changed)
    assert store.get(KEY).planned is None  # type: ignore[union-attr]


def test_a_complete_listing_removes_ghosts_but_not_what_came_while_it_was_made() -> None:
    store = Store()
    store.saw_resource(_resource(5, uid="ghost", name="ghost"))
    store.saw_resource(_resource(5, uid="u1"))
    store.saw_job(_job(5, uid="ghost-job", name="ghost"))
    before = store.uids()
    store.saw_resource(_resource(8, uid="newborn", name="newborn"))
    store.saw_job(_job(8, uid="newborn-job", name="newborn", owner="newborn"))
    assert not store.saw_resource(_resource(5, uid="u1"))
    assert store.saw_job(_job(7)) == KEY
    assert store.forget_lost(before - {"u1", "j1"}) == {("team", "ghost")}
    assert sorted(name for _, name in list(store.keys())) == ["a", "newborn"]
    assert store.job_of(("team", "ghost")) is None
    assert store.job_of(("team", "newborn")) is not None
    assert store.job_of(KEY) is not None


def test_the_job_of_an_earlier_one_of_the_same_name_is_nobodys() -> None:
    store = Store()
    store.saw_resource(_resource(5, uid="u1"))
    store.saw_job(_job(6, owner="u1"))
    assert store.job_of(KEY) is not None
    ended = store.get(KEY)
    store.saw_resource(_resource(9, uid="u2"))  # deleted and made again; the garbage collector comes later
    assert store.job_of(KEY) is None
    assert ended is not None
    store.settle(ended, None)  # a look that began before
    assert not store.get(KEY).settled  # type: ignore[union-attr]
    store.saw_job(_job(11, uid="j2", owner="u2"))
    assert store.job_of(KEY).uid == "j2"  # type: ignore[union-attr]
    store.forget_resource(KEY, "u2")
    store.settle(ended, None)


def test_an_older_copy_of_a_job_is_no_news() -> None:
    store = Store()
    assert store.saw_job(_job(7, active=2)) == KEY
    assert store.saw_job(_job(6, active=1)) is None
    assert store.job_of(KEY).active == 2  # type: ignore[union-attr]
    assert store.saw_job(_job(1, uid="j2")) == KEY, "a job made anew starts again"


def test_a_settled_job_keeps_its_name_and_state_only_until_it_changes() -> None:
    store = Store()
    store.saw_resource(_resource(5, status={"state": "Complete", "message": "long"}))
    live = store.get(KEY)
    assert live is not None
    store.settle(live, datetime(2026, 11, 22, tzinfo=UTC))
    entry = store.get(KEY)
    assert entry is not None
    assert entry.settled
    assert entry.resource == {
        "metadata": {"namespace": "team", "name": "a", "uid": "u1", "generation": 1, "resourceVersion": "5"},
        "status": {"state": "Complete"},
    }
    assert store.states() == {"Complete": 1}
    assert not store.saw_resource(_resource(5))
    assert store.saw_resource(_resource(6))
    assert not store.get(KEY).settled  # type: ignore[union-attr]


def test_twenty_jobs_that_come_to_run_in_ten_seconds_are_a_rush() -> None:
    store = Store()
    for number in range(20):
        assert not store.traffic.rush
        store.saw_resource(_resource(5, name=f"job-{number}", uid=f"u{number}"))
        store.saw_resource(_resource(6, name=f"job-{number}", uid=f"u{number}", status={"state": "Running"}))
    assert store.traffic == Traffic(live=20, starting=0, rush=True)


def test_jobs_that_ran_before_the_operator_came_are_no_rush() -> None:
    store = Store()
    for number in range(30):
        store.saw_resource(_resource(5, name=f"job-{number}", uid=f"u{number}", status={"state": "Running"}))
    assert store.traffic == Traffic(live=30, starting=0)


def test_what_was_deleted_does_not_come_back_by_a_listing_that_was_on_its_way() -> None:
    store = Store()
    store.saw_resource(_resource(5))
    store.saw_job(_job(6))
    assert store.forget_resource(KEY, "u1")
    assert store.forget_job(_job(6)) == KEY
    assert not store.saw_resource(_resource(5))
    assert store.saw_job(_job(6)) is None
    assert (store.get(KEY), store.job_of(KEY)) == (None, None)
    assert store.saw_resource(_resource(9, uid="u2")), "a new one of that name is another"


def test_a_job_made_anew_is_not_replaced_by_the_old_one_in_a_late_page() -> None:
    store = Store()
    store.saw_resource(_resource(5, uid="old"))
    store.saw_resource(_resource(9, uid="new"))
    assert not store.saw_resource(_resource(5, uid="old"))
    assert store.get(KEY).resource["metadata"]["uid"] == "new"  # type: ignore[union-attr]


def test_one_namespace_is_compared_with_what_is_known_of_it() -> None:
    store = Store()
    store.saw_resource(_resource(5))
    other = _resource(5, uid="u2", name="b")
    other["metadata"]["namespace"] = "other"
    store.saw_resource(other)
    assert (store.uids("team"), store.uids()) == ({"u1"}, {"u1", "u2"})


def test_a_job_that_lost_our_label_and_got_it_back_is_seen_again() -> None:
    store = Store()
    store.saw_resource(_resource(5))
    store.saw_job(_job(6))
    assert store.forget_job(_job(8)) == KEY, "to a watch by label it was deleted"
    assert store.saw_job(_job(8)) is None
    assert store.saw_job(_job(9)) == KEY
    assert store.job_of(KEY) is not None
    assert store.forget_job_of(KEY, "j1"), "what we delete ourselves is gone for good"
    assert store.saw_job(_job(12)) is None
