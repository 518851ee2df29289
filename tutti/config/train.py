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
        "Pack samples into micro batches of at most B tokens without padding; false takes micro_batch_size of them.",
    )
    lr: float = arg(5e-5, "Peak learning rate, reached after the warmup.", low=0)
    lr_min: float = arg(1e-7, "Learning rate that linear and cosine decay end at.", low=0)
    lr_start: float = arg(0.0, "Learning rate that the warmup starts from.", low=0)
    freeze: tuple[str, ...] = arg(
        (),
        "Parts of the model that stay as they are: towers (encoders of images), projectors, language_model, decoders, "
        "or names of parameters with * and ?.",
        added=True,
    )
    part_lr: Mapping[str, float] = arg(
        {},
        "Peak learning rates of parts in place of lr, such as {towers: 2e-6, projectors: 1e-3}: parts as in freeze, of "
        "which the last that fits counts. Warmup and decay are those of lr, scaled.",
        added=True,
    )
    loss_weights: Mapping[str, float] = arg(
        {},
        "Weights of a step's losses by kind, with their defaults: text, code, feature and flow (1 each) of models that "
        "draw; l1 (1), mse (1), commitment (1) and kl (1e-6) with data_type image.",
        shown="{}",
        added=True,
    )
    weight_decay: float = arg(0.0, "Decoupled weight decay coefficient.", low=0)
    no_decay_modules: tuple[str, ...] = arg((), "Class names of modules whose parameters get no weight decay.")
    no_decay_params: tuple[str, ...] = arg((), "Parameters whose name contains one of these get no weight decay.")
    optimizer: Literal["adamw", "anyprecision_adamw", "adamw_8bit", "muon"] = arg(
        "adamw",
        "adamw (torch's, fused), anyprecision_adamw: bf16 state with Kahan compensation, or (added) adamw_8bit: state "
        "in 8 bits, by bitsandbytes; muon: orthogonal updates of the blocks' matrices, adamw for the rest, with the "
        "same lr.",
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
        "Part of all steps over which a micro batch grows from bsz_warmup_init_mbtoken to B tokens, with dyn_bsz.",
        low=0,
        high=1,
    )
    bsz_warmup_init_mbtoken: int = arg(200, "Tokens of a micro batch where that warmup starts.", low=1)
    lr_warmup_ratio: float = arg(0.0, "Part of all T steps over which the learning rate rises.", low=0, high=1)
    lr_decay_style: Literal["constant", "linear", "cosine"] = arg("cosine", "Learning rate after the warmup.")
    lr_decay_ratio: float = arg(
        1.0, "Part of all T steps at whose end linear and cosine decay have reached lr_min; flat after.", low=0, high=1
    )
    enable_reshard_after_forward: bool = arg(
        False, "FSDP2: free gathered parameters after the forward pass and gather them again for the backward pass."
    )
    enable_reshard_after_backward: bool = arg(
        False, "FSDP2: free gathered parameters after every micro batch's backward pass, not just the last one's."
    )
    enable_mixed_precision: bool = arg(
        True,
        "fp32 parameters and optimizer, compute in compute_dtype, fp32 gradient reduction; false holds everything in "
        "bf16, and computes in it unless compute_dtype is float32.",
    )
    enable_gradient_checkpointing: bool = arg(
        True, "Keep only the inputs of each block and recompute the rest in the backward pass."
    )
    enable_reentrant: bool = arg(True, "Use torch's reentrant kind of gradient checkpointing.")
    enable_full_shard: bool = arg(
        True, "FSDP: shard parameters, gradients and optimizer (ZeRO-3); false keeps gathered parameters (ZeRO-2)."
    )
    enable_fsdp_offload: bool = arg(
        False, "FSDP: hold parameters, gradients and optimizer in host memory, and step there."
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
        True, "Rank 0 alone reads the weight files and sends them on; false lets every rank read just its slices."
    )
    enable_full_determinism: bool = arg(False, "Deterministic kernels only: two runs are equal bit for bit.")
    enable_batch_invariant_mode: bool = arg(
        False,
        "Compute sample by sample, so that its logits do not depend, bit for bit, on its batch; slow for short ones.",
    )
    empty_cache_steps: int = arg(500, "Steps between two releases of cached device memory; 0 never.", low=0)
    gc_steps: int = arg(
        500, "Steps between two Python garbage collections, on all ranks at once; 0 leaves collection automatic.", low=0
    )
    data_parallel_mode: Literal["ddp", "fsdp1", "fsdp2"] = arg(
        "ddp",
        "Data parallelism: whole replicas (ddp), or sharded parameters, gradients and optimizer; fsdp1 reduces "
        "gradients once a step, fsdp2 those of each micro batch, with enable_full_shard.",
    )
    data_parallel_replicate_size: int = arg(
        1, "Replicas among the dp ranks; times data_parallel_shard_size it is dp.", low=1
    )
    data_parallel_shard_size: int = arg(
        1, "Ranks that share one replica (FSDP); with both sizes at 1, FSDP shards over all of dp.", low=1
    )
    tensor_parallel_size: int = arg(1, "Ranks that share each matrix.", low=1)
    expert_parallel_size: int = arg(1, "Ranks that share the experts of a mixture-of-experts model.", low=1)
    ep_outside: bool = arg(False, "Expert groups of strided ranks, rather than of neighbouring ones.")
    pipeline_parallel_size: int = arg(1, "Stages that the blocks are divided into.", low=1)
    ulysses_parallel_size: int = arg(
        1, "Ranks that share a sequence and exchange it for heads around attention.", low=1
    )
    async_enabled: bool = arg(False, "Overlap the exchange of Ulysses with the projections around it.")
    context_parallel_size: int = arg(1, "Ranks that share a sequence in a ring of attention blocks.", low=1)
    ckpt_manager: Literal["dcp"] = arg("dcp", "Checkpoint format: torch.distributed.checkpoint.")
    save_async: bool = arg(False, "Write checkpoints in the background while training goes on.")
    load_checkpoint_path: str | None = arg(
        None,
        "Checkpoint folder to resume from, exactly; auto takes the newest whole one in output_dir, if any.",
        path=True,
    )
    save_steps: int = arg(0, "Steps between two checkpoints; 0 never.", low=0)
    save_epochs: int = arg(1, "Epochs between two checkpoints; 0 never.", low=0)
    hf_save_steps: int = arg(0, "Steps between two exports as a Hugging Face folder; 0 never.", low=0)
    hf_save_epochs: int = arg(0, "Epochs between two exports as a Hugging Face folder; 0 never.", low=0)
    eval_steps: int = arg(0, "Steps between two evaluations on data.eval_path; 0 never.", low=0)
    eval_epochs: int = arg(0, "Epochs between two evaluations on data.eval_path; 0 never.", low=0)
    save_hf_weights: bool = arg(
        True, "Export the final model as a Hugging Face folder; `tutti export` does the same for a checkpoint later."
    )
    seed: int = arg(42, "Seed of initialisation, data order and dropout.", low=0)
    enable_compile: bool = arg(False, "Compile each repeated block with torch.compile.")
    use_wandb: bool = arg(False, "Log to Weights & Biases as well, offline where there is no network.")
    wandb_project: str = arg("VeOmni", "Project of the run in Weights & Biases and in other trackers.")
    wandb_name: str | None = arg(
        None, "Name of the run in Weights & Biases and in other trackers, which take that of output_dir by default."
    )
    wandb_id: str | None = arg(None, "Id of the Weights & Biases run to go on with.")
    enable_profiling: bool = arg(False, "Run torch's profiler and write Chrome traces.")
    profile_start_step: int = arg(1, "First step that is profiled; a run's first step is 1.", low=0)
    profile_end_step: int = arg(2, "Step before which profiling ends.", low=1)
    profile_trace_dir: str = arg("./trace", "Folder of the traces.", path=True)
    profile_record_shapes: bool = arg(True, "Record the shapes of the operators' inputs.")
    profile_profile_memory: bool = arg(True, "Record allocations.")
    profile_with_stack: bool = arg(True, "Record the source lines of the operators.")
    profile_rank0_only: bool = arg(True, "Profile rank 0 alone.")
    pipeline_schedule: Literal["1f1b", "interleaved", "zero_bubble"] = arg(
        "1f1b",
        "One forward, one backward; interleaved: the same with several thin stages on a rank, for a smaller bubble; "
        "zero_bubble: gradients of parameters are computed apart from those of inputs, while a rank would wait "
        "(FSDP then frees what it has gathered at the end of a step only).",
        added=True,
    )
    pipeline_stages_per_rank: int = arg(
        1,
        "Stages on each pipeline rank: 1 with pipeline_schedule 1f1b, at least 2 with interleaved.",
        low=1,
        added=True,
    )
    max_steps: int | None = arg(None, "Most steps of an epoch; the schedule follows it. For trials.", low=1)
    log_steps: int = arg(
        1, "Steps between two lines of metrics (each line averages over the steps since).", low=1, added=True
    )
    adam_beta1: float = arg(0.9, "Decay of the optimizer's first moment, per step.", low=0, high=1, added=True)
    adam_beta2: float = arg(0.999, "Decay of the optimizer's second moment, per step.", low=0, high=1, added=True)
    adam_eps: float = arg(1e-8, "Added to the root of the second moment.", low=0, added=True)
    muon_momentum: float = arg(0.95, "Decay of the matrices' momentum under muon, per step.", low=0, high=1, added=True)
    max_checkpoints: int = arg(0, "Newest checkpoints that are kept; 0 keeps all.", low=0, added=True)
    keep_best: bool = arg(
        False,
        "Beyond max_checkpoints, keep the checkpoint of lowest evaluation loss among those that were saved right after "
        "an evaluation.",
        added=True,
    )
    early_stopping_patience: int = arg(
        0, "Evaluations in a row without a lower loss after which the run ends; 0 never.", low=0, added=True
    )
    early_stopping_min_delta: float = arg(
        0.0, "By how much an evaluation loss must be below the lowest before it to be lower.", low=0, added=True
    )
    max_nonfinite_steps: int = arg(
        10,
        "Most steps in a row whose gradient is NaN or infinite, and which are left out; with one more the run fails.",
        low=0,
        added=True,
    )
    spike_sigma: float = arg(
        0.0,
        "Standard deviations above the mean of the last spike_window steps from which on a step's loss or gradient "
        "norm is a spike, which is counted and logged; 0 looks for none.",
        low=0,
        added=True,
    )
    spike_window: int = arg(
        128, "Steps that spikes are measured by; none is found before half of them are known.", low=4, added=True
    )
    skip_spikes: bool = arg(False, "Leave out the updates of steps that are spikes.", added=True)
    hang_timeout: int = arg(
        1800,
        "Seconds without progress (a step, a batch of an evaluation, a checkpoint, an export) after which the run ends "
        "and says which rank hangs, in which phase and where in the code; 0 never.",
        low=0,
        added=True,
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = arg(
        "auto",
        "Dtype of the forward and backward pass (parameters: see enable_mixed_precision); auto: bfloat16 on "
        "accelerators and on CPUs that multiply matrices faster in it, which is measured, float32 on others.",
        added=True,
    )
    dpo_beta: float = arg(
        0.1, "data_type dpo: how closely the model is kept to the reference model.", low=1e-6, added=True
    )
    dpo_loss: Literal["sigmoid", "ipo"] = arg(
        "sigmoid", "data_type dpo: the logistic loss of DPO, or the squared one of IPO.", added=True
    )
    dpo_label_smoothing: float = arg(
        0.0, "data_type dpo: probability that chosen and rejected are the wrong way round.", low=0, high=0.5, added=True
    )
    dpo_reference: Literal["precompute", "on_the_fly"] = arg(
        "precompute",
        "data_type dpo: compute the reference model's log-probabilities once before training, or for each batch anew.",
        added=True,
    )
    lora_rank: int = arg(16, "Rank of the adapters, with architecture lora.", low=1, added=True)
    lora_alpha: float = arg(
        32.0, "An adapter's change is scaled by lora_alpha / lora_rank (see lora_rslora).", low=0, added=True
    )
    lora_dropout: float = arg(
        0.0, "Part of an adapter's inputs that are set to zero in training.", low=0, high=0.99, added=True
    )
    lora_targets: tuple[str, ...] = arg(
        (),
        "Layers to adapt: names or ends of names, with * and ? (q_proj, layers.0.*, experts.down_proj); "
        "none is every linear layer and every stack of experts in the blocks, but no router.",
        added=True,
    )
    lora_rslora: bool = arg(False, "Scale by lora_alpha / sqrt(lora_rank), for large ranks.", added=True)
    lora_dora: bool = arg(False, "DoRA: train the magnitude of each of a weight's rows as well.", added=True)
    lora_base_dtype: Literal["compute", "int8", "nf4"] = arg(
        "compute",
        "How the frozen weights beside adapters are held: in compute_dtype, or quantized by bitsandbytes, to 8 bits "
        "(int8) or 4 (nf4); they are unpacked to compute_dtype layer by layer, and again in the backward pass.",
        added=True,
    )
    lora_full_modules: tuple[str, ...] = arg(
        (), "Modules to train whole beside the adapters: names or ends of names (embed_tokens, lm_head).", added=True
    )
    sample_prompts: tuple[str, ...] = arg(
        (),
        "Prompts that the model answers before training, at each evaluation and at the end, in the log and the report.",
        added=True,
        prose=True,
    )
    sample_prompts_path: str | None = arg(
        None,
        "File of more of these prompts, or a comma list: jsonl rows with a `prompt` or `messages`, or txt with one a "
        "line. A row may name the `answer` to expect, a text or a list of texts: the share of answers with it is "
        "`sample_accuracy`, or `unseen_accuracy` of a file that is data.eval_path.",
        added=True,
        path=True,
    )
    sample_tokens: int = arg(48, "Most tokens of each of these answers.", low=1, added=True)
    sample_steps: int = arg(20, "Diffusion: steps in which such a prompt is drawn.", low=1, added=True)
    sample_guidance: float = arg(
        4.0,
        "Diffusion: how strongly a prompt leads what is drawn for it; 1 not beyond what was learned.",
        low=1,
        added=True,
    )
    flow_time_mean: float = arg(
        0.0,
        "Diffusion, also of model.decoders: mean of the logit-normal times of training; above 0 more noise.",
        added=True,
    )
    flow_time_std: float = arg(1.0, "Diffusion: their standard deviation.", low=0.01, added=True)
    flow_shift: float = arg(
        1.0, "Diffusion: shift of these times towards noise, s t / (1 + (s - 1) t).", low=0.01, added=True
    )
    cfg_dropout: float = arg(
        0.1,
        "data_type diffusion, and models that draw: probability that a caption (the text before a picture) is left "
        "out, which guidance needs in sampling.",
        low=0,
        high=1,
        added=True,
    )
    ema_decay: float = arg(
        0.0,
        "Decay, per step, of a moving average of the weights, which is sampled from and exported; 0 keeps none.",
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
        "Services that follow the run with the numbers of metrics.jsonl, through accelerate (wandb: as use_wandb); one "
        "that fails does not stop the run.",
        added=True,
    )
