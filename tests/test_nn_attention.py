"""What the attention modules do beyond torch's: each option against plain arithmetic on the module's own weights."""

import math

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fused_attn import inspection, settings
from fused_attn.nn import MultiheadAttention, RotaryEmbedding, Transformer, TransformerDecoderLayer, TransformerEncoderLayer
from fused_attn.run import autograd

KERNELS = pytest.mark.kernels
BACKENDS = pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=KERNELS)], indirect=True)
EMBED, HEADS, DIM = 32, 4, 8


@pytest.fixture
def backend(request, monkeypatch):
    monkeypatch.setattr(settings, "BACKEND", request.param)
    return request.param


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def close(actual, expected, tolerance=1e-10):  # one tensor or a list of them
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def made(cls=MultiheadAttention, *args, dtype=torch.float64, **options):
    """A module with random weights, biases and sinks too."""
    args = args or (EMBED, HEADS)
    module = cls(*args, batch_first=True, dtype=dtype, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def grads(outputs, module, *inputs):
    loss = sum(x.sin().sum() for x in outputs if x is not None)
    return torch.autograd.grad(loss, [*inputs, *module.parameters()], retain_graph=True, materialize_grads=True)


# --- options, one by one and together ---


def turned(x, rope):
    """x [B, H, N, D] as complex numbers times e^(i position frequency)."""
    half = rope.dim // 2
    angles = torch.arange(x.shape[2]).double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    a, b = (x[..., : rope.dim : 2], x[..., 1 : rope.dim : 2]) if rope.interleaved else (x[..., :half], x[..., half : rope.dim])
    z = torch.view_as_real(torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles))
    return torch.cat(((z if rope.interleaved else z.mT).flatten(-2), x[..., rope.dim :]), -1)


