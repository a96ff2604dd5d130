"""torch's modules and ours, one against the other: state dicts, outputs, weights, gradients, rounding, errors, copies."""

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from support.oracle import EPS
from torch import nn
from torch.utils._pytree import tree_map

import fused_attn.nn
from fused_attn import settings
from fused_attn.nn import MultiheadAttention, RotaryEmbedding, TransformerDecoder, TransformerDecoderLayer
from fused_attn.run import autograd

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")  # of torch's own stacks

STACKS = ("TransformerEncoder", "TransformerDecoder")
NAMES = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer", *STACKS)
INPUTS = {"MultiheadAttention": 3, "TransformerEncoderLayer": 1, "TransformerEncoder": 1} | dict.fromkeys(
    ("TransformerDecoderLayer", "TransformerDecoder", "Transformer"), 2)
TRITON = pytest.param("triton", marks=pytest.mark.kernels)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels as the default backend; the list of their calls."""
    calls, run = [], autograd.attention
    monkeypatch.setattr(settings, "BACKEND", "triton")
    monkeypatch.setattr(autograd, "attention", lambda *call: calls.append(call) or run(*call))
    return calls


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def close(actual, expected, tolerance=1e-10):
    """One tensor or a list of them, shapes and dtypes alike."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def database(name, training):
    """(args, kwargs) of construction and of the call, for every sample that torch tests this module with."""
    pytest.importorskip("expecttest", reason="torch's test database needs it")
    from torch.testing._internal.common_modules import module_db  # here: it takes seconds

    own = name if name not in STACKS else f"{name}Layer"
    info = next(info for info in module_db if info.module_cls is getattr(nn, own))
    samples = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
    renamed = {"src_mask": "mask"} if name == "TransformerEncoder" else {}
    return [(x.constructor_input.args, x.constructor_input.kwargs, x.forward_input.args,
             {renamed.get(key, key): value for key, value in x.forward_input.kwargs.items()}) for x in samples]


def build(package, name, args, kwargs):
    torch.manual_seed(7)
    if name not in STACKS:
        return getattr(package, name)(*args, **kwargs, dtype=torch.float64)
    layer = getattr(package, f"{name}Layer")(*args, **kwargs, dtype=torch.float64)
    return getattr(package, name)(layer, 2, nn.LayerNorm(layer.self_attn.embed_dim, dtype=torch.float64))


def pair(name, args, kwargs, std=0.6):
    """torch's module and ours: drawn alike from one seed, then with one set of random weights, biases and norms too."""
    theirs, ours = (build(package, name, args, kwargs) for package in (nn, fused_attn.nn))
    drawn = theirs.state_dict(), ours.state_dict()
    assert list(drawn[0]) == list(drawn[1])
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in drawn), strict=True))
    for module in ours.modules():  # none of torch's that has a twin of ours is left
        assert getattr(fused_attn.nn, type(module).__name__, None) in (None, type(module))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=std)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs, ours


def results(module, args, kwargs, weigh=True):
    """(outputs, gradients of inputs, float masks and parameters); an input passed twice stays one tensor."""
    floats = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    twins = {id(x): x.detach().clone().requires_grad_() for x in floats}
    outputs = module(*(twins[id(x)] for x in args), **{name: twins.get(id(x), x) for name, x in kwargs.items()})
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
    loss = sum(x.sin().sum() for x in (outputs if weigh else outputs[:1]))
    grads = torch.autograd.grad(loss, [*twins.values(), *module.parameters()], materialize_grads=True)
    return outputs, grads


def compare(theirs, ours, args, kwargs):
    expected, wanted = results(theirs, args, kwargs)
    outputs, grads = results(ours, args, kwargs)
    close(outputs, expected)
    close(grads, wanted, 1e-9)


def against_torch(name, training, samples):
    for args, kwargs, call_args, call_kwargs in samples:
        theirs, ours = pair(name, args, kwargs)
        try:
            compare(theirs.train(training), ours.train(training), call_args, call_kwargs)
        except AssertionError as error:
            shown = tree_map(lambda x: tuple(x.shape) if isinstance(x, torch.Tensor) else x, (args, kwargs, call_kwargs))
            raise AssertionError(f"{name}: {shown}") from error


