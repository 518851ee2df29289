"""Which parts of a model run as fused kernels, found out by trying them.

Models are transformers' own classes, and hundreds of families have their own norm, gated MLP and rotary embedding,
most of them alike. What a part computes is found out in two steps, on few random numbers:

1. On the CPU, in fp32 and bf16, it is compared with the plain forms in `tutti.model.fused`, values and gradients, and
   where they round. A part that differs from all of them stays as it is.
2. On the accelerator the kernel is compared with the part. Where it cannot be compiled or differs, the part stays too.

Parts are recognised by their structure: a norm has one vector of weights and a number for eps; a gated MLP has
`gate_proj` and `up_proj` (or both in `gate_up_proj`), `down_proj` and an activation; a layer of experts has the method
`_apply_gate`; attention calls a function of its module, `apply_rotary_pos_emb`. No class and no module is changed: an
instance's forward is wrapped, or for the rotary embedding replaced by a copy that finds another function under that
name. Experts are told their activation's name.

Shapes: T tokens, H heads, D head dimension.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial, wraps
from types import FunctionType, MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from tutti.core.modules import Forward, attach, attached, wrap_forward
from tutti.model import fused
from tutti.model.fused import ACTIVATIONS, Norm
from tutti.model.structure import is_experts

log = logging.getLogger(__name__)

NAME = "fused"

ROTARY = "apply_rotary_pos_emb"
"""The name of the function that turns queries and keys in transformers' modules."""

_EPS = ("variance_epsilon", "eps", "epsilon")
"""The names that modules have for it."""

T = TypeVar("T")


def fuse_modules(model: nn.Module, device: torch.device | None, dtype: torch.dtype) -> None:
    """Make the norms, gated MLPs and rotary embeddings of `model` run as fused kernels where these give their values.

    model: on any device, also meta. device: where it will run; None is an accelerator that is presumed (a rehearsal's).
    dtype: that it will compute in. Logs a line that counts them. Does nothing on a CPU.
    """
    if device is not None and (device.type != "cuda" or fused.load_kernels() is None):
        return
    trials, counts = _Trials(device, dtype), Counter[str]()
    for name, module in model.named_modules():
        if "forward" in vars(module) or attached(module).wrappers:
            continue  # what is around it may rely on the module's own
        for kind, fuse in _KINDS.items():
            if fuse(module, trials):
                counts[kind] += 1
                log.debug("fused: %s (%s)", name, type(module).__name__)
    if counts:
        log.info("fused kernels: %s", ", ".join(f"{counts[kind]} {kind}" for kind in _KINDS if counts[kind]))


class _Trials:
    """Trials of parts on a device in a dtype, one for all parts of a kind."""

    def __init__(self, device: torch.device | None, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._known: dict[Hashable, Any] = {}
        self._told: set[Hashable] = set()

    def once(self, key: Hashable, find: Callable[[], T]) -> T:
        """The result of `find` when it was first called with this key."""
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]

    def passes(self, key: Hashable, what: str, find: Callable[[torch.device, torch.dtype], str]) -> bool:
        """True if `find` on the device says nothing that speaks against the kernel of `what`."""
        if self.device is None:
            return True
        device, dtype = self.device, self.dtype
        problem = self.once(key, lambda: _said(partial(find, device, dtype)))
        if problem and key not in self._told:
            self._told.add(key)
            log.warning("%s run as torch's kernels, slower: a trial of the fused one says: %s", what, problem)
        return not problem


def _fuse_norm(module: Any, trials: _Trials) -> bool:
    if not _may_be_norm(module):
        return False
    key = (type(module), len(module.weight), _scalars(module))
    norm = trials.once(key, lambda: recognise_norm(module))
    if norm is None or not trials.passes(
        (key, "device"), f"{type(module).__name__}s", partial(_norm_differs, module, norm)
    ):
        return False
    wrap_forward(module, NAME, partial(_normed, module=module, norm=norm))
    return True


def _fuse_mlp(module: Any, trials: _Trials) -> bool:
    activation, function = _usable_activation(module, trials), _activation_of(module)
    if activation is None:
        return False
    if not trials.once((type(module), _scalars(module), function), lambda: is_gated_mlp(module, activation)):
        return False
    wrapper = _gated_halves if hasattr(module, "gate_up_proj") else _gated
    wrap_forward(module, NAME, partial(wrapper, module=module, activation=activation))
    return True


