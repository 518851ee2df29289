"""Existing models that draw: losses and gradients of text and codes equal those of the original class."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, Emu3VQVAE

from tests.data.processors import PROCESSORS
from tests.infer.models import ONE
from tests.model.drawers import drawer_config, drawing_rows, write_drawer, write_emu3_vq
from tests.model.test_multimodal import assert_same_gradients
from tests.train.runs import QUICKSTART
from tutti.checkpoint.hf_load import load_weights
from tutti.core.batch import Batch, Sample, pack
from tutti.core.pixels import Square, to_image, to_values
from tutti.data.encode import make_encoder
from tutti.data.formats import Row
from tutti.kinds.language import build, read_inputs
from tutti.model.build import check_eager
from tutti.model.omni_processor import CODE
from tutti.model.structure import part_parameters, read_structure
from tutti.model.vq import PictureTokenizer, read_codes
from tutti.train.inputs import num_ids
from tutti.train.objective import Objective
from tutti.train.tasks.draw_codes import CodeDrawing, Coder
from tutti.train.tasks.weighted_losses import SCALES

CPU = torch.device("cpu")


def packed_sums(folder: Path, path: str, **changes: Any) -> tuple[Any, dict[str, Any], list[Sample]]:
    """The model, trained on `drawing_rows` in one packed batch: with gradients, the sums, and the samples."""
    config = drawer_config(folder, path, **changes)
    tokenizer, model = build(config, CPU)
    structure = read_structure(model)
    inputs = read_inputs(config, tokenizer, structure)
    load_weights(model, path, world=ONE, broadcast=False)
    encoder = make_encoder(config, tokenizer, vocab_size=num_ids(model), processor=inputs.processor)
    found: Any = encoder([Row(row, str(QUICKSTART / "rows.jsonl"), 1) for row in drawing_rows()])
    samples = [one for one, *_ in found]
    batch = pack(samples, pad_to=sum(map(len, samples)) + 3)
    batch = replace(batch, extras=encoder.extras(samples, len(batch.input_ids)))
    pictures = PictureTokenizer(model.drawing_folder, CPU, size=model.drawing_size)
    coder = Coder(inputs.processor.drawn_token_ids[0], model.code_decoder, pictures.encode)
    batch = replace(coder(batch), payload={SCALES: torch.ones(2, dtype=torch.float64)})
    sums: Any = Objective(model, CodeDrawing(weights={"text": 1.0, "code": 1.0}), structure=structure)(batch)
    sums["loss"].backward()
    return model, sums, [replace(one, input_ids=ids, labels=labels) for one, ids, labels in _coded(samples, batch)]


def _coded(samples: list[Sample], batch: Batch) -> Iterator[tuple[Sample, Any, Any]]:
    """Each sample with its tokens and labels, codes among them."""
    lengths = list(map(len, samples))
    parts = (each[: sum(lengths)].split(lengths) for each in (batch.input_ids, batch.labels))
    return zip(samples, *(map(Tensor.numpy, part) for part in parts), strict=True)


def picture(row: dict[str, Any]) -> Image.Image:
    return Image.open(QUICKSTART / row["image"]).convert("RGB")


def pixels_of(image: Image.Image) -> torch.Tensor:
    """[1, 3, 16, 16] in [-1, 1], of the middle of a picture, scaled."""
    cut = torch.tensor(list(Square(16).cut(image).getdata()), dtype=torch.float32)
    return cut.view(16, 16, 3).permute(2, 0, 1)[None] / 127.5 - 1


def janus_losses(plain: Any, processor: Any, row: dict[str, Any], sample: Sample) -> dict[str, torch.Tensor]:
    """The losses of a row's text and codes, by transformers' modules alone."""
    draws = "image" in row and "<image>" in row["messages"][1]["content"]
    chat = [dict(message) for message in row["messages"]]
    if draws:
        places = "<begin_of_image>" + "<image_placeholder>" * 16 + "<end_of_image>"
        chat[1]["content"] = chat[1]["content"].replace("<image>", places)
    elif "image" in row:
        chat[0]["content"] = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.tokenizer.apply_chat_template(chat, tokenize=False)
    if "image" in row and not draws:
        made = processor(text=[text], images=[picture(row)], return_tensors="pt")
        ids, pixels = made["input_ids"], made["pixel_values"]
    else:
        ids, pixels = processor.tokenizer([text], return_tensors="pt")["input_ids"], None
    places = (ids == plain.config.image_token_id)[0]
    embeds = plain.get_input_embeddings()(ids)
    codes = torch.zeros(0, dtype=torch.int64)
    if pixels is not None:
        embeds = embeds.masked_scatter(places[None, :, None], plain.model.get_image_features(pixels).pooler_output)
    if draws:
        codes = plain.model.vqmodel.encode(pixels_of(picture(row))).image_tokens
        assert len(codes.unique()) > 3
        vectors = plain.prepare_embeddings_for_image_generation(codes)
        embeds = embeds.masked_scatter(places[None, :, None], vectors)
    hidden = plain.model.language_model(inputs_embeds=embeds).last_hidden_state[0]
    labels = torch.from_numpy(sample.labels.astype("int64"))
    before = places.roll(-1) & draws
    assert sample.input_ids[~places.numpy()].tolist() == ids[0][~places].tolist()
    assert (labels[before] >= 0).all()
    logits = plain.model.generation_head(hidden[before])
    return {
        "text": cross_entropy(plain.lm_head(hidden), labels.masked_fill(before, -100), reduction="sum"),
        "code": cross_entropy(logits, codes, reduction="sum"),
    }


def test_janus_from_files_equals_the_untouched_class(tmp_path: Path) -> None:
    path = write_drawer(tmp_path / "model")
    model, sums, samples = packed_sums(tmp_path, path)
    plain: Any = AutoModelForMultimodalLM.from_pretrained(path, attn_implementation="eager")
    processor = AutoProcessor.from_pretrained(path)
    rows = drawing_rows()
    each = [janus_losses(plain, processor, row, one) for row, one in zip(rows, samples, strict=True)]
    want = {kind: torch.stack([one[kind] for one in each]).sum() for kind in ("text", "code")}
    sum(want.values()).backward()  # type: ignore[union-attr]
    for kind, value in want.items():
        assert sums[kind].item() == pytest.approx(value.item(), rel=1e-5)
    assert sums["code_targets"] == 16 * 8
    assert_same_gradients(model, plain)
    assert model.model.generation_head.vision_head.weight.grad.any()
    assert not any(item.requires_grad for item in model.model.vqmodel.parameters())
    assert all(".generation_" in name for name in part_parameters(model, "decoders", "train.freeze"))


def vocabulary_losses(plain: Any, processor: Any, row: dict[str, Any], sample: Sample) -> dict[str, torch.Tensor]:
    """The losses of a row's text and codes, of the tokens that the original class makes of it by itself."""
    chat = [{**message, "content": message["content"].replace("<image>", "IMAGE")} for message in row["messages"]]
    text = processor.tokenizer.apply_chat_template(chat, tokenize=False).replace("IMAGE", processor.image_token)
    ids = processor.tokenizer([text], return_tensors="pt")["input_ids"]
    if "image" in row:
        image = picture(row)
        if "emu3" in type(plain).__module__:
            image = Square(8).cut(image)
        own = {"return_for_text_completion": True} if "chameleon" in type(plain).__module__ else {}
        made = processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=False, **own)
        ids = made.pop("input_ids")
        sizes = {name: made[name] for name in ("image_sizes",) if name in made}
        places = ids == plain.config.image_token_id if hasattr(plain.config, "image_token_id") else None
        codes = plain.model.get_image_tokens(made["pixel_values"], **sizes)
        assert len(codes.unique()) > 3
        ids = ids.masked_scatter(places, codes.flatten().to(ids))
    assert sample.input_ids.tolist() == ids[0].tolist()
    labels = torch.from_numpy(sample.labels.astype("int64"))
    hidden = plain.model(input_ids=ids).last_hidden_state[0]
    logits = plain(input_ids=ids).logits[0]
    first = plain.model.vocabulary_mapping.img2bpe[0]
    drawn = (labels >= first) & (labels < first + 16)
    return {
        "text": cross_entropy(logits, labels.masked_fill(drawn, -100), reduction="sum"),
        "code": cross_entropy(plain.lm_head(hidden), labels.masked_fill(~drawn, -100), reduction="sum"),
    }


