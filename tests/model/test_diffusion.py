import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.diffusion import AUTOENCODERS, TRANSFORMERS, make_folder
from tutti.model import diffusion
from tutti.model.denoiser import cast_to_infer, make_net
from tutti.model.denoiser_flops import DenoiserFlops
from tutti.model.diffusion import (
    FAMILIES,
    EncodedText,
    Family,
    Guided,
    add_noise,
    flow_time,
    latent_channels,
    predict,
    sample,
    to_tokens,
)
from tutti.model.pipeline_folder import read_folder, read_scheduler

STEPS = 3


def net_of(name: str) -> Any:
    """A transformer of the class without zero weights, so that its output depends on all inputs."""
    torch.manual_seed(0)
    net = make_net({"_class_name": name, **TRANSFORMERS[name]}).eval()
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return net


def texts(family: Family, length: int = 5) -> tuple[EncodedText, EncodedText]:
    """Two encoded prompts each, and as many empty ones."""
    torch.manual_seed(1)
    found = []
    for _ in range(2):
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, 3:] = False
        pooled = torch.randn(2, 16) if family.pooled else None
        found.append(EncodedText(torch.randn(2, length, 16), mask if family.mask else None, pooled))
    return found[0], found[1]


def noise_for(family: Family, net: Any) -> Tensor:
    torch.manual_seed(2)
    frames = (2,) if family.video else ()
    return torch.randn(2, latent_channels(family, net.config), *frames, 8, 8)


