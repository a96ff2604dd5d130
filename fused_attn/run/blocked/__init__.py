"""Exact attention by blocks of queries in plain PyTorch: every feature, any device, memory linear in the length.

A block is some heads, some queries and the keys that any of these queries sees. All of their scores are held at once, so that
a block needs no running maximum, and nothing of it is kept: the backward makes it again.

blocks      which keys a block sees, and what belongs to it of every tensor of a call
tile        the arithmetic of one block, forward and backward
by_kernel   the same by torch's own fused CPU kernel, for blocks that it computes exactly
dense       the loops over the blocks of a dense batch
packed      packed sequences as dense batches
calls       whole calls, forward and backward
derivatives every further derivative, block by block
dropout     which weights stay: the kernels' random numbers, or torch's
"""
