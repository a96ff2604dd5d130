"""flash-attn's, xformers' and SageAttention's names, held to what their documentation says, in plain PyTorch."""

import inspect

import pytest
import torch

from fused_attn import attention, attention_varlen, attention_weights
from fused_attn.compat import flash_attn, xformers
from fused_attn.compat.sageattention import sageattn

B, H, D = 2, 4, 8
CU_Q, CU_K = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 4, 6, 11], dtype=torch.int32)


def tensors(n_queries, n_keys, heads=H, kv_heads=H, batch=B):
    generator = torch.Generator().manual_seed(n_queries + 100 * n_keys)
    return [torch.randn(batch, n, h, D, dtype=torch.float64, generator=generator)
            for n, h in ((n_queries, heads), (n_keys, kv_heads), (n_keys, kv_heads))]


def truth(q, k, v, bias=0.0, scale=D**-0.5):
    """(out, lse) of q, k, v [B, N, heads, D] with ``bias`` added to the scores; rows without a key give 0."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale + bias
    weights = torch.softmax(scores, -1).nan_to_num(0)
    return (weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)).transpose(1, 2), torch.logsumexp(scores, -1)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


# --- flash-attn ---


def distances(n_queries, n_keys):
    """Position of a query less that of a key, the last ones side by side."""
    return torch.arange(n_queries)[:, None] + n_keys - n_queries - torch.arange(n_keys)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(7, 7), (5, 9), (9, 5)])
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_flash_attn(n_queries, n_keys, kv_heads):
    q, k, v = tensors(n_queries, n_keys, kv_heads=kv_heads)
    apart, slopes = distances(n_queries, n_keys), torch.rand(H, dtype=torch.float64)
    masks = {(False, (-1, -1)): apart < 99, (True, (-1, -1)): apart >= 0, (False, (2, 1)): (apart <= 2) & (apart >= -1),
             (True, (3, -1)): (apart <= 3) & (apart >= 0), (False, (-1, 0)): apart >= 0}
    for (causal, window), keep in masks.items():
        bias = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)
        out, lse, nothing = flash_attn.flash_attn_func(q, k, v, causal=causal, window_size=window, return_attn_probs=True)
        close(out, truth(q, k, v, bias)[0])
        close(lse, truth(q, k, v, bias)[1])
        assert nothing is None
        bias = bias - slopes[:, None, None] * apart.abs()
        close(flash_attn.flash_attn_func(q, k, v, 0.0, 0.7, causal, window, 0.0, slopes, True), truth(q, k, v, bias, 0.7)[0])
    capped = attention(*(x.transpose(1, 2) for x in (q, k, v)), softcap=2.0).transpose(1, 2)
    close(flash_attn.flash_attn_func(q, k, v, softcap=2.0), capped)


def test_flash_attn_of_packed_tensors():
    """Gradients too, which reach the packed tensor itself."""
    q, k, v = tensors(6, 6)
    qkv, kv = torch.stack((q, k, v), 2).requires_grad_(), torch.stack((k, v), 2).requires_grad_()
    want, _ = truth(*qkv.unbind(2))
    close(flash_attn.flash_attn_qkvpacked_func(qkv), want)
    close(flash_attn.flash_attn_kvpacked_func(q, kv), want)
    for packed, run, first in ((qkv, flash_attn.flash_attn_qkvpacked_func, ()),
                               (kv, lambda x: flash_attn.flash_attn_kvpacked_func(q, x), (q,))):
        expected, = torch.autograd.grad(truth(*first, *packed.unbind(2))[0].sin().sum(), packed)
        close(torch.autograd.grad(run(packed).sin().sum(), packed)[0], expected)


def test_flash_attn_of_variable_lengths():
    q, k, v = (x[0] for x in tensors(8, 11, kv_heads=2, batch=1))
    slopes = torch.rand(3, H, dtype=torch.float64)
    arguments = {"causal": True, "window_size": (2, -1), "alibi_slopes": slopes, "softmax_scale": 0.5}
    out, lse, nothing = flash_attn.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 5, return_attn_probs=True, **arguments)
    assert lse.shape == (H, 8)
    assert nothing is None
    for i, (a, b, c, d) in enumerate(zip(CU_Q, CU_Q[1:], CU_K, CU_K[1:], strict=False)):
        apart = distances(b - a, d - c)
        bias = torch.where((apart >= 0) & (apart <= 2), 0.0, -torch.inf) - slopes[i][:, None, None] * apart.abs()
        want, want_lse = truth(q[None, a:b], k[None, c:d], v[None, c:d], bias, 0.5)
        close(out[None, a:b], want)
        close(lse[None, :, a:b], want_lse)
    kv = torch.stack((k, v), 1)
    assert torch.equal(flash_attn.flash_attn_varlen_kvpacked_func(q, kv, CU_Q, CU_K, 5, 5, **arguments), out)
    qkv = torch.stack((q, q, q), 1)
    same = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, CU_Q, 5, causal=True)
    close(same, attention_varlen(q, q, q, CU_Q, CU_Q, 5, 5, causal=True))


def test_flash_attn_drops_and_refuses():
    q, k, v = tensors(64, 64)
    torch.manual_seed(0)
    dropped = [flash_attn.flash_attn_func(q, k, v, dropout_p=0.5) for _ in range(2)]
    assert not torch.equal(*dropped)
    for run, message in (
            (lambda: flash_attn.flash_attn_func(q, k, v, window_size=(-2, 0)), "window_size"),
            (lambda: flash_attn.flash_attn_func(q[0], k, v), r"q: expected a tensor \[batch, tokens, heads, head_dim\]"),
            (lambda: flash_attn.flash_attn_qkvpacked_func(q), "qkv: expected a tensor with 3 in dimension 2 of 5")):
        with pytest.raises(ValueError, match=message):
            run()
    with pytest.raises(NotImplementedError, match="block_table"):
        flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], CU_Q, CU_K, 5, 5, block_table=torch.zeros(1))


def test_flash_attn_takes_its_arguments_in_the_originals_order():
    shared = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes", "deterministic",
              "return_attn_probs"]
    packing = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
    for name, expected in {
        "flash_attn_func": ["q", "k", "v", *shared], "flash_attn_qkvpacked_func": ["qkv", *shared],
        "flash_attn_kvpacked_func": ["q", "kv", *shared],
        "flash_attn_varlen_func": ["q", "k", "v", *packing, *shared, "block_table"],
        "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *shared],
        "flash_attn_varlen_kvpacked_func": ["q", "kv", *packing, *shared],
    }.items():
        assert list(inspect.signature(getattr(flash_attn, name)).parameters) == expected


# --- xformers ---


BIASES = [
    xformers.LowerTriangularMask(), xformers.LowerTriangularFromBottomRightMask(),
    xformers.LowerTriangularFromBottomRightMask().make_local_attention(3),
    xformers.LowerTriangularFromBottomRightLocalAttentionMask(1), xformers.LocalAttentionFromBottomRightMask(1, 2),
]


def test_biases_are_what_their_documentation_draws():
    def rows(bias, n_queries, n_keys):
        return ["".join(str(int(x)) for x in row) for row in bias.materialize((n_queries, n_keys)).exp()]

    assert rows(xformers.LocalAttentionFromBottomRightMask(1, 2), 4, 4) == ["1110", "1111", "0111", "0011"]
    assert rows(xformers.LocalAttentionFromBottomRightMask(1, 2), 4, 5) == ["11110", "01111", "00111", "00011"]
    assert rows(xformers.LowerTriangularMask(), 3, 5) == ["10000", "11000", "11100"]
    assert rows(xformers.LowerTriangularFromBottomRightMask(), 3, 5) == ["11100", "11110", "11111"]
    assert rows(xformers.LowerTriangularFromBottomRightLocalAttentionMask(2), 3, 5) == ["01100", "00110", "00011"]
    blocks = xformers.BlockDiagonalMask.from_seqlens([2, 1], [1, 3])
    assert rows(blocks, 3, 4) == ["1000", "1000", "0111"]
    assert rows(blocks.make_causal(), 3, 4) == ["1000", "1000", "0100"]
    assert rows(blocks.make_causal_from_bottomright(), 3, 4) == ["0000", "1000", "0111"]
    assert rows(blocks.make_local_attention_from_bottomright(2), 3, 4) == ["0000", "1000", "0011"]
    padded = xformers.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 2], 3, [2, 3])
    assert rows(padded, 3, 6) == ["110000", "000110", "000111"]


@pytest.mark.parametrize(("n_queries", "n_keys"), [(7, 7), (5, 9), (9, 5)])
def test_xformers_biases(n_queries, n_keys):
    q, k, v = tensors(n_queries, n_keys)
    added = torch.randn(B, H, n_queries, n_keys, dtype=torch.float64)
    for bias in (*BIASES, None, added, xformers.LowerTriangularMask().add_bias(added[0])):
        whole = bias.materialize((B, H, n_queries, n_keys), torch.float64) if isinstance(bias, xformers.AttentionBias) else bias
        want, want_lse = truth(q, k, v, 0.0 if whole is None else whole)
        got, lse = xformers.memory_efficient_attention_forward_requires_grad(q, k, v, bias)
        close(got, want)
        close(lse, want_lse)
    one = [x[:, :, 0] for x in (q, k, v)]
    want, _ = truth(*(x[:, :, None] for x in one), added[:, :1], 0.3)
    close(xformers.memory_efficient_attention(*one, added[:, 0], scale=0.3), want[:, :, 0])


@pytest.mark.parametrize("kv_seqlen", [None, [4, 2, 5, 1]])
@pytest.mark.parametrize("change", [
    lambda x: x, lambda x: x.make_causal(), lambda x: x.make_causal_from_bottomright(), lambda x: x.make_local_attention(2),
    lambda x: x.make_local_attention_from_bottomright(2),
], ids=["all", "causal", "causal from the end", "local", "local from the end"])
def test_xformers_blocks(kv_seqlen, change):
    lengths = [3, 0, 5, 2]
    bias = change(xformers.BlockDiagonalMask.from_seqlens(lengths, kv_seqlen))
    q, k, v = tensors(10, sum(kv_seqlen or lengths), batch=1)
    want, _ = truth(q, k, v, bias.materialize((1, H, q.shape[1], k.shape[1]), torch.float64))
    close(xformers.memory_efficient_attention(q, k, v, bias), want)


def test_xformers_padded_keys():
    for kind in (xformers.BlockDiagonalPaddedKeysMask, xformers.BlockDiagonalCausalWithOffsetPaddedKeysMask):
        bias = kind.from_seqlens([1, 2], kv_padding=6, kv_seqlen=[3, 5])
        q, k, v = tensors(3, 12, batch=1)
        want, _ = truth(q, k, v, bias.materialize((1, H, 3, 12), torch.float64))
        close(xformers.memory_efficient_attention(q, k, v, bias), want)


def test_xformers_groups_read_shared_heads_once():
    q = torch.randn(2, 4, 2, 3, D, dtype=torch.float64)
    k, v = (torch.randn(2, 6, 2, 1, D, dtype=torch.float64).expand(2, 6, 2, 3, D) for _ in range(2))
    want, _ = truth(*(x.flatten(2, 3) for x in (q, k, v)))
    for one in ((k, v), (k.contiguous(), v.contiguous())):
        got = xformers.memory_efficient_attention(q, *one, output_dtype=torch.float32)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want.view(q.shape), rtol=1e-6, atol=1e-6)


def test_xformers_lists_of_tensors():
    pieces = [torch.randn(batch, n, 2, D) for batch, n in ((1, 3), (2, 4), (1, 0))]
    bias, together = xformers.BlockDiagonalMask.from_tensor_list(pieces)
    assert together.shape == (1, 11, 2, D)
    attended = xformers.memory_efficient_attention(together, together, together, bias)
    for got, piece in zip(bias.split(attended), pieces, strict=True):
        torch.testing.assert_close(got, truth(piece, piece, piece)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: xformers.LocalAttentionFromBottomRightMask(-1, 0), "window_left: expected an int of 0 or more; got -1"),
    (lambda: xformers.LowerTriangularFromBottomRightMask().make_local_attention(0), "window_size: expected an int above 0"),
    (lambda: xformers.BlockDiagonalMask.from_seqlens([1, 2], [3]), "kv_seqlen: expected 2 lengths"),
    (lambda: xformers.BlockDiagonalPaddedKeysMask.from_seqlens([1], 2, [3]), "seqlens: expected lengths from 0 to 2"),
    (lambda: xformers.memory_efficient_attention(*tensors(4, 4), xformers.BlockDiagonalMask.from_seqlens([4])),
     r"query: expected \[1, 4"),
    (lambda: xformers.memory_efficient_attention(*(x[0, 0] for x in tensors(4, 4))), "query: expected a tensor of 3, 4 or 5"),
], ids=range(6))
def test_xformers_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- SageAttention ---


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_sageattn(layout):
    q, k, v = (x.transpose(1, 2) if layout == "HND" else x for x in tensors(5, 9, kv_heads=2))
    heads = [x.transpose(1, 2) if layout == "NHD" else x for x in (q, k, v)]
    want, want_lse = attention(*heads, causal=True, scale=0.3, return_lse=True)
    rounding = {"HND": "qk_quant_gran", "NHD": "smooth_k"}[layout]  # the warning comes once for each
    with pytest.warns(RuntimeWarning, match="are ignored"):
        out, lse = sageattn(q, k, v, layout, True, 0.3, return_lse=True, **{rounding: "per_thread"})
    close(out, want.transpose(1, 2) if layout == "NHD" else want)
    close(lse, want_lse)
    close(sageattn(q, k, v, layout, True, 0.3), out)
    with pytest.raises(ValueError, match="tensor_layout"):
        sageattn(q, k, v, "BHND")


# --- names that people bring ---


@pytest.mark.parametrize(("name", "meant"), [
    ("softmax_scale", "scale"), ("window_size", "window"), ("is_causal", "causal"), ("attn_mask", "mask, or bias"),
    ("dropout", "dropout_p"), ("return_attn_probs", "return_lse"), ("block_mask", "mask_mod"), ("casual", "causal"),
    ("alibi_slope", "alibi_slopes"), ("cu_seqlens_q", "fused_attn.attention_varlen")])
def test_other_names_are_told_apart(name, meant):
    q = torch.randn(1, 1, 4, 8)
    for call in (attention, attention_weights):
        arguments = (q, q) if call is attention_weights else (q, q, q)
        with pytest.raises(TypeError, match=f"{name}'; did you mean {meant}"):
            call(*arguments, **{name: None})
    with pytest.raises(TypeError, match="key_lengths'; did you mean seqused_k"):
        attention_varlen(*[torch.randn(8, 1, 8)] * 3, CU_Q, CU_Q, 5, 5, key_lengths=None)
    with pytest.raises(TypeError, match=r"'nothing_like_it'$"):
        attention(q, q, q, nothing_like_it=1)
