"""torch.compile(fullgraph=True), checkpointing and deepcopied graphs with everything that is not plain attention."""

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

import fused_attn

pytestmark = pytest.mark.kernels
B, H, N, D = 2, 4, 40, 16


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@triton.jit
def stretched(score, q_pos, k_idx, head, batch, args):
    factor: tl.constexpr = args[1]
    return score * args[0] * factor


@triton.jit
def stretched_slope(score, modded, q_pos, k_idx, head, batch, args):
    factor: tl.constexpr = args[1]
    return args[0] * factor


@triton.jit
def stretched_factor(score, modded, q_pos, k_idx, head, batch, args):
    factor: tl.constexpr = args[1]
    return score * factor


STRETCHED = fused_attn.ScoreMod("stretched", stretched, stretched_slope, (stretched_factor,),
                                reference=lambda s, q, k, h, b, args: s * args[0] * args[1])

CALLS = {  # a tensor, and the arguments made of it
    "bias": (lambda: normal(1, H, N, N), lambda x: {"bias": x}),
    "alibi": (lambda: normal(H), lambda x: {"alibi_slopes": x, "causal": True}),
    "sinks": (lambda: normal(H), lambda x: {"sinks": x}),
    "relative": (lambda: normal(H, 2 * N - 1), lambda x: {"bias": fused_attn.RelativeBias(x)}),
    "t5": (lambda: normal(32, H), lambda x: {"bias": fused_attn.t5_bias(x, N, N)}),
    "mask": (lambda: torch.rand(B, 1, N, N) > 0.3, lambda x: {"mask": x}),
    "lengths": (lambda: torch.tensor([3, 20]), lambda x: {"key_lengths": x}),
    "document": (lambda: torch.arange(N) // 9, lambda x: {"mask_mod": fused_attn.document_mask(x), "causal": True}),
    "dropout": (lambda: normal(1, H, N, N), lambda x: {"bias": x, "dropout_p": 0.25}),
    "precise": (lambda: normal(H), lambda x: {"sinks": x, "precise": True}),
    "score mod": (lambda: normal(1, H, 1, N), lambda x: {"score_mod": STRETCHED(x, 0.5)}),
}


def run(function, leaves):
    torch.manual_seed(1)
    out = function(*leaves)
    return out, *torch.autograd.grad(out.sin().sum(), [x for x in leaves if x.requires_grad])


def check_same(results, expected):
    for mine, theirs in zip(results, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.few(1)
@pytest.mark.parametrize("call", [pytest.param(name, marks=() if name in ("t5", "dropout", "score mod", "document") else
                                               pytest.mark.slow) for name in CALLS])
def test_compiles_whole(call):
    draw, arguments = CALLS[call]
    leaves = normal(B, H, N, D), normal(B, 2, N, D), normal(B, 2, N, D), draw()

    def function(q, k, v, x):
        return fused_attn.attention(q, k, v, backend="triton", **arguments(x))

    torch._dynamo.reset()
    check_same(run(torch.compile(function, fullgraph=True, backend="aot_eager"), leaves), run(function, leaves))


@pytest.mark.parametrize("call", ["dropout", pytest.param("t5", marks=pytest.mark.slow)])
def test_checkpointing_draws_the_same_dropout(call):
    draw, arguments = CALLS[call]
    leaves = normal(B, H, N, D), normal(B, 2, N, D), normal(B, 2, N, D), draw()

    def function(q, k, v, x):
        return fused_attn.attention(q, k, v, backend="triton", **arguments(x))

    check_same(run(lambda *xs: checkpoint(function, *xs, use_reentrant=False), leaves), run(function, leaves))


def test_masks_made_before_compile_whole_where_numbers_vary():
    """The numbers of a mask are compile-time constants, also to a compiler that has those vary which it did not see made."""
    leaves = normal(B, H, N, D), normal(B, 2, N, D), normal(B, 2, N, D)

    def function(q, k, v, mask):
        return fused_attn.attention(q, k, v, mask_mod=mask, backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for mask in (fused_attn.dilated_window_mask(5, 2), fused_attn.dilated_window_mask(4, 3)):
        check_same(run(lambda *xs, mask=mask: compiled(*xs, mask), leaves),
                   run(lambda *xs, mask=mask: function(*xs, mask), leaves))


def test_packed_sequences_compile_whole():
    cu = torch.tensor([0, 13, 40], dtype=torch.int32)
    leaves = normal(N, H, D), normal(N, 2, D), normal(N, 2, D)

    def function(q, k, v):
        return fused_attn.attention_varlen(q, k, v, cu, cu, 27, 27, causal=True, backend="triton")

    torch._dynamo.reset()
    check_same(run(torch.compile(function, fullgraph=True, backend="aot_eager"), leaves), run(function, leaves))


@pytest.mark.few(2)
@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0])
def test_a_backward_that_computes_again_drops_the_same(budget):
    x, w = torch.randn(2, N, 32, requires_grad=True), (torch.randn(32, 96) * 0.2).requires_grad_()

    def function(x, w):
        q, k, v = torch.relu(x @ w).view(2, N, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        out = fused_attn.attention(q, k, v, dropout_p=0.5, backend="triton").transpose(1, 2).reshape(2, N, 32)
        return torch.relu(torch.relu(out @ w) @ w.T) @ w

    def run(function):
        torch.manual_seed(7)
        out = function(x, w)
        return out, *torch.autograd.grad(out.sum(), (x, w))

    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        got = run(torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True))
    torch.testing.assert_close(got, run(function), rtol=1e-4, atol=1e-4)


@pytest.mark.few(2)
@pytest.mark.parametrize("which", ["q is k is v", "q is k", "k is v", "none"])
def test_compiled_jagged_tensors(which):
    x = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5, 4)], layout=torch.jagged).requires_grad_()

    def function(x):
        x, y, z = x.transpose(1, 2), (x * 2).transpose(1, 2), x.sin().transpose(1, 2)
        qkv = {"q is k is v": (x, x, x), "q is k": (x, x, y), "k is v": (x, y, y), "none": (x, y, z)}[which]
        return fused_attn.attention(*qkv, causal=True, backend="triton").values()

    torch._dynamo.reset()
    results = []
    for run in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        out = run(x)
        results.append((out, torch.autograd.grad(out.sin().sum(), x)[0].values()))
    torch.testing.assert_close(*results)


