"""Generation by transformers' own `generate`, for models that the packed loop of `tutti.infer.generate` is not for.

These are models that carry more than keys and values from token to token (recurrent states, chunked attention), whose
positions depend on how long the longest sequence of a batch is, or whose generation config changes their logits
(repetition penalties, forbidden tokens). They run in batches of prompts of one length, which need no padding: padding
leaks into recurrent states. `generate` keeps its loop to itself, so it runs in a thread, and a logits processor, the
last one, makes our choice of tokens the only possible one and hands it out.
"""

from __future__ import annotations

import copy
import inspect
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

_SHAPING = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "guidance_scale",
    "remove_invalid_values",
)
"""Settings of a generation config that change logits also where tokens are not sampled."""

_COUPLED_ROPE = ("dynamic", "longrope")
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def needs_generate(model: PreTrainedModel) -> bool:
    """Whether `model` is to be run by transformers' generate."""
    config = model.config.get_text_config()
    generation = model.generation_config
    shaping = any(getattr(generation, name, None) not in (None, False, 0, 1) for name in _SHAPING)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    layers = set(getattr(config, "layer_types", None) or ())
    taken = inspect.signature(type(model).forward).parameters
    attention = [module for module in model.modules() if "Attention" in type(module).__name__]
    plain = (
        model._supports_attention_backend
        and not model._is_stateful
        and not config.is_encoder_decoder
        and layers <= _PLAIN_LAYERS
        and not getattr(config, "num_kv_shared_layers", 0)
        and {"logits_to_keep", "position_ids"} <= set(taken)
        and len(attention) == config.num_hidden_layers
        and all(isinstance(getattr(module, "layer_idx", None), int) for module in attention)
    )
    return shaping or not plain or not kinds.isdisjoint(_COUPLED_ROPE)


Choose = Callable[[Tensor], "list[int] | None"]


def generate_equal(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], choose: Choose, *, limit: int, stop_ids: frozenset[int]
) -> Iterator[list[int]]:
    """The tokens of each step after `prompts`, which are of one length, as `choose` picks them from logits [B, V].

    Ends when every answer has a stop token or `limit` tokens, or when `choose` gives None.
    """
    steps: queue.Queue[list[int] | BaseException | None] = queue.Queue()
    link = _Link(choose, steps)
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, num_beams=1, max_length=None, max_new_tokens=limit, return_dict_in_generate=False)
    config.update(temperature=None, top_p=None, top_k=None, eos_token_id=sorted(stop_ids) or None)
    config.pad_token_id = min(stop_ids, default=0)
    generate: Any = model.generate
    ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)

    def run() -> None:
        try:
            generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([link]),
                stopping_criteria=StoppingCriteriaList([_Stop(link)]),
            )
            steps.put(None)
        except BaseException as error:
            steps.put(error)

    thread = threading.Thread(target=run, name="generate", daemon=True)
    thread.start()
    try:
        while (tokens := steps.get()) is not None:
            if isinstance(tokens, BaseException):
                raise tokens
            yield tokens
    finally:
        link.stopped = True
        thread.join()


class _Link(LogitsProcessor):
    """Puts our choice into generate's logits and into `steps`."""

    def __init__(self, choose: Choose, steps: queue.Queue[Any]) -> None:
        self._choose = choose
        self._steps = steps
        self.stopped = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = None if self.stopped else self._choose(scores)
        if chosen is None:
            self.stopped = True
            return scores
        self._steps.put(chosen)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)


class _Stop(StoppingCriteria):
    def __init__(self, link: _Link) -> None:
        self._link = link

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._link.stopped, dtype=torch.bool, device=input_ids.device)
