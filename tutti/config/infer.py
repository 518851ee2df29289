"""`infer.*`: which model to generate with, and how its tokens are sampled."""

from dataclasses import dataclass

from tutti.config.argument import arg


@dataclass(frozen=True)
class InferConfig:
    """Generation."""

    model_path: str | None = arg(
        None,
        "Model to generate with: a Hugging Face or adapter folder, a name on the hub (org/name, org/name@revision), "
        "a training checkpoint, or a run's output_dir.",
        shown="Required",
        required=("infer",),
        path=True,
    )
    tokenizer_path: str | None = arg(
        None,
        "Folder of the tokenizer, or a name on the hub; without a model.model_path, the one of infer.model_path.",
        shown="model.model_path",
        path=True,
    )
    seed: int = arg(42, "Seed of the sampling: the same seed gives the same text.", low=0)
    do_sample: bool = arg(True, "Sample the next token; false takes the most likely one (greedy).")
    temperature: float = arg(1.0, "Divides the logits before sampling: below 1 sharper, above 1 flatter.", low=0)
    top_p: float = arg(1.0, "Sample from the smallest set of tokens whose probabilities reach this sum.", low=0, high=1)
    max_tokens: int = arg(1024, "Most tokens that one answer may have.", low=1)
    top_k: int = arg(0, "Sample from this many of the most likely tokens; 0: from all.", low=0, added=True)
    repetition_penalty: float = arg(
        1.0,
        "Divides the positive logits of tokens that prompt or answer have already, and multiplies the negative ones; "
        "above 1 there is less repetition.",
        low=0.01,
        added=True,
    )
    stop: tuple[str, ...] = arg(
        (),
        "Texts that end an answer as the end of a turn does, and are no part of it.",
        added=True,
        prose=True,
    )
    chat_template: str = arg(
        "default",
        "How conversations are rendered: default (as the model was trained, or by its tokenizer's template), none "
        "(prompts are texts to go on with), plain, chatml, llama2, or the path of a Jinja file.",
        added=True,
        path=True,
    )
    image_steps: int = arg(28, "Steps in which a diffusion model draws a picture.", low=1, added=True)
    image_guidance: float = arg(
        4.0,
        "How strongly the prompt leads what a model draws (train.cfg_dropout); 1 not beyond what was learned.",
        low=1,
        added=True,
    )
    image_temperature: float = arg(
        1.0,
        "Divides the logits of a picture's codes, beside infer.temperature, where a language model draws.",
        low=0.01,
        added=True,
    )
    image_size: str | None = arg(
        None,
        "Width and height of what a diffusion model draws, in pixels (512x512); by default the size of its config.",
        added=True,
    )
    video_frames: int = arg(17, "Most frames of a video that a diffusion model draws.", low=1, added=True)
    batch_tokens: int = arg(
        32768, "Most tokens that the sequences generated together may take, prompts and answers.", low=1, added=True
    )
