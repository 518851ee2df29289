import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.harness import run_ranks
from tutti.config import TrainConfig
from tutti.core.tensors import local_part
from tutti.train import adamw
from tutti.train.adamw import AnyPrecisionAdamW
from tutti.train.adamw_8bit import AdamW8bit
from tutti.train.optim import build_optimizer, room_for_state, set_lr


class Block(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.norm(torch.tanh(self.proj(x)))


class Tiny(nn.Module):
    def __init__(self, tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def config(**train) -> SimpleNamespace:
    return SimpleNamespace(train=TrainConfig(**train))


def tiny(seed: int = 0, **kwargs) -> Tiny:
    torch.manual_seed(seed)
    return Tiny(**kwargs)


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 16, (4, 6), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(ids).float().flatten(0, 1), ids.roll(1, 1).flatten()).backward()


def decay_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    return {name: decay[p] for name, p in model.named_parameters() if p in decay}


def test_no_decay_by_module_and_by_name():
    model = tiny()
    settings = config(weight_decay=0.1, no_decay_modules=("LayerNorm",), no_decay_params=("bias",))
    decay = decay_of(model, build_optimizer(model, settings))
    assert len(decay) == len(list(model.parameters()))
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name or "bias" in name else 0.1), name


def test_a_module_exempts_everything_under_it():
    decay = decay_of(model := tiny(), build_optimizer(model, config(weight_decay=0.1, no_decay_modules=("Block",))))
    assert {name for name, value in decay.items() if value} == {"embed.weight", "head.weight"}


def test_groups_exist_without_weight_decay():
    optimizer = build_optimizer(tiny(), config(no_decay_params=("norm",)))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_tied_and_frozen_parameters():
    model = tiny(tied=True)
    model.blocks[0].requires_grad_(False)
    decay = decay_of(model, build_optimizer(model, config(weight_decay=0.1, no_decay_params=("head",))))
    assert decay["embed.weight"] == 0.0, "exempt under its other name"
    assert not any(name.startswith("blocks.0") for name in decay)


def test_a_name_that_matches_nothing():
    with pytest.raises(ValueError, match=r"train\.no_decay_modules.*RMSNorm.*LayerNorm"):
        build_optimizer(tiny(), config(no_decay_modules=("RMSNorm",)))
    with pytest.raises(ValueError, match=r"train\.no_decay_params.*gamma.*norm\.weight"):
        build_optimizer(tiny(), config(no_decay_params=("gamma",)))


def test_everything_frozen():
    with pytest.raises(ValueError, match="frozen"):
        build_optimizer(tiny().requires_grad_(False), config())


def test_hyperparameters_and_set_lr():
    for name in ("adamw", "anyprecision_adamw"):
        settings = config(
            optimizer=name, lr=1e-3, adam_beta1=0.8, adam_beta2=0.9, adam_eps=1e-6, no_decay_params=("bias",)
        )
        optimizer = build_optimizer(tiny(), settings)
        assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-6 and g["lr"] == 1e-3 for g in optimizer.param_groups)
        set_lr(optimizer, 0.5)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert isinstance(optimizer, AnyPrecisionAdamW)
    assert build_optimizer(tiny(), config()).param_groups[0]["fused"]


def test_fp32_state_is_adamw(monkeypatch):
    monkeypatch.setattr(adamw, "BUCKET_ON_CPU", 30)
    ours, theirs = tiny(), tiny()
    kwargs = {"lr": 1e-2, "weight_decay": 0.1}
    mine = AnyPrecisionAdamW(ours.parameters(), state_dtype=torch.float32, **kwargs)
    reference = torch.optim.AdamW(theirs.parameters(), **kwargs)
    for step in range(20):
        backward(ours, step)
        backward(theirs, step)
        mine.step()
        reference.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    assert "compensation" not in mine.state[next(ours.parameters())]


def test_a_parameter_that_is_not_contiguous():
    start = torch.randn(6, 4).t()
    ours, theirs = nn.Parameter(start.clone(memory_format=torch.preserve_format)), nn.Parameter(start.contiguous())
    assert not ours.is_contiguous()
    mine, reference = AnyPrecisionAdamW([ours], state_dtype=torch.float32), torch.optim.AdamW([theirs], weight_decay=0)
    for _ in range(3):
        ours.grad, theirs.grad = start.cos().contiguous(), start.cos()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


