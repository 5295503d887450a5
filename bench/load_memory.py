"""Host memory per rank while a model is loaded under FSDP: anonymous memory above what the process had before.

Started by torchrun; a thread reads ``/proc/self/status`` while the product's own loading runs. Rank 0 prints one JSON
object with every rank's figures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

from finetune_trainer.distributed import join_process_group
from finetune_trainer.launcher import read_config
from finetune_trainer.preparation import prepare_node
from finetune_trainer.progress import HeartbeatWriter, StopSignal
from finetune_trainer.recipe import Run
from finetune_trainer.status import LauncherStatus
from finetune_trainer.worker_config import WorkerConfig

# what loading imports when it needs it: libraries are no part of the model's memory
LIBRARIES = ("peft", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "torch._dynamo")


class AnonymousMemory:
    """Largest ``RssAnon`` + ``RssShmem`` of this process while the block runs, above that at its start."""

    def __enter__(self) -> AnonymousMemory:
        self.before = self.peak = _anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.after = _anonymous_bytes()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, _anonymous_bytes())
            time.sleep(0.002)

    @property
    def above(self) -> int:
        return self.peak - self.before


def _anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return sum(int(kib) * 1024 for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", text, flags=re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args()
    config = read_config(options.config)
    worker_file = Path(config.work_directory) / "worker.json"
    rank = int(os.environ["RANK"])
    context = join_process_group(config.plan.device, 120)
    if rank == 0:
        worker = prepare_node(config, LauncherStatus(config.job, 0, Path(config.work_directory)))
        (Path(config.work_directory) / "ranks").mkdir(parents=True, exist_ok=True)
        worker_file.write_text(worker.model_dump_json(by_alias=True))
    context.barrier()
    worker = WorkerConfig.model_validate_json(worker_file.read_text())
    run = Run(worker, context, HeartbeatWriter(Path(config.work_directory), rank, rank), StopSignal())
    for library in LIBRARIES:
        importlib.import_module(library)
    started = time.monotonic()
    with AnonymousMemory() as memory:
        run.load()
    # a sharded parameter answers with the size of the whole
    whole = sum(parameter.numel() * parameter.element_size() for parameter in run.loaded.module.parameters())
    figures = {"rank": rank, "peak": memory.above, "held": memory.after - memory.before, "whole": whole}
    everyone = context.gather(figures | {"seconds": time.monotonic() - started})
    if rank == 0:
        print(json.dumps(everyone), flush=True)
    context.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
