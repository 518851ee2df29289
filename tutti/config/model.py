"""`model.*`: which model, where its weights come from, and which kernels it runs on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tutti.config.argument import arg


@dataclass(frozen=True)
class ModelConfig:
    """The model. `config_path` alone is random initialisation; `model_path` brings weights, config and tokenizer."""

    config_path: str | None = arg(
        None,
        "Hugging Face config: a folder, its config.json, or a name on the hub. Alone it means random initialization.",
        shown="model.model_path",
        path=True,
    )
    model_path: str | None = arg(
        None,
        "Model to start from: a Hugging Face folder, or a name on the hub (org/name, org/name@revision); none"
        " initializes weights at random from config_path.",
        path=True,
    )
    tokenizer_path: str | None = arg(
        None,
        "Folder of the tokenizer, or a name on the hub; without a model_path it defaults to model.config_path.",
        shown="model.model_path",
        path=True,
    )
    safetensor_idx_path: str | None = arg(
        None,
        "Index of the weight files (tensor to file), for reading and for the layout of exports; none uses "
        "model.safetensors.index.json next to the weights, if it exists.",
        path=True,
    )
    encoders: Mapping[str, Any] = arg(
        {},
        "Towers to add to a text-only language model, by modality: {image, audio: {model_path, config_path, "
        "processor_path, add_projector, pool, layer, fields of the tower's config ...}}; see docs/omni.md.",
        path=True,
    )
    decoders: Mapping[str, Any] = arg(
        {},
        "Image decoder of a language model: {image: {model_path}}, the folder of a VQModel, whose codes it "
        "learns to predict, or of a diffusion model, which it conditions (also config_path, tokens, "
        "image_size); see docs/omni.md.",
        path=True,
    )
    input_encoder: Literal["encoder", "decoder"] = arg(
        "encoder", "How the user's images are embedded: as the vision tower's features, or as the decoder's codes."
    )
    output_encoder: Literal["encoder", "decoder"] = arg(
        "decoder",
        "How the assistant's images are embedded: as features, which are regressed, or as codes, which are "
        "predicted with cross-entropy.",
    )
    encode_target: bool = arg(
        False, "Compute the codes or latents of target images once before training, rather than for every batch."
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "native-sparse"] = arg(
        "flash_attention_2",
        "Attention kernel; flash falls back to torch's variable-length attention on CUDA, and to packed sdpa "
        "on a CPU. native-sparse (arXiv 2502.11089) adds parameters to each layer.",
    )
    moe_implementation: Literal["eager", "fused"] | None = arg(
        None,
        "Expert kernel: the model's own loop, or sorted tokens and grouped matrix products; none selects the "
        "fastest one that is correct on this device.",
    )
    basic_modules: tuple[str, ...] = arg(
        (), "Class names of modules that FSDP shards as separate units, in addition to the model's _no_split_modules."
    )
    adapter_path: str | None = arg(
        None,
        "LoRA adapter to continue training (a folder or a name on the hub), of Tutti, peft or diffusers, with"
        " train.architecture lora; target layers, rank and alpha are the adapter's.",
        added=True,
        path=True,
    )
    condition_model_path: str | None = arg(
        None,
        "data_type diffusion: folder or name on the hub with vae, text_encoder, tokenizer and scheduler, if "
        "they are not in the model's own.",
        added=True,
        path=True,
    )
    num_labels: int | None = arg(
        None,
        "Number of classes when data.data_type is classification; none takes the config's.",
        low=2,
        added=True,
    )