def distance_from_fp32(make, dtype: torch.dtype, steps: int = 200) -> float:
    """The distance from fp32 AdamW after 200 steps on noisy gradients, relative to the way that AdamW went."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4096, generator=generator).bfloat16()
    reference, tested = nn.Parameter(start.float()), nn.Parameter(start.clone().to(dtype))
    kwargs = {"lr": 1e-4, "weight_decay": 0.01}
    exact, optimizer = torch.optim.AdamW([reference], **kwargs), make([tested], **kwargs)
    slope = torch.randn(4096, generator=generator)
    for step in range(steps):
        scale = 1.0 if step < 20 else 0.1  # gradients shrink: the variance must fall too
        grad = ((slope + torch.randn(4096, generator=generator)) * scale).bfloat16()
        reference.grad, tested.grad = grad.float(), grad.to(dtype)
        exact.step()
        optimizer.step()
    result = tested.detach().float()
    if isinstance(optimizer, AnyPrecisionAdamW) and dtype == torch.bfloat16:
        result = result + optimizer.state[tested]["compensation"].float()
    return ((result - reference.detach()).norm() / (reference.detach() - start.float()).norm()).item()


def test_bf16_with_compensation_follows_fp32():
    plain = distance_from_fp32(torch.optim.AdamW, torch.bfloat16)
    compensated = distance_from_fp32(AnyPrecisionAdamW, torch.bfloat16)
    assert compensated < 0.03
    assert compensated < plain / 10
    assert distance_from_fp32(AnyPrecisionAdamW, torch.float32) < 0.03


def test_the_variance_falls_when_gradients_do():
    parameter = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    optimizer = AnyPrecisionAdamW([parameter], lr=0.0)
    for step in range(700):
        parameter.grad = torch.full_like(parameter, 1.0 if step < 100 else 0.0)
        optimizer.step()
    expected = (1 - 0.999**100) * 0.999**600
    torch.testing.assert_close(
        optimizer.state[parameter]["exp_avg_sq"].float(), torch.full((64,), expected), rtol=0.02, atol=0
    )


def test_state_dict_keeps_types_and_values():
    for dtype in (torch.bfloat16, torch.float32):
        model = tiny().to(dtype)
        optimizer = AnyPrecisionAdamW(model.parameters(), lr=1e-2)
        backward(model, 0)
        optimizer.step()
        twin = copy.deepcopy(model)
        resumed = AnyPrecisionAdamW(twin.parameters(), lr=1e-2)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for a, b in ((model, optimizer), (twin, resumed)):
            backward(a, 1)
            b.step()
        for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b), name
            assert resumed.state[b]["exp_avg"].dtype == torch.bfloat16


def train_sharded(name: str, dtype: torch.dtype, shard: bool) -> dict[str, np.ndarray]:
    model = tiny().to(dtype)
    if shard:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    settings = config(optimizer=name, lr=1e-2, weight_decay=0.1, no_decay_modules=("LayerNorm", "Block"))
    optimizer = build_optimizer(model, settings)
    for step in range(5):
        backward(model, step)
        optimizer.step()
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {n: p.detach().float().numpy() for n, p in full.items()}


@pytest.mark.parametrize("name", ["adamw", "anyprecision_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sharded_equals_single(name, dtype):
    single, tolerance = train_sharded(name, dtype, False), 1e-5 if dtype == torch.float32 else 2e-2
    for rank in run_ranks(2, train_sharded, name, dtype, True):
        for key, value in single.items():
            np.testing.assert_allclose(rank[key], value, rtol=tolerance, atol=tolerance / 10, err_msg=key)


def test_plain_and_sharded_parameters_together():
    assert run_ranks(1, partly_sharded) == [True]


def partly_sharded() -> bool:
    model = tiny()
    fully_shard(model.blocks[0])
    for name in ("adamw", "anyprecision_adamw"):
        optimizer = build_optimizer(model, config(optimizer=name))
        backward(model, 0)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for old, new in zip(before, model.parameters(), strict=True):
            assert not torch.equal(local_part(old), local_part(new.detach()))
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_reads_nothing_back_from_the_device(dtype):
    """On the meta device, which has no values to read."""
    parameter = nn.Parameter(torch.empty(3, 5, dtype=dtype, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    optimizer = AnyPrecisionAdamW([parameter], weight_decay=0.1)
    optimizer.step()
    optimizer.found_inf = torch.empty((), device="meta")
    optimizer.step()
    assert optimizer.state[parameter]["step"].is_meta
    saved = optimizer.state_dict()
    saved["state"][0] = saved["state"][0] | {"step": torch.ones(())}
    optimizer.load_state_dict(saved)
    assert optimizer.state[parameter]["step"].is_meta, "a count of the host's is loaded to where the parameter is"


@pytest.mark.parametrize("make", [AnyPrecisionAdamW, AdamW8bit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_step_that_is_refused_on_the_device_changes_nothing(make, dtype):
    def make_model():
        torch.manual_seed(0)
        return nn.Linear(64, 96).to(dtype)

    told, asked = make_model(), make_model()
    optimizer, other = (make(model.parameters(), lr=1e-2, weight_decay=0.1) for model in (told, asked))
    for step, refused in enumerate((1.0, 0.0, 0.0, 1.0, 0.0)):
        for parameter, same in zip(told.parameters(), asked.parameters(), strict=True):
            same.grad = torch.full_like(same, step + 1).cumsum(0).cos()
            parameter.grad = torch.full_like(parameter, torch.nan) if refused else same.grad
        optimizer.found_inf, other.found_inf = torch.tensor(refused), torch.tensor(0.0)
        optimizer.step()
        if not refused:
            other.step()
    for parameter, same in zip(told.parameters(), asked.parameters(), strict=True):
        assert torch.equal(parameter, same)
        for key, value in other.state[same].items():
            assert torch.equal(optimizer.state[parameter][key], value), key


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.99999])
def test_corrections_of_a_count_on_the_device_are_those_of_the_host(beta):
    for step in (1, 2, 10, 100_000):
        got = adamw._correction(beta, torch.tensor(step)).item()
        assert got == pytest.approx(adamw._correction(beta, step), rel=1e-6)
        rounded = [torch.full((999,), 1.0).add_(torch.arange(999) * 1e-5) for _ in range(2)]
        for tensor, count in zip(rounded, (step, torch.tensor(step)), strict=True):
            adamw._round_by_step(tensor, count)
        assert torch.equal(*rounded)


def test_room_is_as_large_as_what_the_first_step_makes():
    model = tiny()
    optimizer = build_optimizer(model, config())
    room = room_for_state(optimizer)
    model(torch.arange(16)).sum().backward()
    optimizer.step()
    made = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(item.nbytes for item in room) == sum(value.nbytes for value in made)