@pytest.mark.parametrize("family", ["emu3", "chameleon"])
def test_codes_of_the_vocabulary_equal_the_untouched_class(tmp_path: Path, family: str) -> None:
    path = write_drawer(tmp_path / "model", family)
    size = {"data.image_max_pixels": 64} if family == "emu3" else {}
    model, sums, samples = packed_sums(tmp_path, path, **size)
    plain: Any = AutoModelForMultimodalLM.from_pretrained(path, attn_implementation="eager")
    processor = PROCESSORS[family]()
    each = [vocabulary_losses(plain, processor, row, one) for row, one in zip(drawing_rows(), samples, strict=True)]
    want = {kind: torch.stack([one[kind] for one in each]).sum() for kind in ("text", "code")}
    sum(want.values()).backward()  # type: ignore[union-attr]
    for kind, value in want.items():
        assert sums[kind].item() == pytest.approx(value.item(), rel=1e-5)
    assert sums["code_targets"] == 16 * 8
    for parameter in plain.model.vqmodel.parameters():
        parameter.grad = None
    assert_same_gradients(model, plain)
    assert not any(item.requires_grad for item in model.model.vqmodel.parameters())
    if family == "chameleon":
        with pytest.raises(ValueError, match=r"train\.tensor_parallel_size: ChameleonForConditionalGeneration never"):
            Objective(model, tensor=object())  # type: ignore[arg-type]