@pytest.mark.few(2)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_samples(name, training):
    samples = database(name, training)
    assert len(samples) >= 35
    against_torch(name, training, samples)


@pytest.mark.few(2)
@pytest.mark.kernels
@pytest.mark.parametrize(("training", "step"), [
    pytest.param(True, 23, id="train, some"), pytest.param(True, 1, marks=pytest.mark.slow, id="train"),
    pytest.param(False, 1, marks=pytest.mark.slow, id="eval")])
@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_samples_on_the_kernels(name, training, step, kernels):
    samples = database(name, training)[5 % step :: step]
    against_torch(name, training, samples)
    assert len(kernels) >= len(samples) >= 2  # the kernels ran


# --- what torch's database leaves out: batches, other key sizes, weights of each head, float masks ---


def masked(shape, kind=bool):
    """A mask that leaves every row its first key, bool or float, where True or -inf means masked."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask if kind is bool else normal(*shape).masked_fill(mask, -math.inf)


MASKS = {  # of pairs [L, S], of pairs of each head, of keys
    "none": lambda pairs, each, keys: {}, "2-D bool": lambda pairs, each, keys: {"attn_mask": masked(pairs)},
    "3-D float": lambda pairs, each, keys: {"attn_mask": masked(each, float)},
    "padding": lambda pairs, each, keys: {"key_padding_mask": masked(keys)},
    "3-D bool, padding": lambda pairs, each, keys: {"attn_mask": masked(each), "key_padding_mask": masked(keys)},
    "2-D float, float padding": lambda pairs, each, keys: {"attn_mask": masked(pairs, float),
                                                           "key_padding_mask": masked(keys, float)},
}
WEIGHTS = ({"need_weights": False}, {}, {"average_attn_weights": False})
MODULES = [{}, {"batch_first": True, "bias": False}, {"kdim": 5, "vdim": 7, "batch_first": True}, {"kdim": 5, "vdim": 12},
           {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True}]


def own_samples(mask):
    """Batched calls of a ``MultiheadAttention``: of one tensor, of two, of three."""
    batch, heads, length, embed = 2, 3, 4, 12
    for kwargs, weights, kind in itertools.product(MODULES, WEIGHTS, ("self", "memory", "three")):
        if "kdim" in kwargs and kind != "three":
            continue
        n_keys = length if kind == "self" else 6
        sizes = [(n, batch) if not kwargs.get("batch_first") else (batch, n) for n in (length, n_keys)]
        query, key = normal(*sizes[0], embed), normal(*sizes[1], kwargs.get("kdim", embed))
        value = normal(*sizes[1], kwargs.get("vdim", embed))
        args = {"self": (query,) * 3, "memory": (query, key, key), "three": (query, key, value)}[kind]
        yield (embed, heads), kwargs, args, {
            **MASKS[mask]((length, n_keys), (batch * heads, length, n_keys), (batch, n_keys)), **weights}


@pytest.mark.parametrize("mask", MASKS)
def test_batches(mask):
    against_torch("MultiheadAttention", True, own_samples(mask))


@pytest.mark.kernels
@pytest.mark.parametrize(("mask", "step"), [("3-D bool, padding", 6), *(
    pytest.param(mask, 1, marks=pytest.mark.slow) for mask in MASKS)])
def test_batches_on_the_kernels(mask, step, kernels):
    samples = list(own_samples(mask))[::step]
    against_torch("MultiheadAttention", True, samples)
    assert len(kernels) >= len(samples) >= 5


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("backend", [None, TRITON])
def test_a_query_without_keys_gives_zero(backend, need_weights, kind, monkeypatch):
    """torch gives NaN for it where weights are wanted, and 0 where not: that is the oracle of the gradients."""
    theirs, ours = pair("MultiheadAttention", (12, 3), {"batch_first": True})
    x, mask, padding = normal(2, 4, 12), torch.rand(4, 4) < 0.3, torch.zeros(2, 4, dtype=torch.bool)
    mask[2], mask[0], padding[1] = True, False, True
    if kind == "float":
        mask, padding = (normal(*m.shape).masked_fill(m, -math.inf) for m in (mask, padding))
    arguments = {"attn_mask": mask, "key_padding_mask": padding}
    with torch.no_grad():
        weights = theirs(x, x, x, **arguments)[1]
    assert weights[0, 2].isnan().all()
    assert weights[1].isnan().all()
    expected, wanted = results(theirs, (x,) * 3, {**arguments, "need_weights": False})
    monkeypatch.setattr(settings, "BACKEND", backend)
    outputs, grads = results(ours, (x,) * 3, {**arguments, "need_weights": need_weights}, weigh=False)
    close(outputs[0], expected[0])
    close(outputs[0][1], ours.out_proj.bias.expand(4, 12))
    if need_weights:
        close(outputs[1], weights.nan_to_num(0.0))
        loss = ours(x, x, x, **arguments)[1].sin().sum()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, ours.parameters(), materialize_grads=True))
    close(grads, wanted, 1e-9)


def test_masks_of_two_types_are_warned_about_in_torchs_words():
    x, padding, texts = normal(4, 2, 12), torch.zeros(2, 4, dtype=torch.bool), []
    for module in pair("MultiheadAttention", (12, 3), {}):
        with pytest.warns(UserWarning, match="mismatched") as caught:
            module(x, x, x, attn_mask=normal(4, 4), key_padding_mask=padding)
        texts.append(str(caught[0].message))
    assert texts[0] == texts[1]


# --- rounding ---

ROUNDED = {  # constructor, kwargs of the call
    "MultiheadAttention": [((32, 4), {}), ((32, 4), {"need_weights": False})],
    "TransformerEncoderLayer": [((32, 4, 64, 0.0, "gelu"), {})], "TransformerDecoderLayer": [((32, 4, 64, 0.0, "gelu"), {})],
}


@pytest.mark.few(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("backend", [None, TRITON])
def test_rounding_is_no_worse_than_torchs(backend, name, dtype, monkeypatch):
    """Error against fp64 at most twice torch's own; the floor is one rounding of the result."""
    for args, kwargs in ROUNDED[name]:
        theirs, ours = (module.to(dtype) for module in pair(name, args, {"batch_first": True}, 0.2))
        wide = build(nn, name, args, {"batch_first": True})
        wide.load_state_dict(ours.state_dict())
        inputs = [normal(2, 40, 32).to(dtype) for _ in range(INPUTS[name])]
        exact = itertools.chain(*results(wide, [x.double() for x in inputs], kwargs))
        other = itertools.chain(*results(theirs, inputs, kwargs))
        monkeypatch.setattr(settings, "BACKEND", backend)
        mine = itertools.chain(*results(ours, inputs, kwargs))
        for ref, a, b in zip(exact, other, mine, strict=True):
            assert b.dtype == dtype
            assert (b - ref).norm() <= 2 * (a - ref).norm() + EPS[dtype] * ref.norm()


