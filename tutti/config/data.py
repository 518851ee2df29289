"""`data.*`: which data, how a row becomes tokens and labels, and how samples reach the training step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tutti.config.argument import Open, arg
from tutti.config.tasks import TASKS, TaskRow


@dataclass(frozen=True)
class DataConfig:
    """The data. L is max_seq_len; B = train.micro_batch_size * L is the token budget of a micro batch."""

    @property
    def task(self) -> TaskRow:
        """The row of data_type in the table of tasks."""
        return TASKS[self.data_type]

    @property
    def sample_tokens(self) -> int:
        """The most tokens of a sample: L, or 1 where a sample is an image."""
        return self.max_seq_len if self.task.has_tokens else 1

    train_path: str | None = arg(
        None,
        "Training data: a file, a folder, a name on the hub (org/name:split), a URL (s3://, gs://, hf:// "
        "...), a comma-separated list of them, or a YAML of several sources (jsonl, json, parquet, arrow, "
        "csv, txt, tar).",
        shown="Required",
        required=("train", "check"),
        path=True,
    )
    eval_path: str | None = arg(
        None, "Evaluation data, in the same formats; used every train.eval_steps or train.eval_epochs.", path=True
    )
    train_size: int = arg(
        10_000_000,
        "Tokens per epoch with train.dyn_bsz, which determine its steps: for iterable data, or if set. Longer"
        " data continues in the next epoch; shorter data starts over.",
        low=1,
    )
    train_sample: int = arg(
        10_000,
        "Samples per epoch without train.dyn_bsz, which determine its steps: for iterable data, or if set. "
        "Longer data continues in the next epoch; shorter data starts over.",
        low=1,
    )
    data_type: str = arg(
        "conversation",
        "What a row is, and what is learned from it: "
        + "; ".join(f"{name}, {row.doc}" for name, row in TASKS.items())
        + ".",
        values=tuple(TASKS),
    )
    dataloader_type: Literal["native"] = arg("native", "The data loader: torch's DataLoader with Tutti's packing.")
    datasets_type: str = arg(
        "mapping",
        "mapping: random access, shuffled globally by seed and epoch; iterable: streamed in order through a "
        "shuffle buffer; or module:factory, a dataset of your own.",
        examples=("mapping", "iterable"),
        open_set=Open(("mapping", "iterable"), "module:factory", ":"),
    )
    multisource_datasets_type: Literal["interleave"] = arg(
        "interleave", "How several sources are mixed: sample by sample, by their (scheduled) weights."
    )
    source_name: str | None = arg(
        None, "Label of the data in logs and metrics; in a YAML of several sources, the one to train on."
    )
    dyn_bsz_buffer_size: int = arg(
        200,
        "Samples held back to fill each micro batch close to its B tokens, with train.dyn_bsz; the order stays random.",
        low=1,
    )
    text_keys: str | None = arg(
        None,
        "Column with the text; of a comma list the first that a row has. "
        "By data_type: " + ", ".join(f"{row.columns} ({name})" for name, row in TASKS.items()) + ".",
        shown="content_split",
        examples=("content_split", "messages"),
    )
    row_template: Mapping[str, str] = arg(
        {},
        "For tables without messages: the text of a message by role, with columns in braces and <image>, "
        '<video> or <audio> for the row\'s media, such as {user: "<image>What is this?", assistant: '
        '"{caption}"}.',
        shown="{}",
        added=True,
    )
    media_root: str | None = arg(
        None,
        "Folder that may contain media, in addition to the data file's own; paths in rows are relative to either.",
        path=True,
        added=True,
    )
    image_min_pixels: int | None = arg(
        None, "Minimum pixels of an image; a smaller one is enlarged, keeping its aspect ratio.", low=1, added=True
    )
    image_max_pixels: int | None = arg(
        None, "Maximum pixels of an image; a larger one is reduced, keeping its aspect ratio.", low=1, added=True
    )
    video_fps: float | None = arg(
        None,
        "Frames per second to use of a video, evenly spaced; by default as many as the model's processor uses, or 2.",
        low=0.01,
        added=True,
    )
    video_max_frames: int | None = arg(
        None, "Maximum number of frames of a video; evenly spaced if there are more.", low=1, added=True
    )
    video_min_pixels: int | None = arg(
        None,
        "Minimum pixels of a video's frame; a smaller one is enlarged, keeping its aspect ratio.",
        low=1,
        added=True,
    )
    video_max_pixels: int | None = arg(
        None, "Maximum pixels of a video's frame; a larger one is reduced, keeping its aspect ratio.", low=1, added=True
    )
    audio_max_seconds: float | None = arg(
        None, "Maximum length of a sound, in seconds; longer ones are cut at the end.", low=0.1, added=True
    )
    audio_in_video: bool = arg(
        False, "Use the sound of videos together with their frames (Qwen-Omni models).", added=True
    )
    media_cache_mb: int = arg(
        256,
        "Megabytes of decoded images, videos and sounds that the workers of a rank cache together, first "
        "come, first kept; 0 disables the cache.",
        low=0,
        added=True,
    )
    augment: Mapping[str, Any] = arg(
        {},
        "Augmentation of training images, with data_type image: {flip: true, shift: 0.1, scale: 0.1} mirrors "
        "every other one, shifts each by up to a tenth of its side and scales it by up to 1.1; random by "
        "sample and epoch.",
        shown="{}",
        added=True,
    )
    chat_template: str = arg(
        "default",
        "default (the tokenizer's own, else `Role: content<eos>`), chatml, llama2, or the path of a Jinja file.",
        open_set=Open(("default", "chatml", "llama2"), "the path of a Jinja file", "/\\."),
        path=True,
    )
    chat_date: str | None = arg(
        None,
        "Date (YYYY-MM-DD) for chat templates that ask for today's; by default the day the run began, which "
        "its checkpoints record.",
        added=True,
    )
    max_seq_len: int = arg(
        2048, "Maximum length L of a sample, in tokens; longer ones are cut depending on data_type.", low=2
    )
    num_workers: int = arg(4, "Processes per rank that read and tokenize; 0 does it in the training process.", low=0)
    prefetch_factor: int = arg(2, "Batches of rows that each worker prepares in advance.", low=1)
    drop_last: bool = arg(
        True,
        "Leave out samples that do not fill a last global batch at the end of the run, rather than spread "
        "them over the last steps.",
    )
    pin_memory: bool = arg(True, "Put batches into page-locked memory, so that copies to the accelerator overlap.")
    silent_exception: bool = arg(
        False,
        "Skip bad rows and count them by reason, rather than stop the run with the file, line and reason of "
        "the first one.",
    )
    shuffle: bool = arg(True, "Shuffle the training data; false keeps its order.", added=True)
    shuffle_buffer_size: int = arg(10_000, "Samples in the shuffle buffer of an iterable dataset.", low=1, added=True)
