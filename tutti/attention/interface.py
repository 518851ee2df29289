"""Attention over packed batches, for every Hugging Face model, behind transformers' `AttentionInterface`.

A packed batch holds many samples end to end in one row. Attending with one T x T mask would spend almost all of its
work on pairs that the mask then throws away, so attention runs sample by sample:

- On CUDA, one variable-length kernel (the flash-attn packages where installed, else torch's `varlen_attn`).
- On the CPU, `packed_attention` below. Each sample's queries are cut into tiles of rows; a tile multiplies only
  with the keys it may see (its own sample's, up to the diagonal, within the sliding window); scores, softmax and their
  gradients are plain batched matrix products, which on CPUs with bf16 instructions are two to three times as fast as
  torch's fused kernel on samples of a few hundred tokens. It is a custom operator with its own backward, so that
  torch.compile takes it as one node and no padded copies are made for the gradient of every slice.

Where the tokens of a batch are split over ranks (`tutti.parallel.sequence`), the kernel is wrapped in the exchange of
tokens for heads, and ring attention takes its place over the context axis.

Masks are made only where a model's is more than causal or a sliding window (Gemma 3, where the tokens of an image see
one another): attention then runs over the batch as a whole, with the mask cut at the samples' borders.

`eager` is the model's own attention with a block-diagonal mask that transformers derives from the restarting
`position_ids`; it is the reference that the others are tested against.

Shapes: T tokens, H query heads, K key/value heads (H = K * G), D head dimension, E value dimension. The operator
takes heads first ([H, T, D], any strides) and returns [T, H, E], which is how the models lay out their projections.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from tutti.attention.ring import ring_attention
from tutti.attention.tiles import AttentionSpec, Biases, Tile, scores, tiles
from tutti.attention.ulysses import heads_to_tokens, own_heads, tokens_to_heads
from tutti.core.batch import Batch, GlobalSequence
from tutti.core.rehearsal import has_values
from tutti.model.structure import text_model

log = logging.getLogger(__name__)

PACKED = "tutti_packed"
"""The name under which packed attention is registered with transformers."""

SAVED_SCORES = 8
"""The backward pass reads saved probabilities up to this many times the size of the queries, else recomputes them."""


_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def resolve_attention(requested: str, device: torch.device, *, split: bool = False) -> str:
    """The name to give transformers as `attn_implementation` for `model.attn_implementation` on this device.

    split: the tokens of a batch are split over ranks, which only our attention can do. Logs one line where something
    else than the request runs.
    """
    AttentionInterface.register(PACKED, packed_forward)
    AttentionMaskInterface.register(PACKED, packed_mask)
    if requested == "eager":
        return "eager"
    if requested in _PACKAGES:
        installed = importlib.util.find_spec(_PACKAGES[requested]) is not None
        if device.type == "cuda" and installed and not split:
            return requested
        reason = "where ranks share a batch" if installed and split else "here"
        instead = "torch's variable-length kernel" if device.type == "cuda" else "packed sdpa on the CPU"
        log.info("model.attn_implementation %s is not available %s: using %s", requested, reason, instead)
    return PACKED


def attention_by_part(config: PreTrainedConfig, text: str) -> str | dict[str, str]:
    """What to give transformers as `attn_implementation` for a model that is to attend to its text by `text`.

    Encoders of images attend within each image, as their own code arranges it, by the default that transformers has for
    them; their own eager code with eager, and the package that `text` names.
    """
    language = config.get_text_config()
    parts = [name for name in config.sub_configs if getattr(config, name, None) is language]
    if not parts or text != PACKED:
        return text
    return {"": text, parts[0]: text}


def packed_kwargs(batch: Batch) -> dict[str, Any]:
    """What a decoder's forward is given for `batch`: its tokens as one row, positions, and the samples' borders.

    Of a batch that ranks share: this rank's tokens and positions, and the whole batch's borders.
    """
    return {"input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None], **border_kwargs(batch)}


def border_kwargs(batch: Batch) -> dict[str, Any]:
    """What attention is to know of `batch`, or of the whole batch that ranks share: where its samples begin."""
    bordered = batch.sequence or batch
    kwargs = {
        "cu_seq_lens_q": bordered.cu_seqlens,
        "cu_seq_lens_k": bordered.cu_seqlens,
        "max_length_q": bordered.max_seqlen,
        "max_length_k": bordered.max_seqlen,
        "use_cache": False,
    }
    return kwargs if batch.sequence is None else kwargs | {"whole": batch.sequence}


def check_packable(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that would carry something from one packed sample into the next."""
    known = {"full_attention", "sliding_attention"}
    others = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - known)
    language: Any = text_model(model)
    if others or language._is_stateful or not language._supports_attention_backend:
        kind = f"of type {', '.join(others)}" if others else "that mix tokens otherwise than by attention"
        raise ValueError(
            f"{model.config.model_type} has layers {kind}, which would leak from one packed sample into the next; "
            "models of full and sliding-window attention can be trained"
        )


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Attention needs no mask where its own arguments say all."""


def packed_mask(*, mask_function: Callable[..., Any], **kwargs: Any) -> Tensor | None:
    """transformers' mask signature -> None, since packed attention never looks across a sample's border; but bool
    [1, 1, T, T] where a model's mask is more than causal or a sliding window (the tokens of an image see one another).
    """
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
"""The parts of masks that say no more than is known of a packed batch and a layer anyway."""


def _mask_kinds(mask_function: Callable[..., Any]) -> Iterator[str]:
    """The names of transformers' functions that made a mask function and all that it combines."""
    yield mask_function.__qualname__.partition(".")[0]
    for cell in mask_function.__closure__ or ():
        held = cell.cell_contents
        for item in held if isinstance(held, tuple) else (held,):
            if callable(item):
                yield from _mask_kinds(item)


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
    """
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None:
        name = type(module).__name__
        raise ValueError(f"{name} does not pass the samples' borders on; set model.attn_implementation=eager")
    if dropout:
        raise ValueError("packed attention has no dropout; set attention_dropout to 0 in the model's config")
    spec = spec_of(module, query, scaling, kwargs)
    sinks = kwargs.get("s_aux")
    heads = (query.squeeze(0), key.squeeze(0), value.squeeze(0))
    whole: GlobalSequence | None = kwargs.get("whole")
    if whole is not None:
        heads = tokens_to_heads(*heads, whole.ranks, getattr(module, "early_values", None))
        sinks = own_heads(sinks, whole.ranks)
    if whole is not None and whole.ranks.context_size > 1:
        assert attention_mask is None, "the ring was given a mask"
        out = ring_attention(*heads, whole.borders, spec, sinks, whole.ranks.context_group)
    elif attention_mask is not None:
        out = _masked(*heads, attention_mask, spec, sinks)
    else:
        out = _attend(*heads, cu_seqlens, kwargs["max_length_q"], spec, sinks)
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
    cu_seqlens: Tensor,
    max_seqlen: int,
    spec: AttentionSpec,
    sinks: Tensor | None,
) -> Tensor:
    """The device's kernel over all tokens of a batch: heads first -> [T, H, E]."""
    if query.device.type == "cuda" and query.dtype != torch.float32 and not spec.softcap and sinks is None:
        return _varlen(query, key, value, cu_seqlens, max_seqlen, spec)
    return packed_attention(query, key, value, cu_seqlens, spec, sinks)


