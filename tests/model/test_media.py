"""Multimodal models from files on disk: packed samples equal the original class with its own processor's inputs."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM

from tests.data.processors import PROCESSORS
from tests.model import drawers, gallery
from tests.model.test_multimodal import assert_same_gradients
from tutti.attention.interface import attention_by_part, resolve_attention
from tutti.config.load import from_dict
from tutti.core.batch import IGNORE, Sample, pack
from tutti.data.encode import make_encoder
from tutti.data.formats import BadRow, Row
from tutti.data.preference import make_pair_encoder
from tutti.model.build import build_model
from tutti.model.multimodal import make_media_positions
from tutti.model.processor import build_processor
from tutti.model.structure import read_structure
from tutti.train.objective import Objective

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart"
CPU = torch.device("cpu")
CONFIGS = {"pixtral": "mistral3"} | {name: name for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3")}
CONFIGS |= {"qwen3_vl_moe": "qwen3_vl_moe", "glm4v": "glm4v"}
OTHERS = {
    "gemma4": "gemma4", "janus": "janus", "qwen2_audio": "qwen2_audio", "qwen2_5_omni": "qwen2_5_omni_thinker",
    "qwen3_omni": "qwen3_omni_moe_thinker", "video_llama_3": "video_llama_3",
    "gemma4_unified": "gemma4_unified",
}  # fmt: skip
CONFIGS |= {name: name for name in ("idefics3", "smolvlm", "internvl", "llava_next", "llava_onevision")}
CONFIGS |= {name: name for name in ("aya_vision", "cohere2_vision", "ovis2")}


def make_rows(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Chats about so many images each, of different sizes."""
    images = [json.loads(line) for line in (QUICKSTART / "images.jsonl").read_text().splitlines()]
    rows = []
    for number, count in enumerate(counts):
        found = images[3 * number : 3 * number + count]
        names = ", ".join(one["caption"] for one in found) or "nothing"
        question = "<image>" * count + "What do you see?"
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": names}]
        rows.append({"messages": chat, "images": [one["image"] for one in found]})
    return rows


