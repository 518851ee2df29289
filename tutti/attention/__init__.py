"""Attention over packed batches: the interface to transformers' models, kernels, ranks that share a batch, a cache."""