# --- errors, in torch's words ---

X = torch.arange(120, dtype=torch.float64).reshape(2, 5, 12).sin()
SHORT, OTHER, FLAT = X[:, :4], X[..., :10], X[0]
BAD_CALLS = {  # args, kwargs
    "embed dim": ((OTHER, OTHER, OTHER), {}), "unbatched embed dim": ((OTHER[0],) * 3, {}),
    "2-D mask": ((X, X, X), {"attn_mask": torch.zeros(5, 6, dtype=torch.bool)}),
    "3-D mask": ((X, X, X), {"attn_mask": torch.zeros(2, 5, 5, dtype=torch.bool)}),
    "3-D float mask": ((X, SHORT, SHORT), {"attn_mask": torch.zeros(6, 5, 5)}),
    "4-D mask": ((X, X, X), {"attn_mask": torch.zeros(2, 3, 5, 5, dtype=torch.bool)}),
    "unbatched 3-D mask": ((FLAT,) * 3, {"attn_mask": torch.zeros(2, 5, 5, dtype=torch.bool)}),
    "unbatched 2-D mask": ((FLAT,) * 3, {"attn_mask": torch.zeros(5, 4, dtype=torch.bool)}),
    "padding of other keys": ((X, SHORT, SHORT), {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}),
    "padding of another batch": ((X, X, X), {"key_padding_mask": torch.zeros(3, 5, dtype=torch.bool)}),
    "unbatched padding": ((X, X, X), {"key_padding_mask": torch.zeros(5, dtype=torch.bool)}),
    "batched padding": ((FLAT,) * 3, {"key_padding_mask": torch.zeros(1, 5, dtype=torch.bool)}),
    "int mask": ((X, X, X), {"attn_mask": torch.zeros(5, 5, dtype=torch.int64)}),
    "int padding": ((X, X, X), {"key_padding_mask": torch.zeros(2, 5, dtype=torch.uint8)}),
    "causal without a mask": ((X, X, X), {"is_causal": True}),
    "unbatched query": ((FLAT, X, X), {}), "unbatched key": ((X, FLAT, FLAT), {}), "1-D query": ((FLAT[0], FLAT, FLAT), {}),
    "4-D query": ((X[None],) * 3, {}),
}


