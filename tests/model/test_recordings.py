"""Video and audio from files on disk: packed samples equal the original class with its own processor's inputs."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageSequence

from tests.data import recordings
from tests.data.processors import PROCESSORS, make_tokenizer
from tests.model.test_media import build
from tests.model.test_multimodal import assert_same_gradients
from tutti.config.load import from_dict
from tutti.core.batch import IGNORE, Sample, pack
from tutti.data.audio import decode_sound
from tutti.data.encode import Encoder, make_encoder
from tutti.data.formats import Row
from tutti.model.multimodal import make_media_positions
from tutti.model.structure import read_structure
from tutti.train.objective import Objective

ANSWER = {"role": "assistant", "content": "A square that moves."}
MARKS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recordings")
    write_files(made)
    return made


def write_files(made: Path) -> None:
    """Write the videos, sounds and images that rows here refer to."""
    (made / "long.mp4").write_bytes(recordings.video(20, 4))
    (made / "short.webm").write_bytes(recordings.video(7, 3, (48, 64), form="webm", codec="libvpx"))
    (made / "heard.mp4").write_bytes(recordings.video(12, 4, sound=True))
    (made / "uneven.mp4").write_bytes(recordings.video(9, 4, sound=True))
    (made / "again.mp4").write_bytes(recordings.video(8, 4, (48, 64), sound=True))
    (made / "long.wav").write_bytes(recordings.sound(1.7))
    (made / "high.flac").write_bytes(recordings.sound(0.4, 48000, channels=2, form="flac", codec="flac", seed=1))
    images = [Image.fromarray(one) for one in recordings.frames(6, (40, 40))]
    images[0].save(made / "moving.webp", save_all=True, append_images=images[1:], duration=250, lossless=True)
    images[0].save(made / "still.png")
    for number, image in enumerate(images):
        image.save(made / f"frame{number}.png")


def row(*media: tuple[str, Any]) -> dict[str, Any]:
    """A chat about media, each a kind and an entry."""
    question = " and ".join(MARKS[kind] for kind, _ in media) + "What do you see?"
    columns: dict[str, list[Any]] = {}
    for kind, entry in media:
        columns.setdefault(f"{kind}s", []).append(entry)
    return {"messages": [{"role": "user", "content": question}, ANSWER], **columns}


VIDEOS = {
    "a file": row(("video", "long.mp4")),
    "of another shape": row(("video", "short.webm")),
    "an animation": row(("video", "moving.webp")),
    "frames": row(("video", {"frames": [f"frame{number}.png" for number in range(6)], "video_fps": 3})),
    "text": {"messages": [{"role": "user", "content": "Nothing?"}, ANSWER]},
    "an image": row(("image", "still.png")),
}
TWO = row(("video", "long.mp4"), ("video", "short.webm"))
SOUNDS = {
    "a sound": row(("audio", "long.wav")),
    "two sounds": row(("audio", "high.flac"), ("audio", "long.wav")),
    "text": VIDEOS["text"],
}
ALL = row(("audio", "high.flac"), ("image", "still.png"), ("video", "short.webm"), ("audio", "long.wav"))
MIXED = row(("image", "still.png"), ("video", "short.webm"), ("image", "frame3.png"))


def decoded(folder: Path, entry: Any) -> np.ndarray:
    """All frames of a video, uint8 [frames, height, width, 3], by the shortest way."""
    if isinstance(entry, dict):
        return np.stack([np.asarray(Image.open(folder / name).convert("RGB")) for name in entry["frames"]])
    if entry.endswith("webp"):
        return np.stack([np.asarray(one.convert("RGB")) for one in ImageSequence.Iterator(Image.open(folder / entry))])
    with av.open(str(folder / entry)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


FPS = {"long.mp4": 4.0, "short.webm": 3.0, "moving.webp": 4.0}


def own_inputs(processor: Any, folder: Path, chat: dict[str, Any], sample: Sample) -> dict[str, Any]:
    """The inputs that the class's own processor makes of a row, by `apply_chat_template`."""
    text = chat["messages"][0]["content"]
    parts: list[dict[str, Any]] = []
    metadata = []
    media = iter(sample.media)
    left = {kind: list(chat.get(f"{kind}s", ())) for kind in MARKS}
    for word in text.replace("<", "|<").replace(">", ">|").split("|"):
        kind = word[1:-1]
        if word not in MARKS.values():
            parts += [{"type": "text", "text": word}] if word else []
            continue
        entry, medium = left[kind].pop(0), next(media)
        frames = medium.frames
        if kind == "audio":
            samples = decode_sound(str(folder / entry), 16000, None)
            assert medium.size == samples.shape
            parts.append({"type": "audio", "audio": samples})
            continue
        if frames is None:
            parts.append({"type": "image", "image": Image.open(folder / entry).convert("RGB")})
            continue
        pixels = decoded(folder, entry)
        fps = entry["video_fps"] if isinstance(entry, dict) else FPS[entry]
        assert (frames.total, frames.fps) == (len(pixels), pytest.approx(fps))
        indices = list(frames.indices)
        parts.append({"type": "video", "video": pixels[indices]})
        metadata.append({"fps": fps, "total_num_frames": len(pixels), "duration": len(pixels) / fps,
                         "frames_indices": indices})  # fmt: skip
    options: dict[str, Any] = {"video_metadata": [metadata], "do_sample_frames": False} if metadata else {}
    if metadata and "Omni" in type(processor).__name__:  # which does not look at the metadata
        (only,) = metadata
        options["fps"] = len(only["frames_indices"]) / only["total_num_frames"] * only["fps"]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": parts}, {**ANSWER, "content": [{"type": "text", "text": ANSWER["content"]}]}],
            chat_template=processor.tokenizer.chat_template, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"return_mm_token_type_ids": True, "add_special_tokens": False, **options},
        )
    )  # fmt: skip


