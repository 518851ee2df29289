"""Executors run a step's micro batches, sequentially on this rank or through a pipeline's stages.

The executor is chosen once, when the run is set up; training and evaluation do not depend on which one it is. In a
pipeline every rank gets the same micro batches (so it knows the shapes of what it receives), and only the rank with the
last stage has a loss. A rank follows its schedule (`tutti.parallel.pipeline.schedule`). For each action it receives
what it needs from the previous or next rank, runs a stage forward or backward, and sends the result:

- Forward: hidden states and, if there is a router loss, the logits of all routers so far. This loss is not a sum over
  layers, so the last stage computes it from the logits of all layers, and their gradients come back in the same way.
- Backward: the gradients of exactly these tensors.

Messages have no tags: in each direction they are received in the order in which they are sent, since both ranks follow
the same schedule. Each direction has its own process group, so that a message that waits for its receiver never blocks
another. What the next action needs is requested before the current one computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tutti.core.batch import Batch
from tutti.core.compat import stage_backward_input, stage_backward_weight
from tutti.core.tensors import local_part
from tutti.parallel.fsdp import GradientSync
from tutti.parallel.grads import gradient_norm
from tutti.parallel.pipeline.schedule import Action, forward_schedule, rank_schedule
from tutti.parallel.pipeline.stage import Handoff, Pipeline, Stage

LossOf = Callable[[Batch, Any], Tensor]
"""A function of a micro batch on the device and the root module's output for it that returns what is differentiated.
"""


class Executor(Protocol):
    """Runs the root module on the micro batches of a step."""

    def train(self, batches: Sequence[Batch], loss_of: LossOf) -> None:
        """Run forward and backward over all `batches`, leaving the step's gradients reduced over the ranks.
        `loss_of` is called on the ranks that have a loss. A collective call."""
        ...

    def evaluate(self, batches: Sequence[Batch], **options: Any) -> Iterator[Any]:
        """Yield the root's output for each of `batches`, on the ranks that have one. A collective call, to be
        exhausted.

        options: additional arguments of the root's forward.
        """
        ...

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm over all gradients of the model, of which this rank has those of `parameters`. Collective."""
        ...


class SequentialExecutor:
    """For ranks with the model's full depth. prepare: returns this rank's share of a micro batch, on its device."""

    def __init__(self, root: nn.Module, sync: GradientSync, prepare: Callable[[Batch], Batch]) -> None:
        self._root, self._sync, self._prepare = root, sync, prepare

    def train(self, batches: Sequence[Batch], loss_of: LossOf) -> None:
        for number, micro in enumerate(batches):
            self._sync.before(last=number == len(batches) - 1)
            batch = self._prepare(micro)
            loss_of(batch, self._root(batch)).backward()
        self._sync.finish()

    def evaluate(self, batches: Sequence[Batch], **options: Any) -> Iterator[Any]:
        for micro in batches:
            yield self._root(self._prepare(micro), **options)

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        return gradient_norm(parameters)


class PipelineExecutor:
    """For a root whose depth is cut into `pipeline`'s stages. dtype: of hidden states. split: gradients of
    parameters are computed separately from those of inputs (zero bubble)."""

    def __init__(
        self,
        root: nn.Module,
        pipeline: Pipeline,
        sync: GradientSync,
        prepare: Callable[[Batch], Batch],
        dtype: torch.dtype,
        *,
        split: bool,
    ) -> None:
        self._root, self._pipeline, self._sync, self._prepare = root, pipeline, sync, prepare
        self._split = split
        self._stages = {stage.index: stage for stage in pipeline.stages}
        self._wires = P2PTransport(pipeline, dtype)
        named = dict(root.named_parameters())
        self._tied = [parameter for name, parameter in named.items() if name in pipeline.tied]

    def train(self, batches: Sequence[Batch], loss_of: LossOf) -> None:
        group, per_rank = self._pipeline.group, self._pipeline.per_rank
        order = rank_schedule(group.rank(), group.size(), per_rank, len(batches), split=self._split)
        step = _Step([self._prepare(micro) for micro in batches])
        num_left = sum(action.kind in "BI" for action in order)
        for action in self._wires.ahead(order, step.batches):
            stage = self._stages[action.stage]
            if action.kind == "F":
                self._forward(stage, action.batch, step, loss_of)
                continue
            if action.kind == "W":
                self._backward_weights(action, step)
                continue
            num_left -= 1
            self._sync.before(last=num_left == 0 and not self._split)
            self._backward(action, stage, step)
        self._sync.finish()
        self._wires.flush()
        for parameter in self._tied:
            assert parameter.grad is not None, "a tied parameter has no gradient"
            dist.all_reduce(local_part(parameter.grad), group=self._pipeline.tied_group)

    def evaluate(self, batches: Sequence[Batch], **options: Any) -> Iterator[Any]:
        group, per_rank = self._pipeline.group, self._pipeline.per_rank
        order = forward_schedule(group.rank(), group.size(), per_rank, len(batches))
        prepared = [self._prepare(micro) for micro in batches]
        for action in self._wires.ahead(order, prepared):
            stage, batch = self._stages[action.stage], prepared[action.batch]
            out = self._root(batch, stage=stage, received=self._wires.take(action), **options)
            if stage.is_last:
                yield out
            else:
                self._wires.send(action, out)
        self._wires.flush()

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        # Of tied parameters, the first rank's copy counts.
        twice = {id(parameter) for parameter in self._tied} if self._pipeline.is_last else set()
        counted = [parameter for parameter in parameters if id(parameter) not in twice]
        return gradient_norm(counted, elsewhere=self._pipeline.group)

    def _forward(self, stage: Stage, number: int, step: _Step, loss_of: LossOf) -> None:
        batch, action = step.batches[number], Action("F", stage.index, number)
        received = self._wires.take(action)
        for tensor in _tensors(received):
            tensor.requires_grad_()
        out = self._root(batch, stage=stage, received=received)
        if stage.is_last:
            step.running[stage.index, number] = _Run(received, [loss_of(batch, out)])
            return
        step.running[stage.index, number] = _Run(received, _tensors(out))
        self._wires.send(action, out)

    def _backward(self, action: Action, stage: Stage, step: _Step) -> None:
        """The backward pass; kind I leaves the gradients of parameters for later."""
        place = action.stage, action.batch
        received, made = step.running.pop(place)
        inputs = _tensors(received)
        given = None if stage.is_last else _tensors(self._wires.take(action))
        if action.kind == "I":
            _, step.postponed[place] = stage_backward_input(made, given, inputs, iter(self._root.parameters()))
        else:
            _differentiate(made, given)
        if received is not None:
            hidden, *routed = [tensor.grad for tensor in inputs]
            assert hidden is not None, "the stage before gets no gradient"
            self._wires.send(action, Handoff(hidden, routed[0] if routed else None))

    def _backward_weights(self, action: Action, step: _Step) -> None:
        stage_backward_weight(iter(self._root.parameters()), step.postponed.pop((action.stage, action.batch)))


