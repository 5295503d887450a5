"""The client beside a real operator, real pods and real object storage: one life of a job seen through `finetune`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from deploy.local.cluster import tools
from tests.cluster.cluster import wait_for
from tests.cluster.workshop import Workshop, storage_environment

COMMAND = str(Path(sys.executable).with_name("finetune"))


class Terminal:
    """Where a user of the cluster types, with the credentials of the bucket in the environment."""

    def __init__(self, shop: Workshop, folder: Path) -> None:
        self.folder = folder
        self.place = ["--namespace", shop.namespace]
        self.environment = shop.cluster.environment | storage_environment(shop.cluster) | {"COLUMNS": "160"}
        self.environment["PATH"] = (
            f"{Path(COMMAND).parent}:{self.environment['PATH']}"  # kubectl looks for plugins there
        )

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [COMMAND, *words, *self.place],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, program: str = COMMAND) -> str:
        """What a command that succeeds prints."""
        command = [*program.split(), *words, *self.place]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout


def test_a_job_is_run_watched_paused_and_fetched_with_the_client_alone(shop: Workshop, tmp_path: Path) -> None:
    terminal = Terminal(shop, tmp_path)
    (tmp_path / "job.yaml").write_text(json.dumps(shop.manifest("job", "LoRA", "DDP", **shop.slow(400))))
    run = terminal.start("run", "--on", "kubernetes", "job.yaml", "--directory", "adapter", "--output", "json")
    try:
        wait_for(lambda: shop.status("job").get("progress", {}).get("step", 0) > 5, 120, "the job does not train")
        assert "Running" in terminal("list")
        screen = terminal("finetune", "status", "job", program=str(tools.program("kubectl")))
        for part in ("2 ranks (2 nodes x 1)", "strategy      DDP, method LoRA", "attempts", "conditions"):
            assert part in screen, screen
        assert "step" in terminal("logs", "job", "--no-follow")
        assert terminal("logs", "job", "--rank", "1", "--no-follow", "--tail", "20").strip()
        terminal("suspend", "job")
        terminal("wait", "job", "--for", "Suspended", "--timeout", "60s")
        terminal("resume", "job")
        terminal("wait", "job", "--timeout", "180s")
        said, complaint = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 0, complaint
    result = json.loads(said)
    assert (result["exitClass"], result["step"]) == ("Completed", 400)
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "report.json"} <= files
    terminal("fetch", "job", "--directory", "again")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("adapter", "again")]
    assert weights[0] == weights[1]
    terminal("cancel", "job", "--yes")
    terminal("wait", "job", "--for", "Deleted", "--timeout", "60s")
