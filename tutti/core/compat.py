"""Private parts of torch and transformers that Tutti uses, and the versions that it is tested with.

Most of what we use from the two is public API. The names here are not, or may be moved by a new version; this is the
one place to fix then. A name is looked up when it is first imported from here, so that unused parts take no time to
load, and a missing one gives an error that says which versions have it.

`python -m tutti.core.compat oldest` prints the oldest tested versions to install, `newest` the newest.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

TESTED = {
    "torch": ("2.11.0", "2.15.0"),
    "torchvision": ("0.26.0", "0.29.2"),  # each belongs to one version of torch
    "transformers": ("5.23.0", "5.24.0"),
}
"""The oldest and the newest version of each package that are tested together."""

_PLACES = {
    # torch: tensors without values, and modes that see every operator
    "DataDependentOutputException": "torch._subclasses.fake_tensor:DataDependentOutputException",
    "DynamicOutputShapeException": "torch._subclasses.fake_tensor:DynamicOutputShapeException",
    "UnsupportedOperatorException": "torch._subclasses.fake_tensor:UnsupportedOperatorException",
    "FakeTensor": "torch._subclasses.fake_tensor:FakeTensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor:FakeTensorMode",
    "TorchDispatchMode": "torch.utils._python_dispatch:TorchDispatchMode",
    "is_traceable_wrapper_subclass": "torch.utils._python_dispatch:is_traceable_wrapper_subclass",
    "FakeStore": "torch.testing._internal.distributed.fake_pg:FakeStore",
    "get_opdef": "torch._library.custom_ops:_maybe_get_opdef",
    "get_dispatch_mode": "torch:_C._get_dispatch_mode",
    "DispatchModeKey": "torch:_C._TorchDispatchModeKey",
    # torch: trees of tensors
    "tree_flatten": "torch.utils._pytree:tree_flatten",
    "tree_leaves": "torch.utils._pytree:tree_leaves",
    "tree_unflatten": "torch.utils._pytree:tree_unflatten",
    # torch: autograd in parts
    "stage_backward_input": "torch.distributed.pipelining._backward:stage_backward_input",
    "stage_backward_weight": "torch.distributed.pipelining._backward:stage_backward_weight",
    "graph_is_kept": "torch:_C._autograd._get_current_graph_task_keep_graph",
    # torch: devices that have fused kernels of optimizers
    "fused_devices": "torch.utils._foreach_utils:_get_fused_kernels_supported_devices",
    # torch: compilers
    "BackendCompilerFailed": "torch._dynamo.exc:BackendCompilerFailed",
    "has_triton": "torch.utils._triton:has_triton",
    # torch: functions that make tensors on a device
    "device_constructors": "torch.utils._device:_device_constructors",
    # torch: sharded tensors, process groups, checkpoints
    "StridedShard": "torch.distributed.tensor.placement_types:_StridedShard",
    "compute_local_shape_and_global_offset": "torch.distributed.tensor._utils:compute_local_shape_and_global_offset",
    "clear_sharding_cache": "torch.distributed.tensor.debug:_clear_sharding_prop_cache",
    "GroupName": "torch.distributed.distributed_c10d:GroupName",
    "default_store": "torch.distributed.distributed_c10d:_get_default_store",
    "dump_flight_recorder": "torch._C._distributed_c10d:_dump_fr_trace_json",
    "dump_nccl_flight_recorder": "torch._C._distributed_c10d:_dump_nccl_trace_json",
    "resolve_process_group": "torch.distributed.distributed_c10d:_resolve_process_group",
    "work_from_future": "torch._C._distributed_c10d:_create_work_from_future",
    "StorageInfo": "torch.distributed.checkpoint.filesystem:_StorageInfo",
    # torch: compiled code
    "pick_vec_isa": "torch._inductor.cpu_vec_isa:pick_vec_isa",
    # torch: attention over packed samples
    "varlen_forward": "torch.nn.attention.varlen:torch.ops.torch_attn._varlen_attn",
    "varlen_backward": "torch.nn.attention.varlen:torch.ops.torch_attn._varlen_attn_backward",
    # transformers: attention and expert kernels by name
    "AttentionMaskInterface": "transformers.masking_utils:AttentionMaskInterface",
    "sdpa_mask": "transformers.masking_utils:sdpa_mask",
    "ExpertsInterface": "transformers.integrations.moe:ExpertsInterface",
    # transformers: how the keys of published checkpoints become a model's parameters
    "Concatenate": "transformers.core_model_loading:Concatenate",
    "DtensorShardOperation": "transformers.distributed.sharding_utils:DtensorShardOperation",
    "MergeModulelist": "transformers.core_model_loading:MergeModulelist",
    "PrefixChange": "transformers.core_model_loading:PrefixChange",
    "Transpose": "transformers.core_model_loading:Transpose",
    "WeightConverter": "transformers.core_model_loading:WeightConverter",
    "WeightRenaming": "transformers.core_model_loading:WeightRenaming",
    "apply_converters": "transformers.core_model_loading:apply_converters",
    "apply_renamings": "transformers.core_model_loading:apply_renamings",
    "dot_natural_key": "transformers.core_model_loading:dot_natural_key",
    "get_model_conversion_mapping": "transformers.conversion_mapping:get_model_conversion_mapping",
    "no_tie_weights": "transformers.initialization:no_tie_weights",
    "rename_source_key": "transformers.core_model_loading:rename_source_key",
    "str_to_torch_dtype": "transformers.modeling_utils:str_to_torch_dtype",
    # transformers: videos as processors take them
    "VideoMetadata": "transformers.video_utils:VideoMetadata",
    # transformers: chat templates, and a layer that is a linear one transposed
    "Conv1D": "transformers.pytorch_utils:Conv1D",
    "compile_jinja_template": "transformers.utils.chat_template_utils:_compile_jinja_template",
    "render_jinja_template": "transformers.utils.chat_template_utils:render_jinja_template",
}
"""The module and the name in it, by the name that is imported from here."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, path = _PLACES[name].partition(":")
    try:
        value: Any = import_module(module)
        for part in path.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        raise ImportError(f"{module} has no {path} in {package} {version(package)}; {_advice(package)}") from error
    globals()[name] = value
    return value


