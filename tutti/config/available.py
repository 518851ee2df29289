"""What the reference has and this version does not: such an argument is refused when set, never ignored.

A row is an argument (refused when away from its default) or `argument=value` (that one value is refused), and what it
belongs to. Whoever brings the machinery deletes the row. So it is with pairs of arguments that do not work together
yet. What never will, since one takes away what the other promises, `tutti.config.load` refuses.
"""

from tutti.config import Config, away_from_default, get

NOT_YET: dict[str, str] = {
    "model.encoders": "omni models",
    "model.decoders": "omni models",
    "model.input_encoder": "omni models",
    "model.output_encoder": "omni models",
    "model.encode_target": "omni models",
    "model.attn_implementation=native-sparse": "Native Sparse Attention",
}

NOT_TOGETHER: tuple[tuple[str, str], ...] = (("train.lora_base_dtype", "train.tensor_parallel_size"),)
"""Pairs of arguments (or `argument=value`) that work, but not both at once."""


def unavailable(config: Config) -> list[str]:
    """One problem for each argument of a resolved configuration that this version cannot act on."""
    problems = []
    for row, part in NOT_YET.items():
        name, _, refused = row.partition("=")
        if _is_set(config, row):
            instead = f"choose another value than {refused}" if refused else "leave it at its default"
            problems.append(f"{name}: not available yet ({part}); {instead}")
    for first, second in NOT_TOGETHER:
        if _is_set(config, first) and _is_set(config, second):
            problems.append(f"{first}: not available yet together with {second}; leave one of them at its default")
    return problems


def _is_set(config: Config, row: str) -> bool:
    name, _, refused = row.partition("=")
    return str(get(config, name)) == refused if refused else away_from_default(config, name)
