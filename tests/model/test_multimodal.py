"""Models with image input: packed loss and gradients equal those of the original class, sample by sample."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM

from tests.checkpoint.weighing import CPU, ONE, held
from tests.model.gallery import FAMILIES, Picture, pack_pictures, picture, tiny
from tests.train.runs import tiny_config
from tutti.attention.interface import attention_by_part, resolve_attention
from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.hf_save import export_hf
from tutti.config import ConfigError
from tutti.config.layout import fit
from tutti.core.batch import IGNORE
from tutti.model.build import build_model, language_factory
from tutti.model.initialize import init_weights
from tutti.model.mixers import separate_mixers
from tutti.model.multimodal import check_first, check_multimodal, make_media_positions
from tutti.model.structure import basic_modules, blocks, count_flops, read_structure, text_model, tower_blocks, towers
from tutti.model.tokenizer import build_tokenizer
from tutti.train.objective import Objective


def build_pair(family: str, attention: str = "sdpa", **text: Any) -> tuple[Any, Any]:
    config = tiny(family, **text)
    torch.manual_seed(0)
    plain = AutoModelForMultimodalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():  # so that parameters that classes initialize with zero or one have an effect
        for parameter in plain.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    by_part = attention_by_part(config, resolve_attention(attention, CPU))
    packed = AutoModelForMultimodalLM.from_config(config, attn_implementation=by_part).eval()
    packed.load_state_dict(plain.state_dict())
    return plain, packed


def own_loss(plain: Any, pictures: list[Picture]) -> torch.Tensor:
    """The loss that the family's own class gives for each sample alone, summed over targets."""
    total = torch.zeros(())
    for item in pictures:
        ids = torch.from_numpy(item.sample.input_ids).long()[None]
        labels = torch.full_like(ids, IGNORE)
        labels[0, 1:] = torch.from_numpy(item.sample.labels[:-1]).long()
        loss = plain(input_ids=ids, labels=labels, use_cache=False, **item.inputs).loss
        total = total + loss * (labels != IGNORE).sum()
    return total


def assert_same_gradients(packed: Any, plain: Any) -> None:
    want = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in packed.named_parameters():
        if want[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        # Key biases cancel in the softmax, so their gradient is only rounding. Those of steps nearly cancel.
        scale = want[name.replace("k_proj.bias", "k_proj.weight").replace("dt_bias", "A_log")].abs().max().item()
        error = (parameter.grad - want[name]).abs().max().item()
        assert error <= 1e-4 * scale, f"{name} is off by {error:.2e} of {scale:.2e}"


def assert_packed_equals_own(family: str, pictures: list[Picture], attention: str = "sdpa", **text: Any) -> None:
    plain, packed = build_pair(family, attention, **text)
    batch = make_media_positions(read_structure(packed))(pack_pictures(pictures, pad_to=160))
    objective = Objective(packed)
    separate_mixers(objective.structure)
    out = objective(batch)
    out["loss"].backward()
    want = own_loss(plain, pictures)
    want.backward()
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradients(packed, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_with_and_without_images_equal_the_family_s_own(family: str) -> None:
    pictures = [
        picture(family, 0, 12, 2),
        picture(family, 1, 9, 0),
        picture(family, 2, 20, 1),
        picture(family, 3, 7, 3),
    ]
    assert_packed_equals_own(family, pictures)


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "llava"])
def test_eager_attention_keeps_samples_apart_too(family: str) -> None:
    assert_packed_equals_own(family, [picture(family, 0, 12, 2), picture(family, 1, 9, 1)], "eager")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "glm4v", "gemma3"])
def test_eager_attention_keeps_texts_apart_too(family: str) -> None:
    assert_packed_equals_own(family, [picture(family, 0, 12, 0), picture(family, 1, 9, 0)], "eager")


def test_videos_beside_images() -> None:
    pictures = [picture("qwen2_vl", 0, 12, 2, video=True), picture("qwen2_vl", 1, 9, 1), picture("qwen2_vl", 2, 7, 0)]
    assert_packed_equals_own("qwen2_vl", pictures)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_text_alone_leaves_towers_with_a_gradient_of_zero(family: str) -> None:
    assert_packed_equals_own(family, [picture(family, 0, 12, 0), picture(family, 1, 9, 0)])
    _, packed = build_pair(family)
    out = Objective(packed)(pack_pictures([picture(family, 0, 12, 0)]))
    out["loss"].backward()
    beside = [parameter for tower in towers(packed) for parameter in tower.parameters()]
    assert beside and all(parameter.grad is not None and not parameter.grad.any() for parameter in beside)


def test_the_router_loss_is_the_family_s_own_times_tokens() -> None:
    item = picture("qwen3_vl_moe", 0, 12, 2)
    plain, packed = build_pair("qwen3_vl_moe", output_router_logits=True, router_aux_loss_coef=0.01)
    out = Objective(packed)(make_media_positions(read_structure(packed))(pack_pictures([item])))
    ids = torch.from_numpy(item.sample.input_ids).long()[None]
    own = plain(input_ids=ids, output_router_logits=True, use_cache=False, **item.inputs).aux_loss
    assert out["router_loss"].item() == pytest.approx(0.01 * own.item() * len(item.sample), rel=1e-5)


