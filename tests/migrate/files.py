"""Configuration files of other frameworks as users write them, and helpers to read them in tests."""

from pathlib import Path
from typing import Any

from tutti.config import Config
from tutti.config.load import load
from tutti.migrate import Migration, migrate
from tutti.migrate.show import as_yaml

VEOMNI_FLAT = """
model:
  model_path: ./Qwen3-8B
  attn_implementation: flash_attention_2
  moe_implementation: fused
data:
  train_path: corpus/tulu
  train_size: 80000000
  data_type: conversation
  max_seq_len: 4096
  text_keys: messages
  chat_template: qwen
  num_workers: 8
  drop_last: true
train:
  output_dir: qwen3_sft
  data_parallel_mode: fsdp2
  ulysses_parallel_size: 1
  global_batch_size: 32
  micro_batch_size: 2
  rmpad: false
  rmpad_with_pos_ids: true
  dyn_bsz: true
  dyn_bsz_margin: 0
  lr: 5.0e-6
  lr_warmup_ratio: 0.007
  lr_decay_style: constant
  weight_decay: 0.01
  optimizer: adamw
  enable_gradient_checkpointing: true
  init_device: meta
  save_epochs: 1
  load_checkpoint_path: ""
  use_wandb: true
  wandb_project: qwen
  max_steps: 4000
"""

VEOMNI_NESTED = """
model:
  model_path: Qwen/Qwen3-0.6B
  ops_implementation:
    attn_implementation: flash_attention_3
    moe_implementation: fused_triton
    rms_norm_implementation: liger_kernel
  lora_config: {rank: 16, alpha: 32, lora_modules: [q_proj, v_proj], seed: 3}
data:
  train_path: corpus.jsonl
  eval_path: held_out.jsonl
  mm_configs: {fps: 2.0}
  dataloader: {type: native, num_workers: 4, persistent_workers: true}
train:
  micro_batch_size: 1
  num_train_epochs: 2
  moe_load_balance_monitor_interval: 0
  optimizer: {type: muon, lr: 1.0e-5, lr_decay_style: cosine, max_grad_norm: 0.5, muon_lr: 1.0e-3}
  wandb: {enable: false, project: run, name: first}
  accelerator:
    ulysses_size: 1
    dp_shard_size: -1
    fsdp_config:
      fsdp_mode: fsdp2
      mixed_precision: {enable: true, param_dtype: bfloat16}
  checkpoint: {output_dir: out, manager: dcp, save_hf_weights: false}
  gradient_checkpointing: {enable: true, early_stop: true}
"""

LLAMA_FACTORY = """
### model
model_name_or_path: models/llama-3-8b
trust_remote_code: true
flash_attn: fa2

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_dropout: 0.05
lora_target: q_proj, v_proj
deepspeed: configs/ds_z3_offload_config.json
quantization_bit: 4

### dataset
dataset: letters,recipes
dataset_dir: sets
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
neat_packing: true
packing: true
mask_history: false

### output
output_dir: saves/llama3
logging_steps: 10
save_steps: 500
plot_loss: true
report_to: tensorboard
run_name: first

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.5
lr_scheduler_type: polynomial
warmup_steps: 20
bf16: true
optim: paged_adamw_8bit
neftune_noise_alpha: 5
resume_from_checkpoint: null
ddp_timeout: 180000000

### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""

AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: true
strict: false
chat_template: llama3
datasets:
  - path: owner/alpaca
    type: alpaca
    split: train
    name: cleaned
    revision: v1
    shards: 4
  - path: json
    data_files: letters.jsonl
    ds_type: json
    type: chat_template
    field_messages: turns
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/lora
sequence_len: 4096
sample_packing: true
eval_sample_packing: false
pad_to_sequence_len: true
adapter: qlora
lora_model_dir:
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
lora_modules_to_save: [embed_tokens, lm_head]
wandb_project: songs
wandb_entity:
wandb_name: first
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
tf32: false
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
early_stopping_patience:
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
fsdp: [full_shard, auto_wrap]
fsdp_config:
  fsdp_offload_params: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: FULL_STATE_DICT
special_tokens: {pad_token: <|end_of_text|>}
"""

TRL = """
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: trl-lib/Capybara
dataset_config: small
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
eos_token: '<|im_end|>'
eval_strategy: steps
eval_steps: 100
use_peft: true
lora_r: 32
lora_target_modules: all-linear
output_dir: out
report_to: [tensorboard, wandb]
torch_dtype: bfloat16
warmup_ratio: 0.1
lr_scheduler_type: constant
weight_decay: 0.01
dataset_num_proc: 4
load_best_model_at_end: true
attn_implementation: kernels-community/flash-attn
fsdp: shard_grad_op auto_wrap
fsdp_config: {fsdp_transformer_layer_cls_to_wrap: QwenBlock, min_num_params: 0}
"""

TRAINER = """
{"output_dir": "out", "per_device_train_batch_size": 4, "learning_rate": 3e-4, "max_steps": 500, "warmup_steps": 37,
"lr_scheduler_type": "cosine", "seed": 1, "label_smoothing_factor": 0.1}
"""

TORCHTITAN = """
[job]
dump_folder = "./outputs"
[metrics]
log_freq = 10
enable_tensorboard = true
[model]
name = "llama3"
flavor = "8B"
hf_assets_path = "./assets/Llama-3.1-8B"
[optimizer]
name = "AdamW"
lr = 3e-4
[lr_scheduler]
warmup_steps = 100
min_lr_factor = 0.1
[training]
local_batch_size = 2
seq_len = 8192
steps = 1000
dataset = "c4"
[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 2
fsdp_reshard_after_forward = "never"
[checkpoint]
enable = true
interval = 250
async_mode = "async"
[activation_checkpoint]
mode = "full"
[quantize.linear.float8]
filter_fqns = ["output"]
"""

FILES = {
    "transformers and TRL": TRL,
    "transformers and TRL, arguments alone": TRAINER,
    "torchtitan": TORCHTITAN,
    "VeOmni": VEOMNI_FLAT,
    "VeOmni, nested": VEOMNI_NESTED,
    "LLaMA-Factory": LLAMA_FACTORY,
    "Axolotl": AXOLOTL,
}


def migrated(tmp_path: Path, text: str, ranks: int = 1) -> Migration:
    path = tmp_path / ("theirs.toml" if text.startswith("\n[") else "theirs.yaml")
    path.write_text(text)
    return migrate(str(path), ranks)


def loaded(tmp_path: Path, migration: Migration) -> Config:
    path = tmp_path / "ours.yaml"
    path.write_text(as_yaml(migration, "theirs.yaml"))
    return load([str(path)], None)


def row(migration: Migration, key: str) -> Any:
    (found,) = [row for row in migration.rows if row.key == key]
    return found
