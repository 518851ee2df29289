"""Every causal language model of transformers at tiny size: packed training equals the original class sample by
sample, or is refused by name. `make sweep` runs all families and writes the table in docs/models.md.

A family's config is its class's default one, made small by one rule for all: sizes that are known by name are set, and
lists with an entry a layer are cut. Weights are random, with nothing left at zero or one, so that all of them matter.

Columns: *packed*, a batch of ragged samples in one row; *eager*, the same with the model's own attention;
*checkpointed*, by the default (reentrant) mechanism; *saved*, an export that transformers loads bit for bit as it loads
what was exported; *varied*, packed, checkpointed and saved with features at other values than by default.
"""

from __future__ import annotations

import argparse
import copy
import logging
import multiprocessing
import re
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

LENGTHS = (7, 1, 23, 2, 12, 40)
VOCAB = 96
COLUMNS = ("packed", "eager", "checkpointed", "saved")
FIRST_TABLE = (*COLUMNS, "varied")
EQUAL, REFUSED, FAILED, UNTESTED = "equal", "refused", "**differs**", "untested"
MOST = 5_000_000
"""Parameters that a tiny model may have."""

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
PAGES = {PAGE: ("sweep", "classes"), ROOT / "docs" / "multimodal.md": ("media",)}
COMPARED = ROOT / "tutti" / "model" / "families.py"

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "emb_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48,
    "shared_expert_intermediate_size": 16, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "shared_experts_intermediate_size": 16, "index_n_heads": 16, "index_head_dim": 16,
    "index_topk": 8, "zero_expert_num": 2,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "global_head_dim": 8,
    "kv_channels": 8,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_sequence_length": 256, "max_seq_len": 256,
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "num_shared_experts": 1, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 8, "rotary_dim": 8,
    "sliding_window": 8, "attention_window": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0,
    "mamba_n_heads": 4, "mamba_num_heads": 4, "n_mamba_heads": 4, "mamba_head_dim": 16, "mamba_d_state": 8,
    "ssm_state_size": 8, "state_size": 8, "n_groups": 1, "mamba_chunk_size": 16, "chunk_size": 16, "lru_width": 32,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_head_dim": 8, "linear_num_heads": 4, "shared_intermediate_size": 16, "attention_window_size": 8,
}  # fmt: skip
"""Sizes by the names that configs have for them; only those that a family's config has are set."""