def test_positions_that_come_with_the_batch_are_taken() -> None:
    pictures = [picture("qwen3_vl", 0, 12, 2), picture("qwen3_vl", 1, 9, 1)]
    _, packed = build_pair("qwen3_vl")
    objective, batch = Objective(packed), pack_pictures(pictures)
    placed = make_media_positions(read_structure(packed))(batch)
    assert placed.extras["position_ids"].shape == (4, 1, len(batch.input_ids))
    assert make_media_positions(read_structure(packed))(placed) is placed
    rows = replace(placed, extras=placed.extras | {"position_ids": placed.extras["position_ids"][1:]})
    losses = [objective(one)["loss"].item() for one in (rows, placed, batch)]
    assert losses[0] == losses[1] != losses[2]
    del batch.extras["mm_token_type_ids"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="needs mm_token_type_ids beside image_grid_thw"):
        make_media_positions(read_structure(packed))(batch)


def configured(tmp_path: Path, family: str, **changes: Any) -> Any:
    path = tmp_path / family
    if not path.is_dir():
        torch.manual_seed(0)
        AutoModelForMultimodalLM.from_config(tiny(family)).save_pretrained(path)
    return tiny_config(tmp_path, **{"model.model_path": str(path), **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_loaded_drawn_and_exported(family: str, tmp_path: Path) -> None:
    config = configured(tmp_path, family)
    model = build_model(config, device=CPU)
    load_weights(model, tmp_path / family, world=ONE)
    theirs = AutoModelForMultimodalLM.from_pretrained(tmp_path / family)
    assert type(model) is type(theirs) and all(not tensor.is_meta for tensor in model.buffers())
    for mine, other in ((model.state_dict(), theirs.state_dict()), (buffers(model), buffers(theirs))):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    export_hf(model, tmp_path / "out", build_tokenizer(config), world=ONE)
    assert held(tmp_path / "out") == held(tmp_path / family)
    drawn = build_model(config, device=CPU)
    init_weights(drawn, 0, CPU)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(drawn.get_parameter(name).std(), parameter.std(), rtol=0.4, atol=0.02, msg=name)


def buffers(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers())


def test_the_class_that_architectures_name_is_taken() -> None:
    config = tiny("gemma3")
    assert language_factory(config) is AutoModelForMultimodalLM
    assert language_factory(config.text_config) is AutoModelForCausalLM
    both = AutoConfig.for_model("qwen3_5")
    assert language_factory(both) is AutoModelForMultimodalLM
    both.architectures = ["Qwen3_5ForCausalLM"]
    assert language_factory(both) is AutoModelForCausalLM


@pytest.mark.parametrize("family", FAMILIES)
def test_what_lies_beside_the_language_model(family: str) -> None:
    _, model = build_pair(family)
    assert text_model(model).config is model.config.text_config
    assert [block for _, block in blocks(model)] == list(text_model(model).layers)
    assert all(model.get_submodule(name) is block for name, block in blocks(model))
    assert len(tower_blocks(model)) == 2
    beside = {id(p) for tower in towers(model) for p in tower.parameters()}
    inside = {id(p) for p in text_model(model).parameters()} | {id(model.lm_head.weight)}
    assert not beside & inside and beside | inside == {id(p) for p in model.parameters()}


def test_the_work_of_towers_is_counted_by_patches() -> None:
    _, model = build_pair("qwen3_vl")
    count = count_flops(model)
    words = [p for p in (*text_model(model).layers.parameters(), model.lm_head.weight) if p.ndim > 1]
    assert count.per_token == 6 * sum(p.numel() for p in words)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    patches = [p for tower in towers(model) for p in tower.parameters() if p.ndim > 1 and id(p) not in tables]
    batch = pack_pictures([picture("qwen3_vl", 0, 12, 1)])  # an image of 4 x 4 patches
    added = count.batch([12], batch.num_values()) - count.batch([12])
    assert added == pytest.approx(16 * 6 * sum(p.numel() for p in patches))


def test_a_model_of_text_alone_takes_no_images() -> None:
    model = AutoModelForCausalLM.from_config(tiny("llava").text_config)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has nothing .* could take pixel_values"):
        Objective(model)(pack_pictures([picture("llava", 0, 12, 1)]))


def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path) -> None:
    def check(**changes: Any) -> None:
        config = configured(tmp_path, "qwen3_vl", **changes)
        check_multimodal(read_structure(build_model(config, device=CPU)), fit(config, 1), config.train)

    check()
    with pytest.raises(ConfigError, match=r"train\.enable_batch_invariant_mode: Qwen3VLForConditionalGeneration"):
        check(**{"train.enable_batch_invariant_mode": True})
    staged = configured(tmp_path, "gemma3", world=2, **{"train.pipeline_parallel_size": 2})
    with pytest.raises(ConfigError, match=r"train\.pipeline_parallel_size: Gemma3For.* by a mask of its own"):
        check_multimodal(read_structure(build_model(staged, device=CPU)), fit(staged, 2), staged.train)
    model = build_model(configured(tmp_path, "qwen3_vl"), device=CPU)
    check_first(read_structure(model), 1)
    with pytest.raises(ValueError, match="to its first 1 blocks, of which the first stage has 0"):
        check_first(read_structure(model), 0)
    with pytest.raises(ValueError, match=r"model\.basic_modules: Qwen3VLVisionBlock is part of what encodes images"):
        basic_modules(model, ["Qwen3VLVisionBlock"])
    assert basic_modules(model, ["Qwen3VLTextMLP"])
    config = configured(tmp_path, "qwen3_vl")
    with torch.device("meta"):
        crossing = AutoModelForMultimodalLM.from_config(AutoConfig.for_model("mllama"))
    with pytest.raises(ValueError, match="the language model of MllamaForConditionalGeneration attends to images"):
        check_multimodal(read_structure(crossing), fit(config, 1), config.train)
