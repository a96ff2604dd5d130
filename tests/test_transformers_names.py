"""Under which names models of transformers run the plug, which models can, and what others do to the names."""

import copy
import importlib
import sys

import pytest
import torch

T = pytest.importorskip("transformers")
fused = pytest.importorskip("fused_attn.integrations.transformers")

pytestmark = pytest.mark.filterwarnings("default:::transformers")

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LEFT = torch.arange(7) >= torch.tensor([[3], [0]])


def close(actual, expected, tolerance=1e-12):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_any_name_from_a_config_or_a_checkpoint(tmp_path):
    fused.register("mine")
    model = T.LlamaForCausalLM(T.LlamaConfig(**SMALL, intermediate_size=32)).eval()
    model.save_pretrained(tmp_path)
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="mine").eval()
    made = T.AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="mine").eval()
    made.load_state_dict(model.state_dict())
    ids, mask = torch.randint(3, 61, (2, 7)), LEFT.long()
    model.set_attn_implementation("eager")
    for twin in (loaded, made):
        assert twin.config._attn_implementation == "mine"
        close(twin(ids, attention_mask=mask).logits[LEFT], model(ids, attention_mask=mask).logits[LEFT], 2e-6)


@pytest.mark.parametrize("family", ["Bloom", "Falcon", "Mpt", "Deberta", "DebertaV2", "XLNet", "Sam", "Git", "GPTNeo"])
def test_families_beside_the_interface(family):
    """Their attention is their own: a model is not made, and one that is there stays with eager, as transformers warns."""
    config = getattr(T, f"{family}Config")(**{name: 2 for name in ("num_hidden_layers", "n_layers") if family != "GPTNeo"})
    fused.register()
    with pytest.raises(ValueError, match=r"attn_implementation: .*such as 'eager'.*code of its own"):
        getattr(T, f"{family}Model")._from_config(config, attn_implementation="fused_attn")


def test_one_beside_the_interface_stays_with_eager():
    model = T.BloomModel(T.BloomConfig(**SMALL))
    before = model.config._attn_implementation
    fused.register()
    model.set_attn_implementation("fused_attn")  # transformers warns
    assert model.config._attn_implementation == before == "eager"


def llama(**options):
    return T.AutoModelForCausalLM.from_config(T.LlamaConfig(**SMALL, intermediate_size=32), **options)


def test_an_attention_with_arguments_that_are_not_known_is_refused(monkeypatch):
    """As of one whose eager code takes a bias or a sink under a name of its own."""
    module = sys.modules[T.LlamaModel.__module__]

    def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, extra_sinks=None, **kwargs):
        raise AssertionError

    fused.register()
    llama(attn_implementation="fused_attn")
    monkeypatch.setattr(module, "eager_attention_forward", eager_attention_forward)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM can use.*gives attention extra_sinks, which is not known"):
        llama(attn_implementation="fused_attn")


COMMON = """
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, {base}

class Custom({base}):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = {layer}(config)
        self.post_init()

    def forward(self, x):
        return self.layer(x)
"""
ATTEND = """
class {name}(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        {init}

    def forward(self, x):
        return {forward}
"""


def custom(layer, code="", base="PreTrainedModel", parts=""):
    """{name: text} of the files of a model of somebody's, as trust_remote_code has them."""
    return {"modeling_custom": COMMON.format(base=base, layer=layer) + code, "custom_parts": "import torch\n" + parts}


def attention(name, forward, init="self.out = torch.nn.Linear(32, 32)"):
    return ATTEND.format(name=name, forward=forward, init=init)


