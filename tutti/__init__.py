"""Tutti trains any model of the Hugging Face ecosystem on any number of processes, from one YAML."""

__version__ = "0.1.0"
