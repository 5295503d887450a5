"""The demo: from the documentation on this machine to a verified adapter in object storage, in about four minutes.

    1 a corpus, questions and a tokenizer from the installed standard library
    2 a real S3 server (versitygw) on this machine
    3 `finetune run base.yaml`      a small language model from random weights, two ranks, DDP
    4 `finetune run answers.yaml`   QLoRA under FSDP on two ranks, published to S3
    5 the published adapter judged by plain PEFT in a fresh process

Everything lies in .demo/ and is made anew each time. Ends with a sentence and exit code 1 if a claim fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpus
from ruamel.yaml import YAML

from finetune_storage import ObjectStore, fetch_artifact

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
STATE = REPOSITORY / ".demo"
BUCKET = "demo"
CORPUS_CHARACTERS = 1_000_000
STEPS = 5
TOLERANCE = 0.02  # of two loss measurements: different code, batches and BF16 kernels


class ClaimFailed(Exception):
    """The demo did not show what it promises; the text says what."""


def main() -> int:
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop like Ctrl-C: the S3 server must not be left behind
    try:
        demo()
    except ClaimFailed as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo stopped; `make demo` starts again from the beginning.", file=sys.stderr)
        return 130
    say(f"\nDone in {time.monotonic() - started:.0f} s. Everything lies in {STATE}.")
    return 0


def demo() -> None:
    shutil.rmtree(STATE, ignore_errors=True)
    STATE.mkdir()
    headline(1, "Corpus and questions from the documentation of this Python")
    built = corpus.build(STATE / "data", CORPUS_CHARACTERS)
    say(f"{built.documents:,} documents ({built.characters:,} characters), {built.questions:,} questions to learn,")
    say(f"{built.held_out:,} questions about other functions held out, a tokenizer of {corpus.VOCABULARY:,} tokens")

    headline(2, "Object storage")
    with object_storage() as (output, environment):
        headline(3, "Pre-training a small language model from random weights (two ranks, DDP)")
        base = run_job("base.yaml", output, environment)
        fetch(base, STATE / "base-model", environment)
        say_metrics(base)

        headline(4, "Fine-tuning it by QLoRA under FSDP on two ranks")
        tuned = run_job("answers.yaml", output, environment)
        listing = fetch(tuned, STATE / "adapter", environment)
        say_metrics(tuned)

        headline(5, "The published adapter in a fresh process with plain PEFT")
        verdict = verify()
        judge(verdict, tuned["metrics"])
        say_result(verdict, tuned, listing)


@contextlib.contextmanager
def object_storage() -> Iterator[tuple[str, dict[str, str]]]:
    """(output URI, environment) of a real S3 server, or of a directory where none can be started."""
    server_module = _load(REPOSITORY / "deploy" / "local" / "s3" / "server.py")
    server = server_module.S3Server(STATE / "s3")
    try:
        server.start()
    except server_module.ServerUnavailable as error:
        say("!" * 100)
        say(f"{error}\nNOT S3: artifacts go to a local directory instead.")
        say("!" * 100)
        yield (STATE / "artifacts").as_uri(), {}
        return
    try:
        server.create_bucket(BUCKET)
        say(f"S3 server (versitygw) at {server.endpoint}, bucket s3://{BUCKET}")
        yield f"s3://{BUCKET}", server.environment
    finally:
        server.stop()


def run_job(manifest: str, output: str, environment: dict[str, str]) -> dict[str, Any]:
    """`finetune run` on a manifest of this folder; progress on the terminal, the result as an object."""
    text = with_output(HERE / manifest, output)
    command = [str(Path(sys.executable).with_name("finetune")), "run", "-", "--output", "json"]
    command += ["--state-dir", str(STATE / "state")]
    say(f"$ finetune run examples/demo/{manifest}")
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=HERE,  # relative URIs of a manifest on standard input
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
    )
    try:
        output_bytes, _ = process.communicate(text.encode())
    except KeyboardInterrupt:  # let the ranks end before the server and we do
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    result: dict[str, Any] = json.loads(output_bytes) if output_bytes.strip() else {}
    if process.returncode != 0 or result.get("state") != "Completed":
        detail = result.get("message") or f"exit code {process.returncode}"
        raise ClaimFailed(f"{manifest} did not complete: {detail} {result.get('hint', '')}".strip())
    return result


def with_output(manifest: Path, output: str) -> str:
    """The manifest's text with its output moved to ``output`` where that is not the S3 bucket it names."""
    text = manifest.read_text(encoding="utf-8")
    if output == f"s3://{BUCKET}":
        return text
    yaml = YAML()
    document = yaml.load(text)
    document["spec"]["output"]["uri"] = document["spec"]["output"]["uri"].replace(f"s3://{BUCKET}", output)
    rendered = io.StringIO()
    yaml.dump(document, rendered)
    return rendered.getvalue()


