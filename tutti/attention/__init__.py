"""Attention over packed batches. Begin with `interface`, which transformers' models call.

- `interface`: registration with transformers, the arguments that carry a batch's borders, masks, choice of a kernel.
- `spec`, `tiles`: how queries see keys, and the tiles of scores that follow.
- `packed_cpu`: the kernel by tiles, for CPUs and for what CUDA's does not know.
- `varlen`: CUDA's variable-length kernel, for a batch and for the blocks of a ring.
- `ulysses`: ranks that share a batch exchange tokens for heads.
- `ring`, `online_softmax`: ranks that share a batch pass keys and values around, and merge what they see.
- `sparse`: native sparse attention, by kernels of our own (`sparse_triton`, `sparse_kernels`) or by tensor operations
  (`sparse_tensors`).
- `kv_cache`: generation.
"""
