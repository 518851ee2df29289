"""`tutti check`: what a run would do and take, without training."""
