"""`tutti check`: shows what a run would do and need, without training."""