def plain(module, query, key, value, causal=False, window=(None, None), softcap=None, alibi=False, sinks=False, rope=None,
          num_kv_heads=HEADS, kdim=None, vdim=None):
    """(out, weights) of the formula in docs/numerics.md."""
    sizes = [EMBED, num_kv_heads * DIM, num_kv_heads * DIM]
    separate = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    projections = zip(separate if kdim else module.in_proj_weight.split(sizes), module.in_proj_bias.split(sizes), strict=True)
    q, k, v = ((x @ w.T + b).unflatten(-1, (-1, DIM)).transpose(1, 2)
               for x, (w, b) in zip((query, key, value), projections, strict=True))
    q, k = (turned(q, rope), turned(k, rope)) if rope else (q, k)
    k, v = (x.repeat_interleave(HEADS // num_kv_heads, 1) for x in (k, v))
    scores = q @ k.mT / DIM**0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    n_queries, n_keys = scores.shape[2:]
    distance = torch.arange(n_queries)[:, None] + n_keys - n_queries - torch.arange(n_keys)  # position - key
    if alibi:
        scores = scores - torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None] * distance.abs()
    left, right = (math.inf if bound is None else bound for bound in (window[0], 0 if causal else window[1]))
    scores = scores.masked_fill((distance > left) | (-distance > right), -math.inf)
    if sinks:
        scores = torch.cat((scores, module.sinks[:, None, None].expand(len(scores), -1, n_queries, 1)), -1)
    p = torch.softmax(scores, -1)[..., :n_keys]
    return (p @ v).transpose(1, 2).flatten(2) @ module.out_proj.weight.T + module.out_proj.bias, p


OPTIONS = {
    "none": {}, "causal": {"causal": True}, "window": {"window": (3, 2)}, "left": {"window": (4, None), "causal": True},
    "softcap": {"softcap": 1.5}, "alibi": {"alibi": True}, "sinks": {"sinks": True}, "rope": {"rope": RotaryEmbedding(DIM)},
    "partial rope": {"rope": RotaryEmbedding(6, interleaved=True)}, "groups": {"num_kv_heads": 2},
    "one group": {"num_kv_heads": 1}, "groups, own sizes": {"num_kv_heads": 2, "kdim": 20, "vdim": 12},
    "together": {"num_kv_heads": 2, "causal": True, "window": (5, 0), "softcap": 4.0, "alibi": True, "sinks": True,
                 "rope": RotaryEmbedding(4)},
}


def on_both(*fast):
    """Every option on both backends; on the kernels, those that are not named are slow."""
    slow = (), (pytest.mark.slow,)
    return pytest.mark.parametrize(("backend", "option"), [(None, option) for option in OPTIONS] + [
        pytest.param("triton", option, marks=(KERNELS, *slow[option not in fast])) for option in OPTIONS], indirect=["backend"])


@pytest.mark.few(2)
@on_both("together", "groups, own sizes")
def test_options(backend, option):
    options = OPTIONS[option]
    module = made(**options)
    sizes = EMBED, options.get("kdim", EMBED), options.get("vdim", EMBED)
    for n_queries in (9,) if "rope" in options else (9, 5):  # rope speaks of one sequence
        inputs = [normal(2, n, size).requires_grad_() for n, size in zip((n_queries, 9, 9), sizes, strict=True)]
        exact, p = plain(module, *inputs, **options)
        out, weights = module(*inputs, average_attn_weights=False)
        close([out, weights, module(*inputs)[1]], [exact, p, p.mean(1)])
        close(grads((out, weights), module, *inputs), grads((exact, p), module, *inputs), 1e-9)
        out, weights = module(*inputs, need_weights=False)
        assert weights is None
        close(out, exact)
        close(grads([out], module, *inputs), grads([exact], module, *inputs), 1e-9)


@pytest.mark.parametrize("options", [{}, {"kdim": 20, "vdim": 12}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_groups_are_torchs_module_with_repeated_heads(num_kv_heads, options):
    ours, shared = made(num_kv_heads=num_kv_heads, **options), num_kv_heads * DIM

    def repeated(x, dim=0):
        return x.unflatten(dim, (num_kv_heads, DIM)).repeat_interleave(HEADS // num_kv_heads, dim).flatten(dim, dim + 1)

    def wide(name, x):
        if name.startswith("in_proj"):
            return torch.cat([x[:EMBED], *(repeated(part) for part in x[EMBED:].split(shared))])
        return repeated(x) if name[1:] == "_proj_weight" and name[0] != "q" else repeated(x, 2) if name[:4] == "bias" else x

    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options)
    widened = {name: wide(name, x) for name, x in ours.named_parameters()}
    inputs = [normal(2, n, size).requires_grad_() for n, size in ((5, EMBED), (9, ours.kdim), (9, ours.vdim))]
    expected = torch.func.functional_call(theirs, widened, tuple(inputs))
    outputs = ours(*inputs)
    close(outputs, expected)
    close(grads(outputs, ours, *inputs), grads(expected, ours, *inputs), 1e-9)


def test_options_go_where_they_belong():
    """In a decoder those about positions concern the self-attention alone; ``causal`` spares a Transformer's encoder."""
    model = Transformer(EMBED, HEADS, 2, 2, 16, causal=True, window=(3, 0), alibi=True, rope=RotaryEmbedding(4), softcap=3.0,
                        sinks=True, num_kv_heads=2)
    across = [layer.multihead_attn for layer in model.decoder.layers]
    own = [layer.self_attn for layer in (*model.encoder.layers, *model.decoder.layers)]
    assert [x.options for x in own] == [(False, (3, 0), 3.0, True)] * 2 + [(True, (3, 0), 3.0, True)] * 2
    assert [x.options for x in across] == [(False, None, 3.0, False)] * 2
    assert all(x.alibi_slopes().shape == (HEADS,) and hasattr(x, "rope") for x in own)
    assert not any(x.alibi_slopes() is not None or hasattr(x, "rope") for x in across)
    assert all(x.num_kv_heads == 2 and x.sinks.shape == (HEADS,) for x in (*own, *across))
    assert "causal=True, window=(3, 0), softcap=3.0, alibi=True, num_kv_heads=2" in repr(own[-1])


@pytest.mark.parametrize(("cls", "args", "mask"), [
    (TransformerEncoderLayer, (EMBED, HEADS, 16, 0.0), "src_mask"), (Transformer, (EMBED, HEADS, 1, 2, 16, 0.0), "tgt_mask"),
    (TransformerDecoderLayer, (EMBED, HEADS, 16, 0.0), "tgt_mask")], ids=["encoder layer", "transformer", "decoder layer"])
def test_causal_layers_are_layers_with_a_causal_mask(cls, args, mask):
    causal, other = made(cls, *args, causal=True), made(cls, *args)
    other.load_state_dict(causal.state_dict())
    inputs = (normal(2, 6, EMBED), normal(2, 6, EMBED))[: 1 + (mask == "tgt_mask")]
    out, expected = causal(*inputs), other(*inputs, **{mask: torch.ones(6, 6, dtype=torch.bool).triu(1)})
    close(out, expected)
    close(grads([out], causal), grads([expected], other), 1e-9)


# --- causal in name only ---


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=["plain", "appended keys"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padding"])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(6, 6), (4, 6), (6, 4)])
def test_torchs_causal_biases_are_masks(n_queries, n_keys, padded, options):
    module, x, memory = made(**options), normal(2, n_queries, EMBED), normal(2, n_keys, EMBED)
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool).triu(1)
    padding = (torch.arange(n_keys) >= torch.tensor([[n_keys], [2]])) if padded else None
    expected = module(x, memory, memory, padding, attn_mask=mask)
    for bias in (causal_upper_left, *([causal_lower_right] if n_queries == n_keys else [])):
        close(module(x, memory, memory, padding, attn_mask=bias(n_queries, n_keys)), expected)
    close(module(x, memory, memory, padding, attn_mask=mask, is_causal=True), expected)
    close(module(x, memory, memory, padding, need_weights=False, attn_mask=mask, is_causal=True)[0], expected[0])


def test_a_causal_bias_must_fit():
    module, x, memory = made(), normal(2, 6, EMBED), normal(2, 4, EMBED)
    with pytest.raises(ValueError, match="attn_mask: expected causal_upper_left"):
        module(memory, x, x, attn_mask=causal_lower_right(4, 6))
    with pytest.raises((RuntimeError, ValueError), match="attn_mask"):
        module(x, x, x, attn_mask=causal_upper_left(3, 9))


class Recorder(TorchDispatchMode):
    """The shapes of all tensors that are made, in ``shapes``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.shapes += [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result


@pytest.mark.parametrize("way", ["option", "hint", "bias"])
@BACKENDS
def test_nothing_quadratic_is_built_for_a_causal_call(backend, way):
    module = made(causal=way == "option", dtype=torch.float32)
    x = normal(2, 37, EMBED, dtype=torch.float32).requires_grad_()
    given = {"option": {}, "hint": {"attn_mask": torch.ones(37, 37, dtype=torch.bool).triu(1), "is_causal": True},
             "bias": {"attn_mask": causal_upper_left(37, 37)}}[way]
    with Recorder() as recorder:
        recorder.shapes = []
        out = module(x, x, x, need_weights=False, **given)[0]
        out.sum().backward()
    assert (2, 37, EMBED) in recorder.shapes
    assert [shape for shape in recorder.shapes if shape.count(37) > 1] == []
    exact = plain(module.double(), *(x.double(),) * 3, causal=True)[0]
    close(out.double(), exact, 1e-4)


# --- jagged nested tensors ---

LENGTHS = {"self": (5, 9, 1), "memory": (7, 2, 4)}


def nested(lengths, size=EMBED):
    return torch.nested.nested_tensor([normal(n, size) for n in lengths], layout=torch.jagged, requires_grad=True)


@pytest.mark.few(3)
@pytest.mark.parametrize("across", [False, True], ids=["self", "cross"])
@on_both("together", "groups, own sizes")
def test_jagged_tensors_are_their_sequences_alone(backend, across, option):
    options = OPTIONS[option]
    module = made(**options)
    query = nested(LENGTHS["self"])
    inputs = [query]
    if across or "kdim" in options:
        inputs.append(nested(LENGTHS["memory"], options.get("kdim", EMBED)))
    if "kdim" in options:
        value = normal(sum(LENGTHS["memory"]), options["vdim"]).requires_grad_()
        inputs.append(torch.nested.nested_tensor_from_jagged(value, inputs[1].offsets()))
    call = [*inputs, *inputs[-1:] * 2][:3]
    out = module(*call, need_weights=False)[0]
    alone = torch.cat([module(*(x[None] for x in parts), need_weights=False)[0][0]
                       for parts in zip(*(x.unbind() for x in call), strict=True)])
    close(out.values(), alone)
    for mine, exact in zip(grads([out.values()], module, *inputs), grads([alone], module, *inputs), strict=True):
        close(*((x.values() if x.is_nested else x) for x in (mine, exact)), 1e-9)


def test_a_layer_takes_jagged_tensors():
    layer = made(TransformerEncoderLayer, EMBED, HEADS, 16, 0.0, causal=True, rope=RotaryEmbedding(8))
    x = nested(LENGTHS["self"])
    alone = torch.cat([layer(part[None])[0] for part in x.unbind()])
    close(layer(x).values(), alone)


@pytest.mark.parametrize(("named", "options", "call"), [
    ("need_weights=True", {}, {"need_weights": True}), ("attn_mask", {}, {"attn_mask": torch.zeros(5, 5)}),
    ("key_padding_mask", {}, {"key_padding_mask": torch.zeros(3, 9)}), ("cache", {}, {"cache": object()}),
    ("bias_k", {"add_bias_kv": True}, {}), ("add_zero_attn=True", {"add_zero_attn": True}, {})])
def test_what_jagged_tensors_do_not_go_with(named, options, call):
    x = nested(LENGTHS["self"])
    with pytest.raises(ValueError, match=f"^{named}: not taken with nested tensors"):
        made(**options).eval()(x, x, x, **{"need_weights": False, **call})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_jagged_tensors_that_do_not_fit_are_told():
    module, x, dense = made(), nested(LENGTHS["self"]), normal(3, 5, EMBED)
    for text, call in (("key: expected a contiguous jagged nested", (x, dense, dense)), ("query: expected", (dense, x, x)),
                       ("value", (x, x, nested((1, 5, 9))))):  # as many tokens, in other sequences
        with pytest.raises(ValueError, match=f"^{text}"):
            module(*call, need_weights=False)


# --- torch around it ---


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@BACKENDS
def test_autocast(backend, need_weights):
    """The type of torch's results, and an error of their size."""
    ours = made(dtype=torch.float32, sinks=False)
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = normal(2, 30, EMBED, dtype=torch.float32)
    exact = theirs(x, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        mine, other = ours(x, x, x, need_weights=need_weights), theirs(x, x, x, need_weights=need_weights)
    for a, b, ref in zip(mine, other, exact, strict=True):
        if b is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert (a - ref).norm() <= 2 * (b - ref).norm()
    mine[0].sum().backward()
    assert {parameter.grad.dtype for parameter in ours.parameters()} == {torch.float32}


COMPILED = {  # options, call
    "layer": ({"num_kv_heads": 2, "rope": RotaryEmbedding(4), "causal": True}, {}),
    "weights": ({"sinks": True, "alibi": True}, {}), "no weights": ({"window": (3, 1)}, {"need_weights": False}),
    "mask": ({}, {"attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(3), "need_weights": False}),
    "padding": ({}, {"key_padding_mask": torch.arange(9).expand(2, 9) > 6, "need_weights": False}),
}


@pytest.mark.few(2)
@pytest.mark.parametrize(("backend", "case"), [*((None, case) for case in COMPILED), *(
    pytest.param("triton", case, marks=(KERNELS, pytest.mark.slow)) for case in COMPILED)], indirect=["backend"])
def test_compile_without_graph_breaks(backend, case):
    options, call = COMPILED[case]
    torch._dynamo.reset()
    layer = (TransformerEncoderLayer, EMBED, HEADS, 16, 0.0) if case == "layer" else ()
    module, x = made(*layer, **options), normal(2, 9, EMBED).requires_grad_()
    inputs = (x,) * (1 if layer else 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    outs, exact = ((y,) if layer else y for y in (compiled(*inputs, **call), module(*inputs, **call)))
    close([*grads(outs, module, x), outs[0]], [*grads(exact, module, x), exact[0]], 1e-12)


@BACKENDS
def test_activation_checkpointing(backend):
    """Computed twice, dropped once."""
    layer, x = made(TransformerEncoderLayer, EMBED, HEADS, 16, 0.3, sinks=True), normal(2, 9, EMBED).requires_grad_()
    found = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        out = run(x)
        found.append((out, *grads([out], layer, x)))
    close(*found, 1e-12)


def test_sinks_may_be_parametrised():
    """Then, as in DataParallel's replicas and in FSDP, they are no entry of the module's own parameters."""
    module, x = made(sinks=True), normal(2, 6, EMBED)
    expected = module(x, x, x)[0]
    parametrize.register_parametrization(module, "sinks", nn.Identity())
    close(module(x, x, x)[0], expected)


# --- bad options ---


@pytest.mark.parametrize(("named", "options"), [
    ("num_kv_heads", {"num_kv_heads": 3}), ("num_kv_heads", {"num_kv_heads": 0}), ("num_kv_heads", {"num_kv_heads": 2.0}),
    ("window", {"window": 3}), ("window", {"window": (-1, 0)}), ("softcap", {"softcap": -1.0}), ("causal", {"causal": 1}),
    ("rope", {"rope": RotaryEmbedding(10)}), ("rope", {"rope": True}), ("casual", {"casual": True}),
    ("add_bias_kv", {"add_bias_kv": True, "alibi": True}), ("add_zero_attn", {"add_zero_attn": True, "causal": True})])
def test_bad_options_are_named(named, options):
    with pytest.raises((TypeError, ValueError), match=named):
        MultiheadAttention(EMBED, HEADS, **options)


# --- output and weights of one call ---


@pytest.mark.parametrize("arguments", [{}, {"dropout_p": 0.4}], ids=["", "dropout"])
@BACKENDS
def test_output_and_weights_are_of_one_call(backend, arguments, monkeypatch):
    """One mask for both, and gradients through both; on the kernels through ``Recomputed``."""
    q, k, v = (normal(2, heads, n, 8).requires_grad_() for heads, n in ((4, 7), (2, 9), (2, 9)))
    bias, sinks = normal(4, 7, 9).requires_grad_(), normal(4).requires_grad_()
    recomputed, apply = [], autograd.Recomputed.apply
    monkeypatch.setattr(autograd.Recomputed, "apply", lambda *x: recomputed.append(x) or apply(*x))
    torch.manual_seed(3)
    out, weights = inspection.attention_and_weights(q, k, v, bias=bias, sinks=sinks, causal=True, **arguments)
    assert len(recomputed) == (backend == "triton")
    scores = (q @ k.repeat_interleave(2, 1).mT / 8**0.5 + bias).masked_fill(torch.ones(7, 9).triu(3).bool(), -math.inf)
    scores = torch.cat((scores, sinks[:, None, None].expand(2, -1, 7, 1)), -1)
    p = torch.softmax(scores, -1)[..., :9]
    if arguments:
        stays = weights != 0
        assert 0.25 < (stays.sum() / (2 * 4 * (3 + 4 + 5 + 6 + 7 + 8 + 9))).item() < 0.95
        p = p * stays / 0.6
    exact = p @ v.repeat_interleave(2, 1), p
    close((out, weights), exact)
    cotangents = normal(*out.shape), normal(*weights.shape)
    close(*(torch.autograd.grad(results, (q, k, v, bias, sinks), cotangents) for results in ((out, weights), exact)))


@BACKENDS
def test_weights_have_second_derivatives(backend):
    q, k, v = (normal(1, 1, 3, 4).requires_grad_() for _ in range(3))
    torch.autograd.gradgradcheck(lambda q, k: inspection.attention_and_weights(q, k, v, causal=True)[1], (q, k), fast_mode=True)


@BACKENDS
def test_values_past_the_key_lengths_may_be_nan(backend):
    q, k, v = (normal(2, 2, 6, 8) for _ in range(3))
    lengths = torch.tensor([6, 4])
    clean = inspection.attention_and_weights(q, k, v, key_lengths=lengths)
    k[1, :, 4:] = v[1, :, 4:] = math.nan
    close(inspection.attention_and_weights(q, k, v, key_lengths=lengths), clean)


@pytest.mark.parametrize("backend", [None, "torch"], indirect=True)
def test_weights_where_there_are_no_kernels(backend):
    q = torch.empty(1, 2, 5, 8, device="meta")  # which stands for any device of that kind
    assert [x.shape for x in inspection.attention_and_weights(q, q, q)] == [(1, 2, 5, 8), (1, 2, 5, 5)]