def _usable_activation(module: Any, trials: _Trials) -> str | None:
    """The name of the activation of `module`, if there is a kernel that passes its trial."""
    function = _activation_of(module)
    if function is None:
        return None
    activation = trials.once((type(module), function), lambda: recognise_activation(function))
    if activation is None:
        return None
    if not trials.passes(activation, f"gated MLPs with {activation}", partial(_gate_differs, activation)):
        fused.unusable.add(activation)
        return None
    return activation


def _fuse_experts(module: Any, trials: _Trials) -> bool:
    if not (is_experts(module) and module.has_gate):
        return False
    activation = _usable_activation(module, trials)
    if activation is None:
        return False
    key = (type(module), _scalars(module), _activation_of(module), "experts")
    if not trials.once(key, lambda: is_gated_in_halves(module, activation)):
        return False
    attach(module, gated_by=activation)
    return True


def _fuse_rotary(module: Any, trials: _Trials) -> bool:
    rotate = rotary_of(module)
    if rotate is None:
        return False
    width = getattr(module, "head_dim", None) or 64
    known = [
        item
        for item in trials.once(rotate, lambda: recognise_rotary(rotate))
        if trials.passes((rotate, width, item), "rotary embeddings", partial(_rotary_differs, rotate, item, width))
    ]
    if WHOLE not in known:
        return False
    wrap_forward(module, NAME, partial(_rotating, module=module, plain=rotate, known=known))
    return True


_KINDS: dict[str, Callable[[Any, _Trials], bool]] = {
    "norms": _fuse_norm,
    "gated MLPs": _fuse_mlp,
    "gates of experts": _fuse_experts,
    "rotary embeddings": _fuse_rotary,
}


def _normed(forward: Forward, module: nn.Module, norm: Norm) -> Forward:
    plain: Any = type(module).forward

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not fused.fits(args[0], self.weight):
            return plain(self, *args, **kwargs)
        return fused.rms_norm(args[0], self.weight, norm)

    return _bound(run, module)


def _gated(forward: Forward, module: nn.Module, activation: str) -> Forward:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        (hidden,) = *args, *kwargs.values()
        return self.down_proj(fused.gated(self.gate_proj(hidden), self.up_proj(hidden), activation))

    return _bound(run, module)


def _gated_halves(forward: Forward, module: nn.Module, activation: str) -> Forward:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        (hidden,) = *args, *kwargs.values()
        return self.down_proj(fused.gated_halves(self.gate_up_proj(hidden), activation))

    return _bound(run, module)


