"""Images in answers by diffusion: hidden states of queries are collected and condition a diffusion transformer.

An image's queries (`tutti.model.flow_decoder`) are generated one after the other, like codes (`tutti.infer.drawing`),
although the next one is always known. Their last hidden states are captured at the input of the model's head. When an
image ends, they condition the diffusion transformer, which turns noise from a seed into latents, which the autoencoder
decodes to pixels.

With guidance each sequence has a twin whose prompt is hidden, as some are in training (train.cfg_dropout): the
transformer's prediction is pushed away from that for the twin's queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tutti.core.keyed_random import generator
from tutti.model.conditions import Conditions
from tutti.model.diffusion import Guided, sample
from tutti.model.flow_decoder import FlowDecoder, FlowSpec
from tutti.model.initialize import give_storage
from tutti.model.pipeline_folder import read_scheduler

if TYPE_CHECKING:
    from tutti.infer.generate import NextLogits, Request

Hide = Callable[[Sequence[int]], list[int]]
"""Returns the tokens of a hidden prompt."""


class FlowPainter:
    """Makes images from the hidden states of their queries. settings: steps and guidance of sampling. seed: of the
    noise. hide: hides prompts, for guidance."""

    def __init__(self, model: Any, device: torch.device, settings: Guided, seed: int, hide: Hide) -> None:
        self.spec: FlowSpec = model.flow
        self.codes = self.spec.codes
        self.hide = hide if settings.guidance != 1 else None
        self._model, self._device, self._settings, self._seed = model, device, settings, seed
        self._decoder: Any = None
        self._states: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._conditions = Conditions(self.spec.folder, device, torch.float32, max_length=0, seed=0)
        self._scheduler = read_scheduler(self.spec.folder)

    def begin(self) -> None:
        """Take the decoder's current parameters, gathered. Collective."""
        self._decoder, self._states = whole_decoder(self._model, self._device).eval(), {}

    def encode(self, pixels: Tensor) -> Tensor:
        """The indices int64 [N, Q] of queries, which represent each of N images."""
        return torch.arange(self.spec.tokens).expand(len(pixels), -1)

    def add(self, number: int, states: Sequence[Tensor]) -> None:
        """Record the hidden state [H] of a query of sequence `number`, and of its twin, if it has one."""
        kept = self._states.setdefault(number, ([], []))
        for mine, state in zip(kept, states, strict=False):
            mine.append(state)

    @torch.no_grad()
    def paint(self, number: int, place: int) -> Tensor:
        """The image [3, S, S] in [-1, 1] from the queries that sequence `number` has had since its last one; it is
        image number `place` of the answer."""
        own, twin = (torch.stack(part)[None] if part else None for part in self._states.pop(number))
        assert own is not None, "a picture without queries"
        dtype = next(self._decoder.parameters()).dtype
        text = self._decoder.text(own.to(dtype))
        empty = None if twin is None else self._decoder.text(twin.to(dtype))
        noise = torch.randn(self.spec.latents, generator=generator(self._seed, "sample", number, place))[None]
        family, net = self.spec.family, self._decoder.net
        latents = sample(family, net, self._scheduler, text, empty, noise.to(self._device), self._settings)
        return self._conditions.decode(latents[0]).float() / 127.5 - 1


def whole_decoder(model: Any, device: torch.device) -> FlowDecoder:
    """The diffusion decoder of `model` with all of its parameters on this rank: its own, or a gathered copy if they
    are sharded. Collective."""
    held: FlowDecoder = model.flow_decoder
    if not any(isinstance(item, DTensor) for item in held.parameters()):
        return held
    config = model.config
    made = FlowDecoder(config.denoiser, config.first_code, config.num_codes, config.text_config.hidden_size)
    give_storage(made, device)
    made.to(device)
    targets = made.state_dict()
    with torch.no_grad():
        for name, tensor in held.state_dict().items():
            targets[name].copy_(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
    return made


class LedLogits:
    """Next logits, while a painter collects the hidden states of queries. inner: computes logits, also those of
    twins. head: the model's head, whose inputs are captured. first: the id of query 0."""

    joins = True

    def __init__(self, inner: NextLogits, head: nn.Module, first: int, painter: FlowPainter) -> None:
        self._inner, self._first, self._painter = inner, first, painter
        self._each = 1 if painter.hide is None else 2
        self._numbers: list[int] = []
        self._hidden: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._take)

    def close(self) -> None:
        """Remove the hook from the model's head."""
        self._hook.remove()

    def start(self, requests: Sequence[Request]) -> Tensor:
        self._numbers += [item.number for item in requests]
        hide = self._painter.hide
        given = list(requests) if hide is None else [one for item in requests for one in (item, item.hidden(hide, 1))]
        return self._inner.start(given)[:: self._each]

    def step(self, tokens: Sequence[int]) -> Tensor:
        logits = self._inner.step([token for token in tokens for _ in range(self._each)])
        assert self._hidden is not None
        states = self._hidden.reshape(-1, self._each, self._hidden.shape[-1])
        for row, token in enumerate(tokens):
            if token >= self._first:
                self._painter.add(self._numbers[row], list(states[row]))
        return logits[:: self._each]

    def keep(self, rows: Sequence[int]) -> None:
        self._numbers = [self._numbers[row] for row in rows]
        self._inner.keep([self._each * row + twin for row in rows for twin in range(self._each)])

    def _take(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._hidden = args[0].detach()
