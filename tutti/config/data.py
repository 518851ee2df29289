from typing import Literal

from pydantic import BaseModel, ConfigDict


class DataConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    train_path: str | None = None
    """Path of training dataset Required."""
    eval_path: str | None = None
    """Path of evaluation dataset"""
    train_size: int = 10000000
    """Number of tokens for training to compute training steps for dynamic batch dataloader"""
    train_sample: int = 10000
    """Number of samples for training to compute training steps for non-dynamic batch dataloader"""
    data_type: Literal["plaintext", "conversation", "classification"] = "conversation"
    """Dataset type."""
    dataloader_type: Literal["native"] = "native"
    """Type of the dataloader"""
    datasets_type: str = "mapping"
    """Dataset type. `IterativeDataset` or `MappingDataset`, or your custom datsets"""
    multisource_datasets_type: Literal["interleave"] = "interleave"
    """Type of multisource datasets."""
    source_name: str | None = None
    """Name of the data source. Load from multisource yaml if multisource enabled"""
    dyn_bsz_buffer_size: int = 200
    """Buffer size for dynamic batch size."""
    text_keys: str | None = None
    """The key corresponding to the text samples in the data dictionary. Generally, it is "content_split" for pretraining and "messages" for SFT."""
    chat_template: str = "default"
    """Name of the chat template."""
    max_seq_len: int = 2048
    """Maximum training length."""
    num_workers: int = 4
    """Number of multi-process loaders for the dataloader."""
    prefetch_factor: int = 2
    """Number of samples preprocessed by the dataloader."""
    drop_last: bool = True
    """Whether to discard the remaining data at the end."""
    pin_memory: bool = True
    """Whether to pin the data in the CPU memory."""
    silent_exception: bool = False
    """Whether to ignore exceptions in the dataloader."""