def encoder_of(processor: Any, **data: Any) -> Encoder:
    tree = {"train_path": "x", "data_type": "conversation", "max_seq_len": 1024, **data}
    return make_encoder(from_dict({"data": tree}), processor.tokenizer, vocab_size=4096, processor=processor)


def encoded(encoder: Encoder, folder: Path, *rows: dict[str, Any]) -> list[Sample]:
    found: list[Any] = encoder([Row(one, str(folder / "rows.jsonl"), 1) for one in rows])
    for one in found:
        assert isinstance(one, list), one.reason
    return [one[0] for one in found]


def own_loss(plain: Any, inputs: dict[str, Any], sample: Sample, **options: Any) -> torch.Tensor:
    inputs = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    labels = torch.full_like(inputs["input_ids"], IGNORE)
    labels[0, 1:] = torch.from_numpy(sample.labels[:-1].copy()).long()
    if "mm_token_type_ids" not in inspect.signature(plain.forward).parameters:
        inputs.pop("mm_token_type_ids", None)
    return plain(**inputs, **options, labels=labels, use_cache=False).loss * (labels != IGNORE).sum()


def assert_packed_equals(packed: Any, plain: Any, encoder: Encoder, samples: list[Sample], total: torch.Tensor) -> None:
    """Loss and gradients of samples packed into one batch are those of `total`, the loss of the class on each."""
    batch = pack(samples, pad_to=sum(map(len, samples)) + 3)
    batch = replace(batch, extras=encoder.extras(samples, len(batch.input_ids)))
    out = Objective(packed)(make_media_positions(read_structure(packed))(batch))
    out["loss"].backward()
    total.backward()
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert_same_gradients(packed, plain)


