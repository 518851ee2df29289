"""From paths to a model configuration and a model without storage.

Models are Hugging Face's own classes, chosen by the config's `model_type` and built on the meta device: the modules
exist, their parameters are only shapes. Sharding comes next and weights last (`tutti.checkpoint.hf_load`), so that no
rank ever holds more than its own part. Which attention and expert kernels a model uses is decided here, once, through
the names under which they are registered with transformers; no model code is patched.

Everything is read from local paths, to which `tutti.checkpoint.hub` has resolved names. Code in a checkpoint is not
run.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tutti.attention.interface import FOREIGN, PROBE, MaskSeen, attention_by_part, register_probe, resolve_attention
from tutti.config import Config
from tutti.core.compat import model_mapping
from tutti.core.device import pick_device
from tutti.model.drawing import draws, obstacle, ready_folder
from tutti.model.experts import resolve_experts
from tutti.model.flow_decoder import read_flow
from tutti.model.mixers import mixers, names_read
from tutti.model.omni import OmniModel, compose, name_sources
from tutti.model.omni_config import OmniConfig, answers_with_pictures, decoder_folder, is_composed, regresses
from tutti.model.omni_processor import make_room, placeholders
from tutti.model.sparse import add_sparse_attention, is_sparse, take_sparse_sizes
from tutti.model.speech import keep_speech, thinker_config
from tutti.model.structure import blocks, decoder, experts, text_model
from tutti.model.tokenizer import first_line, local_path

log = logging.getLogger(__name__)


_NO_TEXT = {
    "glm_image": "it writes codes of pictures and no text, and a diffusion transformer of its own makes pictures of "
    "them, which is not trained here"
}
"""model_type of models that look like language models but cannot be trained as such, and why."""


def load_model_config(config: Config) -> PreTrainedConfig:
    """The configuration of the trained model, from model.config_path (by default model.model_path); for a model that
    speaks, its thinker's (`tutti.model.speech`)."""
    found = thinker_config(_read_config(config))
    return found if isinstance(found, OmniConfig) else compose(config.model, found)


