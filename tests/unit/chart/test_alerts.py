"""Every alert fires when it should, with its exact words, and stays silent over a healthy job; every series exists."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.chart import CHART, ROOT, Document, alert_rules, all_expressions, load_yaml, tool

RULES = CHART / "files/rules.yaml"
OPERATOR = 'namespace="finetune-system",job="finetune-operator",pod="operator-1"'
TRAINER = 'namespace="team-a",finetune_job="bot",finetune_node="0",pod="ftj-bot-0-x"'


def operator(name: str, values: str, labels: str = "", target: str = OPERATOR) -> Document:
    """``target``: the labels that the scrape configuration adds."""
    return {"series": f"finetune_operator_{name}{{{target}{labels and ',' + labels}}}", "values": values}


def trainer(name: str, values: str, labels: str = "", target: str = TRAINER) -> Document:
    return {"series": f"finetune_{name}{{{target}{labels and ',' + labels}}}", "values": values}


def watches(namespace: str, release: str, watched: str, values: str = "1x90") -> Document:
    """A leader's own series, of a release in ``namespace``."""
    target = f'namespace="{namespace}",job="{release}",pod="{release}-1"'
    return operator("watches", values, f'watched_namespace="{watched}"', target)


HEALTHY = [
    operator("build_info", "1x300", 'version="0.1.0"'),
    operator("leader", "1x300"),
    operator("watches", "1x300", 'watched_namespace="*"'),
    operator("jobs", "0x300", 'state="Pending"'),
    operator("jobs", "1x300", 'state="Running"'),
    operator("queue_oldest_seconds", "0x300"),
    operator("reconcile_duration_seconds_bucket", "0+60x300", 'le="0.1"'),
    operator("reconcile_duration_seconds_bucket", "0+60x300", 'le="+Inf"'),
    operator("reconcile_errors_total", "0+60x300", 'class="Conflict"'),
    operator("reconcile_errors_total", "0+60x300", 'class="Refused"'),
    operator("reconcile_errors_total", "0x300", 'class="InternalError"'),
    operator("api_requests_total", "0+60x300", 'verb="patch",resource="finetunejobs",code="200"'),
    operator("api_requests_total", "0+1x300", 'verb="patch",resource="finetunejobs",code="409"'),
    operator("progress_pulls_total", "0+6x300"),
    operator("progress_pull_failures_total", "0+1x300"),
    operator("job_seconds_count", "0+1x300", 'outcome="Complete"'),
    operator("job_seconds_count", "0x300", 'outcome="Failed"'),
    operator("restarts_total", "0+1x3 3x297", 'cause="Infrastructure"'),
    operator("restarts_total", "0+1x300", 'cause="Suspended"'),
    trainer("phase", "1x5 0x295", 'phase="FetchingModel"'),
    trainer("phase", "0x5 1x295", 'phase="Training"'),
    trainer("phase", "0x300", 'phase="Publishing"'),
    trainer("step", "0x5 0+10x295"),
    trainer("checkpoint_step", "0+100x30 3000x30 3000+100x240"),
    trainer("start_timestamp_seconds", "0x300"),
    trainer("restarts_total", "0+1x2 2x298"),
    trainer("validation_loss", "2-0.005x300"),
    trainer("data_wait_seconds_total", "0+1x300", 'rank="0"'),
    trainer("rank_heartbeat_timestamp_seconds", "0+60x300", 'rank="0"'),
]


@dataclass(frozen=True)
class Case:
    """Series (one sample a minute) that make an alert fire at ``minute``, its labels, and ``$value`` as text."""

    alert: str
    series: list[Document]
    labels: dict[str, str] = field(default_factory=dict)
    value: str = ""
    minute: int = 60


def pod_of(node: int, name: str = "x") -> str:
    return f'namespace="team-a",finetune_job="bot",finetune_node="{node}",pod="ftj-bot-{node}-{name}"'


