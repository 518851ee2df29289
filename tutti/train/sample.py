"""What the trained model says: prompts completed by the exported folder, loaded as any user would load it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutti.config import Config
from tutti.train.metrics import Metrics

log = logging.getLogger(__name__)


def show_samples(config: Config, folder: Path, metrics: Metrics, step: int) -> None:
    """Complete train.sample_prompts greedily with the model in `folder`, into the log and the report."""
    if not config.train.sample_prompts or config.data.data_type == "classification":
        return
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    chat = config.data.data_type == "conversation"
    for prompt in config.train.sample_prompts:
        messages = [{"role": "user", "content": prompt}]
        text: Any = prompt
        if chat:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)
        with torch.no_grad():
            ids = model.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=config.train.sample_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
        answer = str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
        log.info("sample: %s -> %s", prompt, " ".join(answer.split()))
        metrics.log_text(step, prompt, answer)
