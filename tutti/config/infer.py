from pydantic import BaseModel, ConfigDict


class InferConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    model_path: str | None = None
    """Path to the model parameter file. Required."""
    tokenizer_path: str | None = None
    """Path to the tokenizer."""
    seed: int = 42
    """Random seed."""
    do_sample: bool = True
    """Whether to enable sampling."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Sampling Top P value."""
    max_tokens: int = 1024
    """Maximum number of tokens generated each time."""