def by_pipeline(name: str, net: Any, scheduler: Any, prompts: EncodedText, empty: EncodedText, noise: Tensor) -> Tensor:
    """The latents that diffusers' own pipeline of the class makes."""
    import diffusers

    family = FAMILIES[name]
    kind = getattr(diffusers, family.pipeline)
    needed = inspect.signature(kind.__init__).parameters
    parts = {part: None for part in needed if part != "self" and needed[part].default is inspect.Parameter.empty}
    vae = dict(AUTOENCODERS.get(name, {}))
    if vae:
        parts["vae"] = getattr(diffusers, vae.pop("_class_name")).from_config(vae)
    pipeline = kind(**{**parts, "transformer": net, "scheduler": scheduler})
    pipeline.set_progress_bar_config(disable=True)
    takes = inspect.signature(pipeline.__call__).parameters
    latents = noise
    if family.patch:
        latents = to_tokens(noise, family)
    given: dict[str, Any] = {"latents": latents, "num_inference_steps": STEPS, "output_type": "latent"}
    given |= {"prompt_embeds": prompts.embeds, "negative_prompt_embeds": empty.embeds}
    for argument in takes:
        if argument in ("prompt_attention_mask", "prompt_embeds_mask"):
            given |= {argument: prompts.mask, f"negative_{argument}": empty.mask}
        if argument == "pooled_prompt_embeds":
            given |= {argument: prompts.pooled, f"negative_{argument}": empty.pooled}
        if argument in ("use_resolution_binning", "clean_caption"):
            given[argument] = False
    if "prompt" in takes:
        given |= {"prompt": None}
    if "negative_prompt" in takes:
        given |= {"negative_prompt": None}
    given["true_cfg_scale" if name == "QwenImageTransformer2DModel" else "guidance_scale"] = 3.0
    scale = {
        "LTXPipeline": 32,
        "WanPipeline": pipeline.vae_scale_factor_spatial if hasattr(pipeline, "vae_scale_factor_spatial") else 8,
    }.get(family.pipeline) or pipeline.vae_scale_factor
    given |= {"height": 8 * scale, "width": 8 * scale}
    if family.video:
        given["num_frames"] = 9 if name.startswith("LTX") else pipeline.vae_scale_factor_temporal + 1
    found = pipeline(**given)
    return found[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_sampling_equals_the_pipeline_of_the_family(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family, net = FAMILIES[name], net_of(name)
    scheduler = read_scheduler(read_folder(make_folder(tmp_path / "model", name), "x"))
    if name in ("FluxTransformer2DModel", "QwenImageTransformer2DModel"):
        scheduler.register_to_config(use_dynamic_shifting=True)
    prompts, empty = texts(family)
    noise = noise_for(family, net)
    found = sample(family, net, scheduler, prompts, empty, noise, Guided(STEPS, 3.0))
    expected = by_pipeline(name, net, type(scheduler).from_config(scheduler.config), prompts, empty, noise)
    if family.patch and expected.ndim == 3:
        found = to_tokens(found, family)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(diffusion, "_JOINED", 0)  # as large pictures are drawn
    apart = sample(family, net, scheduler, prompts, empty, noise, Guided(STEPS, 3.0))
    torch.testing.assert_close(
        to_tokens(apart, family) if found.shape != apart.shape else apart, found, rtol=1e-3, atol=1e-3
    )
    plain = sample(family, net, scheduler, prompts, None, noise, Guided(STEPS, 1.0))
    assert (plain.flatten() - found.flatten()).abs().max() > 1e-2, "guidance has no effect"


def test_noise_and_target_of_flow_matching() -> None:
    family = FAMILIES["SD3Transformer2DModel"]
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    made = add_noise(family, None, latents, noise, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(made.latents[0], 0.75 * latents[0] + 0.25 * noise[0])
    torch.testing.assert_close(made.latents[1], 0.25 * latents[1] + 0.75 * noise[1])
    torch.testing.assert_close(made.target, noise - latents)
    assert made.times.tolist() == [250, 750]


def test_noise_and_target_of_an_eps_model(tmp_path: Any) -> None:
    from diffusers import DDPMScheduler

    name = "PixArtTransformer2DModel"
    scheduler = read_scheduler(read_folder(make_folder(tmp_path / "model", name), "x"))
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    made = add_noise(FAMILIES[name], scheduler, latents, noise, torch.tensor([0.1, 0.9]))
    times = torch.tensor([100, 900])
    assert made.times.tolist() == times.tolist()
    expected = DDPMScheduler.from_config(scheduler.config).add_noise(latents, noise, times)
    torch.testing.assert_close(made.latents, expected)
    assert made.target is noise


def test_times_are_logit_normal_and_shifted() -> None:
    drawn = torch.tensor([flow_time((n + 0.5) / 1000, 0.0, 1.0, 1.0) for n in range(1000)])
    logits = (drawn / (1 - drawn)).log()
    assert abs(logits.mean()) < 1e-3 and abs(logits.std() - 1) < 0.01
    assert flow_time(0.5, 0.0, 1.0, 3.0) == pytest.approx(0.75)
    assert flow_time(0.5, 1.0, 1.0, 1.0) == pytest.approx(torch.tensor(1.0).sigmoid().item())
    narrow = flow_time(0.9, 0.0, 0.1, 1.0)
    assert 0.5 < narrow < flow_time(0.9, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prediction_has_the_shape_of_the_latents_and_reaches_the_weights(name: str) -> None:
    family, net = FAMILIES[name], net_of(name)
    latents = noise_for(family, net)
    out = predict(family, net, latents, torch.tensor([100.0, 900.0]), texts(family)[0])
    assert out.shape == latents.shape
    out.square().sum().backward()
    lacking = [key for key, item in net.named_parameters() if item.grad is None]
    # Nothing uses the text output of Qwen-Image's last block.
    assert all("1." in key for key in lacking) if name.startswith("Qwen") else not lacking, lacking


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_draws_in_bf16_is_what_diffusers_loads(name: str, tmp_path: Any) -> None:
    """Also where its class keeps norms and times in fp32, as Wan's does."""
    family, net = FAMILIES[name], net_of(name)
    net.save_pretrained(tmp_path)
    theirs = type(net).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    cast_to_infer(net, torch.bfloat16)
    kinds = [{key: item.dtype for key, item in each.state_dict().items()} for each in (net, theirs)]
    assert kinds[0] == kinds[1] and (torch.float32 in kinds[0].values()) == name.startswith("Wan")
    given = noise_for(family, net).bfloat16(), torch.tensor([100.0, 900.0])
    text = texts(family)[0].map(lambda part: part.bfloat16() if part.is_floating_point() else part)
    with torch.no_grad():
        assert predict(family, net, *given, text).equal(predict(family, theirs, *given, text))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_work_of_a_class_is_counted_without_storage(name: str) -> None:
    """A forward pass takes the operations that torch counts, training three times as many, and frozen weights fewer."""
    family, net = FAMILIES[name], net_of(name)
    config = {"_class_name": name, **TRANSFORMERS[name]}
    text, latents = texts(family)[0].map(lambda part: part[:1]), noise_for(family, net)[:1]
    pooled = None if text.pooled is None else text.pooled.shape[-1]
    # torch does not count the operations of attention on CPUs.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        predict(family, net, latents, torch.tensor([100.0]), text)
    forward = counter.get_total_flops()
    assert forward > 0
    of_two = torch.Size((2, *latents.shape[1:]))
    assert DenoiserFlops(config, net.parameters())(of_two, 5, 16, pooled) == 2 * 3 * forward
    net.requires_grad_(False)
    assert DenoiserFlops(config, net.parameters())(of_two, 5, 16, pooled) == 2 * 2 * forward