SYSTEM, JOB = {"namespace": "finetune-system"}, {"namespace": "team-a", "finetune_job": "bot"}
CASES = [
    Case("FinetuneOperatorDown", [trainer("step", "1x90")]),
    Case("FinetuneOperatorWithoutLeader", [operator("leader", "0x90")], {**SYSTEM, "job": "finetune-operator"}),
    Case(
        "FinetuneOperatorSeveralLeaders",
        [watches("finetune-system", "finetune-operator", "*"), watches("ops", "another", "*")],
        {"watched_namespace": "*"}, "2",
    ),
    Case(
        "FinetuneOperatorReconcileErrors", [operator("reconcile_errors_total", "0+30x90", 'class="ApiError"')],
        {**SYSTEM, "class": "ApiError"}, "500m",
    ),
    Case(
        "FinetuneOperatorInternalError",
        [operator("reconcile_errors_total", "0x55 1x35", 'class="InternalError"')], SYSTEM,
    ),
    Case("FinetuneOperatorQueueStuck", [operator("queue_oldest_seconds", "90x90")], SYSTEM, "1m 30s"),
    Case(
        "FinetuneOperatorSlowReconciles",
        [operator("reconcile_duration_seconds_bucket", values, f'le="{bound}"')
         for bound, values in (("5", "0x90"), ("10", "0+60x90"), ("+Inf", "0+60x90"))],
        SYSTEM, "9.95s",
    ),
    Case(
        "FinetuneOperatorApiErrors",
        [operator("api_requests_total", "0+30x90", f'verb="list",resource="pods",code="{c}"') for c in ("200", "503")],
        SYSTEM, "50%",
    ),
    Case(
        "FinetuneOperatorForbidden",
        [operator("api_requests_total", "0x55 1x35", 'verb="create",resource="services",code="403"')],
        {**SYSTEM, "verb": "create", "resource": "services"},
    ),
    Case(
        "FinetuneOperatorProgressPullsFailing",
        [operator("progress_pulls_total", "0+6x90"), operator("progress_pull_failures_total", "0+6x90")],
        SYSTEM, "100%",
    ),
    Case("FineTuneJobFailed", [operator("job_seconds_count", "0x45 0+1x45", 'outcome="Failed"')], SYSTEM, "14"),
    Case(
        "FineTuneJobsRestarting", [operator("restarts_total", "0+0.1x90", 'cause="Infrastructure"')],
        {**SYSTEM, "cause": "Infrastructure"}, "6",
    ),
    Case(
        "FineTuneJobRestartingTooOften",
        [trainer("restarts_total", "0+0.1x90", target=pod_of(node)) for node in (0, 1, 2)], JOB, "6",
    ),
    Case("FineTuneJobsWaiting", [operator("jobs", "2x90", 'state="Pending"')], {**SYSTEM, "state": "Pending"}, "2"),
    Case(
        "FineTuneJobStuckBeforeTraining", [trainer("phase", "1x90", 'phase="Rendezvous"')],
        {**JOB, "phase": "Rendezvous"},
    ),
    Case("FineTuneJobStalled", [trainer("step", "7x90"), trainer("phase", "1x90", 'phase="Training"')], JOB),
    Case(
        "FineTuneJobRankSilent",
        [trainer("rank_heartbeat_timestamp_seconds", "1800x90", 'rank="3"'),
         trainer("phase", "1x90", 'phase="Evaluating"')],
        {**JOB, "pod": "ftj-bot-0-x", "rank": "3"}, "30m 0s",
    ),
    Case(
        "FineTuneJobCheckpointTooOld",
        [trainer("start_timestamp_seconds", "0x200"), trainer("step", "0+1x200"), trainer("checkpoint_step", "5x200")],
        JOB, minute=150,
    ),
    Case("FineTuneJobValidationLossRising", [trainer("validation_loss", "1x30 2x60")],
         {**JOB, "finetune_node": "0", "pod": "ftj-bot-0-x"}, "2"),
    Case("FineTuneJobWaitsForData", [trainer("data_wait_seconds_total", "0+30x90", 'rank="1"')], JOB, "50%"),
    Case("FineTuneJobPublishingLong", [trainer("phase", "1x90", 'phase="Publishing"')], JOB),
]  # fmt: skip


