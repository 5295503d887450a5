"""One sentence per field, for the CRD, the editor schema and the reference. A test holds the list complete."""

from __future__ import annotations

_LOCATION = {
    "credentials": "Secret whose keys become environment variables with their standard names (AWS_ACCESS_KEY_ID, ...).",
    "credentials.secretName": "Name of a Secret in the job's namespace. It is named here, never read by the operator.",
    "endpoint": "Address of the server, such as http://minio:9000, without a query. Absent: the provider's own.",
    "region": "Region of the bucket (s3:// only). Absent: from the environment.",
    "pathStyle": "Put the bucket in the path instead of the host name (s3:// only). Absent: true with an endpoint.",
}

_MODEL = {
    "": "The base model: config.json, tokenizer files and safetensors under one URI.",
    "uri": "Where the model lies: hf://owner/name[@commit], s3://, gs://, az://, pvc://claim/path; file:// locally.",
    "revision": "Commit of an hf:// model. Absent: resolved once, then fixed for every restart.",
    "initialization": "Pretrained reads the weights; Random trains from scratch with the architecture of config.json.",
    "trustRemoteCode": "Run model code from the repository. Needs the administrator's consent as well.",
    **_LOCATION,
}

_SOURCE = {
    "": "One set of files.",
    "uri": "File, directory or pattern with '*': JSONL (plain, .gz, .zst), Parquet, Arrow or CSV.",
    "format": "How rows are read. Absent: detected from the columns, or refused when that is ambiguous.",
    "weight": "Copies of every row per epoch: 0.5 takes half of the rows, 2 takes all of them twice.",
    **_LOCATION,
}

_DATASET = {
    "": "What is learned from.",
    "train": "Training files. Rows of all sources are mixed.",
    **{f"train[].{name}".removesuffix("."): text for name, text in _SOURCE.items()},
    "validation": "Held-out data, for validation loss, early stopping and the samples in the report.",
    "validation.fraction": "Share of the training rows held out; chosen by content, so the same rows on every run.",
    "validation.sources": "Files of their own for validation.",
    **{f"validation.sources[].{name}".removesuffix("."): text for name, text in _SOURCE.items()},
    "maxSequenceLength": "Longest row in tokens. Longer samples follow truncation.",
    "packing": "Put several samples into one row. Exact: samples never attend to each other.",
    "lossOn": "Completion trains on completions (assistant turns) only; All trains on every token.",
    "truncation": "What happens to a sample that is too long: Drop it, Truncate it, or Fail. Counted in the report.",
}

_METHOD = {
    "": "What is updated.",
    "type": "Full trains every weight; LoRA trains low-rank adapters; QLoRA does so over a 4-bit base.",
    "lora": "LoRA (arXiv:2106.09685) and its variants, for types LoRA and QLoRA.",
    "lora.rank": "Rank of the update.",
    "lora.alpha": "Scale of the update: alpha / rank, or alpha / sqrt(rank) with useRslora.",
    "lora.dropout": "Dropout on the adapter's input.",
    "lora.targetModules": "Modules that get an adapter ('*' allowed), or all-linear: every linear layer but the head.",
    "lora.modulesToSave": "Modules that are trained whole and saved with the adapter, such as embed_tokens.",
    "lora.useRslora": "Rank-stabilised scale (arXiv:2312.03732).",
    "lora.useDora": "Weight-decomposed adaptation (arXiv:2402.09353).",
    "lora.learningRateRatio": "LoRA+ (arXiv:2402.12354): learning rate of B over that of A.",
    "quantization": "4-bit storage of the frozen base (arXiv:2305.14314), for type QLoRA.",
    "quantization.type": "NF4 is made for normally distributed weights; FP4 is a plain 4-bit float.",
    "quantization.doubleQuantization": "Quantise the scales as well: 0.37 bit less per weight.",
    "quantization.computeType": "Type of the arithmetic. Absent: training.precision.",
}