def _read_config(config: Config) -> PreTrainedConfig:
    name = config.model.config_path or config.model.model_path
    argument = "model.model_path" if name == config.model.model_path else "model.config_path"
    if name is None:
        raise ValueError("model.model_path: required, or model.config_path to start from random weights")
    path = local_path(name, argument)
    file = path if path.is_file() else path / "config.json"
    if not file.is_file():
        raise ValueError(f"{argument}: there is no config.json in {path}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("model_type") == OmniConfig.model_type:  # a checkpoint's own, which is complete
            return OmniConfig.from_dict(content)
        model_config = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{argument}: {file} is not a configuration that can be used: {first_line(error)}") from error
    if getattr(model_config, "quantization_config", None):
        method = dict(_as_dict(model_config.quantization_config)).get("quant_method", "quantized")
        raise ValueError(
            f"{argument}: {path} holds {method} weights, which cannot be trained; dequantize them first, save the "
            "result with save_pretrained, and drop quantization_config from its config.json"
        )
    return model_config


def build_model(
    config: Config,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_labels: int | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model that `config` describes, on the meta device, in training mode.

    A causal language model (multimodal if its config is), or for a task with classes or a number as output a sequence
    classifier of `num_labels` classes (by default model.num_labels, else the config's). Parameters are of `dtype`, by
    default fp32 with train.enable_mixed_precision, else bf16. tokenizer: checked to fit the embedding; a model that
    starts from random weights takes its special tokens. device: where it will run, which decides on the kernels
    (default: this machine's).
    """
    device = device or pick_device(config.train.init_device)
    model_config = load_model_config(config)
    if dtype is None:
        dtype = torch.float32 if config.train.enable_mixed_precision else torch.bfloat16
    if tokenizer is not None:
        if isinstance(model_config, OmniConfig):
            model_config.placeholders = placeholders(tokenizer, model_config)
            if model_config.draws:
                text = language_config(model_config)
                make_room(tokenizer, text, is_new=config.model.model_path is None)
            model_config.first_code = max(num_token_ids(model_config), max(tokenizer.get_vocab().values()) + 1)
        _check_vocabulary(model_config, tokenizer)
        if config.model.model_path is None:
            _take_special_tokens(language_config(model_config), tokenizer)
    head = config.data.task.head
    classify = head != "tokens"
    if classify:
        count = 1 if head == "scalar" else num_labels or config.model.num_labels
        if count is not None:
            model_config.num_labels = count
    composed = isinstance(model_config, OmniConfig)
    factory = AutoModelForSequenceClassification if classify else language_factory(language_config(model_config))
    if type(language_config(model_config)) not in model_mapping(factory):
        kind = "sequence classifier" if classify else "causal language model"
        why = f"; {note}" if (note := _NO_TEXT.get(model_config.model_type)) else ""
        raise ValueError(f"model.config_path: transformers has no {kind} for model_type {model_config.model_type}{why}")
    take_sparse_sizes(model_config, config.model.attn_implementation)
    requested = "native-sparse" if is_sparse(model_config) else config.model.attn_implementation
    attention = resolve_attention(requested, device)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attention_by_part(model_config, attention),
        "experts_implementation": resolve_experts(config.model.moe_implementation),
    }
    with torch.device("meta"):
        if composed:
            model = OmniModel._from_config(model_config, **options)
        else:
            model = instantiate(factory, model_config, **options)
    keep_in_fp32(model)
    add_sparse_attention(model)
    if composed:
        name_sources(model, config.model)
    if config.model.moe_implementation is not None and not experts(model):
        log.warning("model.moe_implementation: has no effect: %s has no experts", type(model).__name__)
    if config.model.model_path and model.can_generate():
        _read_generation_config(model, Path(config.model.model_path))
    whole = _read_config(config)
    if config.model.model_path and thinker_config(whole) is not whole:
        log.info("%s: its thinker is trained, what speaks stays as it is", whole.model_type)
        keep_speech(model, Path(config.model.model_path), whole)
    return model.train()


def instantiate(factory: Any, model_config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The model of a config. ValueError: its class only supports its own attention."""
    try:
        return factory.from_config(model_config, **options, trust_remote_code=False)
    except KeyError as error:
        if str(error).strip("'") != options.get("attn_implementation"):
            raise
        raise ValueError(f"{model_config.model_type}{_ATTENDS_ALONE}") from None


def keep_in_fp32(model: PreTrainedModel) -> None:
    """Keep in fp32 (on the meta device) what `from_pretrained` keeps in fp32 in a bf16 model, such as routers."""
    kept: Any = model._keep_in_fp32_modules_strict or ()
    if model.dtype == torch.float32 or not kept:
        return
    pattern = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in sorted(kept)))
    tied = set(getattr(model, "all_tied_weights_keys", ()))  # tied to others, whose dtype they have
    for prefix, module in model.named_modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                path = f"{prefix}.{name}"
                if tensor is None or path in tied:
                    continue
                if tensor.is_floating_point() and pattern.search(path):
                    wide = tensor.float()
                    store[name] = nn.Parameter(wide) if isinstance(tensor, nn.Parameter) else wide


def check_dtypes(model: PreTrainedModel) -> None:
    """Raise ValueError for a bf16 model with some parameters kept in fp32: they cannot be sharded together."""
    wide = [name for name, item in model.named_parameters() if item.dtype == torch.float32]
    if wide and any(item.dtype == torch.bfloat16 for item in model.parameters()):
        raise ValueError(
            f"train.enable_mixed_precision: {type(model).__name__} keeps {wide[0]} in fp32, which is not there yet "
            "beside parameters in bf16; set true"
        )


def check_packable(model: PreTrainedModel) -> None:
    """Raise ValueError for a model in which information could leak from one packed sample into the next."""
    language: Any = text_model(model)
    units = [block for _, block in blocks(model)]
    mixing = mixers(units)
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    unknown = set(kinds) - {"full_attention", "sliding_attention", "mlp", "moe"}
    if len(kinds) == len(units):
        unknown -= {kind for kind, block in zip(kinds, units, strict=True) if mixers([block])}
    carries = bool(unknown) or (language._is_stateful and not mixing)
    attends = _attends_by_interface(language, units, mixing)
    if not carries and not attends and attention_classes(units, mixing):
        raise ValueError(f"{model.config.model_type}{_ATTENDS_ALONE}")
    if carries or not attends:
        kind = f"of type {', '.join(sorted(unknown))}" if unknown else "that mix tokens otherwise than by attention"
        raise ValueError(
            f"{model.config.model_type} has layers {kind}, which would leak from one packed sample into the next; "
            "models of full and sliding-window attention, gated delta nets, Mamba and short convolutions can be trained"
        )


_ATTENDS_ALONE = " has attention of its own alone, which knows no borders of packed samples; it cannot be trained"


def _attends_by_interface(language: Any, units: Sequence[nn.Module], mixing: Sequence[nn.Module]) -> bool:
    """True if all attention in a language model's blocks uses the registered implementation, at given positions.

    Hybrid models do not declare this (`_supports_attention_backend`), but their classes show it.
    """
    if language._supports_attention_backend:
        return True
    attention = attention_classes(units, mixing)
    if not attention:
        return bool(mixing)
    positions = "position_ids" in inspect.signature(language.forward).parameters
    return positions and all(
        "ALL_ATTENTION_FUNCTIONS" in names_read(kind) and FOREIGN.isdisjoint(names_read(kind)) for kind in attention
    )


def attention_classes(units: Iterable[nn.Module], mixing: Iterable[nn.Module]) -> set[type]:
    """The classes of the attention layers in blocks, without modules that contain attention and without the blocks'
    mixers."""
    known = {*units, *(part for mixer in mixing for part in mixer.modules())}
    parts = [part for block in units for part in block.modules() if part not in known]
    return {type(part) for part in parts if _is_attention(part) and not any(map(_is_attention, part.children()))}


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def check_eager(model: PreTrainedModel) -> None:
    """Raise ValueError if the model's own attention (eager) would look across the borders of packed samples.

    It is kept within them by a mask that transformers derives from restarting positions. Not every class passes its
    positions to the masking code. The model runs only until it asks for its masks, which are inspected.
    """
    config: Any = model.config.get_text_config()
    units = [block for _, block in blocks(model)]
    if config._attn_implementation != "eager" or not attention_classes(units, mixers(units)):
        return
    language: Any = text_model(model)
    rows = (4, 1) if hasattr(decoder(model), "get_rope_index") else (1,)
    positions = torch.tensor([0, 1, 0, 1]).expand(*rows, -1)
    register_probe()
    embeddings = [module for module in language.modules() if isinstance(module, nn.Embedding)]
    worn = [vars(embedding).get("forward") for embedding in embeddings]
    for embedding in embeddings:
        vars(embedding)["forward"] = partial(_no_embedding, embedding.embedding_dim)
    config._attn_implementation = PROBE
    try:
        with torch.no_grad():
            language(inputs_embeds=torch.zeros(1, 4, config.hidden_size), position_ids=positions, use_cache=False)
        kept = False
    except MaskSeen as seen:
        kept = seen.ends_at_borders
    except Exception as error:
        log.debug("the masks of %s are not seen: %s", type(model).__name__, error)
        kept = False
    finally:
        config._attn_implementation = "eager"
        for embedding, forward in zip(embeddings, worn, strict=True):
            del vars(embedding)["forward"]
            if forward is not None:
                vars(embedding)["forward"] = forward
    if not kept:
        raise ValueError(
            f"model.attn_implementation: {type(model).__name__} does not keep packed samples apart in its eager "
            "attention; choose another, such as sdpa"
        )


def _no_embedding(width: int, ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, width)


def turn_off_dropout(model: nn.Module) -> None:
    """Set to 0, in place, every dropout probability of values, attention or layers in `model`, and the noise of its
    routers. The model's config keeps them, for exports. Logs a line if there are any."""
    found = set()
    for module in model.modules():
        for name, value in list(vars(module).items()):
            kind = type(module).__name__ if name == "p" else name
            if isinstance(value, float) and value and re.search("drop|jitter", kind.lower()):
                setattr(module, name, 0.0)
                found.add(kind)
    if found:
        log.info("nothing is dropped in training, as by the reference model: %s set to 0", ", ".join(sorted(found)))


def language_factory(model_config: PreTrainedConfig) -> Any:
    """transformers' factory for the language model of a config, text-only or multimodal.

    If there are classes of both kinds, the one that its `architectures` name, else the multimodal one.
    """
    factories: tuple[Any, ...] = (AutoModelForMultimodalLM, AutoModelForCausalLM)
    fitting = [factory for factory in factories if type(model_config) in model_mapping(factory)]
    named = set(model_config.architectures or ())
    by_name = [factory for factory in fitting if model_mapping(factory)[type(model_config)].__name__ in named]
    return (*by_name, *fitting, AutoModelForCausalLM)[0]


def language_config(model_config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the causal language model: of a composed model the foundation's, else `model_config`."""
    return model_config.text_config if isinstance(model_config, OmniConfig) else model_config  # type: ignore[return-value]


def num_token_ids(model_config: PreTrainedConfig) -> int:
    """The number of token ids that rows of the model may contain: those in its embedding, and placeholders beyond
    them."""
    rows = model_config.get_text_config().vocab_size
    beyond = set((model_config.placeholders or {}).values()) if isinstance(model_config, OmniConfig) else set()
    while rows in beyond:
        rows += 1
    return rows


_OF_NOISE = ("train.flow_", "train.sample_steps", "train.sample_guidance")


def check_composed(config: Config) -> None:
    """Raise ValueError for settings that a composed model does not support, or that need one."""
    ready = draws(config)
    if ready and config.model.input_encoder == "decoder":
        raise ValueError(
            "model.input_encoder: a ready-made model sees pictures in its own way; leave it at its default"
        )
    if ready:
        _check_target(config)
    elif decoder_folder(config.model) is None:
        chats = config.data.data_type == "conversation"
        of_codes = {
            "model.input_encoder": config.model.input_encoder == "decoder",
            "model.encode_target": config.model.encode_target,
            "train.cfg_dropout": chats and "train.cfg_dropout" in config.explicit,
            "train.loss_weights": bool(config.train.loss_weights) and chats and not regresses(config.model),
        }
        reason, instead = "there is no model.decoders.image to make them", "set that"
        if ready_folder(config.model) is not None:
            reason, instead = f"with {obstacle(config)} this model is not trained to draw", "change that"
            log.info("%s", reason)
        for name in (name for name, asked in of_codes.items() if asked):
            raise ValueError(f"{name}: is about codes of images, and {reason}; {instead}, or leave this at its default")
    if config.data.data_type == "conversation" and read_flow(config.model) is None:
        of_noise = [name for name in sorted(config.explicit) if name.startswith(_OF_NOISE)]
        if of_noise:
            raise ValueError(
                f"{of_noise[0]}: is about pictures that are drawn by diffusion, and model.decoders.image is none such; "
                "leave it at its default"
            )
    if not is_composed(config.model):
        return
    refuse = "model.encoders: a model with encoders beside it cannot be trained"
    if answers_with_pictures(config.model):
        _check_drawing(config)
    if not config.data.task.holds_chats or config.data.task.head != "tokens":
        raise ValueError(f"{refuse} with data.data_type {config.data.data_type} (choose conversation or dpo)")


def _check_drawing(config: Config) -> None:
    """Raise ValueError for settings that a model that draws does not support."""
    if config.data.data_type != "conversation":
        raise ValueError(
            f"model.decoders: a model that draws is not trained with data.data_type {config.data.data_type}; choose "
            "conversation"
        )
    flow = read_flow(config.model)
    if regresses(config.model) and decoder_folder(config.model) is not None:
        how = "by codes" if flow is None else "from queries (from features is not available yet)"
        raise ValueError(
            f"model.output_encoder: this decoder draws {how}, and encoder has features in their place; set decoder, or "
            "leave model.decoders out"
        )
    if flow is not None and config.model.input_encoder == "decoder":
        raise ValueError(
            "model.input_encoder: the queries of a diffusion decoder say nothing about a picture that is there; set "
            "encoder, and model.encoders.image to see by"
        )
    if config.train.pipeline_parallel_size > 1:
        raise ValueError("train.pipeline_parallel_size: a model that draws is not cut into stages yet; set 1")
    _check_target(config)


def _check_target(config: Config) -> None:
    if config.model.encode_target and config.data.datasets_type != "mapping":
        raise ValueError(
            "model.encode_target: goes over the data beforehand, and streamed data (data.datasets_type) is read as it "
            "is trained on: leave it false"
        )


def _check_vocabulary(model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = num_token_ids(model_config)
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        raise ValueError(
            f"model.tokenizer_path: the tokenizer has {needed} tokens, but the model's embedding only {rows} rows; "
            "use the model's own tokenizer, or a config with a larger vocab_size"
        )


def _take_special_tokens(model_config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a fresh model use its tokenizer's special tokens, whatever its config says.

    The padding token stays: its embedding row is never trained, and padding is often end of text.
    """
    ends = []
    for role in ("bos_token_id", "eos_token_id"):
        mine, theirs = getattr(model_config, role, None), getattr(tokenizer, role)
        ends.append(theirs)
        if mine != theirs:
            try:
                setattr(model_config, role, theirs)
            except StrictDataclassError:  # some configs require one
                continue
            log.info("the model's %s is %s as in the tokenizer (the config has %s)", role, theirs, mine)
    vocab_size = model_config.get_text_config().vocab_size
    padding = getattr(model_config, "pad_token_id", None)
    if padding in ends or (padding or 0) >= vocab_size:
        model_config.pad_token_id = None


def _read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Keep the checkpoint's sampling settings, so that exports contain them."""
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, json.JSONDecodeError) as error:
            raise ValueError(f"model.model_path: generation_config.json in {folder}: {first_line(error)}") from error


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else value.to_dict()
