"""What must not be trained or published is stopped with a sentence; what is stopped early publishes its best."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.builders import conversation, conversations, write_jsonl
from tests.training.jobs import ENGINES, METHODS, Ground, Job, largest_difference, run_together

from finetune_api.digest import training_digest
from finetune_api.spec import LoraOptions, MethodType, Precision
from finetune_trainer.data import SampleStream
from finetune_trainer.worker_config import WorkerConfig

pytestmark = pytest.mark.multiprocess

SHORT = {"maxSteps": 4, "globalBatchSize": 8, "precision": "FP32", "learningRate": 3e-3}
RARE = "\u00ff"  # its bytes stand in one row only
RARE_LINE = 13


def short(tag: str, method: str = "LoRA", engine: str = "DDP", **more: Any) -> Job:
    return Job(tag, METHODS[method], ENGINES[engine], {"training": SHORT}, **more)


# -- samples that share a row -----------------------------------------------------------------------------------------
def test_a_model_whose_samples_see_each_other_in_a_row_trains_one_by_one_only(tmp_path: Path) -> None:
    ground = Ground(tmp_path, rows=24)
    convolve(ground)

    def job(tag: str, engine: str, micro_batch: int, *, packing: bool = False, fails: bool = True) -> Job:
        blocks = {"training": {**SHORT, "microBatchSize": micro_batch}, "dataset": {"packing": packing}}
        return Job(tag, METHODS["LoRA"], ENGINES[engine], blocks, fails=fails)

    refused = [
        job("DDP", "DDP", 4),
        job("FSDP", "FSDP", 4),
        job("ZeRO-3", "ZeRO-3", 4),
        job("packed", "DDP", 1, packing=True),
    ]
    outcomes = ground.run([*refused, job("alone", "DDP", 1, fails=False)], 2)
    for one in refused:
        name, message = ground.failure(one)
        assert name == "SelfCheckError"
        assert re.fullmatch(
            r"In Lfm2ForCausalLM a sample sees the one before it in its row \(its logits differ by 0\.\d+\): it has"
            r" layers besides attention that mix tokens\.",
            message,
        ), message
    assert len(outcomes["alone"].losses) == SHORT["maxSteps"]


def convolve(ground: Ground) -> None:
    """In the model's place one with a short convolution over the row."""
    from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ground.model)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Lfm2Config(vocab_size=len(tokenizer), layer_types=["conv", "full_attention"], **sizes, **heads, **ends)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Lfm2ForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(ground.model)


# -- numbers that are not finite --------------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_names_its_step_and_its_sample_and_publishes_nothing(tmp_path: Path) -> None:
    ground = Ground(tmp_path, rows=24)
    poison_a_rare_token(ground)
    training = {**SHORT, "microBatchSize": 1}
    jobs = [
        Job(f"{method} {engine}", METHODS[method], ENGINES[engine], {"training": training}, fails=True)
        for method, engine in (("LoRA", "DDP"), ("Full", "FSDP"), ("QLoRA", "ZeRO-3"))
    ]
    ground.run(jobs, 2)
    data = ground.data(jobs[0])
    (row,) = (number for number in range(24) if f":{RARE_LINE}" in data.train.origin(number))
    stream = SampleStream(data.train.lengths, 42, 8, group_by_length=True)
    step = next(number for number in range(4) if row in stream.batch(number))
    for job in jobs:
        assert ground.failure(job) == (
            "NumericalError",
            f"step {step + 1}: the loss is nan; samples: train.jsonl:{RARE_LINE}.",
        )
        assert ground.published(job) == []


def test_fp16_gradients_that_are_finite_at_no_loss_scale_end_the_job(tmp_path: Path) -> None:
    ground = Ground(tmp_path, rows=24, rms_norm_eps=1e-30)
    edit_weights(ground, lambda tensors: tensors["model.embed_tokens.weight"].zero_())  # norms multiply by 1e15
    training = {**SHORT, "maxSteps": 25, "precision": "BF16"}
    fp16 = planned(precision=Precision.FP16)  # specs have it on CUDA only, and DeepSpeed too
    engines = ("DDP", "FSDP")
    jobs = [Job(e, METHODS["Full"], ENGINES[e], {"training": training}, change=fp16, fails=True) for e in engines]
    ground.run(jobs, 2)
    for job in jobs:
        assert ground.failure(job) == (  # after 16 halvings of 2^16
            "NumericalError",
            "step 17: the gradient norm is nan; samples: not one sample alone.",
        )
        assert ground.published(job) == []


