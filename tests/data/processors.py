"""Tiny processors of multimodal families: the real processor classes with the quickstart tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

TOKENIZER = Path(__file__).parents[2] / "data" / "quickstart" / "tokenizer.json"

_QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_QWEN = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 4096}
_SQUARE = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "IMAGE{% elif part['type'] == 'video' %}VIDEO{% elif part['type'] == 'audio' %}AUDIO"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    image: str, *extra: str, marker: str | None = None, video: str = "", audio: str = "", **named: str
) -> PreTrainedTokenizerFast:
    """The quickstart tokenizer with the family's special tokens, and a ChatML template that writes `marker` for an
    image, `video` for a video and `audio` for a sound."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": image, **named},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [image, *extra]})
    markers = {"IMAGE": marker or image, "VIDEO": video, "AUDIO": audio}
    tokenizer.chat_template = re.sub("IMAGE|VIDEO|AUDIO", lambda found: markers[found.group()], _CHATML)
    return tokenizer


def _qwen(cls: str, image: str, video: str) -> Any:
    marker = "<|vision_start|><|image_pad|><|vision_end|>"
    tokens = ("<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = make_tokenizer(
        "<|image_pad|>", *tokens, marker=marker, video=marker.replace("image", "video"), video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
    )  # fmt: skip
    size = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "cap_pixels_per_frame": False}
    images, videos = getattr(transformers, image)(**_QWEN), getattr(transformers, video)(**_QWEN | size)
    return getattr(transformers, cls)(image_processor=images, tokenizer=tokenizer, video_processor=videos)


def _llava() -> Any:
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return transformers.LlavaProcessor(
        images, make_tokenizer("<image>"), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def _llava_next() -> Any:
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=[[16, 32], [32, 16]]
    )
    return transformers.LlavaNextProcessor(
        images, make_tokenizer("<image>"), patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def _idefics3() -> Any:
    names = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    return transformers.Idefics3Processor(images, make_tokenizer("<image>", *names), image_seq_len=4)


def _smolvlm() -> Any:
    names = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>")
    sizes = {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}}
    images = transformers.SmolVLMImageProcessor(**sizes | {"size": {"longest_edge": 32}}, do_image_splitting=True)
    videos = transformers.SmolVLMVideoProcessor(**sizes | {"fps": 1, "num_frames": 8}, do_sample_frames=True)
    return transformers.SmolVLMProcessor(images, make_tokenizer("<image>", *names, video="<video>"), videos,
                                         image_seq_len=4)  # fmt: skip


def _internvl() -> Any:
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
             "video_token": "<video>"}  # fmt: skip
    tokenizer = make_tokenizer("<IMG_CONTEXT>", "<img>", "</img>", "<video>", video="<video>", **names)
    size = {"height": 16, "width": 16}
    images = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=2)
    videos = transformers.InternVLVideoProcessor(size=size)
    return transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=4)


def _llava_onevision() -> Any:
    tokenizer = make_tokenizer("<image>", "<video>", video="<video>", video_token="<video>")
    size = {"height": 16, "width": 16}
    images = transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]])
    videos = transformers.LlavaOnevisionVideoProcessor(size=size)
    return transformers.LlavaOnevisionProcessor(
        images, tokenizer, videos, num_image_tokens=16, vision_feature_select_strategy="full"
    )


def _hearing(mels: int) -> Any:
    """Features of sounds of at most 2 seconds."""
    return transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=2)


def _qwen2_audio() -> Any:
    names = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
    marker = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    tokenizer = make_tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", audio=marker, **names)
    return transformers.Qwen2AudioProcessor(_hearing(8), tokenizer)


def _omni(cls: str) -> Any:
    names = {"video_token": "<|VIDEO|>", "audio_token": "<|AUDIO|>"}
    names |= {f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("audio", "vision") for end in ("bos", "eos")}
    seen, heard = ("<|vision_bos|>{}<|vision_eos|>".format, "<|audio_bos|>{}<|audio_eos|>".format)
    tokenizer = make_tokenizer(
        "<|IMAGE|>", *names.values(), marker=seen("<|IMAGE|>"), video=seen("<|VIDEO|>"), audio=heard("<|AUDIO|>"),
        **names,
    )  # fmt: skip
    size = {"size": {"shortest_edge": 64, "longest_edge": 4096}}
    images = transformers.Qwen2VLImageProcessor(**_QWEN)
    videos = transformers.Qwen2VLVideoProcessor(**_QWEN | size, cap_pixels_per_frame=False)
    made = getattr(transformers, cls)(images, videos, _hearing(8), tokenizer)
    made.videos_kwargs = size  # whose defaults are those of the large models
    return made


def _gemma3() -> Any:
    tokenizer = make_tokenizer(
        "<image_soft_token>", "<start_of_image>", "<end_of_image>", marker="<start_of_image>",
        boi_token="<start_of_image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    images = transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16}, do_pan_and_scan=False)
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _gemma4(cls: str, sounds: Any) -> Any:
    names = {f"{end}{kind}_token": f"<{end}{kind}>" for kind in "ia" for end in ("bo", "eo")}
    tokenizer = make_tokenizer(
        "<|image|>", "<|audio|>", "<|video|>", *names.values(), video="<|video|>", audio="<|audio|>",
        audio_token="<|audio|>", **names,
    )  # fmt: skip
    sizes = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    images, videos = (getattr(transformers, f"{cls}{kind}Processor")(**sizes) for kind in ("Image", "Video"))
    return getattr(transformers, f"{cls}Processor")(sounds, images, tokenizer, videos)


def _pixtral() -> Any:
    tokenizer = make_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = transformers.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4})
    return transformers.PixtralProcessor(images, tokenizer, patch_size=4, spatial_merge_size=2)


