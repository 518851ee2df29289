"""Drawing by diffusion in an answer: hidden states of queries are collected, and pictures made of noise by them.

A picture's queries (`tutti.model.flow_decoder`) come one after the other, as codes do (`tutti.infer.drawing`), though
which one follows is known. Their last hidden states are taken where the model's head gets them. Once a picture ends
they lead the diffusion transformer from noise, drawn from a seed, to latents, of which the autoencoder makes pixels.

With guidance each sequence has a twin whose prompt is hidden, as some are in training (train.cfg_dropout): the
transformer's prediction is led away from that for the twin's queries.
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
"""Gives a prompt's tokens as they are hidden."""


class FlowPainter:
    """Makes pictures of what the hidden states of their queries say. settings: steps and guidance of sampling. seed: of
    noise. hide: how prompts are hidden, for guidance."""

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
        """Take the decoder's parameters as they are now, whole. Collective."""
        self._decoder, self._states = whole_decoder(self._model, self._device).eval(), {}

    def encode(self, pixels: Tensor) -> Tensor:
        """The numbers int64 [N, Q] of queries, which stand for each of N pictures."""
        return torch.arange(self.spec.tokens).expand(len(pixels), -1)

    def add(self, number: int, states: Sequence[Tensor]) -> None:
        """Keep the hidden state [H] of a query of sequence `number`, and its twin's, if it has one."""
        kept = self._states.setdefault(number, ([], []))
        for mine, state in zip(kept, states, strict=False):
            mine.append(state)

    @torch.no_grad()
    def paint(self, number: int, place: int) -> Tensor:
        """The picture [3, S, S] in [-1, 1] of the queries that sequence `number` had since its last one; it is number
        `place` of the answer."""
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
    """The diffusion decoder of `model` with all of its parameters on this rank: its own, or a copy where these are
    divided over ranks. Collective."""
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
    """Next logits of sequences whose queries' hidden states a painter collects. inner: computes them, and those of
    twins. head: of the model, which gets the last hidden states. first: the id of query 0."""

    joins = True

    def __init__(self, inner: NextLogits, head: nn.Module, first: int, painter: FlowPainter) -> None:
        self._inner, self._first, self._painter = inner, first, painter
        self._each = 1 if painter.hide is None else 2
        self._numbers: list[int] = []
        self._hidden: Tensor | None = None
        self._hook = head.register_forward_pre_hook(self._take)

    def close(self) -> None:
        """Let the model's head be."""
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
