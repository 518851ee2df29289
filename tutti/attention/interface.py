"""Attention of Hugging Face models over packed batches, through transformers' `AttentionInterface`.

transformers calls a function that is registered under a name for the attention of every layer. `resolve_attention`
registers ours and chooses the name. A model's forward passes the arguments from `packed_kwargs` to it, above all the
borders of the batch's samples. Attention stays within a sample, using one of these:

- On CUDA, a variable-length kernel (`tutti.attention.varlen`): that of the flash-attn packages if
  `model.attn_implementation` asks for one that is installed, else torch's.
- On CUDA, for soft-capped scores, a kernel that FlexAttention compiles (`tutti.attention.flex`).
- Elsewhere, and for what those kernels do not support, tiles of matrix products (`tutti.attention.packed_cpu`).
- For layers with `native_sparse` parameters, native sparse attention (`tutti.attention.sparse`).
- If a model's mask is more than causal or a sliding window (in Gemma 3 the tokens of an image see each other), torch's
  attention over the whole batch, with the mask cut at the samples' borders.

If the tokens of a batch are split over ranks (`tutti.parallel.sequence`), the kernel is wrapped in the exchange of
tokens for heads (`tutti.attention.ulysses`), and over the context axis it is replaced by a ring of ranks
(`tutti.attention.ring`).

`eager` is the model's own attention, with a block-diagonal mask that transformers derives from the restarting
`position_ids`. The other implementations are tested against it.

Shapes: T tokens, H query heads, K key/value heads, D head dimension, E value dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from tutti.attention import flex
from tutti.attention.packed_cpu import packed_attention
from tutti.attention.ring import ring_attention
from tutti.attention.sparse import NAME as SPARSE
from tutti.attention.sparse import NativeSparse
from tutti.attention.spec import AttentionSpec
from tutti.attention.ulysses import heads_to_tokens, own_heads, tokens_to_heads
from tutti.attention.varlen import PACKAGES, fits, fits_package, load_package, package_attention, varlen_attention
from tutti.core.batch import Batch, GlobalSequence
from tutti.core.compat import AttentionMaskInterface, presume_packed, sdpa_mask
from tutti.core.modules import attached

log = logging.getLogger(__name__)

PACKED = "tutti_packed"
"""The name under which packed attention is registered with transformers."""

_BY_PACKAGE = {name: f"{PACKED}_fa{name[-1]}" for name in PACKAGES}
"""The names for packed attention with an installed package. They do not contain `flash`, since transformers would
take such an implementation for its own, and rely on the model to pass on the samples' borders."""


def resolve_attention(requested: str, device: torch.device) -> str:
    """The name to pass to transformers as `attn_implementation` for `model.attn_implementation` on `device`.

    Registers it, and logs a line if something other than the requested implementation runs.
    """
    presume_packed()
    _register(PACKED, packed_forward)
    if requested == "eager":
        return "eager"
    if requested not in PACKAGES:
        return PACKED
    package = load_package(requested) if device.type == "cuda" else None
    if package is not None:
        return _register(_BY_PACKAGE[requested], partial(packed_forward, package=package))
    instead = "torch's variable-length kernel" if device.type == "cuda" else "packed sdpa on the CPU"
    log.info("model.attn_implementation %s is not available here: using %s", requested, instead)
    return PACKED


def _register(name: str, forward: Callable[..., Any]) -> str:
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, packed_mask)
    return name


def attention_by_part(config: PreTrainedConfig, text: str) -> str | dict[str, str]:
    """The `attn_implementation` of each part of a model whose text part uses `text`, in transformers' format.

    Image encoders attend within each image in their own code: with transformers' default for them, with the package
    that `text` stands for, or with their own eager code.
    """
    language = config.get_text_config()
    parts = [name for name in config.sub_configs if getattr(config, name, None) is language]
    if not parts or text == "eager":
        return text
    package = next((name for name, ours in _BY_PACKAGE.items() if ours == text), None)
    towers = set(config.sub_configs) - set(parts) if package else ()
    return dict.fromkeys(towers, package or "") | {"": text, parts[0]: text}


def packed_kwargs(batch: Batch) -> dict[str, Any]:
    """The arguments of a decoder's forward for `batch`: its tokens as one row, positions, and the samples' borders.

    If ranks share the batch, these are this rank's tokens and positions, and the whole batch's borders.
    """
    return {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None], **border_kwargs(batch)}


def border_kwargs(batch: Batch) -> dict[str, Any]:
    """The arguments with the samples' borders in `batch`, or in the whole batch that ranks share.

    `borders` are on the host, for kernels that read them there without waiting for the device.
    """
    sequence = batch.sequence
    bordered = sequence or batch
    kwargs = {
        "cu_seq_lens_q": bordered.cu_seqlens,
        "cu_seq_lens_k": bordered.cu_seqlens,
        "max_length_q": bordered.max_seqlen,
        "max_length_k": bordered.max_seqlen,
        "borders": bordered.cu_seqlens if bordered.borders is None else bordered.borders,
        "use_cache": False,
    }
    return kwargs if sequence is None else kwargs | {"whole": sequence}


def packed_mask(*, mask_function: Callable[..., Any], **kwargs: Any) -> Tensor | None:
    """With transformers' mask signature, returns None, since packed attention never looks across a sample's border;
    or bool [1, 1, T, T] if a model's mask is more than causal or a sliding window (the tokens of an image see each
    other)."""
    if all(kind in _PLAIN_MASKS for kind in _mask_kinds(mask_function)):
        return None
    return sdpa_mask(mask_function=mask_function, **(kwargs | {"allow_is_causal_skip": False}))


