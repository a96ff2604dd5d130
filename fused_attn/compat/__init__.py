"""Other libraries' attention by their own names: change an import, and the call runs on this package's kernels.

    from fused_attn.compat.flex import flex_attention, create_block_mask
    from fused_attn.compat.flash_attn import flash_attn_func, flash_attn_varlen_func
    from fused_attn.compat.xformers import memory_efficient_attention, LowerTriangularMask
    from fused_attn.compat.sageattention import sageattn

Names, arguments, layouts and meanings are the originals'; docs/migration.md lists what differs.
"""