def fitted_config(name: str, processor: Any) -> Any:
    """The tiny config of that name in the gallery or among models that draw, with the tokens of a processor."""
    if name in drawers.CONFIGS:
        return drawers.CONFIGS[name](processor)
    config = copy.deepcopy(gallery.tiny(name, vocab_size=len(processor.tokenizer) + 8))
    for kind in ("image", "video", "audio"):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            if hasattr(config, name) and (ids := getattr(processor, f"{kind}_token_ids", None)) and ids[0] is not None:
                setattr(config, name, ids[0])
    if config.model_type == "ovis2":
        special = ("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
        config.image_token_id, *config.visual_indicator_token_ids = processor.tokenizer.convert_tokens_to_ids(special)
        config.vocab_size = config.text_config.vocab_size
    ends = {"start": "bos", "end": "eos"}
    for name in (f"{kind}_{end}_token_id" for kind in ("vision", "audio") for end in ends):
        if hasattr(config, name):
            kind, end, *_ = name.split("_")
            names = (name, f"{kind}_{ends[end]}_token_id")
            token = next((token for each in names if (token := getattr(processor.tokenizer, each, None))), None)
            setattr(config, name, len(processor.tokenizer) + 1 if token is None else token)
    return config


def build(family: str, processor: Any) -> tuple[Any, Any]:
    config = fitted_config((CONFIGS | OTHERS)[family], processor)
    torch.manual_seed(0)
    plain = AutoModelForMultimodalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    packed = AutoModelForMultimodalLM.from_config(
        config, attn_implementation=attention_by_part(config, resolve_attention("sdpa", CPU))
    ).eval()
    for parameter in plain.parameters():
        if parameter.ndim >= 2 and not parameter.any():  # such as an image projection, which would hide images
            torch.nn.init.normal_(parameter, std=0.1)
    packed.load_state_dict(plain.state_dict())
    return plain, packed


def own_loss(plain: Any, processor: Any, row: dict[str, Any], sample: Sample) -> torch.Tensor:
    """The summed loss that the class gives for a row that its own processor has made inputs of."""
    parts = [{"type": "image"}] * len(row["images"]) + [{"type": "text", "text": "What do you see?"}]
    chat = [{**row["messages"][0], "content": parts}, row["messages"][1]]
    text = processor.tokenizer.apply_chat_template(chat, tokenize=False)
    images = [Image.open(QUICKSTART / name).convert("RGB") for name in row["images"]]
    kinds = {"return_mm_token_type_ids": True, "return_tensors": "pt", "add_special_tokens": False}
    inputs = processor(text=[text], images=[images] if images else None, **kinds)
    assert inputs["input_ids"][0].tolist() == sample.input_ids.tolist()
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    labels[0, 1:] = torch.from_numpy(sample.labels[:-1].copy()).long()
    if "mm_token_type_ids" not in inspect.signature(plain.forward).parameters:
        inputs.pop("mm_token_type_ids", None)
    return plain(**inputs, labels=labels, use_cache=False).loss * (labels != IGNORE).sum()


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_files_equal_the_family_s_own(family: str) -> None:
    processor = PROCESSORS[family]()
    plain, packed = build(family, processor)
    config = from_dict({"data": {"train_path": "x", "data_type": "conversation", "max_seq_len": 512}})
    encoder = make_encoder(config, processor.tokenizer, vocab_size=4096, processor=processor)
    rows = make_rows((1, 0, 2, 1))
    encoded: Any = encoder([Row(row, str(QUICKSTART / "rows.jsonl"), 1) for row in rows])
    samples = [found[0] for found in encoded]
    batch = pack(samples, pad_to=sum(map(len, samples)) + 3)
    batch = replace(batch, extras=encoder.extras(samples, len(batch.input_ids)))
    out = Objective(packed)(make_media_positions(read_structure(packed))(batch))
    out["loss"].backward()
    want = torch.stack([own_loss(plain, processor, row, one) for row, one in zip(rows, samples, strict=True)]).sum()
    want.backward()
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradients(packed, plain)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_a_pair_has_the_inputs_of_both_its_answers(family: str) -> None:
    """Also if the tiling of an image depends on the number of images."""
    processor = PROCESSORS[family]()
    tree = {"train_path": "x", "data_type": "conversation", "max_seq_len": 4096}
    config = from_dict({"data": tree})
    encoder = make_encoder(config, processor.tokenizer, vocab_size=4096, processor=processor)
    pairs = from_dict({"data": tree | {"data_type": "dpo"}})
    both = make_pair_encoder(pairs, processor.tokenizer, vocab_size=4096, processor=processor)
    file = str(QUICKSTART / "rows.jsonl")
    (row,) = make_rows((2,))
    chats = [
        row | {"messages": [row["messages"][0], {"role": "assistant", "content": text}]} for text in ("Yes.", "No")
    ]
    pair = {"prompt": row["messages"][:1], "chosen": "Yes.", "rejected": "No", "images": row["images"]}
    samples = [found[0] for found in encoder([Row(chat, file, 1) for chat in chats])]
    ((joined,),) = both([Row(pair, file, 1)])
    assert joined.input_ids.tolist() == [*samples[0].input_ids.tolist(), *samples[1].input_ids.tolist()]
    want, got = encoder.extras(samples, len(joined)), both.extras([joined], len(joined))
    assert want.keys() == got.keys() and all(want[name].equal(got[name]) for name in want)
    (bad,) = replace(both, max_seq_len=len(joined) - 40)([Row(pair, file, 1)])
    assert isinstance(bad, BadRow) and "tokens of its images: raise data.max_seq_len" in bad.reason


def test_bounds_on_pixels_change_how_many_tokens_an_image_takes() -> None:
    processor = PROCESSORS["qwen2_vl"]()

    def encoded(**data: int) -> tuple[int, torch.Size]:
        tree = {"train_path": "x", "data_type": "conversation", "max_seq_len": 512, **data}
        encoder = make_encoder(from_dict({"data": tree}), processor.tokenizer, vocab_size=4096, processor=processor)
        found: Any = encoder([Row(make_rows((1,))[0], str(QUICKSTART / "rows.jsonl"), 1)])
        sample = found[0][0]
        places = int((sample.input_ids == processor.image_token_id).sum())
        return places, encoder.extras([sample], len(sample))["pixel_values"].shape

    (free, whole), (fewer, small) = encoded(), encoded(image_max_pixels=256)
    assert fewer < free and small[0] < whole[0]
    assert (4 * fewer, 4 * free) == (small[0], whole[0])  # four patches make a token
    assert encoded(image_max_pixels=256, image_min_pixels=256)[0] >= fewer


@pytest.mark.parametrize("parts", [False, True])
def test_a_placeholder_that_no_column_fills_is_told_of(parts: bool) -> None:
    processor = PROCESSORS["qwen2_vl"]()
    tree = {"train_path": "x", "data_type": "conversation", "max_seq_len": 512}
    encoder = make_encoder(from_dict({"data": tree}), processor.tokenizer, vocab_size=4096, processor=processor)
    (row,) = make_rows((1,))
    wrong = {"messages": row["messages"], "image_path": row["images"][0]}
    if parts:
        question = {"role": "user", "content": [{"type": "text", "text": row["messages"][0]["content"]}]}
        wrong = {"messages": [question, row["messages"][1]]}
    encoder([Row(row, str(QUICKSTART / "rows.jsonl"), 1)])
    assert not encoder.notes
    encoder([Row(wrong, str(QUICKSTART / "rows.jsonl"), 2)])
    assert encoder.notes == {"<image> stays a word of the text, as no column of the row has a medium for it": 1}


def test_what_is_remembered_of_sizes_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutti.data.media_processor.REMEMBERED", 2)
    processor = PROCESSORS["qwen2_vl"]()
    tree = {"train_path": "x", "data_type": "conversation", "max_seq_len": 512}
    encoder = make_encoder(from_dict({"data": tree}), processor.tokenizer, vocab_size=4096, processor=processor)
    rows = []
    for number in (0, 1, 2, 3, 0):
        Image.new("RGB", (16 + 8 * number, 40)).save(tmp_path / f"{number}.png")
        rows.append(Row(make_rows((1,))[0] | {"images": [f"{number}.png"]}, str(tmp_path / "rows.jsonl"), 1))
    lengths = [len(found[0]) for found in encoder(rows)]
    assert lengths[0] == lengths[-1] and len(set(lengths)) > 1
    assert encoder.media is not None and len(encoder.media._replacements) == 2


def test_an_image_that_the_processor_refuses_is_a_bad_row(tmp_path: Path) -> None:
    processor = PROCESSORS["qwen2_vl"]()
    tree = {"train_path": "x", "data_type": "conversation", "max_seq_len": 512}
    encoder = make_encoder(from_dict({"data": tree}), processor.tokenizer, vocab_size=4096, processor=processor)
    Image.new("RGB", (3000, 4)).save(tmp_path / "long.png")
    row = make_rows((1,))[0] | {"images": ["long.png"]}
    (bad,) = encoder([Row(row, str(tmp_path / "rows.jsonl"), 1)])
    assert isinstance(bad, BadRow) and "Qwen2VLProcessor cannot take its images: absolute aspect ratio" in bad.reason


def test_a_processor_that_cannot_be_used_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "processor_config.json").write_text('{"processor_class": "NoSuchProcessor"}')
    tokenizer = PROCESSORS["qwen2_vl"]().tokenizer
    config = from_dict({"model": {"tokenizer_path": str(tmp_path)}})
    with caplog.at_level("WARNING", logger="tutti"):
        assert build_processor(config, tokenizer) is None
    assert f"the processor in {tmp_path} cannot be used" in caplog.text


def test_a_fresh_model_without_a_beginning_of_text_in_its_config(tmp_path: Path) -> None:
    processor = PROCESSORS["qwen2_5_vl"]()
    fitted_config("qwen2_5_vl", processor).save_pretrained(tmp_path)
    config = from_dict({"model": {"config_path": str(tmp_path)}})
    model = build_model(config, tokenizer=processor.tokenizer, device=CPU)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