_TRAINING = {
    "": "How far and how fast.",
    "epochs": "Passes over the training rows; may be a fraction. One of epochs and maxSteps; both absent: 1 epoch.",
    "maxSteps": "Optimizer steps, instead of epochs.",
    "globalBatchSize": "Rows per optimizer step over the whole job; does not change with the number of ranks.",
    "microBatchSize": "Rows per forward pass and rank. Absent: chosen by the planner.",
    "learningRate": "Peak learning rate.",
    "schedule": "Learning rate over steps; formulas in schedules.md.",
    "schedule.type": "Shape of the curve.",
    "schedule.warmupFraction": "Linear warm-up as a share of all steps. Both warm-up fields absent: 0.03.",
    "schedule.warmupSteps": "Linear warm-up in steps, instead of warmupFraction.",
    "schedule.minimumFraction": "Rate at the end as a share of learningRate.",
    "schedule.cycles": "Cosine: number of cycles with hard restarts between them.",
    "schedule.power": "Polynomial: exponent.",
    "schedule.decayFraction": "WarmupStableDecay: last share of the steps, in which the rate falls.",
    "schedule.peakFraction": "SlantedTriangular and OneCycle: share of the steps before the peak.",
    "schedule.initialRatio": "SlantedTriangular and OneCycle: peak over first rate.",
    "optimizer": "How gradients become updates.",
    "optimizer.type": "AdamW8bit and PagedAdamW8bit need CUDA and DDP; Adafactor needs DDP.",
    "optimizer.beta1": "AdamW: decay of the first moment.",
    "optimizer.beta2": "AdamW: decay of the second moment.",
    "optimizer.epsilon": "Added to the denominator.",
    "optimizer.weightDecay": "Decoupled weight decay.",
    "optimizer.momentum": "SGD: momentum.",
    "optimizer.decayBiasAndNorm": "Apply weight decay to biases and normalisation weights too.",
    "maxGradientNorm": "Clip the gradient to this norm; null switches clipping off.",
    "precision": "Type of the arithmetic; trained weights are kept in FP32.",
    "gradientCheckpointing": "Recompute activations instead of keeping them. Auto: when they would not fit.",
    "labelSmoothing": "Share of the target spread over the vocabulary.",
    "neftuneAlpha": "Noise on the embeddings (NEFTune, arXiv:2310.05914); 0 is off.",
    "evaluateEverySteps": "Evaluate this often. Absent: before the first step and at the end only.",
    "earlyStopping": "Stop when validation loss no longer falls; the best state is published.",
    "earlyStopping.patience": "Evaluations without progress before stopping.",
    "earlyStopping.minimumDelta": "A smaller fall than this is no progress.",
    "seed": "Of data order, initialisation and dropout.",
}

_DISTRIBUTED = {
    "": "Ranks, and how they share the work.",
    "nodes": "Pods.",
    "processesPerNode": "Ranks per pod. Absent: one per accelerator, or 1 on CPU.",
    "strategy": "Engine and its options.",
    "strategy.type": "Auto takes DDP where a replica fits and FSDP where not, and says why.",
    "strategy.fsdp": "Options of type FSDP.",
    "strategy.fsdp.sharding": "Full shards everything; Hybrid shards within a pod and replicates between pods; "
    "GradientAndOptimizer keeps gathered weights between forward and backward.",
    "strategy.fsdp.cpuOffload": "Keep shards in host memory.",
    "strategy.deepspeed": "Options of type DeepSpeed.",
    "strategy.deepspeed.zeroStage": "1 shards the optimizer, 2 gradients too, 3 parameters too.",
    "strategy.deepspeed.offloadOptimizer": "Where optimizer state is kept. NVMe needs stage 3 and resources.scratch.",
    "strategy.deepspeed.offloadParameters": "Where parameters are kept. Needs stage 3.",
    "strategy.deepspeed.configuration": "More settings of DeepSpeed, from a fixed list (bucket sizes, overlap, ...).",
}

_CONFIGURATION = {
    "communication_data_type": "Type of the gradients on the wire.",
    "wall_clock_breakdown": "Log the time of forward, backward and step.",
    "zero_optimization": "Settings of ZeRO.",
    "zero_optimization.allgather_partitions": "Gather updated parameters with all-gather instead of broadcasts.",
    "zero_optimization.allgather_bucket_size": "Elements gathered at a time.",
    "zero_optimization.reduce_bucket_size": "Elements reduced at a time.",
    "zero_optimization.reduce_scatter": "Reduce-scatter gradients instead of all-reducing them.",
    "zero_optimization.overlap_comm": "Reduce gradients while the backward pass goes on.",
    "zero_optimization.contiguous_gradients": "Copy gradients into one buffer as they come.",
    "zero_optimization.round_robin_gradients": "Deal the copies of gradients to host memory over the ranks.",
    "zero_optimization.sub_group_size": "Parameters updated at a time (stage 3).",
    "zero_optimization.stage3_prefetch_bucket_size": "Elements fetched ahead of their use.",
    "zero_optimization.stage3_param_persistence_threshold": "Parameters smaller than this stay on every rank.",
    "zero_optimization.stage3_max_live_parameters": "Most parameters held per device at a time.",
    "zero_optimization.stage3_max_reuse_distance": "A parameter needed again within this distance is kept.",
}

