"""`train.*`: the optimizer and its schedule, precision and memory, the parallel layout, and what a run writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tutti.config.argument import arg

TrackerName = Literal["aim", "clearml", "comet", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"]


@dataclass(frozen=True)
class TrainConfig:
    """Training. T is the number of optimizer steps in all; dp is the number of data-parallel ranks."""

    output_dir: str | None = arg(
        None,
        "Folder that the run writes: config.yaml, metrics.jsonl, report.html, checkpoints/, hf/.",
        shown="Required",
        required=("train",),
        path=True,
    )
    architecture: Literal["full", "lora"] = arg("full", "Train all weights, or low-rank adapters on frozen ones.")
    dyn_bsz: bool = arg(
        False,
        "Pack samples into micro batches of at most B tokens without padding; false uses micro_batch_size samples.",
    )
    lr: float = arg(5e-5, "Peak learning rate, reached after the warmup.", low=0)
    lr_min: float = arg(1e-7, "Learning rate at the end of linear and cosine decay.", low=0)
    lr_start: float = arg(0.0, "Learning rate at the start of the warmup.", low=0)
    freeze: tuple[str, ...] = arg(
        (),
        "Parts of the model that are not trained: towers (media encoders), projectors, language_model, "
        "decoders, or parameter names with * and ?.",
        added=True,
    )
    part_lr: Mapping[str, float] = arg(
        {},
        "Peak learning rates of parts instead of lr, such as {towers: 2e-6, projectors: 1e-3}, with parts as "
        "in freeze; the last match counts. Warmup and decay are those of lr, scaled.",
        added=True,
    )
    loss_weights: Mapping[str, float] = arg(
        {},
        "Weights of a step's losses by kind, with their defaults: text, code, feature and flow (1 each) for "
        "models that draw; l1 (1), mse (1), commitment (1) and kl (1e-6) with data_type image.",
        shown="{}",
        added=True,
    )
    weight_decay: float = arg(0.0, "Decoupled weight decay coefficient.", low=0)
    no_decay_modules: tuple[str, ...] = arg((), "Class names of modules whose parameters get no weight decay.")
    no_decay_params: tuple[str, ...] = arg((), "Parameters whose name contains one of these get no weight decay.")
    optimizer: Literal["adamw", "anyprecision_adamw", "adamw_8bit", "muon"] = arg(
        "adamw",
        "adamw (torch's, fused); anyprecision_adamw: bf16 state with Kahan compensation; or (added) "
        "adamw_8bit: 8-bit state, by bitsandbytes; muon: orthogonal updates of the blocks' matrices and adamw"
        " for the rest, with the same lr.",
    )
    max_grad_norm: float = arg(
        1.0, "Global gradient norm that gradients are clipped to; 0 measures without clipping.", low=0
    )
    micro_batch_size: int = arg(
        1, "Samples of a micro batch on each rank; with dyn_bsz, its token budget B in units of max_seq_len.", low=1
    )
    global_batch_size: int | None = arg(
        None,
        "Samples of an optimizer step over all ranks (with dyn_bsz, in units of max_seq_len tokens), "
        "a multiple of micro_batch_size * dp; the quotient is the gradient accumulation.",
        shown="train.micro_batch_size * n_gpus",
        low=1,
    )
    num_train_epochs: int = arg(1, "Passes over the training data.", low=1)
    pad_to_length: bool = arg(
        False, "Pad every micro batch to exactly B tokens with ignored ones: static shapes, for compilation."
    )
    bsz_warmup_ratio: float = arg(
        0.0,
        "Share of all steps over which a micro batch grows from bsz_warmup_init_mbtoken to B tokens, with dyn_bsz.",
        low=0,
        high=1,
    )
    bsz_warmup_init_mbtoken: int = arg(200, "Tokens of a micro batch at the start of that warmup.", low=1)
    lr_warmup_ratio: float = arg(0.0, "Share of all T steps over which the learning rate rises.", low=0, high=1)
    lr_decay_style: Literal["constant", "linear", "cosine"] = arg("cosine", "Learning rate after the warmup.")
    lr_decay_ratio: float = arg(
        1.0,
        "Share of all T steps after which linear and cosine decay have reached lr_min; constant from there on.",
        low=0,
        high=1,
    )
    enable_reshard_after_forward: bool = arg(
        False, "FSDP2: free gathered parameters after the forward pass and gather them again for the backward pass."
    )
    enable_reshard_after_backward: bool = arg(
        False, "FSDP2: free gathered parameters after every micro batch's backward pass, not just the last one's."
    )
    enable_mixed_precision: bool = arg(
        True,
        "fp32 parameters and optimizer, compute in compute_dtype, fp32 gradient reduction; false keeps "
        "everything in bf16, and computes in it unless compute_dtype is float32.",
    )
    enable_gradient_checkpointing: bool = arg(
        True, "Keep only the inputs of each block and recompute the rest in the backward pass."
    )
    enable_reentrant: bool = arg(True, "Use torch's reentrant gradient checkpointing.")
    enable_full_shard: bool = arg(
        True, "FSDP: shard parameters, gradients and optimizer (ZeRO-3); false keeps gathered parameters (ZeRO-2)."
    )
    enable_fsdp_offload: bool = arg(
        False, "FSDP: keep parameters, gradients and optimizer in host memory, and run the optimizer there."
    )
    enable_activation_offload: bool = arg(
        False, "Move activations to host memory in the forward pass and back in the backward pass."
    )
    activation_gpu_limit: float = arg(0.0, "Activations that stay on the device when they are offloaded, in GB.", low=0)
    init_device: Literal["cpu", "cuda", "meta", "npu"] = arg(
        "cuda",
        "Where the model is built and loaded; meta builds it without storage, shards it, then loads (large models).",
    )
    broadcast_model_weights_from_rank0: bool = arg(
        True,
        "Only rank 0 reads the weight files and sends them to the others; false lets every rank read its own slices.",
    )
    enable_full_determinism: bool = arg(False, "Use deterministic kernels only: two runs are equal bit for bit.")
    enable_batch_invariant_mode: bool = arg(
        False,
        "Compute sample by sample, so that a sample's logits do not depend, bit for bit, on its batch; slow "
        "for short samples.",
    )
    empty_cache_steps: int = arg(500, "Steps between releases of cached device memory; 0 never.", low=0)
    gc_steps: int = arg(
        500, "Steps between Python garbage collections, on all ranks at once; 0 leaves collection automatic.", low=0
    )
    data_parallel_mode: Literal["ddp", "fsdp1", "fsdp2"] = arg(
        "ddp",
        "Data parallelism: full replicas (ddp), or sharded parameters, gradients and optimizer; with "
        "enable_full_shard, fsdp1 reduces gradients once a step, fsdp2 after each micro batch.",
    )
    data_parallel_replicate_size: int = arg(
        1, "Replicas among the dp ranks; times data_parallel_shard_size this is dp.", low=1
    )
    data_parallel_shard_size: int = arg(
        1, "Ranks that share one replica (FSDP); if both sizes are 1, FSDP shards over all of dp.", low=1
    )
    tensor_parallel_size: int = arg(1, "Ranks that share each matrix.", low=1)
    expert_parallel_size: int = arg(1, "Ranks that share the experts of a mixture-of-experts model.", low=1)
    ep_outside: bool = arg(False, "Form expert groups of strided ranks, rather than of neighboring ones.")
    pipeline_parallel_size: int = arg(1, "Stages that the blocks are divided into.", low=1)
    ulysses_parallel_size: int = arg(
        1, "Ranks that share a sequence and exchange it for heads around attention.", low=1
    )
    async_enabled: bool = arg(False, "Overlap Ulysses' exchange with the projections around it.")
    context_parallel_size: int = arg(1, "Ranks that share a sequence in a ring (ring attention).", low=1)
    ckpt_manager: Literal["dcp"] = arg("dcp", "Checkpoint format: torch.distributed.checkpoint.")
    save_async: bool = arg(False, "Write checkpoints in the background while training continues.")
    load_checkpoint_path: str | None = arg(
        None,
        "Checkpoint folder to resume from, exactly; auto uses the newest complete one in output_dir, if any.",
        path=True,
    )
    save_steps: int = arg(0, "Steps between checkpoints; 0 never.", low=0)
    save_epochs: int = arg(1, "Epochs between checkpoints; 0 never.", low=0)
    hf_save_steps: int = arg(0, "Steps between exports as a Hugging Face folder; 0 never.", low=0)
    hf_save_epochs: int = arg(0, "Epochs between exports as a Hugging Face folder; 0 never.", low=0)
    eval_steps: int = arg(0, "Steps between evaluations on data.eval_path; 0 never.", low=0)
    eval_epochs: int = arg(0, "Epochs between evaluations on data.eval_path; 0 never.", low=0)
    save_hf_weights: bool = arg(
        True, "Export the final model as a Hugging Face folder; `tutti export` does the same for a checkpoint later."
    )
    seed: int = arg(42, "Seed of initialization, data order and dropout.", low=0)
    enable_compile: bool = arg(False, "Compile each repeated block with torch.compile.")
    use_wandb: bool = arg(False, "Log to Weights & Biases, offline if there is no network.")
    wandb_project: str = arg("VeOmni", "Project of the run in Weights & Biases and in other trackers.")
    wandb_name: str | None = arg(
        None,
        "Name of the run in Weights & Biases and in other trackers, for which the default is the name of output_dir.",
    )
    wandb_id: str | None = arg(None, "Id of the Weights & Biases run to continue.")
    enable_profiling: bool = arg(False, "Run torch's profiler and write Chrome traces.")
    profile_start_step: int = arg(1, "First step to profile; a run's first step is 1.", low=0)
    profile_end_step: int = arg(2, "Step before which profiling ends.", low=1)
    profile_trace_dir: str = arg("./trace", "Folder of the traces.", path=True)
    profile_record_shapes: bool = arg(True, "Record the shapes of the operators' inputs.")
    profile_profile_memory: bool = arg(True, "Record allocations.")
    profile_with_stack: bool = arg(True, "Record the source lines of the operators.")
    profile_rank0_only: bool = arg(True, "Profile only rank 0.")
    pipeline_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = arg(
        "1f1b",
        "1f1b: alternate one forward and one backward; interleaved: the same with several thin stages per "
        "rank, for a smaller bubble; zero_bubble: compute gradients of parameters separately from those of "
        "inputs, when a rank would otherwise wait (FSDP then frees gathered parameters only at the end of a "
        "step).",
        added=True,
    )
    pipeline_stages_per_rank: int = arg(
        1,
        "Stages on each pipeline rank: 1 with pipeline_schedule 1f1b, at least 2 with interleaved.",
        low=1,
        added=True,
    )
    max_steps: int | None = arg(None, "Maximum steps of an epoch; the schedule follows it. For trials.", low=1)
    log_steps: int = arg(
        1, "Steps between metrics records (each averages over the steps since the last one).", low=1, added=True
    )
    adam_beta1: float = arg(0.9, "Decay of the optimizer's first moment, per step.", low=0, high=1, added=True)
    adam_beta2: float = arg(0.999, "Decay of the optimizer's second moment, per step.", low=0, high=1, added=True)
    adam_eps: float = arg(1e-8, "Added to the root of the second moment.", low=0, added=True)
    muon_momentum: float = arg(0.95, "Decay of the matrices' momentum under muon, per step.", low=0, high=1, added=True)
    max_checkpoints: int = arg(0, "Number of newest checkpoints to keep; 0 keeps all.", low=0, added=True)
    keep_best: bool = arg(
        False,
        "In addition to max_checkpoints, keep the checkpoint with the lowest evaluation loss among those "
        "saved right after an evaluation.",
        added=True,
    )
    early_stopping_patience: int = arg(
        0, "Consecutive evaluations without a lower loss after which the run ends; 0 never.", low=0, added=True
    )
    early_stopping_min_delta: float = arg(
        0.0, "How far below the previous lowest an evaluation loss must be to count as lower.", low=0, added=True
    )
    max_nonfinite_steps: int = arg(
        10,
        "Maximum consecutive steps with a NaN or infinite gradient, which are skipped; with one more the run fails.",
        low=0,
        added=True,
    )
    spike_sigma: float = arg(
        0.0,
        "Standard deviations above the mean of the last spike_window steps from which a step's loss or "
        "gradient norm counts as a spike, which is logged; 0 disables detection.",
        low=0,
        added=True,
    )
    spike_window: int = arg(
        128,
        "Steps that spikes are measured against; none is detected before half of them are known.",
        low=4,
        added=True,
    )
    skip_spikes: bool = arg(False, "Skip the updates of steps that are spikes.", added=True)
    hang_timeout: int = arg(
        1800,
        "Seconds without progress (a step, an evaluation batch, a checkpoint, an export) after which the run "
        "ends and reports which rank hangs, in which phase and where in the code; 0 never.",
        low=0,
        added=True,
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = arg(
        "auto",
        "Dtype of the forward and backward pass (parameters: see enable_mixed_precision); auto: bfloat16 on "
        "accelerators and on CPUs where its matrix products are measured to be faster, float32 on others.",
        added=True,
    )
    dpo_beta: float = arg(
        0.1, "data_type dpo: how closely the model is kept to the reference model.", low=1e-6, added=True
    )
    dpo_loss: Literal["sigmoid", "ipo"] = arg(
        "sigmoid", "data_type dpo: the logistic loss of DPO, or the squared one of IPO.", added=True
    )
    dpo_label_smoothing: float = arg(
        0.0, "data_type dpo: probability that chosen and rejected are swapped.", low=0, high=0.5, added=True
    )
    dpo_reference: Literal["precompute", "on_the_fly"] = arg(
        "precompute",
        "data_type dpo: compute the reference model's log-probabilities once before training, or for each batch.",
        added=True,
    )
    lora_rank: int = arg(16, "Rank of the adapters, with architecture lora.", low=1, added=True)
    lora_alpha: float = arg(
        32.0, "An adapter's change is scaled by lora_alpha / lora_rank (see lora_rslora).", low=0, added=True
    )
    lora_dropout: float = arg(
        0.0, "Share of an adapter's inputs that are set to zero in training.", low=0, high=0.99, added=True
    )
    lora_targets: tuple[str, ...] = arg(
        (),
        "Layers to adapt: names or ends of names, with * and ? (q_proj, layers.0.*, experts.down_proj); none "
        "means every linear layer and every stack of experts in the blocks, except routers.",
        added=True,
    )
    lora_rslora: bool = arg(False, "Scale by lora_alpha / sqrt(lora_rank), for large ranks.", added=True)
    lora_dora: bool = arg(False, "DoRA: also train the magnitude of each row of a weight.", added=True)
    lora_base_dtype: Literal["compute", "int8", "nf4"] = arg(
        "compute",
        "Storage of the frozen weights of adapted layers: compute_dtype, or quantized by bitsandbytes to 8 "
        "bits (int8) or 4 (nf4); they are unpacked to compute_dtype layer by layer, and again in the backward"
        " pass.",
        added=True,
    )
    lora_full_modules: tuple[str, ...] = arg(
        (),
        "Modules to train fully in addition to the adapters: names or ends of names (embed_tokens, lm_head).",
        added=True,
    )
    sample_prompts: tuple[str, ...] = arg(
        (),
        "Prompts that the model answers before training, at each evaluation and at the end, in the log and the report.",
        added=True,
        prose=True,
    )
    sample_prompts_path: str | None = arg(
        None,
        "File of more prompts, or a comma-separated list: jsonl rows with a `prompt` or `messages`, or txt "
        "with one per line. A row may contain the expected `answer`, a text or a list of alternatives: the "
        "share of right answers is `sample_accuracy`, or `unseen_accuracy` for a file that is data.eval_path.",
        added=True,
        path=True,
    )
    sample_tokens: int = arg(48, "Maximum tokens of each of these answers.", low=1, added=True)
    sample_steps: int = arg(20, "Diffusion: sampling steps for such a prompt.", low=1, added=True)
    sample_guidance: float = arg(
        4.0,
        "Diffusion: guidance scale for such a prompt; 1 is none.",
        low=1,
        added=True,
    )
    flow_time_mean: float = arg(
        0.0,
        "Diffusion, also for model.decoders: mean of the logit-normal training times; above 0 means more noise.",
        added=True,
    )
    flow_time_std: float = arg(1.0, "Diffusion: standard deviation of these times.", low=0.01, added=True)
    flow_shift: float = arg(
        1.0, "Diffusion: shift of these times towards noise, s t / (1 + (s - 1) t).", low=0.01, added=True
    )
    cfg_dropout: float = arg(
        0.1,
        "data_type diffusion, and models that draw: probability that a caption (the text before a picture) is"
        " hidden, which classifier-free guidance needs.",
        low=0,
        high=1,
        added=True,
    )
    ema_decay: float = arg(
        0.0,
        "Decay, per step, of a moving average of the weights, which is used for samples and exports; 0 keeps none.",
        low=0,
        high=0.999999,
        added=True,
    )
    cache_latents: bool = arg(
        True,
        "data_type diffusion: encode all pictures and captions once, before training, into output_dir/cache; false: in "
        "each step.",
        added=True,
    )
    trackers: tuple[TrackerName, ...] = arg(
        (),
        "Services that get the numbers of metrics.jsonl, through accelerate (wandb: as use_wandb); one that "
        "fails does not stop the run.",
        added=True,
    )
