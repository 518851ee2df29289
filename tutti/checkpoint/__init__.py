"""Checkpoints of a run, and Hugging Face folders read and written."""