def fetch(result: dict[str, Any], directory: Path, environment: dict[str, str]) -> list[tuple[str, int]]:
    """Download what a job published, every file verified against the manifest it reported; (path, bytes) of all."""
    artifacts = result["artifacts"]
    store = ObjectStore.open(artifacts["uri"], environment=environment)
    fetch_artifact(store, directory, manifest_sha256=artifacts["manifestSha256"])
    return sorted((found.path, found.bytes) for found in store.list(""))


def verify() -> dict[str, Any]:
    command = [sys.executable, str(HERE / "verify.py"), "--base", str(STATE / "base-model")]
    command += ["--adapter", str(STATE / "adapter"), "--questions", str(STATE / "data" / "questions-held-out.jsonl")]
    command += ["--ask", *(f"What does {name} do?" for name in corpus.SHOWN)]
    say("measuring the loss with and without the adapter, then asking both ...")
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, **quiet}, check=False)
    if done.returncode != 0:
        raise ClaimFailed(f"plain PEFT could not load the published adapter (exit code {done.returncode}).")
    verdict: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return verdict


def judge(verdict: dict[str, Any], metrics: dict[str, float]) -> None:
    """What must hold, or the demo has failed."""
    base, tuned = verdict["baseLoss"], verdict["tunedLoss"]
    if not tuned < base:
        raise ClaimFailed(f"the validation loss did not fall: {base:.4f} before, {tuned:.4f} after.")
    for name, ours in (("baseValidationLoss", base), ("validationLoss", tuned)):
        reported = metrics.get(name)
        if reported is None or abs(reported - ours) > TOLERANCE * ours:
            raise ClaimFailed(f"the trainer reports {name} {reported}, plain PEFT measures {ours:.4f}.")
    if all(shown["before"] == shown["after"] for shown in verdict["answers"]):
        raise ClaimFailed("the tuned model answers every question as the base model does.")


def say_metrics(result: dict[str, Any]) -> None:
    figures = ", ".join(f"{name} {value:,.4g}" for name, value in sorted(result["metrics"].items()))
    say(f"{result['state']} at step {result.get('step')}: {figures}")


def say_result(verdict: dict[str, Any], tuned: dict[str, Any], listing: list[tuple[str, int]]) -> None:
    base, after = verdict["baseLoss"], verdict["tunedLoss"]
    say(f"validation loss on {verdict['questions']} held-out questions, measured by plain PEFT:")
    say(f"  base model {base:.4f}   with adapter {after:.4f}   ({(after - base) / base:+.1%})")
    for shown in verdict["answers"]:
        say(f"\n  {shown['question']}")
        say(f"    before: {' '.join(shown['before'].split())[:150]}")
        say(f"    after:  {' '.join(shown['after'].split())[:150]}")
    say(f"\n{tuned['artifacts']['uri']}")
    for path, size in listing:
        say(f"  {size:>10,}  {path}")
    say(f"\nreport: {tuned['reportPath']}")


def headline(number: int, text: str) -> None:
    say(f"\n[{number}/{STEPS}] {text}")


def say(text: str) -> None:
    print(text, flush=True)


def _load(path: Path) -> Any:
    """A module that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