def _glm4v() -> Any:
    begins = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    tokenizer = make_tokenizer(
        "<|image|>", "<|video|>", *begins, marker="<|begin_of_image|><|image|><|end_of_image|>",
        video="<|begin_of_video|><|video|><|end_of_video|>", video_token="<|video|>",
    )  # fmt: skip
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    sizes |= {"size": {"shortest_edge": 64, "longest_edge": 4096}}
    images, videos = transformers.Glm4vImageProcessor(**sizes), transformers.Glm4vVideoProcessor(**sizes)
    return transformers.Glm4vProcessor(images, tokenizer, videos)


def _janus() -> Any:
    names = {"boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = make_tokenizer("<image_placeholder>", *names.values(), **names)
    half = [0.5] * 3  # as real processors do
    images = transformers.JanusImageProcessor(
        size={"height": 16, "width": 16}, min_size=2, image_mean=half, image_std=half
    )
    return transformers.JanusProcessor(images, tokenizer, num_image_tokens=16)


def _emu3() -> Any:
    names = {
        "boi_token": "<|image start|>", "eoi_token": "<|image end|>", "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    }  # fmt: skip
    visual = [f"<|visual token {code:06d}|>" for code in range(16)]
    tokenizer = make_tokenizer("<image>", *names.values(), "<|extra_200|>", *visual, **names)
    half = [0.5] * 3
    images = transformers.Emu3ImageProcessor(
        min_pixels=64, max_pixels=64, spatial_factor=2, image_mean=half, image_std=half
    )
    processor = transformers.Emu3Processor(images, tokenizer)
    processor.downsample_ratio = 2
    processor.bos_token = ""  # the tokenizer has none, and the processor would write the text "None"
    return processor


def _chameleon() -> Any:
    letters = ["".join(chr(ord("A") + int(digit)) for digit in str(code)) for code in range(16)]
    names = {"boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    tokenizer = make_tokenizer("<image>", *(f"IMGIMG{one}Z" for one in letters), *names.values(), **names)
    tokenizer.sep_token = "<|endoftext|>"
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return transformers.ChameleonProcessor(transformers.ChameleonImageProcessor(**size), tokenizer, image_seq_length=16)


def _aya_vision() -> Any:
    """As the released tokenizers have it, each tile has a token with its number, and `TILE` is none."""
    ends = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>")
    tokenizer = make_tokenizer("<image>", *ends, "TILE_1", "TILE_2", "TILE_GLOBAL")
    images = transformers.GotOcr2ImageProcessor(
        size={"height": 16, "width": 16}, crop_to_patches=True, min_patches=1, max_patches=2
    )
    return transformers.AyaVisionProcessor(images, tokenizer, patch_size=4, img_size=16, downsample_factor=2)


def _cohere2_vision() -> Any:
    names = {
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    tokenizer = make_tokenizer("<|IMG_PATCH|>", *names.values(), **names)
    images = transformers.Cohere2VisionImageProcessor(size={"height": 16, "width": 16}, max_patches=2, patch_size=2)
    return transformers.Cohere2VisionProcessor(images, tokenizer)


def _ovis2() -> Any:
    """As the released tokenizers have it, the text's `<image>` is another token than that of an image's features."""
    ends = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    tokenizer = make_tokenizer("<IMG_ATOM>", *ends, marker="<image>")
    images = transformers.Ovis2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=2)
    return transformers.Ovis2Processor(images, tokenizer, image_seq_length=4)


def _video_llama_3() -> Any:
    tokenizer = make_tokenizer("<|image_pad|>", "<|video_pad|>", video="<|video_pad|>", video_token="<|video_pad|>")
    sizes = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 4096}}
    images = transformers.VideoLlama3ImageProcessor(**sizes, merge_size=1)
    videos = transformers.VideoLlama3VideoProcessor(**sizes, merge_size=2, use_token_compression=False)
    return transformers.VideoLlama3Processor(images, tokenizer, videos)


PROCESSORS = {
    "qwen2_vl": lambda: _qwen("Qwen2VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": lambda: _qwen("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": lambda: _qwen("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"),
    "glm4v": _glm4v,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "qwen2_audio": _qwen2_audio,
    "qwen2_5_omni": lambda: _omni("Qwen2_5OmniProcessor"),
    "qwen3_omni": lambda: _omni("Qwen3OmniMoeProcessor"),
    "gemma3": _gemma3,
    "gemma4": lambda: _gemma4("Gemma4", transformers.Gemma4AudioFeatureExtractor(feature_size=32)),
    "gemma4_unified": lambda: _gemma4("Gemma4Unified", transformers.Gemma4UnifiedAudioFeatureExtractor()),
    "pixtral": _pixtral,
    "janus": _janus,
    "emu3": _emu3,
    "chameleon": _chameleon,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "ovis2": _ovis2,
    "video_llama_3": _video_llama_3,
}