def test_looking_at_the_masks_of_eager_attention_leaves_what_embeds_codes(tmp_path: Path) -> None:
    config = drawer_config(tmp_path, write_drawer(tmp_path / "model"), **{"model.attn_implementation": "eager"})
    model: Any = build(config, CPU)[1]
    forward = vars(model.get_input_embeddings())["forward"]
    check_eager(model)
    assert vars(model.get_input_embeddings())["forward"] is forward


def test_pictures_of_any_size_are_tokenized_as_asked(tmp_path: Path) -> None:
    path = Path(write_emu3_vq(tmp_path))
    pictures, plain = PictureTokenizer(path, CPU, size=8), Emu3VQVAE.from_pretrained(path).eval()
    assert (pictures.codes.number, pictures.codes.tokens, pictures.codes.size.side) == (16, 16, 8)
    both = torch.cat([pixels_of(picture(row))[..., :8, :8] for row in drawing_rows()[:2]])
    codes = pictures.encode(both)
    own = [plain.encode(one[None], torch.tensor([[8, 8]])).image_tokens[0].flatten() for one in both]
    assert codes.tolist() == [one.tolist() for one in own] and len(codes.unique()) > 3
    with torch.no_grad():
        assert pictures.decode(codes).equal(plain.decode(codes.unflatten(1, (4, 4))))
    for size in (None, 7):
        with pytest.raises(ValueError, match="takes pictures of any size: give image_size, a multiple of 2"):
            read_codes(path, "model.decoders.image.model_path", size)


@pytest.mark.parametrize("family", ["janus", "emu3"])
def test_pictures_have_the_values_that_the_model_s_processor_makes(tmp_path: Path, family: str) -> None:
    """Inputs equal those of its image processor; outputs are converted to bytes as in its `postprocess`."""
    path = Path(write_drawer(tmp_path / "model", family))
    file = next(name for name in ("processor_config.json", "preprocessor_config.json") if (path / name).is_file())
    content = json.loads((path / file).read_text())
    content.get("image_processor", content).update({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]})
    (path / file).write_text(json.dumps(content))
    processor = AutoProcessor.from_pretrained(path).image_processor
    size = None if family == "janus" else 8
    pictures, plain = PictureTokenizer(path, CPU, size=size), AutoModelForMultimodalLM.from_pretrained(path).eval()
    image = pictures.codes.size.cut(picture(drawing_rows()[0]))
    values = processor(images=[image], return_tensors="pt")["pixel_values"].view(1, 3, *image.size)
    codes, vq = pictures.encode(to_values(np.array(image))[None]), plain.model.vqmodel
    sizes = [] if family == "janus" else [torch.tensor([image.size])]
    own = vq.encode(values, *sizes).image_tokens
    assert codes.flatten().tolist() == (own if family == "janus" else own[0]).flatten().tolist()
    with torch.no_grad():
        grid = codes if family == "janus" else codes.unflatten(1, (4, 4))
        out = vq.decode(grid)[0]
    form = "pt" if family == "janus" else "PIL.Image.Image"  # which Janus' own cannot make
    (theirs,) = processor.postprocess([out.numpy()], return_tensors=form)["pixel_values"]
    theirs = theirs.permute(1, 2, 0) if family == "janus" else theirs
    ours = to_image(pictures.decode(codes)[0])
    assert np.abs(np.array(ours).astype(int) - np.array(theirs)).max() <= 1
    assert len(codes.unique()) > 3 and np.array(ours).std() > 1


def test_the_tokenizer_in_a_model_s_folder_is_the_model_s(tmp_path: Path) -> None:
    path = write_drawer(tmp_path / "model")
    plain: Any = AutoModelForMultimodalLM.from_pretrained(path).eval()
    pictures = PictureTokenizer(Path(path), CPU)
    assert (pictures.codes.number, pictures.codes.tokens, pictures.codes.size.side) == (24, 16, 16)
    codes = pictures.encode(pixels_of(picture(drawing_rows()[0])))
    with torch.no_grad():
        assert pictures.decode(codes).equal(plain.model.vqmodel.decode(codes))
    assert CODE not in AutoTokenizer.from_pretrained(path).get_vocab()
