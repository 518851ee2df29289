from typing import Literal

from pydantic import BaseModel, ConfigDict


class TrainConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    output_dir: str | None = None
    """Path to save the model. Required."""
    architecture: Literal["full", "lora"] = "full"
    """Whether to train the full model or LoRA."""
    dyn_bsz: bool = False
    """Whether to use dynamic batch size."""
    lr: float = 5e-5
    """Maximum learning rate."""
    lr_min: float = 1e-7
    """Minimum learning rate."""
    lr_start: float = 0.0
    """Starting learning rate for warmup."""
    weight_decay: float = 0.0
    """Weight decay coefficient."""
    no_decay_modules: tuple[str, ...] = ()
    """Modules to exclude from weight decay."""
    no_decay_params: tuple[str, ...] = ()
    """Parameters to exclude from weight decay."""
    optimizer: Literal["adamw", "anyprecision_adamw"] = "adamw"
    """Name of the optimizer."""
    max_grad_norm: float = 1.0
    """Gradient clipping norm."""
    micro_batch_size: int = 1
    """Number of samples processed simultaneously on each GPU."""
    global_batch_size: int | None = None
    """Global batch size, which must be a multiple of the number of GPUs."""
    num_train_epochs: int = 1
    """Number of training epochs."""
    pad_to_length: bool = False
    """Whether to pad the input to the maximum sequence length when using dyn_bsz."""
    bsz_warmup_ratio: float = 0.0
    """Proportion of batch size warmup in the total number of steps."""
    bsz_warmup_init_mbtoken: int = 200
    """Initial micro batch size for warmup."""
    lr_warmup_ratio: float = 0.0
    """Proportion of learning rate warmup in the total number of steps."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    """Name of the learning rate scheduler."""
    lr_decay_ratio: float = 1.0
    """Proportion of learning rate decay in the total number of steps."""
    enable_reshard_after_forward: bool = False
    """Enable reshard after forward for FSDP2."""
    enable_reshard_after_backward: bool = False
    """Enable reshard after backward for FSDP2."""
    enable_mixed_precision: bool = True
    """Whether to enable mixed precision training (higher memory usage but more stable)."""
    enable_gradient_checkpointing: bool = True
    """Whether to enable gradient checkpointing to reduce memory usage."""
    enable_reentrant: bool = True
    """Whether to enable reentrant in gradient checkpointing."""
    enable_full_shard: bool = True
    """Whether to use full sharding FSDP (equivalent to ZeRO3)."""
    enable_fsdp_offload: bool = False
    """Whether to enable FSDP CPU offloading (only supported for FSDP1)."""
    enable_activation_offload: bool = False
    """Whether to enable activation value CPU offloading."""
    activation_gpu_limit: float = 0.0
    """Size of the activation values retained on the GPU (in GB)."""
    init_device: str = "cuda"
    """"cpu", "cuda", "meta", "npu", init device for model initialization. use "meta" or cpu for large model(>30B)"""
    broadcast_model_weights_from_rank0: bool = True
    """Whether to broadcast model weights from rank 0 to all other ranks."""
    enable_full_determinism: bool = False
    """Whether to enable deterministic mode (for bitwise alignment)."""
    enable_batch_invariant_mode: bool = False
    """Whether to enable batch invariant mode."""
    empty_cache_steps: int = 500
    """Number of steps between two cache clearings."""
    gc_steps: int = 500
    """Number of steps between two gc.collect."""
    data_parallel_mode: Literal["ddp", "fsdp1", "fsdp2"] = "ddp"
    """Data parallel algorithm."""
    data_parallel_replicate_size: int = 1
    """Number of replicas for data parallel."""
    data_parallel_shard_size: int = 1
    """Number of shards for data parallel."""
    tensor_parallel_size: int = 1
    """Tensor parallel size (currently not supported)."""
    expert_parallel_size: int = 1
    """Expert parallel size (currently only supported DeepseekMOE)"""
    ep_outside: bool = False
    """Whether to use expert parallel outside in ep-fsdp."""
    pipeline_parallel_size: int = 1
    """Pipeline parallel size (currently not supported)."""
    ulysses_parallel_size: int = 1
    """Ulysses sequence parallel size."""
    async_enabled: bool = False
    """Whether to enable async ulysses."""
    context_parallel_size: int = 1
    """Ring sequence parallel size (currently not supported)."""
    ckpt_manager: Literal["dcp"] = "dcp"
    """Checkpoint manager."""
    save_async: bool = False
    """Whether to save checkpoint asynchronously."""
    load_checkpoint_path: str | None = None
    """Path to the omnistore checkpoint for resuming training."""
    save_steps: int = 0
    """Number of steps between two checkpoint saves. 0 means invalid."""
    save_epochs: int = 1
    """Number of epochs between two checkpoint saves. 0 means invalid."""
    hf_save_steps: int = 0
    """Number of steps between two huggingface model weights saves. 0 means invalid."""
    hf_save_epochs: int = 0
    """Number of epochs between two huggingface model weights saves. 0 means invalid."""
    eval_steps: int = 0
    """Number of steps between two evaluation. 0 means invalid."""
    eval_epochs: int = 0
    """Number of epochs between two evaluation. 0 means invalid."""
    save_hf_weights: bool = True
    """Whether to save the model weights in the huggingface format at the end of training. It is recommended to set it to False for models > 30B to prevent NCCL timeout. You can convert it after training."""
    seed: int = 42
    """Random seed."""
    enable_compile: bool = False
    """Whether to enable torch compile."""
    use_wandb: bool = False
    """Whether to enable byted wandb experiment logging."""
    wandb_project: str = "VeOmni"
    """Name of the wandb experiment project."""
    wandb_name: str | None = None
    """Name of the wandb experiment."""
    wandb_id: str | None = None
    """Wandb run ID for resuming a previous run. When specified, training logs will continue in the existing wandb run."""
    enable_profiling: bool = False
    """Whether to use torch profiling."""
    profile_start_step: int = 1
    """Starting step of profiling."""
    profile_end_step: int = 2
    """Ending step of profiling."""
    profile_trace_dir: str = "./trace"
    """Path to save the profiling results."""
    profile_record_shapes: bool = True
    """Whether to record the shapes of the input tensors."""
    profile_profile_memory: bool = True
    """Whether to record the memory usage."""
    profile_with_stack: bool = True
    """Whether to record the stack information."""
    profile_rank0_only: bool = True
    """Whether to profile only on rank 0."""
    max_steps: int | None = None
    """Number of steps per training epoch (only used for debugging)."""
