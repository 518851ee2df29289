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
        "Hugging Face config: a folder, its config.json, or a name on the hub. Alone it means random initialisation.",
        shown="model.model_path",
        path=True,
    )
    model_path: str | None = arg(
        None,
        "Model to start from: a Hugging Face folder, or a name on the hub (org/name, org/name@revision); none "
        "initialises weights at random from config_path.",
        path=True,
    )
    tokenizer_path: str | None = arg(
        None,
        "Folder of the tokenizer, or a name on the hub; without a model_path it follows model.config_path.",
        shown="model.model_path",
        path=True,
    )
    safetensor_idx_path: str | None = arg(
        None,
        "Index of the weight files (tensor to file), for reading and for the layout of exports; "
        "none takes model.safetensors.index.json beside the weights, if it is there.",
        path=True,
    )
    encoders: Mapping[str, Any] = arg(
        {},
        "Towers beside a language model of text alone, by modality: {image, audio: {model_path, config_path, "
        "processor_path, add_projector, pool, layer, fields of the tower's config ...}}; see docs/omni.md.",
        path=True,
    )
    decoders: Mapping[str, Any] = arg(
        {},
        "What a language model draws by: {image: {model_path}}, the folder of a VQModel, whose codes it learns to "
        "predict, or of a diffusion model, which it leads (also config_path, tokens, image_size); see docs/omni.md.",
        path=True,
    )
    input_encoder: Literal["encoder", "decoder"] = arg(
        "encoder", "What embeds images the user gives: the vision tower's features, or the decoder's codes."
    )
    output_encoder: Literal["encoder", "decoder"] = arg(
        "decoder",
        "What embeds images the assistant makes: features are regressed, codes are predicted by cross-entropy.",
    )
    encode_target: bool = arg(
        False, "Make the codes or latents of target images once, before training, rather than with every batch anew."
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "native-sparse"] = arg(
        "flash_attention_2",
        "Attention kernel; flash falls back to torch's variable-length attention on CUDA, to packed sdpa on a CPU. "
        "native-sparse (arXiv 2502.11089) gives each layer parameters of its own.",
    )
    moe_implementation: Literal["eager", "fused"] | None = arg(
        None,
        "Expert kernel: the model's own loop, or sorted tokens and grouped matrix products; "
        "none takes the fastest one that is right on this device.",
    )
    basic_modules: tuple[str, ...] = arg(
        (), "Class names of modules that FSDP shards as units of their own, beside the model's _no_split_modules."
    )
    adapter_path: str | None = arg(
        None,
        "LoRA adapter to go on with (a folder or a name on the hub), of Tutti, peft or diffusers, with "
        "train.architecture lora; what it adapts, rank and alpha are its own.",
        added=True,
        path=True,
    )
    condition_model_path: str | None = arg(
        None,
        "data_type diffusion: folder or name on the hub of vae, text_encoder, tokenizer and scheduler, where the "
        "model's own has none.",
        added=True,
        path=True,
    )
    num_labels: int | None = arg(
        None,
        "Number of classes when data.data_type is classification; none takes the config's.",
        low=2,
        added=True,
    )