def test_a_budget_of_nothing_warns_of_dropout():
    q = torch.randn(1, 2, 9, 16, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: fused_attn.attention(q, q, q, dropout_p=0.5, backend="triton"), backend="aot_eager")
    with torch._functorch.config.patch(activation_memory_budget=0), pytest.warns(RuntimeWarning, match="budget above 0 saves"):
        compiled(q)


def test_gradients_of_score_mods_need_their_slopes():
    q, k, v, x = normal(1, H, N, D), normal(1, 2, N, D), normal(1, 2, N, D), normal(1, H, 1, N)
    blunt = fused_attn.ScoreMod("blunt", stretched)
    with pytest.raises(ValueError, match="blunt has no slope for argument 0"):
        fused_attn.attention(q, k, v, score_mod=blunt(x, 0.5), backend="triton")
    with pytest.raises(ValueError, match="blunt has no slope, which gradients need"):
        fused_attn.attention(q, k, v, score_mod=blunt(x.detach(), 0.5), backend="triton")
    with torch.no_grad():
        out = fused_attn.attention(q, k, v, score_mod=blunt(x, 0.5), backend="triton")
    with_slopes = fused_attn.attention(q, k, v, score_mod=STRETCHED(x, 0.5), backend="triton")
    assert torch.equal(out, with_slopes)


def test_mods_of_other_code_have_other_names():
    assert fused_attn.ScoreMod("stretched", stretched, stretched_factor).code != STRETCHED.code
    again = fused_attn.ScoreMod("stretched", stretched, stretched_slope, (stretched_factor,), reference=STRETCHED.reference)
    assert again.code is STRETCHED.code


def test_shared_memory_that_a_card_has_not():
    """fp64 at head dim 256 needs 160 KiB in the backward: an A100 has them, a 4090 does not."""
    from fused_attn.plan import tiles

    assert tiles.against(256, 256, torch.float64, "sm_80") is None
    assert "160 KiB of shared memory; sm_89 has 99" in tiles.against(256, 256, torch.float64, "sm_89")
    assert "136 KiB" in tiles.against(576, 512, torch.float32, "sm_86")
    assert tiles.against(576, 512, torch.bfloat16, "sm_86") is None
