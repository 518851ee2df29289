"""The multimodal forward: a packed row is embedded together with its images and passed to the language model.

A multimodal Hugging Face model is a language model with *towers* (an encoder and a projector each), in an outer decoder
that embeds the tokens, encodes the images (or video, or audio), replaces placeholder tokens by their features, and
calls the language model with the row of embeddings. Towers see images and no tokens, and no outer part mixes tokens. So
everything that packed samples and ranks sharing a batch require is done in one place, for any family: in a hook on the
language model.

1. The outer decoder gets the batch as one row, complete on every rank, without samples and their borders, which a tower
   would take for those of its images.
2. At the hook, the row gets its samples' borders and each token's position. A mask from the outer decoder (in Gemma 3
   the tokens of an image see each other) is cut at the samples' borders.
3. If ranks divide the batch's tokens (context, ulysses), each continues with its own tokens of everything that lies
   along them. Every rank has every image's features (`tutti.model.encoder_parallel`), but their gradient comes from its
   own tokens: the sum over ranks is the gradient, for towers as for everything else. The same holds for tensor
   parallelism, whose ranks cut the row one step later. Tokens are embedded by the rank that keeps them, into a row that
   is zero elsewhere.
4. Not every batch has images, while gradients are reduced over ranks with and without them. So the towers' parameters
   are connected to the row with a gradient of zero: in each step every one of them has a gradient, on every rank, on
   every layout. And since towers run on some ranks only, nothing in them may wait for other ranks: they belong to the
   root's FSDP unit, which is gathered for every batch (`tutti.parallel.apply`).

If positions have several rows (mrope: time, height and width), the family's own `get_rope_index` computes them, sample
by sample, before a batch is divided.

Shapes: T tokens in the row, t of them this rank's, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tutti.attention.interface import border_kwargs
from tutti.config import ConfigError, TrainConfig
from tutti.config.layout import Layout
from tutti.core.batch import ALONG_TOKENS, Batch, FullTokens
from tutti.core.collectives import RankGroup
from tutti.core.compat import tree_leaves
from tutti.core.structure import ModelStructure
from tutti.model.encoder_parallel import encode_own_share, encoder_ranks
from tutti.model.flow_decoder import FlowDecoder
from tutti.model.patch_embedding import multiply_patches
from tutti.parallel.pipeline.stage import Handoff, Stage
from tutti.parallel.tensor import local_parameters

_ALONG = {"inputs_embeds": 1, "position_ids": -1, "visual_pos_masks": -1, "per_layer_inputs": 1}
"""Arguments of a language model that lie along its tokens, and in which dimension."""

_BESIDE = {"attention_mask", "deepstack_visual_embeds", "cu_seq_lens_q", "cu_seq_lens_k", "borders"}
"""Known arguments that do not."""

_OF_OUTER = ("input_ids", "logits_to_keep", "use_cache")
"""Arguments of the outer decoder that generation derives from the cache."""


def check_multimodal(structure: ModelStructure, layout: Layout, train: TrainConfig) -> None:
    """Raise ValueError for settings that a model with towers does not support."""
    if not structure.towers:
        return
    name = structure.name
    foreign = [key for key in inspect.signature(structure.text_model.forward).parameters if "cross_attention" in key]
    if foreign:
        raise ValueError(
            f"model.config_path: the language model of {name} attends to images ({foreign[0]}), which would leak from "
            "one packed sample into the next; models that put images in the place of tokens can be trained"
        )
    problems = []
    masks = "token_type_ids" in inspect.signature(structure.decoder.forward).parameters
    if masks and layout.pipeline > 1:
        problems.append(
            f"train.pipeline_parallel_size: {name} attends to its tokens by a mask of its own, which only the first "
            "stage would know; set 1"
        )
    if train.enable_batch_invariant_mode:
        problems.append(f"train.enable_batch_invariant_mode: {name} encodes a batch's images together; set false")
    if problems:
        raise ConfigError(problems)


def check_first(structure: ModelStructure, num_blocks: int) -> None:
    """Raise ValueError unless the first pipeline stage has all blocks to which image features are added."""
    decoder: Any = structure.decoder
    encoder = getattr(decoder.config, "vision_config", None)
    name = structure.name
    needed = len(getattr(encoder, "deepstack_visual_indexes", None) or ())
    if num_blocks < needed:
        raise ValueError(
            f"train.pipeline_parallel_size: {name} adds features of images to its first {needed} "
            f"blocks, of which the first stage has {num_blocks}; a smaller size would do"
        )


class MultimodalForward:
    """Runs a multimodal model's decoder. Creating it puts its hook on the language model, and makes the towers' patch
    embeddings use matrix products.

    tensor: the ranks that cut the row among themselves within the language model.
    """

    def __init__(self, structure: ModelStructure, tensor: RankGroup | None) -> None:
        self._decoder, self._tensor = structure.decoder, tensor
        # Towers, and modules with their own parameters around them and the language model. A diffusion decoder always
        # runs.
        running = {*structure.text_model.modules()}
        for part in structure.decoder.modules():
            running.update(part.modules() if isinstance(part, FlowDecoder) else ())
        self._beside = [part for part in structure.decoder.modules() if part not in running]
        self._name = structure.name
        self._taken = set(inspect.signature(structure.decoder.forward).parameters)
        self._batch: Batch | None = None
        self._given: dict[str, Any] | None = None
        multiply_patches(structure.towers)
        self._text = text = cast(Any, structure.text_model)
        text.register_forward_pre_hook(self._hand_over, with_kwargs=True)
        text.get_input_embeddings().register_forward_pre_hook(self._own_ids)
        text.get_input_embeddings().register_forward_hook(self._in_the_row)

    def run(self, batch: Batch, stage: Stage | None = None, received: Handoff | None = None, **options: Any) -> Any:
        """The decoder's output for `batch`, for this rank's tokens if ranks divide them. options: for the language
        model's forward.

        stage: the language model's stage to run, on what was `received` from the previous one. Everything before the
        language model belongs to the first stage.
        """
        if stage is None:
            return self._run_outer(batch, options)
        if stage.is_first:
            return stage.run(lambda: self._run_outer(batch, options), {}, None)
        row, positions = _divided(batch), _positions(batch)
        own = positions if row is None else positions.index_select(-1, row.held)
        inputs = {"input_ids": batch.input_ids[None], "position_ids": own}
        return stage.run(self._text, inputs | border_kwargs(batch) | options, received)

    def _run_outer(self, batch: Batch, options: dict[str, Any]) -> Any:
        # Token types that only the family's processor produces, but its model does not ask for, would reach the
        # language model.
        row = _row(batch)
        inputs = {key: value for key, value in batch.extras.items() if key in self._taken or key not in ALONG_TOKENS}
        if batch.sequence is not None:
            inputs = encode_own_share(self._decoder, inputs, encoder_ranks(batch.sequence.ranks, self._tensor))
        kwargs = inputs | {"input_ids": row.input_ids[None], "use_cache": False}
        # For the outer decoder this is one sample.
        kwargs["position_ids"] = torch.arange(len(row.input_ids), device=row.input_ids.device)[None]
        self._batch = batch
        return self._call(self._decoder, kwargs, border_kwargs(batch) | options | {"position_ids": _positions(batch)})

    def _call(self, outer: Callable[..., Any], kwargs: Mapping[str, Any], given: dict[str, Any]) -> Any:
        """The output of `outer(**kwargs)`, during which the hooks pass `given` to the language model."""
        self._given = given
        try:
            return outer(**kwargs)
        finally:
            self._batch = self._given = None

    def generate(self, model: Callable[..., Any], inputs: Mapping[str, Any], extras: Mapping[str, Tensor]) -> Any:
        """The output of `model`, the decoder with its head, for one pass of `tutti.attention.kv_cache`.

        inputs: from the cache; the language model gets all of them except the tokens. extras: of new prompts, as in
        `Batch`; they are encoded now, and never again.
        """
        kwargs = {**extras, **{key: inputs[key] for key in _OF_OUTER if key in inputs}}
        kwargs["position_ids"] = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)[None]
        given = {key: value for key, value in inputs.items() if key not in ("input_ids", "logits_to_keep")}
        if "position_ids" in extras:
            given["position_ids"] = extras["position_ids"]
        return self._call(model, kwargs, given)

    def _own_ids(self, module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """A forward hook: the ids to look up in the embedding."""
        row = _divided(self._batch)
        return None if row is None else (args[0].index_select(1, row.held),)

    def _in_the_row(self, module: nn.Module, args: Any, own: Tensor) -> Any:
        """A forward hook: the embeddings as a row that is zero except for the tokens that this rank keeps."""
        row = _divided(self._batch)
        if row is None:
            return None
        return own.new_zeros(1, len(row.input_ids), own.shape[-1]).index_copy(1, row.held, own)

    def _hand_over(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward hook: replaces the language model's arguments from the outer decoder."""
        if self._given is None:
            return None
        batch = self._batch
        handed = {key: value for key, value in kwargs.items() if value is not None} | self._given
        if torch.is_grad_enabled():
            handed["inputs_embeds"] = self._anchored(handed["inputs_embeds"])
        if "attention_mask" in handed and "cu_seq_lens_q" in handed:
            handed["attention_mask"] = _at_borders(handed["attention_mask"], handed["cu_seq_lens_q"])
        row = _divided(batch)
        if batch is not None and row is not None:
            self._check_divisible(handed, batch)
            handed = _own(handed, row.held)
        if self._tensor is not None and "deepstack_visual_embeds" in handed:
            # The first block cuts the row itself, but not inputs between blocks.
            mine = {key: handed[key] for key in ("visual_pos_masks", "deepstack_visual_embeds")}
            places = torch.arange(handed["inputs_embeds"].shape[1], device=handed["inputs_embeds"].device)
            handed |= _own(mine, self._tensor.own(places, 0))
        return args, handed

    def _anchored(self, row: Tensor) -> Tensor:
        with local_parameters(self._beside):
            parameters = [item for part in self._beside for item in part.parameters(recurse=False)]
            return _Anchor.apply(row, *(item for item in parameters if item.requires_grad))

    def _check_divisible(self, handed: Mapping[str, Any], batch: Batch) -> None:
        tensors = [key for key, value in handed.items() if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))]
        unknown = [key for key in tensors if key not in _ALONG and key not in _BESIDE]
        if unknown:
            raise ValueError(
                f"{self._name} hands its language model {', '.join(unknown)}, which is not divided over ranks; set "
                "train.ulysses_parallel_size and train.context_parallel_size to 1"
            )
        ring = batch.sequence is not None and batch.sequence.ranks.context_size > 1
        if ring and any(isinstance(leaf, Tensor) for leaf in tree_leaves(handed.get("attention_mask"))):
            raise ValueError(
                f"{self._name} attends to its tokens by a mask of its own, which a ring of ranks does not know; set "
                "train.context_parallel_size to 1 (train.ulysses_parallel_size may be more)"
            )