def model_mapping(factory: Any) -> Any:
    """The model class for each configuration class, according to one of transformers' Auto classes."""
    try:
        return factory._model_mapping
    except AttributeError as error:
        shown = f"{factory.__name__}._model_mapping in transformers {version('transformers')}"
        raise ImportError(f"there is no {shown}; {_advice('transformers')}") from error


@cache
def presume_packed() -> None:
    """Make transformers assume that a batch on an accelerator is packed: to find out from its positions, the host
    would wait for the device in each forward pass."""
    import torch

    masks: Any = import_module("transformers.masking_utils")
    inner = masks.find_packed_sequence_indices

    def find(position_ids: torch.Tensor) -> torch.Tensor | None:
        if position_ids.device.type == "cpu":
            return inner(position_ids)
        steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
        return (steps != 1).cumsum(-1)

    masks.find_packed_sequence_indices = find


@contextmanager
def truncated_normals_seen() -> Iterator[None]:
    """Make `torch.nn.init.trunc_normal_` write to meta tensors, which newer versions of torch leave alone, so that
    their version counters show that it was called."""
    import torch

    inner = torch.nn.init._no_grad_trunc_normal_

    def write(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor.zero_() if tensor.is_meta else inner(tensor, *args, **kwargs)

    torch.nn.init._no_grad_trunc_normal_ = write
    try:
        yield
    finally:
        torch.nn.init._no_grad_trunc_normal_ = inner


def fsdp_groups(root: Any) -> list[Any]:
    """FSDP's parameter groups of all units in `root`, which is sharded, after its first run. torch 2.11 has one per
    unit."""
    from torch.distributed.fsdp import fully_shard

    groups: list[Any] = []
    try:
        for state in fully_shard.state(root)._state_ctx.all_states:  # type: ignore[attr-defined]
            one = [state._fsdp_param_group] if hasattr(state, "_fsdp_param_group") else []
            groups += getattr(state, "_fsdp_param_groups", [group for group in one if group is not None])
    except AttributeError as error:
        raise ImportError(f"torch {version('torch')} keeps FSDP's units elsewhere; {_advice('torch')}") from error
    return groups


def untested() -> list[str]:
    """A message for each package whose version is outside of the tested range."""
    problems = []
    for package, (oldest, newest) in TESTED.items():
        if not _minor(oldest) <= _minor(version(package)) <= _minor(newest):
            problems.append(f"{package} {version(package)} is untested; {_advice(package)}")
    return problems


def _advice(package: str) -> str:
    oldest, newest = TESTED[package]
    return f"Tutti is tested with {package} {oldest} to {newest}: install one of these"


def _minor(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


if __name__ == "__main__":
    print(*(f"{package}=={pair[sys.argv[1] == 'newest']}" for package, pair in TESTED.items()))
