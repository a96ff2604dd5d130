"""FlexAttention's names, held to torch's own on a CPU, and the masks and scores that people write for it."""

import warnings

import pytest
import torch
import torch.nn.attention.flex_attention as torchs

from fused_attn.compat import flex

B, H, N, D = 2, 4, 300, 16
torch.manual_seed(0)
IDS = torch.randint(0, 3, (N,)).sort().values
RELATIVE = torch.randn(H, 2 * N, dtype=torch.float64)
PREFIX = torch.tensor([20, 150])
LENGTHS = torch.tensor([300, 170])
SLOPES = torch.rand(H, dtype=torch.float64)
JAGGED = torch.cat([torch.arange(n) for n in (100, 50, 150)])  # the position of each token within its document


def tanh_softcap(cap):
    return lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap)


def dilated(window, step):
    return lambda b, h, q_idx, kv_idx: ((q_idx - kv_idx).abs() <= window) & ((q_idx - kv_idx) % step == 0)


def within_documents(inner, ids, position):
    """The mask of a document, asked for in positions within it."""
    return lambda b, h, q_idx, kv_idx: (ids[q_idx] == ids[kv_idx]) & inner(b, h, position[q_idx], position[kv_idx])


def neighbourhood(width, size):
    """Pixels of an image that lie in one window of ``size`` x ``size`` around the other."""
    def mask(b, h, q_idx, kv_idx):
        rows, columns = q_idx // width - kv_idx // width, q_idx % width - kv_idx % width
        return (rows.abs() <= size // 2) & (columns.abs() <= size // 2)

    return mask


MASKS = {
    "causal": (lambda b, h, q, k: q >= k, False), "sliding window": (lambda b, h, q, k: (q >= k) & (q - k <= 50), False),
    "both sides": (lambda b, h, q, k: (q - k).abs() < 50, False), "dilated": (dilated(64, 4), False),
    "documents": (lambda b, h, q, k: IDS[q] == IDS[k], False), "causal documents": (within_documents(
        lambda b, h, q, k: q >= k, IDS, JAGGED), False),
    "prefix": (lambda b, h, q, k: (k < PREFIX[b]) | (q >= k), True), "lengths": (lambda b, h, q, k: k < LENGTHS[b], True),
    "by head": (lambda b, h, q, k: (q - k) % (h + 2) == 0, True),
    "relative": (lambda b, h, q, k: RELATIVE[h, k - q + N] > 0, True),
    "neighbourhood": (neighbourhood(20, 5), False), "strided": (lambda b, h, q, k: (k % 64 == 0) | (q - k).abs().le(8), False),
    "sinks": (flex.or_masks(lambda b, h, q, k: k < 4, lambda b, h, q, k: q - k < 32), False),
    "both": (flex.and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: IDS[q] == IDS[k]), False),
    "everything": (flex.noop_mask, False), "nothing before 100": (lambda b, h, q, k: (q >= 100) & (k <= q), False),
}
SCORES = {
    "alibi": lambda s, b, h, q, k: s + SLOPES[h] * (k - q), "relative": lambda s, b, h, q, k: s + RELATIVE[h, k - q + N],
    "softcap": tanh_softcap(3.0), "causal by score": lambda s, b, h, q, k: torch.where(q >= k, s, -float("inf")),
    "distance": lambda s, b, h, q, k: s - torch.log1p((q - k).abs()), "head scale": lambda s, b, h, q, k: s * SLOPES[h],
    "soft documents": lambda s, b, h, q, k: torch.where(IDS[q] == IDS[k], s, s - 2.0),
    "rectified": lambda s, b, h, q, k: torch.nn.functional.relu(s), "temperature": lambda s, b, h, q, k: s / (1 + 0.01 * q),
}


