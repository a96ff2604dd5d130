"""replace_attention: the same objects with the same answers, another class in between, and the way back to the bit."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.own_layers import OwnEncoder, OwnLayer
from torch import nn

from fused_attn import nn as fused
from fused_attn import replace_attention, settings
from fused_attn.kernels import launch

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}:UserWarning") for text in (  # of torch's own stacks
    "enable_nested_tensor is True", "The PyTorch API of nested tensors")]

WIDTH, LENGTH = 16, 6
PADDING = torch.arange(LENGTH) >= torch.tensor([[4], [6], [1]])
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def encoder_layer(cls=nn.TransformerEncoderLayer, **options):
    return cls(WIDTH, 2, 24, 0.0, batch_first=True, **options)


# --- models made of torch's modules: what they compute at positions that are no padding ---


class Translation(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Transformer(WIDTH, 2, 2, 2, 24, 0.0, batch_first=True)

    def forward(self, x):
        return self.body(x, x.flip(1), src_key_padding_mask=PADDING, tgt_mask=CAUSAL, tgt_is_causal=True,
                         memory_key_padding_mask=PADDING)


class Classifier(nn.Module):
    """The stock recipe: nested tensors and the C++ path wherever torch can take them; the mean of what is no padding."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.TransformerEncoder(encoder_layer(**options), 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.encoder(x, src_key_padding_mask=PADDING)
        return self.head(x.masked_fill(PADDING[..., None], 0.0).sum(1) / (~PADDING).sum(1, keepdim=True))


class Custom(nn.Module):
    """torch's attention in a block of one's own; weights are wanted, too."""

    def __init__(self, **options):
        super().__init__()
        self.mixer = nn.MultiheadAttention(WIDTH, 2, batch_first=True, **options)
        self.other = nn.MultiheadAttention(WIDTH, 4, kdim=5, vdim=7)

    def forward(self, x):
        heard, weights = self.mixer(x, x, x, key_padding_mask=PADDING)
        x = (x + heard).transpose(0, 1)
        return self.other(x, x[..., :5], x[..., :7], need_weights=False)[0].sin() + weights.sum(2).cos().mean()


class Shared(nn.Module):
    """One layer under two names, and called twice."""

    def __init__(self):
        super().__init__()
        self.first = self.second = encoder_layer()
        self.blocks = nn.ModuleList([self.first])

    def forward(self, x):
        return self.second(self.first(x).sin(), src_mask=CAUSAL)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, query, key, value, **kwargs):
        return super().forward(query.sin(), key, value, **kwargs)


class OwnLayers(nn.Module):
    """torch's code in classes of the model's own, around torch's layers."""

    def __init__(self):
        super().__init__()
        self.deep = OwnEncoder(encoder_layer(), 2)
        self.flat = encoder_layer(OwnLayer)

    def forward(self, x):
        return self.flat(self.deep(x, src_key_padding_mask=PADDING).masked_fill(PADDING[..., None], 0.0))