_PLAIN_MASKS = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "add_offsets_to_mask_function",
    "and_masks",
}
"""The mask functions that are implied by a packed batch's borders and a layer's window."""


def _mask_kinds(mask_function: Callable[..., Any]) -> Iterator[str]:
    """The names of the transformers functions that made a mask function and the ones it combines."""
    yield mask_function.__qualname__.partition(".")[0]
    for cell in mask_function.__closure__ or ():
        contents = cell.cell_contents
        for item in contents if isinstance(contents, tuple) else (contents,):
            if callable(item):
                yield from _mask_kinds(item)


PROBE = "tutti_probe"
"""The name of an attention implementation that only reveals which mask a model asks for."""


class MaskSeen(Exception):
    """Raised when a model asks for a mask. ends_at_borders: the mask is cut where positions restart."""

    def __init__(self, ends_at_borders: bool) -> None:
        self.ends_at_borders = ends_at_borders


def register_probe() -> None:
    """Register the attention `PROBE` with transformers; its masks raise `MaskSeen`."""
    AttentionInterface.register(PROBE, packed_forward)
    AttentionMaskInterface.register(PROBE, _show_mask)


def _show_mask(*, mask_function: Callable[..., Any], **kwargs: Any) -> None:
    raise MaskSeen("packed_sequence_mask_function" in _mask_kinds(mask_function))


FOREIGN = frozenset({"position_bias", "indices", "block_indices"})
"""The arguments of some families' attention that change its scores or select its keys."""


def packed_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, E].

    attention_mask: bool [1, 1, T, T] of the whole batch, where there is more to it than its samples' borders.
    ValueError: the model does not pass the borders on, or has dropout.
    """
    if kwargs.get("cu_seq_lens_q") is None:
        name = type(module).__name__
        raise ValueError(f"{name} does not pass the samples' borders on; set model.attn_implementation=eager")
    if dropout:
        keys = [key for key in vars(getattr(module, "config", module)) if key.startswith("att") and "drop" in key]
        named = " and ".join(keys) or "its dropout of attention"
        raise ValueError(f"packed attention has no dropout; set {named} to 0 in the model's config")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"{type(module).__name__} hands on a mask of its own making, whose meaning is not known, and which knows "
            "no borders of samples; its model cannot be trained"
        )
    foreign = sorted(name for name in FOREIGN if kwargs.get(name) is not None)
    if foreign:
        raise ValueError(
            f"{type(module).__name__} hands {foreign[0]} to its attention, which packed attention does not know; set "
            "model.attn_implementation=eager"
        )
    spec = spec_of(module, query, scaling, kwargs)
    sinks = kwargs.get("s_aux")
    heads = (query.squeeze(0), key.squeeze(0), value.squeeze(0))
    whole: GlobalSequence | None = kwargs.get("whole")
    sparse: NativeSparse | None = getattr(module, SPARSE, None)
    if sparse is not None:
        if attention_mask is not None or sinks is not None or spec != AttentionSpec(spec.scale):
            raise ValueError("native-sparse attention is causal, without windows, soft-capping, sinks or a mask")
        # Gates go where the queries go.
        heads = (torch.cat([heads[0], sparse.take_gates().to(query.dtype)], -1), *heads[1:])
    if whole is not None:
        heads = tokens_to_heads(*heads, whole.ranks, attached(module).early_values)
        sinks = own_heads(sinks, whole.ranks)
    if sparse is not None:
        both, key, value = heads
        rows, gates = both.split([query.shape[-1], 3], -1)
        out = sparse(rows, key, value, gates, kwargs.get("borders", kwargs["cu_seq_lens_q"]), spec.scale)
    elif whole is not None and whole.ranks.context_size > 1:
        assert attention_mask is None, "the ring was given a mask"
        out = ring_attention(*heads, whole.borders, spec, sinks, whole.ranks.context_group)
    elif attention_mask is not None:
        out = _masked(*heads, attention_mask, spec, sinks)
    else:
        out = _attend(*heads, spec, sinks, kwargs)
    return (out if whole is None else heads_to_tokens(out, whole.ranks))[None], None


def _masked(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, spec: AttentionSpec, sinks: Tensor | None
) -> Tensor:
    """Attention to what `mask` [1, 1, T, T] says, over the batch as a whole: heads first -> [T, H, E]."""
    if spec.softcap or sinks is not None:
        raise ValueError(
            "packed attention does not know a mask together with soft-capping or sinks; set "
            "model.attn_implementation=eager"
        )
    out = nn.functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        scale=spec.scale,
        enable_gqa=len(query) != len(key),
    )
    return out[0].transpose(0, 1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    sinks: Tensor | None,
    kwargs: Mapping[str, Any],
) -> Tensor:
    """The fastest kernel that knows this attention over all tokens of a batch: heads first -> [T, H, E]."""
    cu_seqlens, package = kwargs["cu_seq_lens_q"], kwargs.get("package")
    if package is not None and sinks is None and fits_package(query, value):
        return package_attention(query, key, value, cu_seqlens, kwargs["max_length_q"], spec, package)
    if fits(query, value, spec):
        return varlen_attention(query, key, value, cu_seqlens, kwargs["max_length_q"], spec, sinks)
    borders = kwargs.get("borders", cu_seqlens)
    if spec.softcap and sinks is None and flex.takes(query):
        return flex.capped_attention(query, key, value, cu_seqlens, borders, spec)
    return packed_attention(query, key, value, borders, spec, sinks)


def spec_of(module: nn.Module, query: Tensor, scaling: float | None, kwargs: Mapping[str, Any]) -> AttentionSpec:
    """The rule by which queries see keys, from the arguments of transformers' attention signature."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return AttentionSpec(scale, causal, kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0)