def spec_of(module: nn.Module, query: Tensor, scaling: float | None, kwargs: Mapping[str, Any]) -> AttentionSpec:
    """What transformers' attention signature says of how queries see keys."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return AttentionSpec(scale, causal, kwargs.get("sliding_window") or 0, kwargs.get("softcap") or 0.0)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, spec: AttentionSpec
) -> Tensor:
    """torch's variable-length flash kernel; a value dimension below the key dimension (MLA) is padded and cut off."""
    from torch.nn.attention.varlen import varlen_attn

    width, padded = value.shape[-1], query.shape[-1]
    if width < padded:
        value = nn.functional.pad(value, (0, padded - width))
    window, right = spec.window, 0 if spec.causal else spec.window - 1
    out: Tensor = varlen_attn(  # type: ignore[assignment]  # a tuple only where auxiliary outputs are asked for
        query.transpose(0, 1).contiguous(),
        key.transpose(0, 1).contiguous(),
        value.transpose(0, 1).contiguous(),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        scale=spec.scale,
        window_size=(window - 1, right),
        enable_gqa=query.shape[0] != key.shape[0],
    )
    return out[..., :width]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    spec: AttentionSpec,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention within each of the samples that `cu_seqlens` [S + 1] borders.

    query [H, T, D], key [K, T, D], value [K, T, E] -> [T, H, E]. sinks [H]: a learned score per head that takes part
    in the softmax and has no value.
    """
    # Saved probabilities have a size that depends on the data, which a compiled graph would have to break for.
    keep = has_values(query) and not torch.compiler.is_compiling()
    return _forward(query, key, value, cu_seqlens, sinks, keep, [float(item) for item in spec])[0]


def _sample_tiles(length: int, spec: AttentionSpec) -> Iterator[Tile]:
    return tiles((0, length), (0, length), spec)


def probabilities(
    rows: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    spec: AttentionSpec,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """softmax of one tile's scores [K, G * rows, keys (+ 1 with sinks)] and, with softcap, tanh(score / softcap).

    out: where to put the softmax.
    """
    made, tanh = scores(rows, keys, bias, spec)
    if sinks is not None:
        kv_heads, num_rows, _ = made.shape
        rows_a_head = num_rows * kv_heads // sinks.numel()
        column = sinks.repeat_interleave(rows_a_head).view(kv_heads, num_rows, 1)
        made = torch.cat([made, column.to(made.dtype)], dim=-1)
    return torch.softmax(made, dim=-1, out=out), tanh


@torch.library.custom_op("tutti::packed_attention", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    keep: bool,
    spec: list[float],
) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H, E] and the tiles' probabilities, flat; empty where they are to be recomputed, which is
    always so without `keep`."""
    heads, total, _ = query.shape
    kv_heads, groups = key.shape[0], heads // key.shape[0]
    out = query.new_empty(total, heads, value.shape[-1])
    see = AttentionSpec.unpack(spec)
    biases = Biases(groups, see, query)
    borders = cu_seqlens.tolist()
    num_scores = _num_scores(borders, heads, see, sinks) if keep else float("inf")
    saved = query.new_empty(int(num_scores) if num_scores <= SAVED_SCORES * query.numel() else 0)
    offset = 0
    for begin, end in pairwise(borders):
        keys, values = key[:, begin:end].contiguous(), value[:, begin:end].contiguous()
        for tile in _sample_tiles(end - begin, see):
            start, stop, first, last = tile
            rows = query[:, begin + start : begin + stop].reshape(kv_heads, groups * (stop - start), -1)
            place = None
            if saved.numel():
                shape = (kv_heads, rows.shape[1], last - first)
                place = saved[offset : offset + math.prod(shape)].view(shape)
                offset += place.numel()
            weights, _ = probabilities(rows, keys[:, first:last], biases(tile), sinks, see, place)
            seen = weights if sinks is None else weights[..., :-1]
            mixed = torch.bmm(seen, values[:, first:last]).view(heads, stop - start, -1)
            out[begin + start : begin + stop] = mixed.transpose(0, 1)
    return out, saved


