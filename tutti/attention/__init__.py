"""Attention over packed batches. Start with `interface`, which transformers' models call.

- `interface`: registration with transformers, the arguments that carry a batch's borders, masks, choice of a kernel.
- `spec`, `tiles`: which keys a query sees, and the resulting tiles of scores.
- `packed_cpu`: the kernel in tiles, for CPUs and for what CUDA's kernel does not support.
- `varlen`: CUDA's variable-length kernel, for a batch and for the blocks of a ring.
- `ulysses`: ranks that share a batch exchange tokens for heads.
- `ring`, `online_softmax`: ranks that share a batch pass keys and values around, and merge partial results.
- `kv_cache`: generation.
"""