def qkv(batch=B, kv_heads=H, n=N):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, heads, n, D, dtype=torch.float64, generator=generator) for heads in (H, kv_heads, kv_heads)]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():  # torch's, that its own is unfused and some names are deprecated
        warnings.filterwarnings("ignore", module="torch")
        yield


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.few(7)
@pytest.mark.parametrize("name", MASKS)
def test_block_masks_are_torchs(name):
    """The same blocks, and the same attention, whoever made the mask, dense and whole."""
    mask, differs = MASKS[name]
    sizes = (B, H) if differs else (None, None)
    ours, theirs = (module.create_block_mask(mask, *sizes, N, N, device="cpu") for module in (flex, torchs))
    for field in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert torch.equal(flex.create_mask(mask, *sizes, N, N, device="cpu"), torchs.create_mask(mask, *sizes, N, N, device="cpu"))
    want, lse = torchs.flex_attention(*qkv(), block_mask=theirs, return_lse=True)
    for block_mask in (ours, theirs):
        got, got_lse = flex.flex_attention(*qkv(), block_mask=block_mask, return_lse=True)
        close(got, want)
        torch.testing.assert_close(got_lse, lse.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.few(5)
@pytest.mark.parametrize("name", SCORES)
def test_scores_are_torchs(name):
    close(flex.flex_attention(*qkv(), score_mod=SCORES[name]), torchs.flex_attention(*qkv(), score_mod=SCORES[name]))


def test_scores_and_masks_together_with_shared_heads():
    mask = torchs.create_block_mask(MASKS["causal"][0], None, None, N, N, device="cpu")
    arguments = {"score_mod": SCORES["alibi"], "block_mask": mask, "enable_gqa": True, "scale": 0.1}
    close(flex.flex_attention(*qkv(kv_heads=2), **arguments), torchs.flex_attention(*qkv(kv_heads=2), **arguments))


def test_blocks_that_somebody_lists_count_as_they_are_listed():
    """As in torch's compiled kernels: full blocks are full whatever the function says, those that are not listed are empty."""
    partial, full = torch.zeros(1, 1, 3, 3, dtype=torch.bool), torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    partial[..., 0, 0] = partial[..., 1, 2] = partial[..., 2, 1] = full[..., 2, 0] = full[..., 0, 2] = True
    lists = [x for blocks in (partial, full) for x in (
        blocks.sum(-1, dtype=torch.int32), blocks.int().sort(dim=-1, descending=True, stable=True).indices.int())]
    mask = torchs.BlockMask.from_kv_blocks(*lists, mask_mod=MASKS["both sides"][0], seq_lengths=(N, N))
    of_block = torch.arange(N) // 128
    i, j = torch.arange(N)[:, None], torch.arange(N)
    inside = (i - j).abs() < 50
    keep = full[0, 0][of_block[:, None], of_block] | (partial[0, 0][of_block[:, None], of_block] & inside)
    q, k, v = qkv()
    want = torch.softmax((q @ k.mT / D**0.5).masked_fill(~keep, -torch.inf), -1).nan_to_num(0) @ v
    for _ in range(2):
        close(flex.flex_attention(q, k, v, block_mask=mask), want)


def test_every_captured_tensor_has_a_gradient():
    """torch's on a CPU has none at all; the truth is autograd through the matrix of scores."""
    table = RELATIVE.clone().requires_grad_()
    q, k, v = (x.requires_grad_() for x in qkv(n=70))
    out = flex.flex_attention(q, k, v, score_mod=lambda s, b, h, q_idx, kv_idx: s + table[h, kv_idx - q_idx + N])
    index = torch.arange(70) - torch.arange(70)[:, None] + N
    want = torch.softmax(q @ k.mT / D**0.5 + table[:, index], -1) @ v
    leaves, dout = (q, k, v, table), torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    for got, expected in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(want, leaves, dout), strict=True):
        close(got, expected)


def test_auxiliary_results():
    q, k, v = qkv()
    out, aux = flex.flex_attention(q, k, v, return_aux=flex.AuxRequest(lse=True))
    close(aux.lse, torch.logsumexp(q @ k.mT / D**0.5, -1))
    close(out, torchs.flex_attention(q, k, v))
    with pytest.raises(NotImplementedError, match="return_aux"):
        flex.flex_attention(q, k, v, return_aux=flex.AuxRequest(max_scores=True))


def test_a_batch_that_is_shared():
    mask = flex.create_block_mask(MASKS["prefix"][0], B, None, N, N, device="cpu")
    q, (k, v) = qkv()[0], qkv(batch=1)[1:]
    close(flex.flex_attention(q, k, v, block_mask=mask), torchs.flex_attention(q, k, v, block_mask=mask))


@pytest.mark.parametrize(("make", "message"), [
    (lambda q, k, v: flex.flex_attention(q[:, :, :99], k, v, block_mask=flex.create_block_mask(
        MASKS["causal"][0], None, None, N, N, device="cpu")), "block_mask: expected one made for Q_LEN=99 and KV_LEN=300"),
    (lambda q, k, v: flex.flex_attention(q, k[:, :2], v[:, :2]), "key: expected query's 4 heads without enable_gqa=True"),
    (lambda q, k, v: flex.flex_attention(q, k, v, block_mask=flex.create_block_mask(
        MASKS["causal"][0], 3, None, N, N, device="cpu")), "block_mask: expected one made for B=2 or B=None; got B=3"),
    (lambda q, k, v: flex.flex_attention(q, k, v, return_lse=True, return_aux=flex.AuxRequest(lse=True)), "return_lse"),
], ids=range(4))
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make(*qkv())


def test_options_of_torchs_kernels_are_ignored_with_a_word():
    with pytest.warns(RuntimeWarning, match="kernel_options .'BLOCK_M'. are ignored"):
        flex.flex_attention(*qkv(), kernel_options={"BLOCK_M": 64})
