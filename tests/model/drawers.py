"""Tiny models of existing classes that draw, in folders, with processors made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, Emu3VQVAE, Emu3VQVAEConfig

from tests.data.processors import PROCESSORS
from tests.train.runs import QUICKSTART, tiny_config
from tutti.config import Config

_TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VQ = {
    "embed_dim": 4, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1,
}  # fmt: skip


def janus_config(processor: Any) -> Any:
    """A Janus that draws pictures of 16 pixels a side as 16 of 24 codes."""
    vision = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        "projection_dim": 32, "num_image_tokens": 16, "mlp_ratio": 2.0,
    }  # fmt: skip
    vq = {**_VQ, "num_embeddings": 24, "projection_dim": 32, "image_token_embed_dim": 32}
    return AutoConfig.for_model(
        "janus",
        text_config={**_TEXT, "vocab_size": len(processor.tokenizer) + 8},
        vision_config=vision,
        vq_config=vq,
        image_token_id=processor.tokenizer.image_token_id,
        tie_word_embeddings=False,
    )


EMU3_VQ: dict[str, Any] = {
    "codebook_size": 16, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "channel_multiplier": [1, 1],
    "num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 32, "temporal_downsample_factor": 2,
}  # fmt: skip


def emu3_config(processor: Any) -> Any:
    """An Emu3 with 16 codes, one per 2 x 2 pixels."""
    text = {**_TEXT, "vocab_size": len(processor.tokenizer), "model_type": "emu3_text_model", "bos_token_id": 1}
    text["attention_dropout"] = 0.0
    names = processor.tokenizer.get_vocab()
    return AutoConfig.for_model("emu3", text_config=text, vq_config=EMU3_VQ, vocabulary_map=names)


def chameleon_config(processor: Any) -> Any:
    """A Chameleon that reads pictures of 16 pixels a side as 16 of 16 codes."""
    vq = {**_VQ, "num_embeddings": 16, "resolution": 16}
    text = {**_TEXT, "vocab_size": len(processor.tokenizer) + 3, "bos_token_id": 1}
    names = processor.tokenizer.get_vocab()
    return AutoConfig.for_model(**{**text, "model_type": "chameleon"}, vq_config=vq, vocabulary_map=names)


CONFIGS = {"janus": janus_config, "emu3": emu3_config, "chameleon": chameleon_config}


def make_various(vq: Any) -> None:
    """Change the weights so that pictures get different codes."""
    with torch.no_grad():
        torch.nn.init.normal_(vq.quantize.embedding.weight)
        next(vq.quant_conv.parameters()).mul_(20)


def write_emu3_vq(folder: Path) -> str:
    """Write a random tokenizer of pictures of any size to `folder`; its path."""
    torch.manual_seed(0)
    vq = Emu3VQVAE(Emu3VQVAEConfig(**EMU3_VQ))
    make_various(vq)
    vq.save_pretrained(folder)
    return str(folder)


def write_drawer(folder: Path, family: str = "janus") -> str:
    """Write a random model of `family` with its processor to `folder`; its path."""
    processor = PROCESSORS[family]()
    torch.manual_seed(0)
    model: Any = AutoModelForMultimodalLM.from_config(CONFIGS[family](processor))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.std() < 0.1:
                torch.nn.init.normal_(parameter, std=0.1)
    make_various(model.model.vqmodel)
    model.save_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template
    processor.save_pretrained(folder)
    return str(folder)


def drawing_rows() -> list[dict[str, Any]]:
    """Chats whose assistant draws, chats about pictures, and chats of text alone."""
    rows = [json.loads(line) for line in (QUICKSTART / "images.jsonl").read_text().splitlines()[:12]]
    made = []
    for number, row in enumerate(rows):
        says = [f"Draw: {row['caption']}", "Here: <image>"] if number % 3 else ["<image>What?", row["caption"]]
        chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), says, strict=True)]
        made.append({"messages": chat, "image": row["image"]})
    return made + [json.loads(line) for line in (QUICKSTART / "chat.jsonl").read_text().splitlines()[:3]]


def drawer_config(folder: Path, model: str, *, world: int = 1, **changes: Any) -> Config:
    """Two steps of the model in the folder `model` on `drawing_rows`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in drawing_rows()))
    values = {
        "model.model_path": model,
        "model.tokenizer_path": None,
        "data.train_path": str(folder / "rows.jsonl"),
        "data.media_root": str(QUICKSTART),
        "train.lr": 3e-3,
        "train.cfg_dropout": 0.0,
        "train.num_train_epochs": 2,
        "train.max_steps": 2,
    }
    return tiny_config(folder, world=world, **values | changes)
