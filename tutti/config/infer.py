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
    seed: int = arg(42, "Seed of sampling: the same seed gives the same text.", low=0)
    do_sample: bool = arg(True, "Sample the next token; false takes the most likely one (greedy).")
    temperature: float = arg(1.0, "Divides the logits before sampling: below 1 sharper, above 1 flatter.", low=0)
    top_p: float = arg(1.0, "Sample from the smallest set of tokens whose probabilities reach this sum.", low=0, high=1)
    max_tokens: int = arg(1024, "Maximum tokens of an answer.", low=1)
    top_k: int = arg(0, "Sample from this many of the most likely tokens; 0: from all.", low=0, added=True)
    repetition_penalty: float = arg(
        1.0,
        "Divides the positive logits of tokens that already occur in prompt or answer, and multiplies the "
        "negative ones; above 1 reduces repetition.",
        low=0.01,
        added=True,
    )
    stop: tuple[str, ...] = arg(
        (),
        "Texts that end an answer; they are not part of it.",
        added=True,
        prose=True,
    )
    chat_template: str = arg(
        "default",
        "How conversations are rendered: default (as in the model's training, or with its tokenizer's "
        "template), none (prompts are texts to continue), plain, chatml, llama2, or the path of a Jinja file.",
        added=True,
        path=True,
    )
    image_steps: int = arg(28, "Sampling steps for a picture of a diffusion model.", low=1, added=True)
    image_guidance: float = arg(
        4.0,
        "Guidance scale when a model draws (needs train.cfg_dropout); 1 is none.",
        low=1,
        added=True,
    )
    image_temperature: float = arg(
        1.0,
        "Divides the logits of a picture's codes, in addition to infer.temperature, when a language model draws.",
        low=0.01,
        added=True,
    )
    image_size: str | None = arg(
        None,
        "Width and height of pictures from a diffusion model, in pixels (512x512); by default the size in its config.",
        added=True,
    )
    video_frames: int = arg(17, "Maximum frames of a video from a diffusion model.", low=1, added=True)
    batch_tokens: int = arg(
        32768, "Maximum tokens of all sequences generated together, prompts and answers.", low=1, added=True
    )