BY_HAND, SDPA = "(x @ x.mT).softmax(-1) @ x", "F.scaled_dot_product_attention(x, x, x)"
ASKS = "ALL_ATTENTION_FUNCTIONS.get_interface('sdpa', None)(self, x, x, x, None)[0]"
IMPORT = "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS\n"
OWN = {  # attention that transformers' interface does not see
    "torch.nn.Module": custom("MyAttention", attention("MyAttention", BY_HAND)),
    "of any name": custom("Mix", attention("Mix", BY_HAND)), "torch's function": custom("Mix", attention("Mix", SDPA)),
    "torch's module": custom("Mix", attention("Mix", "self.mix(x, x, x)[0]", "self.mix = torch.nn.MultiheadAttention(32, 4)")),
    "in a layer": custom("Layer", attention("Layer", "self.mix(x)", "self.mix = Mix()") + attention("Mix", BY_HAND)),
    "in another file": custom("Mix", "from custom_parts import Mix\n", parts=attention("Mix", BY_HAND)),
    "in another file, by its module": custom("custom_parts.Mix", "import custom_parts\n", parts=attention("Mix", BY_HAND)),
    "in a table": custom("TABLE['own']", attention("Mix", BY_HAND) + "TABLE = {'own': Mix}\n"),
    "in a function": custom("Mix", f"def mix(x):\n    return {BY_HAND}\n" + attention("Mix", "mix(x)")),
    "of a family's base class": custom("Mix", attention("Mix", BY_HAND), "LlamaPreTrainedModel"),
}
SEEN = {  # models that go through it, or that have no attention
    "its own layer": custom("MyAttention", IMPORT + attention("MyAttention", ASKS)),
    "imported late": custom("Mix", f"def mix(self, x):\n    {IMPORT}    return {ASKS}\n" + attention("Mix", "mix(self, x)")),
    "in another file": custom("MyAttention", "from custom_parts import MyAttention\n", parts=IMPORT + attention(
        "MyAttention", ASKS)),
    "a family's layer": custom("Layer", "from transformers.models.llama.modeling_llama import LlamaAttention\n" + attention(
        "Layer", "x", "self.mix = LlamaAttention(config, 0)")),
    "a family's model": custom("Unused", attention("MyAttention", BY_HAND) + (
        "from transformers import LlamaModel\nclass Custom(LlamaModel): pass\n")),
    "AutoModel": custom("Pool", "from transformers import AutoModel\n" + attention(
        "Pool", BY_HAND, "self.mix = AutoModel.from_config(config)")),
    "no attention": custom("Convolution", attention("Convolution", "x")),
}


