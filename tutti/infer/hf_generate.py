"""Next logits with transformers' own `generate`, for models that need more than a key/value cache.

These models carry more than keys and values from token to token (recurrent states, chunked attention), have positions
that depend on the longest sequence of a batch, or have a generation config that changes their logits (repetition
penalties, forbidden tokens). They run in batches of prompts of equal length, without padding, because padding affects
recurrent states. `generate` does not expose its loop, so it runs in a thread, which stops at each token to pass on its
logits and receive the choice.
"""

from __future__ import annotations

import copy
import inspect
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tutti.core.batch import ALONG_TOKENS
from tutti.infer.generate import Request
from tutti.infer.media import MediaInputs
from tutti.model.positions import depends_on_length
from tutti.model.structure import text_model

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
"""Settings of a generation config that change logits even without sampling."""

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def needs_generate(model: PreTrainedModel) -> bool:
    """True if `model` must be run with transformers' generate."""
    config = model.config.get_text_config()
    generation = model.generation_config
    shaping = any(getattr(generation, name, None) not in (None, False, 0, 1) for name in _SHAPING)
    layers = set(getattr(config, "layer_types", None) or ())
    taken = inspect.signature(type(model).forward).parameters
    language: Any = model if config is model.config else text_model(model)
    attention = [module for module in language.modules() if "Attention" in type(module).__name__]
    plain = (
        language._supports_attention_backend
        and not language._is_stateful
        and not config.is_encoder_decoder
        and layers <= _PLAIN_LAYERS
        and not getattr(config, "num_kv_shared_layers", 0)
        and {"logits_to_keep", "position_ids"} <= set(taken)
        and len(attention) == config.num_hidden_layers
        and all(isinstance(getattr(module, "layer_idx", None), int) for module in attention)
    )
    return shaping or not plain or depends_on_length(config)


class GeneratedLogits:
    """Next logits of a model that runs with transformers' `generate`. stop_ids: the first of these tokens pads its
    rows."""

    joins = False

    def __init__(self, model: PreTrainedModel, stop_ids: frozenset[int], media: MediaInputs) -> None:
        self._model, self._media = model, media
        self._config = copy.deepcopy(model.generation_config)
        self._config.update(do_sample=False, num_beams=1, max_length=None, return_dict_in_generate=False)
        # None would be replaced by the model's own setting: a nonexistent token ends no row.
        never = model.config.get_text_config().vocab_size
        self._config.update(temperature=None, top_p=None, top_k=None, eos_token_id=sorted(stop_ids) or [never])
        self._config.pad_token_id = min(stop_ids, default=0)
        self._loop: _Loop | None = None
        self._rows: list[int] = []

    def start(self, requests: Sequence[Request]) -> Tensor:
        assert self._loop is None, "no sequence can join those under way"
        config = copy.deepcopy(self._config)
        config.max_new_tokens = max(item.limit for item in requests)
        made = self._media.stacked([(item.ids, item.media) for item in requests])
        # Some families identify media by their tokens, and generate rejects inputs that they do not use.
        taken = inspect.signature(type(self._model).forward).parameters
        values: dict[str, Any] = {key: value for key, value in made.items() if key not in ALONG_TOKENS or key in taken}
        if any(medium.sound for item in requests for medium in item.media):
            values["use_audio_in_video"] = True
        self._loop = _Loop(self._model, [item.ids for item in requests], values, config)
        self._rows = list(range(len(requests)))
        return self._loop.logits()

    def step(self, tokens: Sequence[int]) -> Tensor:
        assert self._loop is not None, "no sequence is under way"
        chosen = [self._config.pad_token_id] * self._loop.num_rows
        for row, token in zip(self._rows, tokens, strict=True):
            chosen[row] = token
        return self._loop.logits(chosen)[self._rows]

    def keep(self, rows: Sequence[int]) -> None:
        self._rows = [self._rows[row] for row in rows]
        if not rows and self._loop is not None:
            loop, self._loop = self._loop, None
            loop.stop()


class _Loop:
    """transformers' loop over prompts of equal length, in a thread that waits for the choice of each token.

    The loop's last logits processor passes the logits out, and makes the chosen token of each row the only possible
    one. Passing None ends the loop.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        values: Mapping[str, Any],
        config: GenerationConfig,
    ) -> None:
        self.num_rows = len(prompts)
        self._made: queue.Queue[Tensor | BaseException] = queue.Queue()
        self._chosen: queue.Queue[Sequence[int] | None] = queue.Queue()
        self._stopped = False
        ids = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
        values = {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in values.items()}
        self._thread = threading.Thread(target=self._run, args=(model, ids, values, config), daemon=True)
        self._thread.start()

    def logits(self, chosen: Sequence[int] | None = None) -> Tensor:
        """The logits [n, V] that follow the prompts, or, given tokens, the last `chosen` token of every row."""
        if chosen is not None:
            self._chosen.put(chosen)
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def stop(self) -> None:
        self._chosen.put(None)
        self._thread.join()

    def _run(self, model: Any, ids: Tensor, values: Mapping[str, Any], config: GenerationConfig) -> None:
        try:
            model.generate(
                ids,
                **values,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Processor(self._exchange)]),
                stopping_criteria=StoppingCriteriaList([_Stop(lambda: self._stopped)]),
            )
            if not self._stopped:
                raise ValueError(
                    f"transformers' generate ended an answer of {type(model).__name__} by itself; look for what does "
                    "so in the model's generation_config.json (max_time, for one)"
                )
        except BaseException as error:
            self._made.put(error)

    def _exchange(self, scores: Tensor) -> Tensor:
        """Pass out the logits, and wait for the tokens that replace them."""
        self._made.put(scores)
        chosen = self._chosen.get()
        if chosen is None:
            self._stopped = True
            return scores
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)


class _Processor(LogitsProcessor):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self._change = change

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._change(scores)


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._stopped(), dtype=torch.bool, device=input_ids.device)