def _num_scores(borders: list[int], heads: int, spec: AttentionSpec, sinks: Tensor | None) -> float:
    """How many probabilities a forward pass makes; infinite where the backward pass needs more than those."""
    if spec.softcap or sinks is not None:
        return float("inf")
    tiles = (tile for begin, end in pairwise(borders) for tile in _sample_tiles(end - begin, spec))
    return heads * sum((stop - start) * (last - first) for start, stop, first, last in tiles)


@_forward.register_fake
def _(query, key, value, cu_seqlens, sinks, keep, spec):  # type: ignore[no-untyped-def]
    size = torch.library.get_ctx().new_dynamic_size() if keep else 0
    return query.new_empty(query.shape[1], query.shape[0], value.shape[-1]), query.new_empty(size)


@torch.library.custom_op("tutti::packed_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    saved: Tensor,
    spec: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and sinks (empty without), the first three laid out [T, heads, ...] in memory."""
    heads, total, dim = query.shape
    kv_heads, groups = key.shape[0], heads // key.shape[0]
    grad_query = query.new_empty(total, heads, dim)
    grad_key = key.new_empty(total, kv_heads, dim)
    grad_value = value.new_empty(total, kv_heads, value.shape[-1])
    grad_sinks = torch.zeros(heads if sinks is not None else 0, dtype=torch.float32, device=query.device)
    see = AttentionSpec.unpack(spec)
    biases = Biases(groups, see, query)
    borders, offset = cu_seqlens.tolist(), 0
    unused = query.new_zeros(1)
    for begin, end in pairwise(borders):
        keys, values = key[:, begin:end].contiguous(), value[:, begin:end].contiguous()
        sum_keys, sum_values = torch.zeros_like(keys), torch.zeros_like(values)
        for tile in _sample_tiles(end - begin, see):
            start, stop, first, last = tile
            num_rows, place = groups * (stop - start), slice(begin + start, begin + stop)
            rows = query[:, place].reshape(kv_heads, num_rows, -1)
            tanh = None
            if saved.numel():
                size = kv_heads * num_rows * (last - first)
                weights = saved[offset : offset + size].view(kv_heads, num_rows, last - first)
                offset += size
            else:
                weights, tanh = probabilities(rows, keys[:, first:last], biases(tile), sinks, see)
            outer = grad[place].transpose(0, 1).reshape(kv_heads, num_rows, -1)
            grad_weights = torch.bmm(outer, values[:, first:last].transpose(1, 2))
            if sinks is not None:
                grad_weights = nn.functional.pad(grad_weights, (0, 1))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if sinks is not None:
                grad_sinks += grad_scores[..., -1].float().view(heads, -1).sum(-1)
                weights, grad_scores = weights[..., :-1], grad_scores[..., :-1]
            if tanh is not None:
                grad_scores = grad_scores * (1 - tanh * tanh)
            sum_values[:, first:last] += torch.bmm(weights.transpose(1, 2), outer)
            sum_keys[:, first:last] += torch.baddbmm(unused, grad_scores.transpose(1, 2), rows, beta=0, alpha=see.scale)
            grad_rows = torch.baddbmm(unused, grad_scores, keys[:, first:last], beta=0, alpha=see.scale)
            grad_query[place] = grad_rows.view(heads, stop - start, dim).transpose(0, 1)
        grad_key[begin:end] = sum_keys.transpose(0, 1)
        grad_value[begin:end] = sum_values.transpose(0, 1)
    return grad_query, grad_key, grad_value, grad_sinks


@_backward.register_fake
def _(grad, query, key, value, cu_seqlens, sinks, saved, spec):  # type: ignore[no-untyped-def]
    def rows_first(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape[1], tensor.shape[0], tensor.shape[2])

    num_sinks = 0 if sinks is None else sinks.shape[0]
    return rows_first(query), rows_first(key), rows_first(value), query.new_empty(num_sinks, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_seqlens, sinks, _, ctx.spec = inputs
    ctx.save_for_backward(query, key, value, cu_seqlens, sinks, output[1])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    query, key, value, cu_seqlens, sinks, saved = ctx.saved_tensors
    grads = _backward(grad, query, key, value, cu_seqlens, sinks, saved, ctx.spec)
    grad_query, grad_key, grad_value = (item.transpose(0, 1) for item in grads[:3])
    grad_sinks = None if sinks is None else grads[3].to(sinks.dtype)
    return grad_query, grad_key, grad_value, None, grad_sinks, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