def promtool_test(directory: Path, tests: list[Document]) -> None:
    path = directory / "tests.json"
    path.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run([tool("promtool"), "test", "rules", str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def expected(case: Case) -> Document:
    """The alert as Prometheus sends it: labels and annotations with every placeholder filled."""
    rule = next(rule for rule in alert_rules() if rule["alert"] == case.alert)

    def filled(text: str) -> str:
        text = re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: case.labels[found.group(1)], text)
        return re.sub(r"\{\{[^}]*\$value[^}]*\}\}", case.value or "a value is missing in this case", text)

    annotations = {name: filled(text) for name, text in rule["annotations"].items()}
    return {"exp_labels": {**case.labels, **rule["labels"]}, "exp_annotations": annotations}


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    done = subprocess.run(
        [tool("promtool"), "check", "rules", "--lint=all", "--lint-fatal", str(RULES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case() -> None:
    assert [case.alert for case in CASES] == [rule["alert"] for rule in alert_rules()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_the_alert_fires_with_these_words(case: Case, tmp_path: Path) -> None:
    alert = {"eval_time": f"{case.minute}m", "alertname": case.alert, "exp_alerts": [expected(case)]}
    promtool_test(tmp_path, [{"interval": "1m", "input_series": case.series, "alert_rule_test": [alert]}])


def test_no_alert_fires_over_five_hours_of_a_healthy_job(tmp_path: Path) -> None:
    quiet = [
        {"eval_time": f"{minute}m", "alertname": rule["alert"], "exp_alerts": []}
        for rule in alert_rules()
        for minute in range(10, 300, 10)
    ]
    promtool_test(tmp_path, [{"interval": "1m", "input_series": HEALTHY, "alert_rule_test": quiet}])


TRAINED = [trainer("start_timestamp_seconds", "0x300"), trainer("step", "0+1x300")]
SILENT = {
    "two releases in one namespace that watch different ones": (
        "FinetuneOperatorSeveralLeaders",
        [watches("ops", "team-a", "a"), watches("ops", "team-b", "b"), watches("ops", "team-b", "c")],
    ),
    "a pod that two scrape configurations find": (
        "FinetuneOperatorSeveralLeaders",
        [operator("watches", "1x90", 'watched_namespace="*"'),
         operator("watches", "1x90", 'watched_namespace="*",instance="10.0.0.1:8080"')],
    ),
    "a leader that followed another": (
        "FinetuneOperatorSeveralLeaders",
        [watches("ops", "team-a", "a", "1x50 stale"), watches("ops", "team-a-new", "a", "_x50 1x40")],
    ),
    "two restarts of a job with eight nodes": (
        "FineTuneJobRestartingTooOften",
        [trainer("restarts_total", "0x30 1x20 2x40", target=pod_of(node)) for node in range(8)],
    ),
    "one checkpoint every 90 minutes": (
        "FineTuneJobCheckpointTooOld",
        [*TRAINED, trainer("checkpoint_step", "_x90 90x90 180x90 270x30")],
    ),
    "one checkpoint every 119 minutes": (
        "FineTuneJobCheckpointTooOld", [*TRAINED, trainer("checkpoint_step", "_x119 119x119 238x62")],
    ),
    "children that a quota refuses": (
        "FinetuneOperatorReconcileErrors", [operator("reconcile_errors_total", "0+30x90", 'class="Refused"')],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_the_alert_stays_silent_over(name: str, tmp_path: Path) -> None:
    alert, series = SILENT[name]
    looks = [{"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": []} for minute in range(1, 300)]
    promtool_test(tmp_path, [{"interval": "1m", "input_series": series, "alert_rule_test": looks}])


@pytest.mark.parametrize(
    "series",
    [
        [watches("ops", "team-a", "a"), watches("team-a", "own", "a"), watches("ops", "team-b", "b")],
        [watches("ops", "team-a", "a"), watches("finetune-system", "finetune-operator", "*")],
    ],
    ids=["two releases that list the same namespace", "one for the whole cluster beside one for a namespace"],
)
def test_several_leaders_of_one_namespace_are_told_by_its_name(series: list[Document], tmp_path: Path) -> None:
    said = expected(Case("FinetuneOperatorSeveralLeaders", [], {"watched_namespace": "a"}, "2"))
    alert = {"eval_time": "60m", "alertname": "FinetuneOperatorSeveralLeaders", "exp_alerts": [said]}
    promtool_test(tmp_path, [{"interval": "1m", "input_series": series, "alert_rule_test": [alert]}])


def test_of_two_releases_in_one_namespace_the_one_without_a_leader_is_told(tmp_path: Path) -> None:
    leads, stands = (f'namespace="ops",job="{release}",pod="{release}-1"' for release in ("team-a", "team-b"))
    series = [operator("leader", "1x90", target=leads), operator("leader", "0x90", target=stands)]
    said = expected(Case("FinetuneOperatorWithoutLeader", [], {"namespace": "ops", "job": "team-b"}))
    alert = {"eval_time": "60m", "alertname": "FinetuneOperatorWithoutLeader", "exp_alerts": [said]}
    promtool_test(tmp_path, [{"interval": "1m", "input_series": series, "alert_rule_test": [alert]}])


def test_restarts_of_a_node_add_up_over_its_pods(tmp_path: Path) -> None:
    first = trainer("restarts_total", "0x5 1x5 2x10 _x70", target=pod_of(0, "first"))
    second = trainer("restarts_total", "_x20 0x5 1x5 2x60", target=pod_of(0, "second"))
    alert = {"alertname": "FineTuneJobRestartingTooOften", "eval_time": "55m"}
    fires = expected(Case("FineTuneJobRestartingTooOften", [], JOB, "4"))
    promtool_test(
        tmp_path,
        [{"interval": "1m", "input_series": [first, second], "alert_rule_test": [{**alert, "exp_alerts": [fires]}]}],
    )


def test_a_first_checkpoint_that_stays_the_only_one_is_told_two_hours_later(tmp_path: Path) -> None:
    series = [*TRAINED, trainer("checkpoint_step", "_x30 30x270")]
    said = expected(Case("FineTuneJobCheckpointTooOld", [], JOB))
    looks = [
        {"eval_time": f"{minute}m", "alertname": "FineTuneJobCheckpointTooOld", "exp_alerts": found}
        for minute, found in ((100, []), (145, []), (151, [said]), (290, [said]))
    ]
    promtool_test(tmp_path, [{"interval": "1m", "input_series": series, "alert_rule_test": looks}])


# ---- every expression is about series that the code exports ----------------------------------------------------------


def exported() -> dict[str, set[str]]:
    """Name of every sample that operator and trainer export -> its labels, from their real collectors."""
    from prometheus_client import CollectorRegistry

    from finetune_api.report import Heartbeat, Phase, Progress
    from finetune_operator.metrics import (
        API_REQUESTS,
        EVERYWHERE,
        REGISTRY,
        RESTARTS,
        WATCH_EVENTS,
        WATCHES,
        LiveCollector,
    )
    from finetune_trainer.metrics import TrainerCollector

    for counter, labels in ((API_REQUESTS, ("get", "jobs", "200")), (WATCH_EVENTS, ("jobs",)), (RESTARTS, ("User",))):
        counter.labels(*labels)
    WATCHES.labels(EVERYWHERE)
    beat = Heartbeat(
        rank=0, local_rank=0, pid=1, phase=Phase.TRAINING, step=1, total_steps=2, loss=1.0, validation_loss=1.0,
        learning_rate=1e-4, gradient_norm=1.0, tokens_per_second=1.0, step_seconds_counts=(1,) * 12,
        model_flops_utilization=0.5, checkpoint_step=1, checkpoint_seconds=1.0, checkpoint_bytes=1,
    )  # fmt: skip
    page = Progress(job={}, node_rank=0, pid=1, phase=Phase.TRAINING, ranks=(beat,))

    class Status:
        def progress(self) -> Progress:
            return page

    registry = CollectorRegistry()
    registry.register(TrainerCollector(Status()))  # type: ignore[arg-type]
    registry.register(LiveCollector(lambda: {}, lambda: 0, lambda: 0.0))
    found: dict[str, set[str]] = {}
    for source in (registry, REGISTRY):
        for family in source.collect():
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


TARGET_LABELS = {"namespace", "pod", "job", "finetune_job", "finetune_node"}  # added by the scrape configuration


@pytest.mark.parametrize("expression", all_expressions("team-a", "bot"), ids=lambda found: found.name)
def test_every_expression_reads_series_and_labels_that_exist(expression) -> None:  # type: ignore[no-untyped-def]
    series = exported()
    assert expression.selectors
    known = set(TARGET_LABELS)
    for selector in expression.selectors:
        name, _, matchers = selector.partition("{")
        assert name in series, f"nobody exports {name}"
        known |= series[name]
        assert set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers)) <= series[name] | TARGET_LABELS
    for clause in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression.promql):
        assert set(re.split(r",\s*", clause)) <= known


def test_the_dashboard_shows_every_series_of_the_trainer_and_the_operator() -> None:
    shown = {selector.partition("{")[0] for found in all_expressions("a", "b") for selector in found.selectors}
    families = {
        re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exported() if not name.endswith("_created")
    }
    assert families - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} == set()


def test_panels_of_the_dashboard_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = json.loads((CHART / "files/dashboard.json").read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_the_scrape_configuration_for_a_plain_prometheus_is_valid_and_adds_the_labels_of_the_expressions() -> None:
    path = ROOT / "deploy/prometheus/scrape.yaml"
    done = subprocess.run(
        [tool("promtool"), "check", "config", "--syntax-only", str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    operator_job, trainer_job = (
        {rule["target_label"] for rule in entry["relabel_configs"] if "target_label" in rule}
        for entry in load_yaml(path.read_text(encoding="utf-8"))["scrape_configs"]
    )
    assert operator_job == {"namespace", "pod", "job"}
    assert trainer_job == TARGET_LABELS - {"job"}


def test_every_alert_has_a_runbook() -> None:
    page = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
    assert [name for rule in alert_rules() if f"### {(name := rule['alert'])}\n" not in page] == []
