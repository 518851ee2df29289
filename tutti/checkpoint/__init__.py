"""Reading and writing checkpoints of a run and Hugging Face folders."""