def poison_a_rare_token(ground: Ground) -> None:
    """One row holds a token that no other holds, and the model's embedding of it is infinite."""
    from transformers import AutoTokenizer

    rows = conversations(24)
    rows[RARE_LINE - 1] = conversation(f"what is {RARE}", "a letter")
    write_jsonl(ground.folder / "train.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(ground.model)
    known = {
        token for row in conversations(24) for turn in row["messages"] for token in tokenizer(turn["content"])[0].ids
    }
    rare = next(token for token in tokenizer(RARE).input_ids if token not in known)
    edit_weights(ground, lambda tensors: tensors["model.embed_tokens.weight"][rare].fill_(float("inf")))


# -- early stopping ---------------------------------------------------------------------------------------------------
def test_early_stopping_publishes_the_best_checkpoint_and_not_the_last(ground: Ground) -> None:
    training = {
        **{"maxSteps": 60, "globalBatchSize": 8, "precision": "FP32", "learningRate": 0.03},
        **{"schedule": {"type": "Constant"}, "evaluateEverySteps": 2, "earlyStopping": {"patience": 3}},
    }
    settings = {"training": training, "dataset": {"validation": {"fraction": 0.3}}}
    jobs = [Job(engine, METHODS["LoRA"], ENGINES[engine], settings) for engine in ("DDP", "ZeRO-3")]
    done = ground.run(jobs, 2)
    for job in jobs:
        report = done[job.tag].report
        curve = {evaluation["step"]: evaluation["loss"] for evaluation in report["evaluations"]}
        best = min((loss, step) for step, loss in curve.items() if step > 0)[1]
        assert report["stoppedEarly"] is True
        assert (report["bestStep"], len(report["steps"])) == (best, best + 3 * 2)
        assert best + 6 < 60
        assert report["metrics"]["validationLoss"] == curve[best]
        adapter = load_file(done[job.tag].artifact / "adapter_model.safetensors")
        checkpoints = ground.folder / "out" / job.tag
        of_best = checkpoint_weights(next(checkpoints.rglob(f"best/step-{best:08d}")))
        of_last = checkpoint_weights(next(checkpoints.rglob(f"checkpoints/step-{best + 6:08d}")))
        assert adapter.keys() == of_best.keys()
        assert all(torch.equal(adapter[name], of_best[name]) for name in adapter)
        assert not any(torch.equal(adapter[name], of_last[name]) for name in adapter)


def test_the_best_that_a_checkpoint_names_is_there_after_a_resume_from_it(ground: Ground) -> None:
    """Better ones came after the checkpoint, and do not come again."""
    training = {**SHORT, "maxSteps": 12, "evaluateEverySteps": 2, "earlyStopping": {"patience": 9}}
    settings = {
        "training": training,
        "dataset": {"validation": {"fraction": 0.3}},
        "checkpoint": {"everySteps": 5, "onTermination": False},
    }

    def job(tag: str, losses: dict[int, float], **more: Any) -> Job:
        return Job(tag, METHODS["LoRA"], ENGINES["DDP"], settings, losses=losses, output="one", **more)

    ground.run([job("begun", {0: 9, 2: 6, 4: 5, 6: 4, 8: 3}, cut=9, stop_after_cut=True)], 1)
    (bests,) = (ground.folder / "out/one").rglob("checkpoints/best")
    assert {path.name for path in bests.iterdir()} == {"step-00000004", "step-00000008"}
    done = ground.run([job("resumed", {6: 7, 8: 7, 10: 7, 12: 7})], 1)["resumed"]
    assert [attempt["resumedFromStep"] for attempt in done.report["attempts"]] == [5]
    assert (done.report["bestStep"], done.report["metrics"]["validationLoss"]) == (4, 5)
    adapter, of_best = (
        load_file(done.artifact / "adapter_model.safetensors"),
        checkpoint_weights(bests / "step-00000004"),
    )
    assert adapter.keys() == of_best.keys()
    assert all(torch.equal(adapter[name], of_best[name]) for name in adapter)


def checkpoint_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The trained tensors of a checkpoint under the names of a PEFT adapter."""
    found = {}
    for file in directory.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            name, _, kind = key.rpartition("/")
            if kind == "weight":
                found["base_model.model." + name.replace(".default.", ".")] = tensor
    return found


# -- what really runs differs from the plan ---------------------------------------------------------------------------
def planned(**update: Any) -> Callable[[WorkerConfig], WorkerConfig]:
    """A worker file whose plan says something else."""

    def change(config: WorkerConfig) -> WorkerConfig:
        plan = config.trainer.plan.model_copy(update=update)
        return config.model_copy(update={"trainer": config.trainer.model_copy(update={"plan": plan})})

    return change


def one_parameter_more(config: WorkerConfig) -> WorkerConfig:
    counts = config.trainer.plan.parameters
    assert counts is not None
    assert counts.exact
    return planned(parameters=counts.model_copy(update={"trainable": counts.trainable + 1}))(config)


def test_a_difference_from_the_plan_stops_the_job_before_its_first_step(ground: Ground) -> None:
    jobs = [
        short("world", change=planned(world_size=3), fails=True),
        short("count", engine="FSDP", change=one_parameter_more, fails=True),
        short("method", engine="ZeRO-3", change=planned(method=MethodType.QLORA), fails=True),
        short("another method", method="QLoRA", change=planned(method=MethodType.LORA), fails=True),
    ]
    ground.run(jobs, 2)
    trainable = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))

    def both(text: str) -> tuple[str, str]:
        sentence = "; ".join(f"rank {rank}: {text}" for rank in range(2))
        return "SelfCheckError", f"What really runs differs from the plan: {sentence}."

    assert {job.tag: ground.failure(job) for job in jobs} == {
        "world": both("world size is 2, the plan says 3"),
        "count": both(f"number of trainable parameters is {trainable}, the plan says {trainable + 1}"),
        "method": both("quantised base is False, the plan says True"),
        "another method": both("quantised base is True, the plan says False"),
    }
    assert [ground.published(job) for job in jobs] == [[], [], [], []]


# -- checkpoints of something else ------------------------------------------------------------------------------------
def test_a_checkpoint_of_another_configuration_is_refused(ground: Ground) -> None:
    other = Job(
        "other rate",
        METHODS["LoRA"],
        ENGINES["FSDP"],
        {"training": {**SHORT, "learningRate": 1e-3}},
        output="shared",
        fails=True,
    )
    ground.run([short("first", engine="FSDP", cut=2, stop_after_cut=True, output="shared"), other], 2)
    manifest = next((ground.folder / "out/shared").rglob("step-00000002/manifest.json"))
    ours = json.loads(manifest.read_text())["configDigest"]
    theirs = training_digest(ground.spec(other, 2))
    name, message = ground.failure(other)
    assert name == "CheckpointError"
    assert message == (
        f"The checkpoint file://{manifest.parent}/ was written by another configuration "
        f"({ours[:12]}… instead of {theirs[:12]}…); choose another output.uri or job name, or delete it."
    )
    assert ground.published(other) == []


# -- base models that are not whole -----------------------------------------------------------------------------------
def edit_weights(ground: Ground, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = ground.model / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(ground: Ground, **settings: Any) -> None:
    file = ground.model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def truncate(ground: Ground) -> None:
    file = ground.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGE: dict[str, tuple[Callable[[Ground], object], str]] = {
    "wider config": (
        lambda ground: edit_config(ground, intermediate_size=160),
        "{model}/model.safetensors: tensor 'model.layers.0.mlp.gate_proj.weight' has shape (128, 64), config.json "
        "implies (160, 64); config.json and weights do not belong together",
    ),
    "more layers": (
        lambda ground: edit_config(ground, num_hidden_layers=3),
        "{model}: its safetensors lack 9 of the model's 30 tensors, first 'model.layers.2.self_attn.q_proj.weight'; "
        "config.json and weights do not belong together",
    ),
    "missing tensor": (
        lambda ground: edit_weights(ground, lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.weight")),
        "{model}: its safetensors lack 1 of the model's 21 tensors, first 'model.layers.1.mlp.down_proj.weight'; "
        "config.json and weights do not belong together",
    ),
    "truncated": (
        truncate,
        "{model}/model.safetensors: not a whole safetensors file (Error while deserializing header: incomplete "
        "metadata, file not fully covered); fetch it again",
    ),
}


def unknown_target(config: WorkerConfig) -> WorkerConfig:
    """As for an architecture whose modules the planner does not know; where it does, it refuses the name itself."""
    lora = LoraOptions(rank=4, target_modules=("q_proj", "query"))
    method = config.trainer.spec.method.model_copy(update={"lora": lora})
    spec = config.trainer.spec.model_copy(update={"method": method})
    return config.model_copy(update={"trainer": config.trainer.model_copy(update={"spec": spec})})


def test_a_base_model_that_is_not_whole_is_refused_in_one_sentence(tmp_path: Path) -> None:
    work = []
    for name, (damage, _) in DAMAGE.items():
        for engine in ("DDP", "ZeRO-3"):
            ground = Ground(tmp_path / f"{name} {engine}".replace(" ", "-"), rows=24)
            damage(ground)
            work.append((ground, short(name, method="QLoRA", engine=engine, fails=True)))
    whole = Ground(tmp_path / "whole", rows=24)
    unknown = short("unknown target", change=unknown_target, fails=True)
    run_together([*work, (whole, unknown)], 2)
    for ground, job in work:
        sentence = DAMAGE[job.tag][1].replace("{model}", str(ground.model))
        assert ground.failure(job) == ("ModelError", sentence), job.tag
        assert ground.published(job) == []
    assert whole.failure(unknown) == (
        "ModelError",
        "spec.method.lora.targetModules: LlamaForCausalLM has no module named 'query'; choose among "
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
    )


# -- whole base models in other forms ---------------------------------------------------------------------------------
def test_shards_with_tied_embeddings_train_like_the_single_file(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    single = Ground(tmp_path / "single", rows=24, tie_word_embeddings=True)
    shards = Ground(tmp_path / "shards", rows=24, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(single.model, dtype=torch.float32)
    (shards.model / "model.safetensors").unlink()
    model.save_pretrained(shards.model, max_shard_size="100KB")
    files = sorted(path.name for path in shards.model.glob("*.safetensors"))
    assert len(files) >= 3, files
    assert "lm_head.weight" not in load_file(single.model / "model.safetensors")
    jobs = [short(f"{m} {e}", m, e) for m in ("Full", "QLoRA") for e in ("DDP", "FSDP", "ZeRO-3")]
    run_together([(ground, job) for ground in (single, shards) for job in jobs], 2)
    for job in jobs:
        one, other = single.outcome(job), shards.outcome(job)
        assert one.losses == other.losses, job.tag
        assert one.weights == other.weights, job.tag
        reference = single.outcome(short(f"{job.tag.split()[0]} DDP")).losses
        assert largest_difference(reference, one.losses) <= 1e-4, job.tag


def test_a_random_start_is_the_same_on_every_engine(tmp_path: Path) -> None:
    ground = Ground(tmp_path, rows=24)
    (ground.model / "model.safetensors").unlink()
    still = {"maxSteps": 1, "globalBatchSize": 8, "precision": "FP32", "learningRate": 1e-30}

    def job(tag: str, engine: str, seed: int, training: dict[str, Any]) -> Job:
        blocks = {"training": {**training, "seed": seed}, "model": {"initialization": "Random"}}
        return Job(tag, METHODS["Full"], ENGINES[engine], blocks)

    engines = ("DDP", "FSDP", "ZeRO-3")
    jobs = [job(f"{engine} start", engine, 42, still) for engine in engines]
    jobs += [job(engine, engine, 42, SHORT) for engine in engines]
    done = ground.run([*jobs, job("another seed", "DDP", 43, still)], 2)
    start = done["DDP start"]
    for engine in engines:
        assert done[f"{engine} start"].weights == start.weights, engine
        assert largest_difference(done[engine].losses, done["DDP"].losses) <= 1e-4, engine
    assert done["another seed"].weights != start.weights
    tensors = load_file(start.artifact / "model.safetensors")
    for name, tensor in tensors.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:  # the architecture's own: normal with its initializer_range
            assert abs(float(tensor.std()) - 0.02) <= 0.002, name