def _row(batch: Batch) -> Batch | FullTokens:
    """The tokens and positions for the outer decoder."""
    return batch if batch.sequence is None or batch.sequence.row is None else batch.sequence.row


def _divided(batch: Batch | None) -> FullTokens | None:
    """The full row of a batch whose tokens are divided over ranks at the language model; None if they are not."""
    if batch is None or batch.sequence is None or batch.sequence.ranks.size == 1:
        return None
    return batch.sequence.row


def _positions(batch: Batch) -> Tensor:
    """Positions, int64 [1, T], or [1 + rows, 1, T] with several rotary axes: those within samples first."""
    own: Tensor = _row(batch).position_ids[None]
    rows = batch.extras.get("position_ids")
    if rows is None:
        return own
    return rows if rows.ndim < 3 or rows.shape[0] > 3 else torch.cat([own[None], rows])


def _at_borders(mask: Any, cu_seqlens: Tensor) -> Any:
    """A mask [1, 1, T, T] (bool, or added to scores), or a dict of such and None, without pairs of different
    samples."""
    if isinstance(mask, dict):
        return {kind: _at_borders(each, cu_seqlens) for kind, each in mask.items()}
    if mask is None:
        return None
    length = mask.shape[-1]
    assert mask.ndim == 4 and mask.shape[2] == length, "a mask that is not of all tokens"
    sample = torch.bucketize(torch.arange(length, device=mask.device), cu_seqlens[1:], right=True)
    across = sample[:, None] != sample
    return mask.masked_fill(across, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _own(handed: Mapping[str, Any], held: Tensor) -> dict[str, Any]:
    """The arguments of the language model, cut to the tokens at positions `held` [t]."""
    own = dict(handed)
    for key, dim in _ALONG.items():
        if key in own:
            own[key] = own[key].index_select(dim, held)
    if "deepstack_visual_embeds" in own:
        mask = handed["visual_pos_masks"][0]
        mine = (mask.cumsum(0) - 1)[held][own["visual_pos_masks"][0]]
        own["deepstack_visual_embeds"] = [features[mine] for features in handed["deepstack_visual_embeds"]]
    return own


class _Anchor(torch.autograd.Function):
    """Returns the row of embeddings unchanged; parameters that may not have contributed to it get a gradient of
    zero."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, *parameters: Tensor) -> Tensor:
        ctx.like = [(item.shape, item.dtype) for item in parameters]
        return row.view_as(row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(grad.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.like)


def make_media_positions(structure: ModelStructure) -> Callable[[Batch], Batch]:
    """A function that adds the positions of its media's tokens to a batch on the host, if the model has several
    rotary axes."""
    index: Any = getattr(structure.decoder, "get_rope_index", None)
    if index is None:
        return lambda batch: batch
    name, taken = structure.name, set(inspect.signature(index).parameters)
    config: Any = structure.decoder.config

    def place(batch: Batch) -> Batch:
        media = [key for key in batch.extras if key.endswith("_grid_thw") or key == "feature_attention_mask"]
        if "position_ids" in batch.extras:
            return batch
        if not media:
            # The first row is also used for masks: without it, a model's own masks would not end at the samples'
            # borders.
            same = batch.position_ids.expand(4, 1, -1)
            return replace(batch, extras={**batch.extras, "position_ids": same})
        if "mm_token_type_ids" in taken and "mm_token_type_ids" not in batch.extras:
            raise ValueError(f"{name} needs mm_token_type_ids beside {media[0]}, to know which tokens are an image's")
        lengths = batch.cu_seqlens.diff().tolist()

        def by_sample(values: Tensor) -> Tensor:
            return pad_sequence(list(values.split(lengths)), batch_first=True)

        inputs = {key: value for key, value in batch.extras.items() if key in taken}
        inputs |= {
            "input_ids": by_sample(batch.input_ids),
            "attention_mask": by_sample(torch.ones_like(batch.input_ids)),
        }
        if "mm_token_type_ids" in taken:
            inputs["mm_token_type_ids"] = by_sample(batch.extras["mm_token_type_ids"].flatten())
        if "audio_seqlens" in taken and "feature_attention_mask" in batch.extras:
            inputs["audio_seqlens"] = batch.extras["feature_attention_mask"].sum(-1)
        if "second_per_grids" in taken and "video_second_per_grid" in batch.extras:
            inputs["second_per_grids"] = batch.extras["video_second_per_grid"]
        if "use_audio_in_video" in taken and (heard := _heard(batch.input_ids, lengths, config)).any():
            rows = torch.cat([index(**one)[0][:, 0] for one in _each_sample(inputs, lengths, heard, config)], dim=-1)
        else:
            padded = index(**inputs)[0]
            rows = torch.cat([padded[:, number, :length] for number, length in enumerate(lengths)], dim=-1)
        positions = torch.cat([batch.position_ids[None], rows])[:, None]
        return replace(batch, extras={**batch.extras, "position_ids": positions})

    return place


def _heard(ids: Tensor, lengths: Sequence[int], config: Any) -> Tensor:
    """bool [samples]: which of the concatenated samples have a video with sound that starts in them."""
    begins = (ids[:-1] == config.vision_start_token_id) & (ids[1:] == config.audio_start_token_id)
    return torch.stack([part.any() for part in torch.cat([begins, begins.new_zeros(1)]).split(list(lengths))])


def _each_sample(
    inputs: Mapping[str, Any], lengths: Sequence[int], heard: Tensor, config: Any
) -> Iterator[dict[str, Any]]:
    """The arguments of a family's `get_rope_index` for each sample, cut from those for all. One switch says for a
    whole call whether sounds belong to videos; heard: its value for each sample."""
    rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    used = dict.fromkeys(rest, 0)
    for number, length in enumerate(lengths):
        ids = inputs["input_ids"][number : number + 1, :length]
        follows = ids[0, 1:][ids[0, :-1] == config.vision_start_token_id]
        sounds = int((ids == config.audio_start_token_id).sum())
        images = int((follows == config.image_token_id).sum())
        counts = {"image_grid_thw": images, "audio_seqlens": sounds}
        own = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_audio_in_video": bool(heard[number])}
        for key, value in rest.items():
            count = counts.get(key, len(follows) - images)
            own[key] = value[used[key] : used[key] + count] if count else None
            used[key] += count
        yield own
