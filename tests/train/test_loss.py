"""The fused head and loss equal torch's cross-entropy on full logits."""

from functools import cache, partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from tutti.model.structure import LogitTransform
from tutti.train import loss as module
from tutti.train.loss import linear_cross_entropy, target_losses


def make(dtype=torch.float64, positions=37, width=12, vocabulary=50):
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=dtype).requires_grad_()
    bias = torch.randn(vocabulary, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, vocabulary, (positions,))


@pytest.mark.parametrize("chunk_rows", [1, 10, 1000])
@pytest.mark.parametrize(
    "transform", [LogitTransform(), LogitTransform(0.25), LogitTransform(1.0, 2.0), LogitTransform(2.0, 1.5, (3, 9))]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_full_logits(monkeypatch, chunk_rows, transform, with_bias):
    hidden, weight, bias, targets = make(torch.float32)
    targets = targets.clamp(min=9)  # some transforms mask those before
    monkeypatch.setattr(module, "CHUNK_BYTES_ON_CPU", chunk_rows * weight.shape[0] * weight.element_size())
    monkeypatch.setattr(module, "CACHED_ELEMENTS", 3 * weight.shape[0])
    used = [hidden, weight, *([bias] if with_bias else [])]
    total, losses = linear_cross_entropy(hidden, weight, targets, bias=bias if with_bias else None, transform=transform)
    (total * 0.5).backward()
    got = [item.grad for item in used]
    for item in used:
        item.grad = None
    raw = hidden @ weight.T + (bias if with_bias else 0)
    want = cross_entropy(transform(raw), targets, reduction="none")
    (want.sum() * 0.5).backward()
    torch.testing.assert_close(losses, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, want.sum(), rtol=1e-5, atol=1e-5)
    for ours, item in zip(got, used, strict=True):
        torch.testing.assert_close(ours, item.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 10, 1000])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(2.0, 1.5)])
@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("hidden",)], ids=["whole", "frozen head", "head alone"])
def test_weights_known_only_in_the_backward_pass(monkeypatch, chunk_rows, transform, frozen):
    hidden, weight, bias, targets = make(torch.float32)
    monkeypatch.setattr(module, "CHUNK_BYTES_ON_CPU", chunk_rows * weight.shape[0] * weight.element_size())
    monkeypatch.setattr(module, "CACHED_ELEMENTS", 3 * weight.shape[0])
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    used = [item.requires_grad_(name not in frozen) for name, item in named.items() if name not in frozen]
    for name in frozen:
        named[name].requires_grad_(False)

    def weighted(losses):
        return losses.square().sum() - losses[:5].sum().exp().log1p()

    losses = target_losses(hidden, weight, targets, bias=bias, transform=transform)
    weighted(losses).backward()
    got = [item.grad for item in used]
    for item in used:
        item.grad = None
    want = cross_entropy(transform(hidden @ weight.T + bias), targets, reduction="none")
    weighted(want).backward()
    torch.testing.assert_close(losses, want, rtol=1e-5, atol=1e-6)
    for ours, item in zip(got, used, strict=True):
        torch.testing.assert_close(ours, item.grad, rtol=1e-4, atol=1e-5)


def presume_compiler(monkeypatch, backend):
    """Make the loss compile its kernel, by `backend`, as it does on a GPU."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(module, "_compiles", lambda logits: not module._failures)
    monkeypatch.setattr(module, "on_accelerator", lambda tensor: True)
    monkeypatch.setattr(module, "_failures", [])
    monkeypatch.setattr(module, "_kernel", cache(module._kernel.__wrapped__))


def test_without_a_c_compiler_the_loss_takes_several_passes(monkeypatch, caplog):
    def backend(graph, _):
        raise RuntimeError("Failed to find C compiler")

    hidden, weight, _, targets = make(torch.float32)
    want, _ = linear_cross_entropy(hidden, weight, targets)
    presume_compiler(monkeypatch, backend)
    for _ in range(2):
        total, _ = linear_cross_entropy(hidden, weight, targets)
        assert total == want
    (record,) = (item for item in caplog.records if item.name == module.__name__)
    assert "Failed to find C compiler" in record.getMessage()


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(2.0, 1.5, (3, 9))])
@pytest.mark.parametrize("weighted", [False, True], ids=["summed", "weighted"])
def test_one_kernel_on_a_gpu_makes_the_same_losses_and_gradients(monkeypatch, transform, weighted):
    hidden, weight, bias, targets = make(torch.float32)
    targets = targets.clamp(min=9)
    made = []

    def run():
        inputs = [item.detach().clone().requires_grad_() for item in (hidden, weight, bias)]
        function = target_losses if weighted else linear_cross_entropy
        out = function(*inputs[:2], targets, bias=inputs[2], transform=transform)
        losses = out if weighted else out[1]
        (losses.square().sum() if weighted else out[0]).backward()
        return [losses.detach(), *(item.grad for item in inputs)]

    want = run()
    monkeypatch.setattr(module, "CHUNK_BYTES_ON_DEVICE", 10 * weight.shape[0] * weight.element_size())
    presume_compiler(monkeypatch, lambda graph, _: made.append(graph) or graph)
    got = run()
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert 1 <= len(made) <= 2, "compiled anew for each number of rows"


def test_no_positions_is_a_zero_loss_with_zero_gradients():
    hidden, weight, _, _ = make(torch.float32, positions=0)
    total, losses = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.int64))
    total.backward()
    assert total == 0 and losses.shape == (0,) and weight.grad.count_nonzero() == 0


def test_very_unlikely_target_keeps_a_finite_exact_loss():
    hidden = torch.tensor([[200.0]])
    total, _ = linear_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([1]))
    assert total.item() == pytest.approx(400.0)


def test_bf16_accumulates_head_gradient_over_chunks_in_fp32(monkeypatch):
    hidden, weight, _, targets = make(torch.float32, positions=4096, width=8, vocabulary=16)
    total, _ = linear_cross_entropy(hidden, weight, targets)
    total.backward()
    exact = weight.grad.clone()
    low_hidden, low_weight = (item.detach().bfloat16().requires_grad_() for item in (hidden, weight))
    monkeypatch.setattr(module, "CHUNK_BYTES_ON_CPU", 4 * 16 * 2)
    total, _ = linear_cross_entropy(low_hidden, low_weight, targets)
    total.backward()
    error = (low_weight.grad.float() - exact).norm() / exact.norm()
    assert error < 1e-2, f"relative error {error:.3g}: the sum over 256 chunks lost precision"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_many_chunks_on_a_gpu(monkeypatch, dtype):
    hidden, weight, _, targets = make(torch.float32, positions=600)
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    monkeypatch.setattr(module, "CHUNK_BYTES_ON_DEVICE", 8 * weight.shape[0] * dtype.itemsize)
    inputs = [item.detach().to("cuda", dtype).requires_grad_() for item in (hidden, weight)]
    linear_cross_entropy(*inputs, targets.cuda())[0].backward()
    for ours, exact in zip(inputs, (hidden, weight), strict=True):
        error = (ours.grad.cpu().float() - exact.grad).norm() / exact.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)
