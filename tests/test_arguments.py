"""Each argument has an effect: `SHOWN_BY` names, for each one, a test that would fail if it were ignored.

The tests here check that every argument of the contract is in `SHOWN_BY`, and that every named test exists.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.config.test_reference import reference

TESTS = Path(__file__).parent

OFFLOAD = "parallel/test_activation_offload.py"
SWITCHES = "train/test_switches.py"
RUN = "train/test_run.py"
LOADER = "data/test_loader.py"
ENCODE = "data/test_encode.py"
BUILD = "model/test_build.py"
INFER = "infer/test_run.py"
METRICS = "train/logging/test_metrics.py"
PROFILE = "train/test_profile.py"
SHARED = f"{SWITCHES}::test_ranks_share_the_model_as_asked"
REFUSED = "config/test_load.py::test_wrong_values"
EXPERTS_AND_REPLICAS = f"{SWITCHES}::test_replicas_and_expert_groups_are_of_the_ranks_asked_for"
BY_STEPS = f"{SWITCHES}::test_checkpoints_and_exports_come_by_steps"
BY_EPOCHS = f"{SWITCHES}::test_checkpoints_exports_and_evaluations_come_by_epochs"
RATE = f"{SWITCHES}::test_the_learning_rate_follows_its_arguments"
WANDB = "train/logging/test_trackers.py::test_wandb_offline_holds_the_history"

SHOWN_BY = {
    "model.config_path": f"{BUILD}::test_the_config_can_be_another_than_the_weights",
    "model.model_path": f"{RUN}::test_exported_model_loads_in_transformers_and_continues_the_loss",
    "model.tokenizer_path": f"{BUILD}::test_a_fresh_model_ends_its_texts_as_its_tokenizer_does",
    "model.safetensor_idx_path": f"{SWITCHES}::test_an_index_says_how_weights_are_read_and_written",
    "model.encoders": "model/test_omni.py::test_an_override_changes_the_tower",
    "model.decoders": "train/test_draw_run.py::test_both_kinds_of_loss_are_told_of_and_fall",
    "model.input_encoder": "train/test_draw_run.py::test_a_model_that_sees_by_codes_has_no_tower",
    "model.output_encoder": "train/test_features_run.py::test_both_kinds_of_loss_are_told_of_and_fall",
    "model.encode_target": "train/test_draw_run.py::test_codes_that_are_made_before_training_are_those_of_each_step",
    "model.attn_implementation": f"{BUILD}::test_kernels_and_dtype_follow_the_configuration",
    "model.moe_implementation": f"{BUILD}::test_kernels_and_dtype_follow_the_configuration",
    "model.basic_modules": f"{SWITCHES}::test_basic_modules_are_units_of_their_own",
    "data.train_path": "data/test_source.py::test_folders_lists_and_globs",
    "data.eval_path": f"{LOADER}::test_evaluation_is_one_pass_in_order_over_all_ranks",
    "data.train_size": f"{LOADER}::test_steps_by_formula",
    "data.train_sample": f"{LOADER}::test_steps_by_formula",
    "data.data_type": f"{RUN}::test_classification_learns_and_reports_accuracy",
    "data.dataloader_type": REFUSED,
    "data.datasets_type": "data/test_preencoded.py::test_a_dataset_of_the_users_own",
    "data.multisource_datasets_type": REFUSED,
    "data.source_name": f"{SWITCHES}::test_a_label_names_the_figures_of_the_one_source",
    "data.dyn_bsz_buffer_size": f"{SWITCHES}::test_a_larger_buffer_fills_batches_better",
    "data.text_keys": f"{ENCODE}::test_text_keys",
    "data.chat_template": f"{SWITCHES}::test_chats_are_rendered_by_the_template_asked_for",
    "data.max_seq_len": f"{ENCODE}::test_a_long_conversation_keeps_its_last_tokens",
    "data.num_workers": "data/test_prefetch.py::test_each_worker_prepares_as_many_batches_ahead_as_asked",
    "data.prefetch_factor": "data/test_prefetch.py::test_each_worker_prepares_as_many_batches_ahead_as_asked",
    "data.drop_last": f"{LOADER}::test_drop_last",
    "data.pin_memory": "data/test_prefetch.py::test_batches_go_to_page_locked_memory_where_there_is_an_accelerator",
    "data.silent_exception": f"{LOADER}::test_bad_rows_stop_the_run_or_are_counted",
    "train.output_dir": f"{RUN}::test_output_folder_of_another_run_is_refused",
    "train.architecture": "train/test_lora_run.py::test_adapter_folder_and_merged_folder_are_the_trained_model",
    "train.dyn_bsz": f"{LOADER}::test_steps_by_formula",
    "train.lr": RATE,
    "train.lr_min": RATE,
    "train.lr_start": RATE,
    "train.weight_decay": f"{SWITCHES}::test_weight_decay_spares_what_is_named",
    "train.no_decay_modules": f"{SWITCHES}::test_weight_decay_spares_what_is_named",
    "train.no_decay_params": f"{SWITCHES}::test_weight_decay_spares_what_is_named",
    "train.optimizer": f"{SWITCHES}::test_the_optimizer_is_the_one_asked_for",
    "train.max_grad_norm": f"{SWITCHES}::test_gradients_are_clipped_to_the_norm",
    "train.micro_batch_size": f"{LOADER}::test_any_number_of_ranks_gets_the_same_global_batches",
    "train.global_batch_size": f"{LOADER}::test_any_number_of_ranks_gets_the_same_global_batches",
    "train.num_train_epochs": f"{SWITCHES}::test_max_steps_caps_each_epoch",
    "train.pad_to_length": f"{SWITCHES}::test_padded_batches_have_one_length",
    "train.bsz_warmup_ratio": f"{LOADER}::test_the_budget_grows_over_the_first_part_of_all_steps",
    "train.bsz_warmup_init_mbtoken": f"{LOADER}::test_the_budget_grows_over_the_first_part_of_all_steps",
    "train.lr_warmup_ratio": RATE,
    "train.lr_decay_style": RATE,
    "train.lr_decay_ratio": RATE,
    "train.enable_reshard_after_forward": SHARED,
    "train.enable_reshard_after_backward": SHARED,
    "train.enable_mixed_precision": f"{SWITCHES}::test_parameters_are_fp32_with_mixed_precision_and_bf16_without",
    "train.enable_gradient_checkpointing": f"{SWITCHES}::test_blocks_are_recomputed_in_the_way_asked_for",
    "train.enable_reentrant": f"{SWITCHES}::test_blocks_are_recomputed_in_the_way_asked_for",
    "train.enable_full_shard": SHARED,
    "train.enable_fsdp_offload": "parallel/test_memory.py::test_modes_train_as_one_process_does",
    "train.enable_activation_offload": f"{OFFLOAD}::test_offloaded_activations_on_layouts",
    "train.activation_gpu_limit": f"{OFFLOAD}::test_offloaded_activations_are_bit_equal_and_counted",
    "train.init_device": f"{SWITCHES}::test_the_model_is_built_where_init_device_says",
    "train.broadcast_model_weights_from_rank0": f"{SWITCHES}::test_rank_0_alone_reads_weights_unless_told_otherwise",
    "train.enable_full_determinism": f"{SWITCHES}::test_only_deterministic_kernels_when_asked",
    "train.enable_batch_invariant_mode": "parallel/test_batch_invariant.py::test_a_sample_is_the_same_in_any_batch",
    "train.empty_cache_steps": f"{SWITCHES}::test_garbage_and_cached_memory_go_at_their_steps",
    "train.gc_steps": f"{SWITCHES}::test_garbage_and_cached_memory_go_at_their_steps",
    "train.data_parallel_mode": SHARED,
    "train.data_parallel_replicate_size": EXPERTS_AND_REPLICAS,
    "train.data_parallel_shard_size": EXPERTS_AND_REPLICAS,
    "train.tensor_parallel_size": SHARED,
    "train.expert_parallel_size": EXPERTS_AND_REPLICAS,
    "train.ep_outside": EXPERTS_AND_REPLICAS,
    "train.pipeline_parallel_size": "parallel/test_grid.py::test_a_layout_equals_one_process",
    "train.ulysses_parallel_size": SHARED,
    "train.async_enabled": SHARED,
    "train.context_parallel_size": SHARED,
    "train.ckpt_manager": REFUSED,
    "train.save_async": f"{SWITCHES}::test_checkpoints_are_written_in_the_background_when_asked",
    "train.load_checkpoint_path": f"{RUN}::test_resume_is_bit_equal",
    "train.save_steps": BY_STEPS,
    "train.save_epochs": BY_EPOCHS,
    "train.hf_save_steps": BY_STEPS,
    "train.hf_save_epochs": BY_EPOCHS,
    "train.eval_steps": f"{RUN}::test_evaluation_is_the_token_mean_on_any_layout",
    "train.eval_epochs": BY_EPOCHS,
    "train.save_hf_weights": BY_STEPS,
    "train.seed": f"{SWITCHES}::test_the_seed_decides_on_weights_and_on_the_order_of_the_data",
    "train.enable_compile": f"{SWITCHES}::test_blocks_are_compiled_when_asked",
    "train.use_wandb": WANDB,
    "train.wandb_project": WANDB,
    "train.wandb_name": WANDB,
    "train.wandb_id": WANDB,
    "train.enable_profiling": f"{SWITCHES}::test_the_asked_steps_are_profiled",
    "train.profile_start_step": f"{SWITCHES}::test_the_asked_steps_are_profiled",
    "train.profile_end_step": f"{SWITCHES}::test_the_asked_steps_are_profiled",
    "train.profile_trace_dir": f"{SWITCHES}::test_the_asked_steps_are_profiled",
    "train.profile_record_shapes": f"{PROFILE}::test_switches",
    "train.profile_profile_memory": f"{PROFILE}::test_switches",
    "train.profile_with_stack": f"{PROFILE}::test_switches",
    "train.profile_rank0_only": f"{PROFILE}::test_ranks",
    "train.max_steps": f"{SWITCHES}::test_max_steps_caps_each_epoch",
    "infer.model_path": f"{INFER}::test_a_checkpoint_speaks_as_its_export_does",
    "infer.tokenizer_path": f"{INFER}::test_another_tokenizer",
    "infer.seed": f"{INFER}::test_each_argument_changes_the_text",
    "infer.do_sample": f"{INFER}::test_each_argument_changes_the_text",
    "infer.temperature": f"{INFER}::test_each_argument_changes_the_text",
    "infer.top_p": f"{INFER}::test_each_argument_changes_the_text",
    "infer.max_tokens": f"{INFER}::test_each_argument_changes_the_text",
}


def test_every_argument_is_shown() -> None:
    contract = [row.name for row in reference()]
    unknown = sorted(set(SHOWN_BY) - set(contract))
    assert not unknown, f"not in the contract: {unknown}"
    missing = [name for name in contract if name not in SHOWN_BY]
    assert not missing, f"name in SHOWN_BY the test that shows what each of these does: {missing}"


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("place", sorted(set(SHOWN_BY.values())))
def test_the_named_test_exists(place: str) -> None:
    file, _, name = place.partition("::")
    assert name in functions_of(file)