FAMILIES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "qwen2_vl": ({"video_max_frames": 6}, [*VIDEOS.values(), TWO, MIXED]),
    "qwen2_5_vl": ({"video_max_frames": 6}, [*VIDEOS.values(), TWO, MIXED]),
    "qwen3_vl": ({}, [*VIDEOS.values(), TWO, MIXED]),
    "qwen3_vl_moe": ({}, [*VIDEOS.values(), TWO, MIXED]),
    "smolvlm": ({}, [*VIDEOS.values(), TWO]),
    "internvl": ({"video_fps": 1}, [*VIDEOS.values(), MIXED]),
    "llava_onevision": ({"video_max_frames": 3}, [*VIDEOS.values(), TWO, MIXED]),
    "qwen2_audio": ({}, [*SOUNDS.values()]),
    "qwen2_5_omni": ({}, [*SOUNDS.values(), VIDEOS["a file"], VIDEOS["an image"], ALL]),
    "gemma4": ({"video_fps": 1}, [*SOUNDS.values(), VIDEOS["a file"], VIDEOS["an image"], TWO, MIXED, ALL]),
    "video_llama_3": ({"video_max_frames": 6}, [*VIDEOS.values(), TWO, MIXED]),
    "gemma4_unified": ({"video_fps": 1}, [*SOUNDS.values(), VIDEOS["a file"], VIDEOS["an image"], TWO, MIXED, ALL]),
    "qwen3_omni": ({"video_fps": 1}, [*SOUNDS.values(), VIDEOS["a file"], VIDEOS["an image"], ALL]),
}
"""The limits on data, and the rows, that a family is tried with."""


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_recordings_equal_the_family_s_own(family: str, folder: Path) -> None:
    processor = PROCESSORS[family]()
    plain, packed = build(family, processor)
    limits, rows = FAMILIES[family]
    encoder = encoder_of(processor, **limits)
    samples = encoded(encoder, folder, *rows)
    total = torch.zeros(())
    for chat, sample in zip(rows, samples, strict=True):
        inputs = own_inputs(processor, folder, chat, sample)
        assert inputs["input_ids"][0].tolist() == sample.input_ids.tolist()
        for name, value in encoder.extras([sample], len(sample)).items():
            assert value.equal(torch.as_tensor(inputs[name])), name
            measured = sample.num_values - value.numel() * value.is_floating_point()
            sample = replace(sample, num_values=measured)
        assert sample.num_values == 0
        total = total + own_loss(plain, inputs, sample)
    assert_packed_equals(packed, plain, encoder, samples, total)


HEARD: list[list[tuple[str, str]]] = [
    [("video", "heard.mp4")],
    [],
    [("video", "long.mp4")],
    [("audio", "high.flac"), ("video", "heard.mp4"), ("image", "still.png")],
    [("audio", "long.wav")],
    [("video", "again.mp4"), ("video", "heard.mp4")],
]
"""Media of rows, with videos that have sound and that have none."""