PARTICULAR: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 2, "num_experts_per_token": 2},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "gemma3n_text": {"intermediate_size": [48, 48], "activation_sparsity_pattern": [0.8, 0.0]},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hy_v4": {"indexer_types": ["full", "shared"]},
    "inkling_text": {"sliding_window_size": 8, "log_scaling_n_floor": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {"num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"], "num_hidden_layers": 3},
    "mamba2": {"head_dim": 16},
    "llama4_text": {"attention_chunk_size": 8, "floor_scale": 4, "no_rope_layers": [1, 0]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mistral4": {"num_key_value_heads": 4, "head_dim": 16},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 4},
    "zamba": {"n_mamba_heads": 2, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"num_key_value_heads": 4, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""Further needs of the configs of some families."""

EVEN_IF_NONE = {
    "head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "n_shared_experts", "n_group",
    "topk_group",
}  # fmt: skip

OFF = re.compile("drop(out)?(_prob|_p|_rate)?$|pdrop$|layerdrop|jitter|aux_loss_coef|output_router_logits")
"""Names of settings for randomness and additional losses, which are turned off."""


@dataclass(frozen=True)
class Kind:
    """A kind of models: the factory of its classes, by the model types of a mapping; classes: how many a head tells
    apart at a sample's last token, 0 where it gives tokens."""

    factory: Any
    mapping: dict[str, Any]
    classes: int = 0

    def task(self) -> Any:
        """The objective that is swept."""
        from tutti.train.tasks.classification import Classification
        from tutti.train.tasks.language import LanguageModelling

        return Classification() if self.classes else LanguageModelling()

    def config(self, family: str) -> PreTrainedConfig:
        """The family's tiny config."""
        config = tiny_config(family)
        if self.classes:
            config.num_labels = self.classes
        return config

    def model(self, config: PreTrainedConfig, **options: Any) -> Any:
        """A fresh instance of the class, by transformers alone."""
        return self.factory.from_config(copy.deepcopy(config), **options)


TOKENS = Kind(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CLASSES = Kind(AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, 3)


def families(kind: Kind = TOKENS) -> list[str]:
    """The model types that transformers has a causal language model of (or another kind of models), in order."""
    return sorted(kind.mapping)


def tiny_config(family: str) -> PreTrainedConfig:
    """The default config of a family with small sizes."""
    default = AutoConfig.for_model(family)
    text = default.get_text_config()
    if text is not default:
        raise ValueError("takes more than text")
    values = text.to_dict()
    layers = next((values[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if values.get(name)), 0)
    changes = {
        name: size
        for name, size in SIZES.items()
        if values.get(name) is not None or name.endswith("token_id") or (name in values and name in EVEN_IF_NONE)
    }
    for name, value in values.items():
        if name in ("layer_types", "layers_block_type") and isinstance(value, list):
            changes[name] = kinds_of(value)
            changes["num_hidden_layers"] = len(changes[name])
        elif name == "mlp_layer_types" and isinstance(value, list):
            changes[name] = kinds_of(value)[:2]
        elif isinstance(value, list) and layers > 2 and len(value) == layers:
            changes[name] = value[:2]
        elif OFF.search(name):
            changes[name] = False if isinstance(value, bool) else 0.0
    if values.get("num_key_value_heads") == values.get("num_attention_heads"):
        changes.pop("num_key_value_heads", None)
        changes["num_key_value_heads"] = 4
    config = AutoConfig.for_model(family, **(changes | PARTICULAR.get(family, {})))
    config.use_cache = False
    return config


def kinds_of(layer_types: list[str]) -> list[str]:
    """The types of a tiny model's layers: the last one of each, and at least two."""
    last = {kind: number for number, kind in enumerate(layer_types)}
    return [layer_types[number] for number in sorted(last.values())] if len(last) > 1 else layer_types[-2:]


def samples(kind: Kind = TOKENS) -> list[tuple[Tensor, Tensor]]:
    """Token ids and targets of ragged samples."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        labels = torch.cat([ids[1:], torch.tensor([-100])])
        labels[torch.rand(length, generator=generator) < 0.3] = -100
        if kind.classes:
            labels = torch.cat([torch.full((length - 1,), -100), ids[-1:] % kind.classes])
        made.append((ids, labels))
    return made


def own_loss(
    config: PreTrainedConfig, state: dict[str, Tensor], dtype: torch.dtype = torch.float32, kind: Kind = TOKENS
) -> tuple[float, dict[str, Tensor]]:
    """The loss of each sample alone, by a fresh instance of the class, summed over targets; and its gradients."""
    total, grads = 0.0, {}
    for ids, labels in samples(kind):
        plain = kind.model(config, attn_implementation="eager", experts_implementation="eager", dtype=dtype).eval()
        plain.load_state_dict(state)
        logits = plain(input_ids=ids[None], use_cache=False).logits[0].float()
        logits, labels = (logits[None], labels[-1:]) if kind.classes else (logits, labels)
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        loss.backward()
        total += loss.item()
        for name, parameter in plain.named_parameters():
            if parameter.grad is not None:
                grads[name] = grads.get(name, 0) + parameter.grad
    return total, grads


def packed_loss(
    config: PreTrainedConfig,
    state: dict[str, Tensor],
    attention: str,
    prepare: Callable[[Any], None],
    dtype: torch.dtype = torch.float32,
    kind: Kind = TOKENS,
) -> tuple[float, dict[str, Tensor]]:
    """The loss of all samples in one row as Tutti trains it, summed over targets; and its gradients."""
    import numpy as np

    from tutti.attention.interface import resolve_attention
    from tutti.core.batch import Sample, pack
    from tutti.model.attention_arguments import pass_arguments
    from tutti.model.build import check_eager, check_packable, instantiate
    from tutti.model.experts import resolve_experts
    from tutti.model.mixers import separate_mixers
    from tutti.model.positions import rotate_by_sample
    from tutti.train.objective import Objective

    model = instantiate(
        kind.factory,
        copy.deepcopy(config),
        attn_implementation=resolve_attention(attention, torch.device("cpu")),
        experts_implementation=resolve_experts("eager" if dtype == torch.float64 else None),  # kernels lack fp64
        dtype=dtype,
    ).eval()
    model.load_state_dict(state)
    check_packable(model)
    check_eager(model)
    rotate_by_sample(model)
    objective = Objective(model, kind.task())
    pass_arguments(objective.structure.text_model, objective.structure.blocks)
    separate_mixers(objective.structure)
    prepare(objective)
    batch = pack(
        [Sample(ids.numpy().astype(np.int32), labels.numpy().astype(np.int32)) for ids, labels in samples(kind)]
    )
    loss = objective(batch)["loss"]
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(got: tuple[float, dict[str, Tensor]], want: tuple[float, dict[str, Tensor]]) -> str:
    """Equal, or what differs most."""
    if abs(got[0] - want[0]) > 1e-5 * abs(want[0]):
        return f"{FAILED}: loss {got[0]:.6g}, not {want[0]:.6g}"
    worst, where = 0.0, ""
    for name, grad in want[1].items():
        like = name.replace("k_proj.bias", "k_proj.weight").replace("dt_bias", "A_log")  # sums that cancel out
        scale = float(want[1].get(like, grad).abs().max())
        error = float((got[1].get(name, torch.zeros_like(grad)) - grad).abs().max())
        if scale > 1e-6 and error / scale > worst:
            worst, where = error / scale, name
    return EQUAL if worst <= 1e-4 else f"{FAILED}: gradient of {where} by {worst:.1e}"


def require_tiny(config: PreTrainedConfig, kind: Kind = TOKENS) -> None:
    """ValueError: the model of this config is not tiny; or whatever its class raises where it can't be made."""
    with torch.device("meta"):
        count = kind.model(config).num_parameters()
    if count > MOST:
        raise ValueError(f"has {count / 1e6:.0f}M parameters where it should be tiny")


def disturbed(config: PreTrainedConfig, kind: Kind = TOKENS) -> Any:
    """The model of a config with weights of which none is zero or one."""
    require_tiny(config, kind)
    torch.manual_seed(0)
    model = kind.model(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def check(family: str, kind: Kind = TOKENS) -> dict[str, str]:
    """The cells of a family, by column."""
    return check_config(kind.config(family), kind)


def check_varied(family: str, kind: Kind = TOKENS) -> str:
    """The cell of a family whose features are at other values than by default (`tests.varied`)."""
    from tests.varied import varied_config

    found = check_config(varied_config(family, kind), kind)
    return next((found[column] for column in ("packed", "checkpointed", "saved") if found[column] != EQUAL), EQUAL)


def check_config(config: PreTrainedConfig, kind: Kind = TOKENS) -> dict[str, str]:
    """The cells of the model of a config, by column."""
    model = disturbed(config, kind)
    state = model.state_dict()
    want = own_loss(config, state, kind=kind)
    found: dict[str, str] = {}

    def run(column: str, action: Callable[[], str]) -> None:
        try:
            found[column] = action()
        except ValueError as error:
            found[column] = f"{REFUSED}: {error}"
        except Exception as error:
            found[column] = f"{FAILED}: {type(error).__name__}: {error}"

    def checkpointed(objective: Any) -> None:
        from tutti.model.structure import blocks
        from tutti.parallel.activation_checkpoint import checkpoint_activations
        from tutti.parallel.apply import hand_on_keys

        units = [block for _, block in blocks(objective.model)]
        objective.train()
        checkpoint_activations(units, reentrant=not hand_on_keys(units))

    def packed(attention: str, prepare: Callable[[Any], None]) -> str:
        said = compare(packed_loss(config, state, attention, prepare, kind=kind), want)
        if "gradient" not in said:
            return said
        # Of sums that cancel out, fp32 leaves too few digits to tell.
        wide = torch.float64
        found = packed_loss(config, state, attention, prepare, wide, kind)
        return compare(found, own_loss(config, state, wide, kind))

    run("packed", lambda: packed("sdpa", lambda _: None))
    run("eager", lambda: packed("eager", lambda _: None))
    run("checkpointed", lambda: packed("sdpa", checkpointed))
    run("saved", lambda: saved(config, model, kind))
    return found


def saved(config: PreTrainedConfig, model: Any, kind: Kind = TOKENS) -> str:
    """Save with transformers, load and export with ours, load with transformers: what it loads of the first too, in
    fp32 and in bf16, of which it keeps some tensors in fp32."""
    from tests.checkpoint.weighing import CPU, ONE
    from tutti.checkpoint.hf_load import load_weights
    from tutti.checkpoint.hf_save import export_hf
    from tutti.model.build import keep_in_fp32

    with tempfile.TemporaryDirectory() as place:
        first = Path(place, "first")
        model.save_pretrained(first)
        for dtype in (torch.float32, torch.bfloat16):
            second = Path(place, str(dtype))
            with torch.device("meta"):
                ours = kind.model(config, dtype=dtype)
            keep_in_fp32(ours)
            load_weights(ours, first, world=ONE, device=CPU)
            export_hf(ours, second, _NoTokenizer(), world=ONE)
            direct, again = (kind.factory.from_pretrained(folder, dtype=dtype) for folder in (first, second))
            dtypes, values = {name: item.dtype for name, item in ours.state_dict().items()}, again.state_dict()
            for name, tensor in direct.state_dict().items():
                if not dtypes[name] == values[name].dtype == tensor.dtype or not torch.equal(values[name], tensor):
                    return f"{FAILED}: {name} in {dtype}"
    return EQUAL


class _NoTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        """Write nothing."""


def check_quietly(family: str) -> dict[str, str]:
    """As `check`, in a silent process; the first column reports a config that can't be made small."""
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        found = check(family)
    except Exception as error:
        return {COLUMNS[0]: f"{UNTESTED}: {type(error).__name__}: {error}"}
    if EQUAL in (found["packed"], found["eager"]):
        found["varied"] = check_varied(family)
    return found


def table(results: dict[str, dict[str, str]], columns: Sequence[str] = COLUMNS) -> str:
    """The results as Markdown, a family a row; the words after a colon are in no cell but the last."""
    lines = ["| model_type | " + " | ".join(columns) + " | |", "| --- |" + " --- |" * (len(columns) + 1)]
    for family, found in results.items():
        cells = [found.get(column, "").partition(":")[0] for column in columns]
        reasons = dict.fromkeys(text.partition(": ")[2] for text in found.values() if ": " in text)
        note = "; ".join(" ".join(reason.split())[:120] for reason in reasons).replace("|", "/")
        lines.append(f"| {family} | " + " | ".join(cells) + f" | {note} |")
    return "\n".join(lines) + "\n"


def rewrite(
    page: str, results: dict[str, dict[str, str]], columns: Sequence[str] = COLUMNS, mark: str = "sweep"
) -> str:
    """`page` with the rows of its table at `mark` that there are new results of, and in order."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    head, _, rest = page.partition(begin)
    old, _, rest = rest.partition(end)
    first, second, *new = table(results, columns).splitlines()
    rows = {row.split(" | ")[0]: row for row in [*old.splitlines()[2:], *new]}
    return "\n".join([head + begin + first, second, *(rows[key] for key in sorted(rows))]) + "\n" + end + rest


def untried(page: str) -> dict[str, dict[str, str]]:
    """Rows of the families that transformers has and the first table of `page` has not."""
    known = rows_of(page, "sweep")
    return {name: {COLUMNS[0]: f"{UNTESTED}: is new"} for name in families() if name not in known}


def rows_of(page: str, mark: str) -> dict[str, list[str]]:
    """The cells of the table at `mark` of `page`, by family."""
    text = page.partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- /{mark} -->")[0]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()[2:]]
    return {family: others for family, *others in cells}


def compared() -> list[str]:
    """The families that the pages' tables, or other tests, find equal to their own classes, in order."""
    from tests.model import gallery
    from tests.model.test_media import CONFIGS, OTHERS

    found = {gallery.tiny(name).model_type for name in gallery.FAMILIES} | {*CONFIGS.values(), *OTHERS.values()}
    found |= {"chameleon", "emu3", "janus"}  # tests.model.test_drawing
    for page, marks in PAGES.items():
        for mark in marks:
            rows = rows_of(page.read_text(encoding="utf-8"), mark)
            found |= {family for family, cells in rows.items() if EQUAL in cells[:2]}
    return sorted(found)


def write_compared() -> None:
    """Write the families that the pages call equal into the list that runs are checked against."""
    head, mark, rest = COMPARED.read_text(encoding="utf-8").partition('= """\n')
    names = "\n".join(textwrap.wrap(" ".join(compared()), 120, break_on_hyphens=False))
    COMPARED.write_text(head + mark + names + "\n" + rest[rest.index('"""') :], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, whose rows of the page are written (default: all)")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    names = options.families or families()
    new = untried(PAGE.read_text(encoding="utf-8"))
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=10) as pool:
        for name, found in zip(names, pool.imap(check_quietly, names), strict=True):
            print(name, found, flush=True)
            PAGE.write_text(
                rewrite(PAGE.read_text(encoding="utf-8"), new | {name: found}, FIRST_TABLE), encoding="utf-8"
            )
            new.pop(name, None)
    write_compared()


if __name__ == "__main__":
    main()