def import_model(files, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setitem(sys.modules, name, None)  # out again after the test
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("modeling_custom").Custom, T.LlamaConfig(**SMALL, intermediate_size=32)


@pytest.mark.parametrize("case", OWN)
def test_custom_models_beside_the_interface(case, tmp_path, monkeypatch):
    fused.register()
    model, config = import_model(OWN[case], tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"attn_implementation: .*Custom can use, such as 'eager'.*code of its own"):
        model._from_config(config, attn_implementation="fused_attn")


@pytest.mark.parametrize("case", SEEN)
def test_custom_models_that_use_the_interface(case, tmp_path, monkeypatch):
    fused.register()
    model, config = import_model(SEEN[case], tmp_path, monkeypatch)
    assert model._from_config(config, attn_implementation="fused_attn").config._attn_implementation == "fused_attn"


@pytest.mark.parametrize("make", [lambda name: llama(attn_implementation=name),
                                  lambda name: llama().set_attn_implementation(name)], ids=["made", "set"])
def test_paged_variants_are_refused(make):
    fused.register()
    with pytest.raises(ValueError, match=r"no paged variant of 'fused_attn'"):
        make("paged|fused_attn")


def assigned(family, name, **options):
    """A model whose config was given an implementation behind its back."""
    model = getattr(T, f"{family}Model")(getattr(T, f"{family}Config")(**SMALL, **options)).eval()
    model.config._attn_implementation = name
    return lambda: model(torch.randint(3, 61, (2, 7)))


def test_what_is_assigned_to_a_config_is_refused_when_it_runs(monkeypatch):
    fused.register()
    with pytest.raises(ValueError, match=r"attn_implementation: .*got 'paged\|fused_attn'.*no masks.*paged caches"):
        assigned("Llama", "paged|fused_attn", intermediate_size=32)()
    monkeypatch.setitem(T.AttentionInterface._global_mapping, "alias", fused.attention_forward)
    with pytest.raises(ValueError, match=r"attn_implementation: .*got 'alias': transformers makes no masks for it$"):
        assigned("Llama", "alias", intermediate_size=32)()
    assert assigned("Llama", "fused_attn", intermediate_size=32)()


@pytest.mark.parametrize("family", ["Falcon", "Bloom", "Mpt"])
def test_what_is_assigned_to_the_config_of_a_family_beside_the_interface(family):
    """Those that ask for a mask; of one that makes its own nothing is seen here."""
    fused.register()
    with pytest.raises(ValueError, match=rf"attn_implementation: .*models of a {family}Config can use.*code of its own"):
        assigned(family, "fused_attn")()


NAMES = ("eager", "sdpa", "flash_attention_2", "my_flash", "sdpa_mine", "flex_attention", "org/kernel", "paged|eager", "a|b",
         "a:b", "a@b", "", None, 3, "of_others", "Flash", "SDPA", "EAGER", " eager", "x\n", "a b", "paged", "None", "default")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_mean_something_else_are_refused(name, monkeypatch):
    monkeypatch.setitem(T.AttentionInterface._global_mapping, "of_others", lambda *args: None)
    before = dict(T.AttentionInterface._global_mapping), dict(T.AttentionMaskInterface._global_mapping)
    with pytest.raises(ValueError, match="name: expected"):
        fused.register(name)
    assert before == (T.AttentionInterface._global_mapping, T.AttentionMaskInterface._global_mapping)


def test_unregister_leaves_transformers_as_it_was(monkeypatch):
    monkeypatch.setattr(fused, "_names", {})
    for methods in fused._CHECKS.values():
        monkeypatch.setattr(T.PreTrainedModel, methods[0].__name__, methods[0])

    def state():
        return (dict(T.AttentionInterface._global_mapping), dict(T.AttentionMaskInterface._global_mapping),
                [getattr(T.PreTrainedModel, method) for method in fused._CHECKS])

    for interface in (T.AttentionInterface, T.AttentionMaskInterface):
        for name in ("fused_attn", "mine"):
            interface._global_mapping.pop(name, None)
    before = state()
    for name in ("fused_attn", "mine", "mine"):
        fused.register(name)
    fused.unregister("mine")
    llama(attn_implementation="fused_attn")
    with pytest.raises(ValueError, match="mine"):
        llama(attn_implementation="mine")
    fused.unregister()
    assert state() == before
    with pytest.raises(KeyError, match="expected one that is registered"):
        fused.unregister()
    fused.register()


@pytest.mark.parametrize("theirs", ["attention", "mask", "attention of one library"])
def test_what_others_registered_stays(theirs, monkeypatch):
    """Neither replaced nor removed; without ours, the name is free again."""
    monkeypatch.setattr(fused, "_names", {})
    interface = T.AttentionMaskInterface if theirs == "mask" else T.AttentionInterface
    monkeypatch.setattr(T.AttentionInterface, "_global_mapping", dict(T.AttentionInterface._global_mapping))
    monkeypatch.setattr(T.AttentionMaskInterface, "_global_mapping", dict(T.AttentionMaskInterface._global_mapping))
    local = fused.ALL_ATTENTION_FUNCTIONS._local_mapping
    fused.register("of_two")

    def mine():
        raise AssertionError

    if theirs == "attention of one library":
        monkeypatch.setitem(local, "of_two", mine)
    else:
        interface.register("of_two", mine)
    with pytest.raises(ValueError, match="it is taken"):
        fused.register("of_two")
    fused.unregister("of_two")
    left = {**interface._global_mapping, **local}
    assert left["of_two"] is mine
    with pytest.raises(ValueError, match="it is taken"):
        fused.register("of_two")


@pytest.mark.parametrize("gone", ["attention", "mask", "both"])
def test_a_registration_that_others_removed(gone, monkeypatch):
    monkeypatch.setattr(fused, "_names", {})
    interfaces = {"attention": [T.AttentionInterface], "mask": [T.AttentionMaskInterface]}.get(
        gone, [T.AttentionInterface, T.AttentionMaskInterface])

    def remove():
        for interface in interfaces:
            del interface._global_mapping["half"]

    for _ in range(2):
        fused.register("half")
        remove()
    fused.register("half")
    assert "half" in T.AttentionInterface._global_mapping.keys() & T.AttentionMaskInterface._global_mapping.keys()
    remove()
    fused.unregister("half")
    assert "half" not in T.AttentionInterface._global_mapping.keys() | T.AttentionMaskInterface._global_mapping.keys()
    assert "half" not in fused._names


@pytest.mark.parametrize(("version", "told"), [("5.3.9", ImportError), ("4.57.6", ImportError), ("5.99.0.dev0", RuntimeWarning),
                                               ("6.0.0", RuntimeWarning)])
def test_versions_beyond_the_tested_ones(version, told, monkeypatch):
    monkeypatch.setattr(fused.transformers, "__version__", version)
    with pytest.warns(told, match=version) if issubclass(told, Warning) else pytest.raises(told, match=version):
        fused.register()