def heard_inputs(processor: Any, folder: Path, media: list[tuple[str, str]], sample: Sample) -> dict[str, Any]:
    """The inputs of the class's own processor for a row whose videos have sound, at one frame rate."""
    of_kind: dict[str, list[Any]] = {kind: [] for kind in MARKS}
    slots: list[int | None] = []
    metadata = []
    for (kind, name), medium in zip(media, sample.media, strict=True):
        if kind == "audio" or medium.sound:
            of_kind["audio"].append(decode_sound(str(folder / name), 16000, None))
            slots.append(None if kind == "audio" else len(of_kind["video"]))
        if kind == "image":
            of_kind[kind].append(Image.open(folder / name).convert("RGB"))
        if (frames := medium.frames) is not None:
            of_kind[kind].append(decoded(folder, name)[list(frames.indices)])
            metadata.append({"fps": frames.fps, "total_num_frames": frames.total, "frames_indices": frames.indices,
                             "duration": frames.total / frames.fps})  # fmt: skip
    options: dict[str, Any] = {}
    if metadata:
        (rate,) = {len(one["frames_indices"]) / one["duration"] for one in metadata}
        options = {"video_metadata": [metadata], "do_sample_frames": False, "fps": rate}
    if any(slot is not None for slot in slots):
        options |= {"load_audio_from_video": True, "audio_from_video_indices": slots}
    between = [{"type": "text", "text": " and "}]
    parts = [part for kind, _ in media for part in ({"type": kind}, *between)][:-1]
    parts.append({"type": "text", "text": "What do you see?"})
    text = processor.tokenizer.apply_chat_template([{"role": "user", "content": parts}, ANSWER], tokenize=False)
    return processor(
        text=[text], images=[of_kind["image"]] if of_kind["image"] else None,
        videos=[of_kind["video"]] if metadata else None, audio=of_kind["audio"] or None, return_tensors="pt",
        add_special_tokens=False, return_mm_token_type_ids=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_omni"])
def test_the_sound_of_a_video_lies_between_its_frames(family: str, folder: Path) -> None:
    processor = PROCESSORS[family]()
    plain, packed = build(family, processor)
    encoder = encoder_of(processor, audio_in_video=True, video_fps=2)
    rows = [row(*media) for media in HEARD]
    samples = encoded(encoder, folder, *rows)
    assert [[one.sound > 0 for one in sample.media if one.kind == "video"] for sample in samples] == [
        [True], [], [False], [True], [], [True, True],
    ]  # fmt: skip
    total = torch.zeros(())
    for names, sample in zip(HEARD, samples, strict=True):
        inputs = heard_inputs(processor, folder, names, sample)
        assert inputs["input_ids"][0].tolist() == sample.input_ids.tolist()
        for name, value in encoder.extras([sample], len(sample)).items():
            assert value.equal(torch.as_tensor(inputs[name])), name
        flag = {"use_audio_in_video": True} if any(one.sound for one in sample.media) else {}
        total = total + own_loss(plain, dict(inputs), sample, **flag)
    assert_packed_equals(packed, plain, encoder, samples, total)
    alone = encoded(encoder, folder, row(("video", "uneven.mp4")), row(("video", "heard.mp4")))
    (both,) = encoded(encoder, folder, row(("video", "uneven.mp4"), ("video", "heard.mp4")))
    text = processor.tokenizer.decode
    inside = [text(one.input_ids).split("<|vision_bos|>")[1].split("<|vision_eos|>")[0] for one in alone]
    assert all(part in text(both.input_ids) for part in inside) and inside[0] != inside[1]
    values = [encoder.extras([one], len(one))["video_second_per_grid"] for one in (*alone, both)]
    assert torch.cat(values[:2]).equal(values[2]) and values[0] != values[1]
    without = encoded(encoder_of(processor, video_fps=2), folder, rows[0])[0]
    assert len(without) < len(samples[0]) and not without.media[0].sound


def test_videos_with_sound_and_without_are_not_mixed_in_a_row_and_others_hear_none(folder: Path) -> None:
    chat = row(("video", "heard.mp4"), ("video", "long.mp4"))
    encoder = encoder_of(PROCESSORS["qwen2_5_omni"](), audio_in_video=True)
    (bad,) = encoder([Row(chat, str(folder / "rows.jsonl"), 1)])
    assert "has videos with sound and without" in bad.reason  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"data\.audio_in_video: Qwen2VLProcessor takes no sound of a video"):
        encoder_of(PROCESSORS["qwen2_vl"](), audio_in_video=True)


