"""Composed models: packed rows with images equal the parts combined by hand, for many language models and encoders."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from tests.model import zoo
from tests.model.composed import TOWERS, write_foundation, write_tower
from tests.model.test_media import make_rows
from tests.model.test_multimodal import assert_same_gradients
from tutti.config.load import from_dict
from tutti.core.batch import IGNORE, Sample, pack
from tutti.data.encode import make_encoder
from tutti.data.formats import Row
from tutti.model.build import build_model, load_model_config, num_token_ids
from tutti.model.initialize import init_weights
from tutti.model.omni import OmniModel
from tutti.model.omni_config import OmniConfig
from tutti.model.omni_processor import add_placeholders, compose_processor, write_markers
from tutti.model.structure import freeze_parts
from tutti.train.objective import Objective

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart"
CPU = torch.device("cpu")
FOUNDATIONS = ("llama", "qwen3", "gemma2", "granite", "qwen3_moe")


def config_of(folder: Path, foundation: str, tower: str, **encoder: Any) -> Any:
    model = {
        "config_path": write_foundation(folder, foundation),
        "tokenizer_path": str(QUICKSTART),
        "encoders": {"image": {"config_path": write_tower(folder, tower), **encoder}},
    }
    data = {"train_path": "x", "data_type": "conversation", "max_seq_len": 512}
    return from_dict({"model": model, "data": data, "train": {"compute_dtype": "float32"}})


def built(config: Any) -> tuple[Any, Any, Any]:
    """The model with random weights, its tokenizer and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART)
    add_placeholders(tokenizer, config.model)
    write_markers(tokenizer, config.model)
    model = build_model(config, tokenizer=tokenizer, device=CPU)
    init_weights(model, 0, CPU)
    return model.eval(), tokenizer, compose_processor(config.model, tokenizer)


def packed_batch(config: Any, model: Any, tokenizer: Any, processor: Any) -> tuple[list[Sample], Any]:
    """Rows with one image, none, two, and one, from files; as samples and as one packed batch."""
    encoder = make_encoder(config, tokenizer, vocab_size=num_token_ids(model.config), processor=processor)
    encoded: Any = encoder([Row(row, str(QUICKSTART / "rows.jsonl"), 1) for row in make_rows((1, 0, 2, 1))])
    samples = [found[0] for found in encoded]
    batch = pack(samples, pad_to=sum(map(len, samples)) + 3)
    return samples, replace(batch, extras=encoder.extras(samples, len(batch.input_ids)))


def loss_by_hand(model: Any, samples: list[Sample], extras: dict[str, Any]) -> torch.Tensor:
    """The summed loss of the samples one by one: features of the tower, projected, put in the places of placeholders,
    and handed to the untouched language model."""
    encoder, foundation = model.encoders["image"], model.foundation
    tower = encoder.tower
    if "image_grid_thw" in extras:
        rows = tower(extras["pixel_values"], grid_thw=extras["image_grid_thw"]).pooler_output
    else:
        states = tower(pixel_values=extras["pixel_values"]).last_hidden_state
        rows = states[:, -16:].flatten(0, 1)
    rows = encoder.projector(rows)
    total, used = rows.new_zeros(()), 0
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids.copy()).long()[None]
        places = ids == model.config.placeholders["image"]
        count = int(places.sum())
        embedded = foundation.get_input_embeddings()(ids.clamp(max=2047)).clone()
        embedded[places] = rows[used : used + count]
        used += count
        labels = torch.full_like(ids, IGNORE)
        labels[0, 1:] = torch.from_numpy(sample.labels[:-1].copy()).long()
        loss = foundation(inputs_embeds=embedded, labels=labels, use_cache=False).loss
        total = total + loss * (labels != IGNORE).sum()
    assert used == len(rows)
    return total


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("foundation", FOUNDATIONS)
def test_packed_equals_the_parts_by_hand(tmp_path: Path, foundation: str, tower: str) -> None:
    config = config_of(tmp_path, foundation, tower)
    model, tokenizer, processor = built(config)
    samples, batch = packed_batch(config, model, tokenizer, processor)
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    out = Objective(model)(batch)
    out["loss"].backward()
    want = loss_by_hand(plain, samples, batch.extras)
    want.backward()
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradients(model, plain)
    moved = {name.split(".")[2] for name, item in model.encoders.named_parameters(prefix="x") if item.grad is not None}
    assert moved == {"tower", "projector"}