_RESOURCES = {
    "": "What one pod gets. Without accelerator the job trains on CPU.",
    "accelerator": "Devices of a pod.",
    "accelerator.resourceName": "Extended resource that the pod asks for.",
    "accelerator.count": "Devices per pod.",
    "accelerator.memory": "Memory of one device; lets the planner judge what fits.",
    "requests": "What the scheduler reserves.",
    "requests.cpu": "CPU cores.",
    "requests.memory": "Host memory.",
    "limits": "What the pod may use at most.",
    "limits.cpu": "CPU cores.",
    "limits.memory": "Host memory.",
    "sharedMemory": "Size of /dev/shm.",
    "scratch": "Local disk for prepared data, model files and NVMe offload.",
}

_PLACEMENT = {
    "": "Where pods may run.",
    "nodeSelector": "Labels that a node must carry.",
    "tolerations": "Taints that the pods accept.",
    "tolerations[]": "As in a pod.",
    "tolerations[].key": "Key of the taint. Absent: every taint.",
    "tolerations[].operator": "Exists or Equal.",
    "tolerations[].value": "Value of the taint, for Equal.",
    "tolerations[].effect": "Effect of the taint. Absent: every effect.",
    "tolerations[].tolerationSeconds": "How long NoExecute is tolerated.",
    "priorityClassName": "PriorityClass of the pods.",
    "schedulerName": "Scheduler of the pods. Empty: the default one.",
    "topologyKey": "Node label within which all pods should be placed, such as a rack.",
}

_CHECKPOINT = {
    "": "When training state is saved. Restarts continue from the newest whole checkpoint. "
    "May be changed while the job is suspended.",
    "everySteps": "Save every this many optimizer steps.",
    "everyMinutes": "Save this often by the clock; null switches it off.",
    "keep": "Checkpoints to keep; older ones are deleted.",
    "onTermination": "Save before exit when the pod is asked to stop.",
}

_OUTPUT = {
    "": "Where artifacts and checkpoints go: uri/namespace/name/uid/.",
    "uri": "Directory: s3://, gs://, az:// or pvc://claim/path; file:// for local runs.",
    "format": "Adapter, MergedModel (adapter merged in) or FullModel (method Full). Absent: what the method trains.",
    **_LOCATION,
}

_RUN_POLICY = {
    "": "Life cycle of the job; may be changed while it runs.",
    "suspend": "Stop after a checkpoint and keep the job; false continues it.",
    "activeDeadlineSeconds": "Longest time to run, restarts included; counted anew after a suspension.",
    "ttlSecondsAfterFinished": "Delete the job this long after it finished. Artifacts stay.",
    "maxRestarts": "Restarts after failures of infrastructure before giving up.",
}

_STATUS = {
    "": "What the operator observed. Written by the operator only.",
    "observedGeneration": "Generation of the spec that this status is about.",
    "state": "One word for people, derived from the conditions.",
    "message": "One sentence for people.",
    "plan": "What runs, with every value that was chosen and why.",
    "plan.memoryPerDevice": "Estimated bytes on the fullest rank, by part.",
    "plan.decisions": "Values that were chosen for the user.",
    "progress": "The newest word from the ranks.",
    "attempts": "The last 20 attempts.",
    "checkpoint": "The newest whole checkpoint.",
    "artifacts": "What was published and verified.",
    "metrics": "Final numbers.",
    "conditions": "Accepted, Queued, PodsReady, Running, Suspended, ArtifactsPublished, Complete, Failed.",
}

_METADATA = {
    "": "Names the job.",
    "name": "Name of the job, at most 50 characters: pods are named after it.",
    "namespace": "Namespace of the job.",
    "labels": "Labels, for queues and selectors.",
    "annotations": "Free notes.",
}

_BLOCKS: dict[str, dict[str, str]] = {
    "spec": {"": "What is asked for.", "managedBy": "Controller that owns the job instead of this operator."},
    "spec.model": _MODEL,
    "spec.task": {"": "What is learned.", "type": "CausalLM: the next token."},
    "spec.dataset": _DATASET,
    "spec.method": _METHOD,
    "spec.training": _TRAINING,
    "spec.distributed": _DISTRIBUTED,
    "spec.distributed.strategy.deepspeed.configuration": _CONFIGURATION,
    "spec.resources": _RESOURCES,
    "spec.placement": _PLACEMENT,
    "spec.checkpoint": _CHECKPOINT,
    "spec.output": _OUTPUT,
    "spec.runPolicy": _RUN_POLICY,
    "status": _STATUS,
    "metadata": _METADATA,
}

DESCRIPTIONS: dict[str, str] = {
    f"{block}.{name}".removesuffix("."): text for block, members in _BLOCKS.items() for name, text in members.items()
}