def test_limits_on_videos_reach_the_tokens_and_the_values(folder: Path) -> None:
    processor = PROCESSORS["qwen2_vl"]()

    def taken(**data: Any) -> tuple[int, int, list[int]]:
        encoder = encoder_of(processor, **data)
        (sample,) = encoded(encoder, folder, VIDEOS["a file"])
        frames = sample.media[0].frames
        assert frames is not None
        patches = len(encoder.extras([sample], len(sample))["pixel_values_videos"])
        tokens = int((sample.input_ids == processor.video_token_id).sum())
        assert 4 * tokens == patches
        return len(frames.indices), tokens, list(frames.indices)

    free = taken()
    assert free[0] == 10  # 5 seconds, of which 2 frames each are taken
    assert taken(video_fps=0.8) == (4, 2 * free[1] // 5, [0, 6, 13, 19])
    assert taken(video_max_frames=2)[2] == [0, 19]
    assert taken(video_max_pixels=400)[1] < free[1] and taken(video_max_pixels=400)[0] == 10
    most = taken(video_min_pixels=4096 * 4)
    assert most[0] == 10 and most[1] > free[1]


def test_a_limit_on_sounds_reaches_the_tokens_and_the_values(folder: Path) -> None:
    processor = PROCESSORS["qwen2_audio"]()

    def taken(**data: Any) -> tuple[int, int]:
        encoder = encoder_of(processor, **data)
        (sample,) = encoded(encoder, folder, SOUNDS["a sound"])
        heard = encoder.extras([sample], len(sample))["feature_attention_mask"].sum()
        return int((sample.input_ids == processor.audio_token_id).sum()), int(heard)

    assert taken() == (42, 170)  # 1.7 seconds of 100 frames each; about four of these make a token
    assert taken(audio_max_seconds=0.8) == (20, 80)


def test_a_video_of_too_many_pixels_is_refused_before_it_is_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tutti.data.media_processor.MAX_VIDEO_PIXELS", 10_000)
    chat = Row(VIDEOS["a file"], str(folder / "rows.jsonl"), 1)
    (bad,) = encoder_of(PROCESSORS["qwen3_vl"]())([chat])
    assert "10 frames of 64 x 48 pixels would be taken, too many" in bad.reason  # type: ignore[union-attr]


def test_kinds_that_a_processor_does_not_take_together_or_at_all_are_bad_rows(folder: Path) -> None:
    def reason(family: str, chat: dict[str, Any], **data: Any) -> str:
        (bad,) = encoder_of(PROCESSORS[family](), **data)([Row(chat, str(folder / "rows.jsonl"), 1)])
        return bad.reason  # type: ignore[union-attr]

    assert "has image and video, of which SmolVLMProcessor takes one kind in a row" in reason("smolvlm", MIXED)
    assert "has a video, whose tokens Glm4vProcessor marks as an image's" in reason("glm4v", VIDEOS["a file"])
    assert "has video, which LlavaProcessor does not take" in reason("llava", VIDEOS["a file"])
    assert "has audio, which Qwen2VLProcessor does not take" in reason("qwen2_vl", row(("audio", "a.wav")))
    marker = make_tokenizer("<audio>").convert_ids_to_tokens(24)  # which Voxtral takes for its own
    voxtral = transformers.VoxtralProcessor(
        transformers.WhisperFeatureExtractor(feature_size=8), make_tokenizer("<audio>", audio=marker)
    )
    (bad,) = encoder_of(voxtral)([Row(row(("audio", "long.wav")), str(folder / "rows.jsonl"), 1)])
    assert "VoxtralProcessor cannot take its audios" in bad.reason  # type: ignore[union-attr]
    seen = transformers.SiglipImageProcessor(size={"height": 16, "width": 16})
    seen.image_seq_length = 16
    tokenizer = make_tokenizer("<image>")
    tokenizer.bos_token = "<|im_start|>"
    paligemma = encoder_of(transformers.PaliGemmaProcessor(seen, tokenizer))
    (bad,) = paligemma([Row(row(("image", "still.png")), str(folder / "rows.jsonl"), 1)])
    assert "PaliGemmaProcessor writes more into a text than its media" in bad.reason  # type: ignore[union-attr]
    splits = transformers.Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 32})
    idefics2 = encoder_of(
        transformers.Idefics2Processor(splits, make_tokenizer("<image>", image_boundary_token="<fake>"))
    )
    (bad,) = idefics2([Row(row(("image", "still.png")), str(folder / "rows.jsonl"), 1)])
    assert "Idefics2Processor does not tell how it replaces placeholders" in bad.reason  # type: ignore[union-attr]
    compressing = PROCESSORS["video_llama_3"]()
    compressing.video_processor.use_token_compression = True
    (bad,) = encoder_of(compressing)([Row(VIDEOS["a file"], str(folder / "rows.jsonl"), 1)])
    assert "VideoLlama3Processor makes a number of tokens that depends on its content" in bad.reason  # type: ignore[union-attr]
    wanted = "set data.video_max_frames, of which every video"
    assert wanted in reason("llava_onevision", VIDEOS["a file"])
    assert wanted in reason("llava_onevision", VIDEOS["a file"], video_max_frames=3, video_fps=1)


def test_a_row_of_too_much_video_says_what_helps(folder: Path) -> None:
    chat = Row(VIDEOS["a file"], str(folder / "rows.jsonl"), 1)
    (bad,) = encoder_of(PROCESSORS["qwen2_vl"](), max_seq_len=64)([chat])
    assert "tokens of its videos: raise data.max_seq_len, or lower data.video_max_frames" in bad.reason  # type: ignore[union-attr]
