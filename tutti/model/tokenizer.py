"""The tokenizer, with its chat template and the tokens that end a text.

Training, samples, inference and exports all take a tokenizer whose `chat_template` is set (`set_chat_template`), and
use only that: an exported model renders chats as in training, and generation stops at the same tokens everywhere
(`end_ids`).
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tutti.config import Config

log = logging.getLogger(__name__)

TEMPLATES = {
    "plain": (
        "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}{{ eos_token }}\n"
        "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% set bos = bos_token if bos_token is defined else '' %}"
        "{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
        "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}"
        "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate user, assistant after an optional system message') }}{% endif %}"
        "{% if message['role'] == 'user' %}"
        "{{ bos + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
        "{% else %}{{ raise_exception('only system, user and assistant messages are supported') }}"
        "{% endif %}{% endfor %}"
    ),
}
"""Chat templates by name. `plain` is for tokenizers without a template."""

_SPECIAL_TOKENS = {
    "eos_token": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "<|eot_id|>"),
    "bos_token": ("<|begin_of_text|>", "<|startoftext|>", "<s>", "<bos>", "[BOS]"),
    "pad_token": ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
    "unk_token": ("<unk>", "[UNK]", "<|unk|>"),
}
"""Common names of special tokens, best first, by which a bare tokenizer.json gets its special tokens."""


def build_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer at model.tokenizer_path: a Hugging Face folder, or a bare tokenizer.json.

    A bare tokenizer.json does not say which tokens end a text; they are found by their common names, and logged.
    """
    name = config.model.tokenizer_path or config.model.model_path or config.model.config_path
    if name is None:
        raise ValueError("model.tokenizer_path: required, no model.model_path or model.config_path to take it from")
    path = local_path(name, "model.tokenizer_path")
    if path.is_file() and path.name == "config.json":
        path = path.parent
    bare = path if path.is_file() else path / "tokenizer.json"
    try:
        if bare.is_file() and not bare.with_name("tokenizer_config.json").is_file():
            return _bare_tokenizer(bare)
        folder = path if path.is_dir() else path.parent
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"model.tokenizer_path: no tokenizer could be read from {path}: {first_line(error)}"
        ) from error


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str, argument: str = "data.chat_template") -> None:
    """Set the chat template of `tokenizer`, in place.

    name: `default` (its own, else `plain`), a name in TEMPLATES, or the path of a Jinja file. argument: the argument
    that set it, for messages. ValueError: an unknown name, a template that is not valid Jinja, or one that ends a turn
    with a token that the tokenizer lacks. Warns if no token of the tokenizer ends a turn.
    """
    if name == "default" and not tokenizer.chat_template:
        name = "plain"
    if name not in ("default", *TEMPLATES) and not Path(name).is_file():
        known = ", ".join(TEMPLATES)
        raise ValueError(f"{argument} {name} is neither default, {known}, nor the path of a Jinja file")
    if "eos_token" in TEMPLATES.get(name, "") and tokenizer.eos_token is None:
        raise ValueError(f"{argument} {name} ends a turn with the tokenizer's eos_token, and it has none")
    try:
        if name != "default":
            tokenizer.chat_template = TEMPLATES.get(name) or Path(name).read_text(encoding="utf-8")
        tokenizer.get_chat_template()  # if there are several, one must be the default
        after = _after_answer(tokenizer)
    except ValueError as error:
        raise ValueError(f"{argument} {name}: {error}") from None
    if after.strip() and _turn_end(tokenizer, after) is None:
        log.warning(
            "%s %s: the tokenizer has no token for what ends a turn, %r, so that it is spelled in several, and "
            "generation does not stop there",
            argument,
            name,
            after,
        )


def end_ids(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None = None) -> list[int]:
    """The ids of the tokens that end generated text, in order: those of `generation_config`, the tokenizer's eos_token,
    and the one with which its chat template ends an assistant's turn.

    A base model's config knows the end of a text, but not the marker that ends a turn: a server that only used that
    config would let the model continue with the user's turn.
    """
    known = getattr(generation_config, "eos_token_id", None)
    ids = [known] if isinstance(known, int) else list(known or ())
    turn = _turn_end(tokenizer, _after_answer(tokenizer)) if tokenizer.chat_template else None
    return list(dict.fromkeys(end for end in (*ids, tokenizer.eos_token_id, turn) if end is not None))


def _after_answer(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the chat template writes after an answer; "" if it can't render a question and an answer.

    ValueError: it is not valid Jinja.
    """
    mark = "\ue000"
    contents: tuple[Any, ...] = (mark, [{"type": "text", "text": mark}])
    for content in contents:
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        except TemplateSyntaxError as error:
            raise ValueError(f"is not a valid Jinja template: {error} (line {error.lineno})") from None
        except Exception:  # a template may fail in any way on unexpected messages
            continue
        if mark in text:
            return text.rpartition(mark)[2]
    return ""


def _turn_end(tokenizer: PreTrainedTokenizerBase, after: str) -> int | None:
    """The first added token of the tokenizer in the text after an answer, which ends the turn; None if there is
    none."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    found = re.search("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)", after)
    return tokenizer.get_vocab()[found.group()] if found else None


def local_path(name: str, argument: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise ValueError(
            f"{argument}: {name} is not there; give a folder, or a name on the Hugging Face hub (org/name)"
        )
    return path


def _bare_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    vocabulary = tokenizer.get_vocab()
    roles = {
        role: next((token for token in names if token in vocabulary), None) for role, names in _SPECIAL_TOKENS.items()
    }
    if roles["eos_token"] is None:
        raise ValueError(
            f"none of its tokens is a known end of text ({', '.join(_SPECIAL_TOKENS['eos_token'])}); "
            "put a tokenizer_config.json that names eos_token beside it"
        )
    roles["pad_token"] = roles["pad_token"] or roles["eos_token"]
    found: dict[str, Any] = {role: token for role, token in roles.items() if token is not None}
    tokenizer.add_special_tokens(found)
    described = ", ".join(f"{role} {token}" for role, token in found.items())
    log.info("%s has no tokenizer_config.json: using %s", file, described)
    return tokenizer


def first_line(error: BaseException) -> str:
    """The first line of an error's text: the other lines of transformers' errors are advice for other situations."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