class SelfAttention(nn.Module):
    """Someone's own."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Mixed(nn.Module):
    """Of everything that is kept, one, beside one that is not."""

    def __init__(self):
        super().__init__()
        self.own, self.foreign = OwnAttention(WIDTH, 2, batch_first=True), SelfAttention()
        self.changed, self.plain = (nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))
        self.changed.forward = lambda x, *_: (3 * nn.MultiheadAttention.forward(self.changed, x, x, x)[0],)

    def forward(self, x):
        x = self.own(x, x, x)[0] + self.foreign(x)
        x = x + self.changed(x, x, x)[0]
        return self.plain(x, x, x)[0]


MODELS = {  # and how many modules are fused afterwards
    "transformer": (Translation, 1 + 2 + 2 * 2 + 2 * 3), "classifier": (Classifier, 1 + 2 * 2),
    "pre-norm, gelu": (lambda: Classifier(norm_first=True, activation="gelu"), 1 + 2 * 2), "custom": (Custom, 2),
    "bias and zeros": (lambda: Custom(add_bias_kv=True, add_zero_attn=True, bias=False), 2), "shared": (Shared, 2),
    "own layers": (OwnLayers, 2 * 2 + 1), "mixed": (Mixed, 1),
}
MODEL = pytest.mark.parametrize("case", MODELS)


def build(case):
    """fp64, with random norms and biases too."""
    model = MODELS[case][0]().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def outcome(model, x):
    """Output and all gradients in training, output in the mode in which torch takes its fast paths."""
    x = x.clone().requires_grad_()
    out = model.train()(x)
    grads = torch.autograd.grad(out.sin().sum(), [x, *model.parameters()], materialize_grads=True)
    with torch.no_grad():
        return out, *grads, model.eval()(x)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=tolerance, atol=tolerance)


def equal(actual, expected):
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def snapshot(model):
    """Class and attributes of every module; dictionaries of modules, parameters and hooks by what is in them."""
    return [(name, type(module), {key: dict(x) if isinstance(x, dict) else x for key, x in vars(module).items()})
            for name, module in model.named_modules(remove_duplicate=False)]


# --- the same answers ---


@MODEL
def test_outputs_and_gradients_stay(case):
    model, x = build(case), normal(3, LENGTH, WIDTH)
    expected = outcome(model, x)
    report = replace_attention(model)
    assert len(report.replaced) == MODELS[case][1]
    assert all(type(model.get_submodule(name)) is getattr(fused, type(model.get_submodule(name)).__name__)
               for name in report.replaced)
    close(outcome(model, x), expected)


@pytest.mark.kernels
@pytest.mark.parametrize("case", ["classifier", "shared"])
def test_outputs_and_gradients_on_the_kernels(case, monkeypatch):
    model, x = build(case), normal(3, LENGTH, WIDTH)
    expected = outcome(model, x)
    replace_attention(model)
    monkeypatch.setattr(settings, "BACKEND", "triton")
    with launch.counted() as launches:
        results = outcome(model, x)
    close(results, expected)
    assert launches["forward_kernel"] == 2 * launches["dq_kernel"] == 4  # two layers, twice


@pytest.mark.parametrize("name", ["MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer",
                                  "TransformerEncoder", "TransformerDecoder", "Transformer"])
def test_the_model_itself_may_be_one(name):
    model = nn.Transformer(WIDTH, 2, 1, 1, 8)
    module = next(module for module in model.modules() if type(module).__name__ == name)
    with replace_attention(module) as report:
        assert type(module) is getattr(fused, name)
        assert report.replaced[0] == ""
        assert report.model is module
        assert str(report).splitlines()[1] == "  (the model itself)"
    assert type(module) is getattr(nn, name)


# --- the same objects ---


@MODEL
def test_state_parameters_and_modules_are_the_same_objects(case):
    model = build(case)
    objects = {id(x) for x in (*model.parameters(), *model.buffers(), *model.modules())}
    names, state = [name for name, _ in model.named_parameters()], model.state_dict()
    with replace_attention(model):
        assert {id(x) for x in (*model.parameters(), *model.buffers(), *model.modules())} == objects
        assert [name for name, _ in model.named_parameters()] == names
        after = model.state_dict()
        assert list(after) == list(state)
        assert after._metadata == state._metadata
        assert all(after[name].data_ptr() == x.data_ptr() for name, x in state.items())
        build(case).load_state_dict(after)
        model.load_state_dict(build(case).state_dict())


def test_hooks_go_on_firing():
    model, x, fired = build("classifier"), normal(3, LENGTH, WIDTH), []
    layer = model.encoder.layers[0]
    for module in (layer, layer.self_attn, model.encoder):
        module.register_forward_pre_hook(lambda module, args: fired.append(("before", id(module))))
        module.register_forward_hook(lambda module, args, out: fired.append(("after", id(module))))
        module.register_full_backward_hook(lambda module, *grads: fired.append(("backward", id(module))))
    outcome(model, x)
    before, fired[:] = list(fired), []
    with replace_attention(model):
        outcome(model, x)
    assert fired == before
    assert len(before) == 3 * (2 + 2 + 1)  # each module: two forwards, one backward


def test_a_hook_registered_within_stays_after():
    model, calls = build("custom"), []
    with replace_attention(model):
        handle = model.mixer.register_forward_pre_hook(lambda *_: calls.append(1))
        model(normal(3, LENGTH, WIDTH))
    model(normal(3, LENGTH, WIDTH))
    assert len(calls) == 2
    handle.remove()
    assert not model.mixer._forward_pre_hooks


def test_optimizers_go_on_with_their_state():
    model, x = build("classifier"), normal(3, LENGTH, WIDTH)
    twin = copy.deepcopy(model)
    adams = [torch.optim.Adam(m.parameters(), 0.01) for m in (model, twin)]

    def steps(count):
        for m, adam in zip((model, twin), adams, strict=True):
            for _ in range(count):
                adam.zero_grad()
                m.train()(x).square().sum().backward()
                adam.step()

    steps(2)
    report = replace_attention(model)
    steps(2)
    close(model.parameters(), twin.parameters(), 1e-8)
    report.restore()
    steps(1)
    close(model.parameters(), twin.parameters(), 1e-8)
    assert {state["step"].item() for state in adams[0].state.values()} == {5}


@pytest.mark.parametrize("place", [{"device": "meta"}, {"dtype": torch.bfloat16}], ids=str)
def test_device_dtype_mode_and_frozen_weights_are_kept(place):
    model = nn.Transformer(WIDTH, 2, 1, 1, 24, 0.3, **place)
    model.encoder.eval()
    model.decoder.layers[0].self_attn.in_proj_weight.requires_grad_(False)

    def kept():
        return ([(name, p.device, p.dtype, p.requires_grad) for name, p in model.named_parameters()],
                [(name, m.training, getattr(m, "dropout", None)) for name, m in model.named_modules()])

    before = kept()
    assert len(replace_attention(model).replaced) == 1 + 2 + 2 * 1 + 3
    assert kept() == before


# --- copies of a replaced model ---


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("case", ["transformer", "classifier", "bias and zeros", "own layers"])
def test_copies_are_replaced_too_and_independent(case, way):
    model, x = build(case), normal(3, LENGTH, WIDTH)
    report = replace_attention(model)
    expected = outcome(model, x)
    twin = way(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    report.restore()
    assert equal(outcome(twin, x), expected)
    assert not replace_attention(twin).replaced  # they are already


# --- and back ---


@MODEL
@pytest.mark.parametrize("way", ["restore", "with", "exception"])
def test_restored_to_the_class_the_attribute_and_the_bit(case, way):
    model, x = build(case), normal(3, LENGTH, WIDTH)
    expected, before = outcome(model, x), snapshot(model)
    if way == "restore":
        report = replace_attention(model)
        assert report.restore() is model
        assert report.restore() is model  # once more changes nothing
    else:
        with pytest.raises(KeyError) if way == "exception" else torch.enable_grad(), replace_attention(model) as report:
            outcome(model, x)
            if way == "exception":
                raise KeyError
    assert report.replaced == []
    assert snapshot(model) == before
    assert equal(outcome(model, x), expected)


def test_weights_trained_in_between_stay():
    model, x = build("classifier"), normal(3, LENGTH, WIDTH)
    with replace_attention(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        expected = outcome(model, x)
    close(outcome(model, x), expected)


@MODEL
@pytest.mark.parametrize("order", ["inner first", "outer first"])
def test_replaced_twice_is_harmless(case, order):
    model, x = build(case), normal(3, LENGTH, WIDTH)
    expected, before = outcome(model, x), snapshot(model)
    reports = [replace_attention(model) for _ in range(2)]
    assert len(reports[0].replaced) == MODELS[case][1]
    assert reports[1].replaced == []
    assert reports[1].kept == reports[0].kept
    close(outcome(model, x), expected)
    for report in reversed(reports) if order == "inner first" else reports:
        report.restore()
    assert snapshot(model) == before


# --- reports, strict, errors ---

REASONS = [
    ("own", "OwnAttention, a subclass of torch's MultiheadAttention, has code of its own"),
    ("foreign", "SelfAttention is not torch's; within patch_sdpa() its scaled_dot_product_attention runs fused"),
    ("changed", "its forward was replaced on the instance"),
]


def test_the_report_of_what_was_done_and_what_was_not():
    report = replace_attention(build("mixed"))
    assert report.replaced == ["plain"]
    assert report.kept == REASONS
    assert str(report).splitlines() == [
        "1 modules run fused attention", "  plain", "3 kept as they were", *(f"  {name}: {why}" for name, why in REASONS)]
    report = replace_attention(build("own layers"))
    assert report.kept == [("deep", "OwnEncoder, a subclass of torch's TransformerEncoder, has code of its own"),
                           ("flat", "OwnLayer, a subclass of torch's TransformerEncoderLayer, has code of its own")]
    layers = ["deep.layers.0", "deep.layers.1"]
    assert sorted(report.replaced) == sorted([*layers, *(f"{layer}.self_attn" for layer in (*layers, "flat"))])
    assert str(replace_attention(nn.Linear(2, 2))) == "0 modules run fused attention"
    assert replace_attention(build("shared")).replaced == ["first", "first.self_attn"]


@pytest.mark.parametrize(("case", "reasons"), [("mixed", [f"{name}: {why}" for name, why in REASONS]), ("own layers", [
    "deep: OwnEncoder, a subclass", "flat: OwnLayer, a subclass"])])
def test_strict_raises_and_changes_nothing(case, reasons):
    model = build(case)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="strict: not everything would run fused") as caught:
        replace_attention(model, strict=True)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == len(reasons)
    assert all(line.startswith(f"  {reason}") for line, reason in zip(lines, reasons, strict=True))
    assert snapshot(model) == before
    assert len(replace_attention(build("classifier"), strict=True).replaced) == MODELS["classifier"][1]


@pytest.mark.parametrize("model", [None, nn.Linear, torch.zeros(2)], ids=["None", "a class", "a tensor"])
def test_anything_but_a_module_is_refused(model):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module; got (NoneType|type|Tensor)"):
        replace_attention(model)
