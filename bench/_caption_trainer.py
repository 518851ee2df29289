"""transformers' Trainer on pictures of bench.caption: `python -m bench._caption_trainer FOLDER ROWS WORKERS [BATCH]`.

FOLDER holds config.json and the processor. Samples come in random order and are padded to the longest of their batch.
The collator decodes and processes them in WORKERS processes. Prints trained tokens and seconds of the timed steps as
JSON.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Trainer

from bench._trainer import IGNORE, Timer, training_arguments
from bench.caption import ACCUMULATION, BATCH_SIZE, QUESTION, WARMUP_STEPS


class Collator:
    """Pads rows to the longest, with labels for the assistant's text and its end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processor = folder, AutoProcessor.from_pretrained(folder)
        tokenizer = self.processor.tokenizer
        self.header = len(tokenizer("<|im_start|>assistant\n")["input_ids"])
        self.start, self.end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def __call__(self, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        images = [[Image.open(self.folder / row["image"]).convert("RGB")] for row in rows]
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        chats = [[question, {"role": "assistant", "content": row["caption"]}] for row in rows]
        texts = [self.processor.tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
        options: dict[str, Any] = {"padding": True, "return_tensors": "pt", "return_mm_token_type_ids": True}
        batch = dict(self.processor(text=texts, images=images, padding_side="right", **options))
        ids, places = batch["input_ids"], torch.arange(batch["input_ids"].shape[1])
        first = torch.where(ids == self.start, places, 0).amax(1, keepdim=True) + self.header
        last = torch.where(ids == self.end, places, 0).amax(1, keepdim=True)
        batch["labels"] = ids.masked_fill((places < first) | (places > last), IGNORE)
        return batch


def main(folder: Path, path: Path, workers: int, batch_size: int = BATCH_SIZE) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    collate, timer = Collator(folder), Timer(after=WARMUP_STEPS)
    arguments = training_arguments(
        folder, batch_size, ACCUMULATION, dataloader_num_workers=workers, bf16=torch.accelerator.is_available()
    )
    Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=[timer]).train()
    counts = [len(collate.processor.tokenizer(row["caption"])["input_ids"]) + 1 for row in rows]
    timed = counts[WARMUP_STEPS * batch_size * ACCUMULATION :]
    seconds = timer.end - timer.start
    print(json.dumps({"trained_tokens": sum(timed), "seconds": seconds, "trained": sum(counts)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
