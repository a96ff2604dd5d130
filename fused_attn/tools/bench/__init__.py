"""What measuring needs wherever it is done: cases, peers, gates, times. Used by ``fused-attn bench`` and by benchmarks/."""