def errors(modules, *args, **kwargs):
    """What each module raises."""
    for module in modules:
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            module(*args, **kwargs)
        yield caught.value


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_raise_torchs_errors(case, need_weights):
    args, kwargs = BAD_CALLS[case]
    modules = pair("MultiheadAttention", (12, 3), {"batch_first": True})
    theirs, ours = errors(modules, *args, **kwargs, need_weights=need_weights)
    assert type(theirs) is type(ours)
    if "is_causal" in kwargs:  # ours says more
        assert str(ours).startswith(str(theirs).rstrip("."))
    else:
        assert str(ours) == str(theirs)


@pytest.mark.parametrize("kwargs", [{}, {"kdim": 12, "vdim": 5}], ids=["one projection", "three projections"])
def test_keys_and_values_that_do_not_match_raise_torchs_error(kwargs):
    # Not batch_first: torch would name shapes that it has transposed.
    theirs, ours = errors(pair("MultiheadAttention", (12, 3), kwargs), X, X, normal(3, 5, 12))
    assert "match value" in str(ours)
    assert repr(theirs) == repr(ours)


@pytest.mark.parametrize(("name", "mask"), [
    ("src_mask", torch.zeros(5, 5, dtype=torch.int64)), ("src_key_padding_mask", torch.zeros(2, 5, dtype=torch.int64)),
    ("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool)), ("is_causal", True)],
    ids=["int mask", "int padding", "padding of another batch", "causal without a mask"])
def test_layers_raise_torchs_errors(name, mask):
    modules = pair("TransformerEncoderLayer", (12, 3, 8, 0.0), {"batch_first": True})
    theirs, ours = errors(modules, X, **{name: mask})
    assert (type(theirs), str(theirs).rstrip(".")) == (type(ours), str(ours)[: len(str(theirs).rstrip("."))])


# --- no fast paths of torch's ---


@pytest.mark.parametrize("name", NAMES)
def test_no_fast_paths(name, monkeypatch):
    """Neither torch's quick C++ path, nor nested tensors, nor a search for causal masks, in the mode that has them all."""
    for function in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_nested_tensor_from_mask"):
        monkeypatch.setattr(torch, function, lambda *_, **__: pytest.fail("a fast path"))
    monkeypatch.setattr(nn.modules.transformer, "_detect_is_causal_mask", lambda *_, **__: pytest.fail("a fast path"))
    args = {"MultiheadAttention": (12, 2), "Transformer": (12, 2, 1, 1, 8)}.get(name, (12, 2, 8))
    theirs, ours = (module.eval() for module in pair(name, args, {"batch_first": True}))
    mask = {"MultiheadAttention": "attn_mask", "TransformerEncoder": "mask", "TransformerEncoderLayer": "src_mask"}
    causal = {mask.get(name, "tgt_mask"): nn.Transformer.generate_square_subsequent_mask(5).double()}
    inputs = (X,) * INPUTS[name]
    with torch.no_grad():
        if name != "TransformerDecoderLayer":  # which has none
            with pytest.raises(pytest.fail.Exception, match="a fast path"):
                theirs(*inputs)
        outs = [ours(*inputs), ours(*inputs, **causal)]
    close(outs, [ours(*inputs), ours(*inputs, **causal)])  # where gradients are wanted


# --- dropout ---


def test_dropout_of_the_layers_is_torchs():
    """Where everything is dropped there is one answer."""
    for name in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        modules = pair(name, (12, 3, 8, 1.0), {"batch_first": True, "norm_first": True})
        compare(*modules, (X, SHORT)[: INPUTS[name]], {})


@pytest.mark.parametrize(("backend", "draws"), [(None, 4000), pytest.param("triton", 6, marks=pytest.mark.kernels)])
def test_dropout_of_weights_in_distribution(backend, draws, monkeypatch):
    """Dropped at the rate, grown where kept; and the weights returned are those that made the output."""
    monkeypatch.setattr(settings, "BACKEND", backend)
    ours = MultiheadAttention(12, 3, dropout=0.3, batch_first=True, dtype=torch.float64)
    nn.init.normal_(ours.in_proj_bias)
    x = X[:1].expand(draws, -1, -1)
    with torch.no_grad():
        out, weights = ours(x, x, x, average_attn_weights=False)
        plain, exact = ours.eval()(x[:1], x[:1], x[:1], average_attn_weights=False)
        v = (x @ ours.in_proj_weight[24:].T + ours.in_proj_bias[24:]).unflatten(-1, (3, 4)).transpose(1, 2)
        close(out, ours.out_proj((weights @ v).transpose(1, 2).flatten(2)))
        close(ours.train()(x, x, x)[1].mean(0), exact[0].mean(0), 4 / draws**0.5)
        alone = ours(x, x, x, need_weights=False)[0]
    kept = weights != 0
    close(weights[kept], (exact / 0.7).expand_as(weights)[kept])
    n = weights.numel()
    assert abs(kept.double().mean() - 0.7) < 5 * (0.21 / n) ** 0.5
    assert kept.flatten(0, 1).unique(dim=0).shape[0] > 1  # heads and batch entries draw their own
    for mean in (out.mean(0), alone.mean(0)):
        close(mean, plain[0], 4 / draws**0.5)


# --- copies ---


COPIED = {
    "plain": {}, "separate": {"kdim": 24, "vdim": 24, "add_bias_kv": True}, "grouped": {"num_kv_heads": 2, "sinks": True},
    "positions": {"rope": RotaryEmbedding(6), "causal": True, "window": (3, 0), "softcap": 5.0}, "alibi": {"alibi": True},
    "decoder": {"num_kv_heads": 1, "rope": RotaryEmbedding(4, interleaved=True), "sinks": True, "causal": True},
}


def made(case):
    if case == "decoder":
        return TransformerDecoder(TransformerDecoderLayer(24, 4, 16, 0.0, batch_first=True, **COPIED[case]), 2).eval()
    return MultiheadAttention(24, 4, batch_first=True, **COPIED[case]).eval()


def reloaded(case, module):
    (twin := made(case)).load_state_dict(module.state_dict(), strict=True)
    return twin


@pytest.mark.parametrize("case", COPIED)
def test_copies_are_equal_to_the_bit(case):
    module = made(case)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = normal(2, 9, 24, dtype=torch.float32)
    out = module(*(inputs := (x, x.flip(1)) if case == "decoder" else (x, x, x)))
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, reloaded(case, module)):
        assert torch.equal(*((y if case == "decoder" else y[0]) for y in (out, twin(*inputs))))
        assert repr(twin) == repr(module)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}