def _rotating(forward: Forward, module: nn.Module, plain: Callable[..., Any], known: Sequence[Rotation]) -> Forward:
    """The forward of attention, which finds in the place of the function `plain` one that uses the kernel for the
    `known` kinds of rotation."""
    own: Any = type(module).forward

    def rotate(query: Any, key: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _turns(query, key, cos, sin, known):
            return plain(query, key, cos, sin, *args, **kwargs)
        return fused.rotate(query, key, cos, sin)

    names = {**own.__globals__, ROTARY: rotate}
    made = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    made.__kwdefaults__ = own.__kwdefaults__
    return _bound(made, module)


def _bound(function: Callable[..., Any], module: nn.Module) -> Forward:
    """`function` as a method of `module`, so that a copy of the module has it as its own."""
    return MethodType(wraps(type(module).forward)(function), module)


def _turns(query: Any, key: Any, cos: Any, sin: Any, known: Sequence[Rotation]) -> bool:
    """True for queries and keys [B, heads, T, D] and angles [B or 1, T, D or less] that are turned in a known way."""
    if query.ndim != 4 or key.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape:
        return False
    batch, _, length, width = query.shape
    turned = cos.shape[-1]
    return (
        Rotation(turned < width, cos.dtype != query.dtype) in known
        and turned % 2 == 0
        and turned <= width
        and cos.dtype in (query.dtype, torch.float32)
        and (key.shape[0], *key.shape[2:]) == (batch, length, width)
        and cos.shape[1] == length
        and cos.shape[0] in (1, batch)
        and query.dtype == key.dtype
        and cos.dtype == sin.dtype
        and not cos.requires_grad
        and fused.fits(query, key, cos, sin)
    )


def _may_be_norm(module: Any) -> bool:
    parameters = dict(module.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].ndim != 1 or _eps(module) is None:
        return False
    return len(_arguments(module)) == 1 and len(parameters["weight"]) <= fused.MAX_WIDTH


def _eps(module: Any) -> float | None:
    return next((value for key in _EPS if isinstance(value := getattr(module, key, None), float)), None)


def recognise_norm(module: Any) -> Norm | None:
    """The rule of `module`, where it is an RMS norm along the last dimension of its only argument."""
    eps = _eps(module)
    if eps is None or not _may_be_norm(module):
        return None
    cpu, dtypes = torch.device("cpu"), (torch.bfloat16, torch.float32)
    for offset in (0, 1):
        for is_rounded in (True, False):
            norm = Norm(eps, offset, is_rounded)
            problems = [_said(partial(_norm_differs, module, norm, cpu, dtype)) for dtype in dtypes]
            if not any(problems):
                return norm
    log.debug("not fused: %s is no RMS norm of a known kind", type(module).__name__)
    return None


def _norm_differs(module: Any, norm: Norm, device: torch.device, dtype: torch.dtype) -> str:
    """The difference of `module`, with random weights, from `norm`: the kernel, or the plain form on a CPU."""
    draws = torch.Generator().manual_seed(0)
    width = len(module.weight)
    scales = torch.tensor([1e-3, 0.1, 1.0, 3.0, 30.0])[:, None]
    drawn = (torch.randn(2, 5, width, generator=draws) * scales, 1 + 0.5 * torch.randn(width, generator=draws))

    def theirs(x: Tensor, weight: Tensor) -> Any:
        return _twin(module, {"weight": weight})(x)

    return _difference(theirs, partial(fused.rms_norm, norm=norm), [item.to(device, dtype) for item in drawn])


def _twin(module: nn.Module, parameters: dict[str, Any], modules: dict[str, nn.Module] | None = None) -> nn.Module:
    """A copy of `module`, in training, that has these parameters, and these modules in the place of its own."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = parameters
    twin.__dict__["_modules"] = dict(module._modules) | (modules or {})
    twin.training = True
    return twin


def _arguments(module: nn.Module) -> list[str]:
    """The arguments of a module's forward."""
    forward: Any = type(module).forward
    return list(inspect.signature(forward).parameters)[1:]


def _scalars(module: nn.Module) -> tuple[Any, ...]:
    """The numbers and words that a module goes by."""
    plain = {key: value for key, value in vars(module).items() if isinstance(value, int | float | str)}
    return tuple(sorted((key, value) for key, value in plain.items() if key != "layer_idx"))


def _activation_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    found = (getattr(module, key, None) for key in ("act_fn", "activation_fn"))
    return next((function for function in found if callable(function)), None)


def recognise_activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name in `tutti.model.fused.ACTIVATIONS` of what `function` computes."""
    x = torch.linspace(-8, 8, 201)
    try:
        found = function(x)
    except Exception:  # any code of a model
        return None
    near = (
        name
        for name, plain in ACTIVATIONS.items()
        if isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found, plain(x), 1e-5, 1e-6)
    )
    return next(near, None)


def _gate_differs(activation: str, device: torch.device, dtype: torch.dtype) -> str:
    draws = torch.Generator().manual_seed(0)
    drawn = [(3 * torch.randn(7, 200, generator=draws)).to(device, dtype) for _ in range(2)]

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return ACTIVATIONS[activation](gate) * up

    return _difference(plain, partial(fused.gated, activation=activation), drawn)


def is_gated_mlp(module: nn.Module, activation: str) -> bool:
    """True if `module` computes down(activation(gate(x)) * up(x)), tried with small matrices in place of its own."""
    children = dict(module.named_children())
    joined = "gate_up_proj" in children
    names = ("gate_up_proj", "down_proj") if joined else ("gate_proj", "up_proj", "down_proj")
    if not set(names) <= set(children) or len(_arguments(module)) != 1:
        return False
    if any(True for _ in module.parameters(recurse=False)) or any(_drops(child) for child in module.modules()):
        return False
    draws = torch.Generator().manual_seed(0)
    into = [(32, 8)] if joined else [(16, 8), (16, 8)]
    drawn = [torch.randn(shape, generator=draws) for shape in ((2, 3, 8), *into, (8, 16))]

    def theirs(x: Tensor, *matrices: Tensor) -> Any:
        return _twin(module, {}, {name: _Product(item) for name, item in zip(names, matrices, strict=True)})(x)

    def ours(x: Tensor, *matrices: Tensor) -> Tensor:
        *into, down = matrices
        parts = [x @ matrix.T for matrix in into]
        gate, up = parts[0].chunk(2, -1) if joined else parts
        return (ACTIVATIONS[activation](gate) * up) @ down.T

    dtypes = (torch.float32, torch.bfloat16)
    problems = [_said(partial(_difference, theirs, ours, [item.to(dtype) for item in drawn])) for dtype in dtypes]
    if any(problems):
        log.debug("not fused: %s: %s", type(module).__name__, *filter(None, problems[:1] or problems))
    return not any(problems)


def is_gated_in_halves(experts: Any, activation: str) -> bool:
    """True if a layer of experts computes activation(gate) * up, with gate and up next to each other."""
    drawn = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    given = [scale * drawn.to(dtype) for dtype in (torch.float32, torch.bfloat16) for scale in (3, 60)]  # 60: a clamp
    ours = partial(_plain_halves, activation=activation)
    return not any(_said(partial(_difference, experts._apply_gate, ours, [item])) for item in given)


def _plain_halves(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and module.p > 0


class _Product(nn.Module):
    """A linear layer with a matrix that is given."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


def rotary_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function that the forward of `module` turns its queries and keys with."""
    forward: Any = type(module).forward
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    found = forward.__globals__.get(ROTARY)
    return found if callable(found) else None


class Rotation(NamedTuple):
    """A way to turn heads. is_partial: by their first columns only. is_wide: by angles in fp32."""

    is_partial: bool
    is_wide: bool


WHOLE = Rotation(False, False)


def recognise_rotary(rotate: Callable[..., Any]) -> list[Rotation]:
    """The kinds of rotation in which `rotate` computes what `tutti.model.fused.rotate` does."""
    cpu, dtypes = torch.device("cpu"), (torch.bfloat16, torch.float32)
    kinds = (Rotation(is_partial, is_wide) for is_partial in (False, True) for is_wide in (False, True))
    found = [
        kind
        for kind in kinds
        if not any(_said(partial(_rotary_differs, rotate, kind, 16, cpu, item)) for item in dtypes)
    ]
    if WHOLE not in found:
        log.debug("not fused: %s.%s turns otherwise", rotate.__module__, ROTARY)
    return found


def _rotary_differs(
    rotate: Callable[..., Any], kind: Rotation, width: int, device: torch.device, dtype: torch.dtype
) -> str:
    draws = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 6, width), (2, 5, 2, width))
    given = [torch.randn(shape, generator=draws).to(device, dtype).transpose(1, 2) for shape in shapes]
    angles = torch.rand(2, 5, width // 4 * 2 if kind.is_partial else width, generator=draws) * 6
    turns = [item.to(device, torch.float32 if kind.is_wide else dtype) for item in (angles.cos(), angles.sin())]

    def by(function: Callable[..., Any], query: Tensor, key: Tensor) -> Any:
        return function(query, key, *turns)

    return _difference(partial(by, rotate), partial(by, fused.rotate), given)


def _said(trial: Callable[[], str]) -> str:
    """The words of `trial`, or the error that ended it. Random numbers that it draws are drawn again after it."""
    try:
        with torch.random.fork_rng(devices=()):
            return trial()
    except Exception as error:  # any code of a model, and compilers fail in many ways
        return f"{type(error).__name__}: {error}"


def _difference(theirs: Callable[..., Any], ours: Callable[..., Any], given: Sequence[Tensor]) -> str:
    """Describes where two functions of `given` differ in values or gradients by more than the order of sums; empty if
    they do not."""
    first, second = (list(_values(function, given)) for function in (theirs, ours))
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} results"
    places = [number for number, pair in enumerate(zip(first, second, strict=True)) if not is_close(*pair)]
    return f"other values in {places} of {len(first)} results and gradients" if places else ""


def _values(function: Callable[..., Any], given: Sequence[Tensor]) -> Iterator[Tensor]:
    """The results of `function`, and the gradients of what it is given."""
    inputs = [item.detach().requires_grad_() for item in given]
    with torch.enable_grad():
        out = function(*inputs)
    results = list(out) if isinstance(out, tuple) else [out]
    draws = torch.Generator().manual_seed(1)
    outer = [torch.randn(item.shape, generator=draws).to(item.device, item.dtype) for item in results]
    yield from (item.detach() for item in results)
    yield from torch.autograd.grad(results, inputs, outer)


EQUAL = 0.95
"""The share of values in half precision that are to be equal: sums in another order change the rounding of few."""


def is_close(first: Tensor, second: Tensor) -> bool:
    """True if two results of a part agree but for the order of sums, and what that changes in rounding."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    largest, eps = float(first.abs().max()), torch.finfo(first.dtype).eps
    if first.dtype == torch.float32:
        return torch.allclose(first, second, rtol=1e-4, atol=100 * eps * largest)
    first, second = first.float(), second.float()
    same = (first - second).abs() <= 1e-6 * largest  # far below the others, where a tanh is nearly -1, say
    # A vector is a weight's gradient, which one form sums after rounding and the other before.
    equal = first.ndim == 1 or float(same.float().mean()) >= EQUAL
    return equal and torch.allclose(first, second, rtol=4 * eps, atol=2 * eps * largest)