def rows_of_all_media() -> list[dict[str, Any]]:
    """Chats about a picture, a recording and a picture, a video, two recordings, and nothing."""
    rows = []
    for question, media in (
        ("<image>What?", {"image": "images/1f3a0.webp"}),
        ("<audio>And <image>?", {"audio": "audio/0000.ogg", "image": "images/1f415.webp"}),
        ("<video>What?", {"video": "video/1f308.webp"}),
        ("<audio><audio>", {"audios": ["audio/0001.ogg", "audio/0002.ogg"]}),
        ("Hello?", {}),
    ):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "An answer."}]
        rows.append({"messages": chat, **media})
    return rows


def features_by_hand(model: Any, extras: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The rows of all pictures, frames and recordings, from the towers."""
    image, audio = model.encoders["image"], model.encoders["audio"]
    found = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        states = image.tower(pixel_values=extras[name]).last_hidden_state
        found[kind] = image.projector(states.flatten(0, 1))
    states = audio.tower(input_features=extras["input_features"]).last_hidden_state
    heard = [
        torch.stack([row[4 * place : 4 * place + 4].flatten() for place in range(count)])
        for row, count in zip(states, extras["audio_tokens"].tolist(), strict=True)
    ]
    found["audio"] = audio.projector(torch.cat(heard))
    return found


def test_sounds_and_videos_come_in_their_places(tmp_path: Path) -> None:
    config = config_of(tmp_path, "llama", "siglip")
    spec = {**config.model.encoders, "audio": {"config_path": write_tower(tmp_path, "whisper"), "pool": 4}}
    config = replace(config, model=replace(config.model, encoders=spec))
    model, tokenizer, processor = built(config)
    encoder = make_encoder(config, tokenizer, vocab_size=num_token_ids(model.config), processor=processor)
    encoded: Any = encoder([Row(row, str(QUICKSTART / "rows.jsonl"), 1) for row in rows_of_all_media()])
    samples = [found[0] for found in encoded]
    batch = pack(samples, pad_to=sum(map(len, samples)) + 3)
    batch = replace(batch, extras=encoder.extras(samples, len(batch.input_ids)))
    out = Objective(model)(batch)["loss"]
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    rows = features_by_hand(plain, batch.extras)
    used = dict.fromkeys(rows, 0)
    total = torch.zeros(())
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids.copy()).long()[None]
        embedded = plain.get_input_embeddings()(ids).clone()
        for kind, token in plain.config.placeholders.items():
            places = ids == token
            count = int(places.sum())
            embedded[places] = rows[kind][used[kind] : used[kind] + count]
            used[kind] += count
        labels = torch.full_like(ids, IGNORE)
        labels[0, 1:] = torch.from_numpy(sample.labels[:-1].copy()).long()
        loss = plain.foundation(inputs_embeds=embedded, labels=labels, use_cache=False).loss
        total = total + loss * (labels != IGNORE).sum()
    assert used == {kind: len(found) for kind, found in rows.items()}
    assert out.item() == pytest.approx(total.item(), rel=1e-5)
    out.backward()
    total.backward()
    assert_same_gradients(model, plain)


def test_a_sound_beyond_the_window_is_a_bad_row(tmp_path: Path) -> None:
    config = config_of(tmp_path, "llama", "siglip")
    tower = {"config_path": write_tower(tmp_path, "whisper"), "max_source_positions": 50}
    config = replace(config, model=replace(config.model, encoders={"audio": tower}))
    model, tokenizer, processor = built(config)

    def encoded(data: Any) -> Any:
        found = replace(config, data=data)
        encoder = make_encoder(found, tokenizer, vocab_size=num_token_ids(model.config), processor=processor)
        return encoder([Row(rows_of_all_media()[3], str(QUICKSTART / "rows.jsonl"), 1)])[0]

    assert "a sound of 2." in encoded(config.data).reason and "the tower hears 1.0 s" in encoded(config.data).reason
    (sample,) = encoded(replace(config.data, audio_max_seconds=1.0))
    assert (sample.input_ids == model.config.placeholders["audio"]).sum() == 100


def test_llama_with_clip_and_a_linear_projector_is_llava(tmp_path: Path) -> None:
    """LLaVA is the same model, written as one class: with its weights the logits are equal."""
    config = config_of(tmp_path, "llama", "clip")
    model, tokenizer, processor = built(config)
    samples, batch = packed_batch(config, model, tokenizer, processor)
    llava = LlavaConfig(
        vision_config=copy.deepcopy(model.config.vision_config),
        text_config=copy.deepcopy(model.config.text_config),
        image_token_index=model.config.placeholders["image"],
        vision_feature_layer=-1,
    )
    want = LlavaForConditionalGeneration(llava).eval()
    names = {"model.language_model.": "foundation.model.", "model.vision_tower.": "encoders.image.tower."}
    names |= {"lm_head.": "foundation.lm_head.", "model.multi_modal_projector.linear_1.": "encoders.image.projector.0."}
    names["model.multi_modal_projector.linear_2."] = "encoders.image.projector.2."
    ours = model.state_dict()
    theirs = {
        name: ours[next(new + name[len(old) :] for old, new in names.items() if name.startswith(old))]
        for name in want.state_dict()
    }
    want.load_state_dict(theirs)
    model.set_attn_implementation("eager")
    ids = torch.from_numpy(samples[0].input_ids.copy()).long()[None]
    pixels = batch.extras["pixel_values"][:1]
    inputs = {"input_ids": ids, "pixel_values": pixels}
    torch.testing.assert_close(model(**inputs).logits, want(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_pooling_makes_fewer_tokens_of_neighbouring_features(tmp_path: Path) -> None:
    whole, pooled = (built(config_of(tmp_path, "llama", "siglip", pool=size)) for size in (1, 2))
    counts = []
    for model, tokenizer, processor in (whole, pooled):
        config = config_of(tmp_path, "llama", "siglip")
        samples, batch = packed_batch(config, model, tokenizer, processor)
        counts.append(int((samples[0].input_ids == model.config.placeholders["image"]).sum()))
        assert Objective(model)(batch)["loss"] > 0
    assert counts == [16, 4]
    encoder = pooled[0].encoders["image"]
    pixels = torch.randn(1, 3, 16, 16)
    cells = encoder.tower(pixel_values=pixels).last_hidden_state.view(4, 4, 24)
    want = torch.stack([cells[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten() for y in (0, 1) for x in (0, 1)])
    torch.testing.assert_close(encoder(pixels)[0], encoder.projector(want))


def test_an_earlier_layer_gives_the_features(tmp_path: Path) -> None:
    model, _, _ = built(config_of(tmp_path, "llama", "clip", layer=-2))
    encoder, pixels = model.encoders["image"], torch.randn(2, 3, 16, 16)
    states = encoder.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert encoder(pixels).equal(encoder.projector(states[:, 1:]))
    frozen = {name for name, item in encoder.tower.named_parameters() if not item.requires_grad}
    assert any("layers.1." in name for name in frozen) and not any("layers.0." in name for name in frozen)


def test_a_token_for_images_is_added_where_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = json.loads((QUICKSTART / "tokenizer.json").read_text())
    tokens["added_tokens"] = [one for one in tokens["added_tokens"] if one["content"] != "<|image|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens).replace('"<|image|>"', '"<|unused|>"'))
    (tmp_path / "tokenizer_config.json").write_text((QUICKSTART / "tokenizer_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = config_of(tmp_path, "llama", "siglip")
    with caplog.at_level("INFO", logger="tutti"):
        add_placeholders(tokenizer, config.model)
    assert "<|image|> is new in the tokenizer, as id 2048" in caplog.text
    write_markers(tokenizer, config.model)
    model = build_model(config, tokenizer=tokenizer, device=CPU)
    init_weights(model, 0, CPU)
    assert model.config.placeholders["image"] == 2048 == model.get_input_embeddings().weight.shape[0]
    samples, batch = packed_batch(config, model, tokenizer, compose_processor(config.model, tokenizer))
    assert 2048 in samples[0].input_ids
    plain = copy.deepcopy(model).eval()
    plain.set_attn_implementation("eager")
    want = loss_by_hand(plain, samples, batch.extras)
    assert Objective(model)(batch)["loss"].item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("tower", ["siglip", "qwen2_vl"])
def test_parts_are_frozen_by_name(tmp_path: Path, tower: str) -> None:
    model, _, _ = built(config_of(tmp_path, "llama", tower))
    freeze_parts(model, ["language_model", "towers"])
    left = {name.split(".")[2] for name, item in model.named_parameters() if item.requires_grad}
    assert left == ({"projector"} if tower == "siglip" else {"projector", "tower"})  # its merger projects too
    assert all(name.startswith("encoders.") for name, item in model.named_parameters() if item.requires_grad)


def test_the_config_of_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    config = config_of(tmp_path, "granite", "qwen2_vl")
    found = load_model_config(config)
    assert isinstance(found, OmniConfig)
    (tmp_path / "model_config.json").write_text(found.to_json_string())
    again = load_model_config(
        replace(config, model=replace(config.model, config_path=str(tmp_path / "model_config.json")))
    )
    assert again.to_dict() == found.to_dict() and type(again.vision_config) is type(found.vision_config)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no path": ({"config_path": None}, "model.encoders.image: needs model_path, or config_path"),
    "an unknown field": ({"hiden_size": 32}, r"image.hiden_size: SiglipVisionConfig .*did you mean hidden_size\?"),
    "no such folder": ({"config_path": "nowhere"}, "model.encoders.image.config_path: nowhere is not there"),
    "widths": ({"add_projector": False}, "add_projector: false needs features of the language model's width 32, .* 24"),
    "a type": ({"pool": "two"}, "model.encoders.image.pool: must be of type int, got 'two'"),
    "a pool of none": ({"pool": 0}, "model.encoders.image.pool: must be at least 1, got 0"),
    "a layer": ({"layer": -9}, "model.encoders.image: SiglipVisionConfig cannot be used for image"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_composed_is_refused(tmp_path: Path, name: str) -> None:
    encoder, reason = BAD[name]
    with pytest.raises(ValueError, match=reason):
        load_model_config(config_of(tmp_path, "llama", "siglip", **encoder))


def test_kinds_and_foundations_that_cannot_be_composed_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "llama", "siglip")
    for kind in ("video",):
        other = replace(config, model=replace(config.model, encoders={kind: {"config_path": "x"}}))
        with pytest.raises(
            ValueError, match=rf"encoders.{kind}: not available yet; there are encoders for image, audio"
        ):
            load_model_config(other)
    seeing = {"audio": {"config_path": write_tower(tmp_path, "clip")}}
    with pytest.raises(ValueError, match="CLIPVisionConfig cannot be used for audio: it takes no mel frames of sounds"):
        load_model_config(replace(config, model=replace(config.model, encoders=seeing)))
    whole = replace(config, model=replace(config.model, config_path=write_tower(tmp_path, "qwen2_vl")))
    with pytest.raises(ValueError, match=r"model\.encoders: qwen2_vl takes images by towers of its own"):
        load_model_config(whole)
    (tmp_path / "veomni").mkdir()
    (tmp_path / "veomni" / "config.json").write_text('{"model_type": "janus_siglip"}')
    theirs = config_of(tmp_path, "llama", "siglip", config_path=str(tmp_path / "veomni"))
    with pytest.raises(ValueError, match=r"model\.encoders\.image\.config_path: .*; give a siglip_vision_model folder"):
        load_model_config(theirs)


def test_an_override_changes_the_tower(tmp_path: Path) -> None:
    found: Any = load_model_config(config_of(tmp_path, "llama", "siglip", hidden_size=32, add_projector=False))
    assert found.vision_config.hidden_size == 32 and found.encoders["image"]["width"] == 32
    with torch.device("meta"):
        model = OmniModel._from_config(found)
    assert not list(model.encoders["image"].projector.parameters())
    assert AutoConfig.from_pretrained(tmp_path / "siglip").hidden_size == 24
    assert isinstance(AutoModelForCausalLM.from_config(zoo.tiny("llama")), type(model.foundation))