class _Run(NamedTuple):
    """A forward pass whose backward pass is pending: the stage's input, and its output (or the loss)."""

    received: Handoff | None
    made: list[Tensor]


class _Step:
    """A step in progress, by stage and micro batch. postponed: what W needs from I, as torch returns it."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.running: dict[tuple[int, int], _Run] = {}
        self.postponed: dict[tuple[int, int], Any] = {}


def _differentiate(made: Sequence[Tensor], given: Sequence[Tensor] | None) -> None:
    """Run the backward pass from `made` with gradients `given` (None for a loss). Outputs that depend only on frozen
    parameters, such as those of a first stage without adapters, need none."""
    wanted = [number for number, tensor in enumerate(made) if tensor.requires_grad]
    if wanted:
        grads = None if given is None else [given[number] for number in wanted]
        torch.autograd.backward([made[number] for number in wanted], grads)


def _tensors(passed: Handoff | None) -> list[Tensor]:
    return [] if passed is None else [tensor for tensor in passed if tensor is not None]


class P2PTransport:
    """Communication with the next and the previous rank of a pipeline. dtype: of hidden states."""

    def __init__(self, pipeline: Pipeline, dtype: torch.dtype) -> None:
        self._pipeline, self._dtype = pipeline, dtype
        self._ranks = dist.get_process_group_ranks(pipeline.group)
        self._place = pipeline.group.rank()
        # Keyed by direction, and by whether it connects the last rank with the first: with two ranks both exist.
        wraps = (False, True) if pipeline.per_rank > 1 else (False,)
        self._groups = {
            (onward, wrap): dist.new_group(self._ranks, use_local_synchronization=True)
            for onward in (True, False)
            for wrap in wraps
        }
        self._arriving: dict[Action, tuple[Handoff, list[Any]]] = {}
        self._leaving: deque[tuple[Any, Tensor]] = deque()

    def ahead(self, order: Iterable[Action], batches: Sequence[Batch]) -> Iterator[Action]:
        """Yield the actions of `order`, each after the inputs of the one after it have been requested."""
        waiting: Action | None = None
        for action in order:
            self._ask(action, batches)
            if waiting is not None:
                yield waiting
            waiting = action
        if waiting is not None:
            yield waiting

    def take(self, action: Action) -> Handoff | None:
        """The tensors that another rank sent for `action`; None if it needs none."""
        if action not in self._arriving:
            return None
        passed, works = self._arriving.pop(action)
        for work in works:
            work.wait()
        return passed

    def send(self, action: Action, passed: Handoff) -> None:
        """Send the result of `action` to the rank that continues with it."""
        assert passed.hidden.dtype == self._dtype, f"hidden states are {passed.hidden.dtype}, not {self._dtype}"
        onward = action.kind == "F"
        peer, group = self._way(onward, leaving=True)
        for tensor in _tensors(passed):
            held = tensor.detach().contiguous()
            self._leaving.append((dist.isend(held, peer, group=group), held))
        while self._leaving and self._leaving[0][0].is_completed():
            self._leaving.popleft()

    def flush(self) -> None:
        """Wait until all has been sent."""
        while self._leaving:
            self._leaving.popleft()[0].wait()

    def _ask(self, action: Action, batches: Sequence[Batch]) -> None:
        kind, stage, number = action
        onward = kind == "F"
        border = stage if onward else stage + 1  # the stage whose input, or whose input's gradient, is received
        if kind == "W" or border in (0, self._pipeline.num_stages):
            return
        tokens = batches[number].input_ids
        length = len(tokens) // self._pipeline.token_parts
        peer, group = self._way(onward, leaving=False)
        hidden = tokens.new_empty((1, length, self._pipeline.hidden_size), dtype=self._dtype)
        layers = self._pipeline.routed[border]
        routed = None
        if layers:
            routed = tokens.new_empty((layers, length, self._pipeline.num_experts), dtype=torch.float32)
        passed = Handoff(hidden, routed)
        self._arriving[action] = passed, [dist.irecv(tensor, peer, group=group) for tensor in _tensors(passed)]

    def _way(self, onward: bool, *, leaving: bool) -> tuple[int, Any]:
        """The rank at the other end, and the process group of that direction."""
        size = len(self._ranks)
        other = (self._place + (1 if onward == leaving else -1)) % size
        earlier, later = (self._place, other) if onward == leaving else (other, self._place)
        wrap = later < earlier
        return self._ranks[other], self._groups[onward, wrap]
