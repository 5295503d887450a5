"""validate, plan, schema, crd, report: what does not train."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from tests.builders import build_model, conversations, write_jsonl
from tests.unit.client.client_rig import finetune, write_manifest
from tests.unit.trainer.report_builders import make_report

from finetune.cli import main
from finetune.commands import credential_notes
from finetune.local import run_directory
from finetune.manifests import read_job, resolve_relative_uris
from finetune.progress_view import duration
from finetune.result import decisive
from finetune_api.exits import ExitClass
from finetune_api.report import Termination


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_manifest(tmp_path / "job.yaml")


def test_a_valid_manifest_is_called_valid(manifest: Path, tmp_path: Path) -> None:
    ended = finetune("validate", "job.yaml", cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "job.yaml: valid\n", "")


def test_every_problem_of_a_manifest_is_printed_and_the_code_is_10(manifest: Path, tmp_path: Path) -> None:
    text = manifest.read_text().replace("LoRA", "Lora").replace("globalBatchSize: 4", "globalBatchSize: 0")
    manifest.write_text(text.replace("  output:", "  outputs:"))
    ended = finetune("validate", "job.yaml", cwd=tmp_path)
    assert ended.returncode == 10
    assert ended.stdout == ""
    *problems, summary = ended.stderr.splitlines()
    assert summary == f"job.yaml: {len(problems)} problems"
    assert len(problems) == 4
    for place in ("spec.method.type", "spec.training.globalBatchSize", "spec.outputs", "spec.output"):
        assert sum(f"job.yaml: {place} (line " in problem or f"job.yaml: {place}:" in problem for problem in problems)


def test_what_the_planner_refuses_is_invalid_too(tmp_path: Path) -> None:
    write_manifest(tmp_path / "job.yaml", training={"globalBatchSize": 5}, distributed={"processesPerNode": 2})
    ended = finetune("validate", "job.yaml", cwd=tmp_path)
    assert ended.returncode == 10
    assert "spec.training.globalBatchSize" in ended.stderr


def test_file_uris_are_refused_for_a_cluster(manifest: Path, tmp_path: Path) -> None:
    ended = finetune("validate", "--cluster", "job.yaml", cwd=tmp_path)
    assert ended.returncode == 10
    assert "spec.model.uri" in ended.stderr


def test_a_missing_manifest_is_told_in_a_sentence(tmp_path: Path) -> None:
    ended = finetune("plan", "absent.yaml", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (10, "")
    assert ended.stderr == (
        "absent.yaml: cannot be read (No such file or directory); name the manifest file, or - for standard input\n"
    )


def test_a_manifest_that_is_not_utf_8_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"apiVersion: \xff\n")
    ended = finetune("validate", "job.yaml", cwd=tmp_path)
    assert ended.returncode == 10
    assert ended.stderr.splitlines()[0] == ("job.yaml: is not UTF-8 text (byte 12); save the manifest as UTF-8")


def test_a_traceback_appears_only_with_debug(tmp_path: Path) -> None:
    assert "Traceback" not in finetune("plan", "absent.yaml", cwd=tmp_path).stderr
    assert "Traceback" in finetune("plan", "--debug", "absent.yaml", cwd=tmp_path).stderr


def test_relative_uris_are_resolved_against_the_manifest_s_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my jobs"
    folder.mkdir()
    text = 'a: "file://./x/*.jsonl"  # file://./\nb: file://../y\nc: [file://./, file:///abs/z]\nd: s3://b/./x'
    assert resolve_relative_uris(text, folder).splitlines() == [
        f'a: "file://{tmp_path}/my%20jobs/x/*.jsonl"  # file://{tmp_path}/my%20jobs/',
        f"b: file://{tmp_path}/y",
        f"c: [file://{tmp_path}/my%20jobs/, file:///abs/z]",
        "d: s3://b/./x",
    ]


def test_a_manifest_from_standard_input_is_relative_to_the_current_folder(manifest: Path, tmp_path: Path) -> None:
    ended = finetune("plan", "--no-facts", "--output", "json", "-", cwd=tmp_path, stdin=manifest.read_text())
    assert ended.returncode == 0
    assert json.loads(ended.stdout)["artifactPrefix"].startswith(f"file://{tmp_path}/out/default/tiny/")


def test_the_uid_follows_from_what_defines_the_result(manifest: Path, tmp_path: Path) -> None:
    first = read_job(str(manifest)).identity
    assert len(first.uid) == 16
    write_manifest(manifest, checkpoint={"everySteps": 3})
    assert read_job(str(manifest)).identity == first
    write_manifest(manifest, training={"maxSteps": 7, "globalBatchSize": 4, "precision": "FP32"})
    assert read_job(str(manifest)).identity.uid != first.uid


def test_the_plan_is_the_same_as_screen_json_and_yaml(manifest: Path, tmp_path: Path) -> None:
    screen = finetune("plan", "--no-facts", "job.yaml", cwd=tmp_path).stdout
    as_json = json.loads(finetune("plan", "--no-facts", "--output", "json", "job.yaml", cwd=tmp_path).stdout)
    as_yaml = YAML(typ="safe").load(finetune("plan", "--no-facts", "--output", "yaml", "job.yaml", cwd=tmp_path).stdout)
    assert as_json == as_yaml
    assert as_json["globalBatchSize"] == 4
    assert screen.startswith("default/tiny\n\n  runs on       1 rank (1 node x 1, cpu)\n")
    for decision in as_json["decisions"]:
        assert decision["field"] in screen
        assert decision["reason"] in screen


def test_the_plan_with_facts_counts_parameters_and_memory(manifest: Path, tmp_path: Path) -> None:
    build_model(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", conversations(16))
    ended = finetune("plan", "job.yaml", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "  parameters    " in ended.stdout
    assert " per device (weights " in ended.stdout


def test_a_machine_without_the_trainer_is_told_what_to_install(manifest: Path, tmp_path: Path) -> None:
    hidden = "import sys\nsys.modules['torch'] = sys.modules['peft'] = None\n"  # as if they were not installed
    program = f"{hidden}from finetune.cli import main\nsys.exit(main(['run', {str(manifest)!r}]))"
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (10, "")
    assert ended.stderr == (
        "finetune run trains on this machine and needs torch, peft, not installed here;"
        ' install the trainer: pip install "finetune-operator[trainer]"\n'
    )


def test_missing_model_files_are_told_before_anything_runs(manifest: Path, tmp_path: Path) -> None:
    ended = finetune("run", "job.yaml", cwd=tmp_path)
    assert ended.returncode == 12
    place = "point spec.model.uri at the directory that has it"
    assert ended.stderr == f"The base model file://{tmp_path}/model has no config.json; {place}.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (
            "--no-fetch",
            "--no-fetch belongs to --on kubernetes, and this run is --on local; drop it, or add --on kubernetes",
        ),
        (
            "--directory a --endpoint http://s3 --namespace team --context lab --kubeconfig file",
            "--directory, --endpoint, --namespace, --context, --kubeconfig belong to --on kubernetes, and this run is"
            " --on local; drop them, or add --on kubernetes",
        ),
        (
            "--on kubernetes --state-dir state",
            "--state-dir belongs to --on local, and this run is --on kubernetes; drop it, or add --on local",
        ),
    ],
)
def test_options_of_the_other_place_are_refused(
    manifest: Path, words: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(manifest), *words.split()]) == 2
    assert capsys.readouterr().err == f"{complaint}\n"


@pytest.mark.parametrize("text", ["abc", "-1", "1.5", ""])
def test_a_tail_that_is_no_number_is_told_in_words(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["logs", "bot", f"--tail={text}"])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"error: argument --tail: '{text}' is no number of lines; write for instance 100")


def test_a_state_directory_that_cannot_be_made_is_told_in_a_sentence(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(manifest), "--state-dir", "/proc/nope"]) == 10
    where = run_directory(Path("/proc/nope"), read_job(str(manifest)))
    assert capsys.readouterr().err == (
        f"the state of this run cannot be written to {where} (No such file or directory); name another --state-dir\n"
    )


def test_a_file_of_this_machine_that_cannot_be_used_is_no_defect_of_the_command(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run_directory(tmp_path / "state", read_job(str(manifest))) / "result.json"
    file.mkdir(parents=True)
    assert main(["run", str(manifest), "--state-dir", str(tmp_path / "state")]) == 10
    assert capsys.readouterr().err == f"{file}: Is a directory; see whether it exists and whether you may use it\n"


def test_schema_and_crd_are_what_lies_in_the_repository(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    schema, crd = finetune("schema", cwd=tmp_path), finetune("crd", cwd=tmp_path)
    assert schema.stdout == (root / "docs/finetunejob.schema.json").read_text(encoding="utf-8")
    assert crd.stdout == (root / "crds/finetune.dev_finetunejobs.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [("validate",), ("plan", "--no-facts")])
def test_light_commands_start_without_what_takes_seconds_to_import(arguments: tuple[str, ...], manifest: Path) -> None:
    program = f"import sys\nfrom finetune.cli import main\nmain({[*arguments, str(manifest)]!r})\nprint(*sys.modules)"
    listed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    loaded = set(listed.split())
    assert not loaded & {"torch", "rich", "numpy", "obstore", "transformers", "kubernetes", "finetune_trainer"}


def test_named_secrets_are_not_read_but_the_variables_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    output = {"uri": "s3://bucket/out", "credentials": {"secretName": "bucket"}}
    job = read_job(str(write_manifest(tmp_path / "job.yaml", output=output)))
    assert credential_notes(job) == [
        "spec.output.credentials: the Secret 'bucket' is not read locally; from the environment:"
        " AWS_ACCESS_KEY_ID (set), AWS_SECRET_ACCESS_KEY (not set), AWS_SESSION_TOKEN (not set)"
    ]


def test_a_report_is_summarised_and_its_page_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report()
    folder = tmp_path / "node-0" / "report"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(report.model_dump_json(by_alias=True))
    assert main(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == f"report: {folder / 'report.html'}"
    assert f"{report.steps[-1].loss:.4f} at step {report.steps[-1].step}" in shown


def test_a_missing_report_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 10
    assert capsys.readouterr().err == (
        f"there is no report.json in {tmp_path}; name the run directory that finetune run printed,"
        " or the URI of the artifact\n"
    )


def test_the_cause_tells_the_story_of_several_nodes() -> None:
    def ended(exit_class: ExitClass) -> Termination:
        return Termination(exit_class=exit_class, exit_code=exit_class.code, message=exit_class.value)

    echo, cause = ended(ExitClass.COMMUNICATION_FAILED), ended(ExitClass.INVALID_DATA)
    assert decisive([echo, cause]) is cause
    assert decisive([ended(ExitClass.COMPLETED), ended(ExitClass.INTERRUPTED)]).exit_class is ExitClass.INTERRUPTED


def test_durations_are_readable() -> None:
    assert [duration(seconds) for seconds in (4.4, 59.6, 200, 18_120)] == [
        "4 s",
        "1 min 00 s",
        "3 min 20 s",
        "5 h 02 min",
    ]
