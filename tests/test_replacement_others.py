"""replace_attention beside what others do to a model: all is undone or nothing, and never what is somebody else's."""

import pytest
from test_replacement import LENGTH, MODELS, WIDTH, SelfAttention, build, equal, normal, snapshot
from torch import nn

from fused_attn import nn as fused
from fused_attn import replace_attention

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def sharded(module):
    """As ``fully_shard`` does: another class, of the one that it finds, on the same object."""
    module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})


CHANGED = {
    "parametrized": lambda model: nn.utils.parametrize.register_parametrization(model.mixer, "in_proj_weight", Doubled()),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model.mixer, "in_proj_weight"),
    "sharded": lambda model: sharded(model.mixer),
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("way", ["restore", "with"])
def test_a_class_that_others_gave_is_not_overwritten(change, way):
    """Nor is anything else restored, until it is undone."""
    model, x = build("custom"), normal(3, LENGTH, WIDTH)
    before = snapshot(model)
    report = replace_attention(model)
    CHANGED[change](model)
    within, expected = [type(module) for module in model.modules()], model(x)
    with pytest.raises(RuntimeError, match=r"restore: expected the classes .*\n  mixer: \w+MultiheadAttention$"):
        report.restore() if way == "restore" else report.__exit__(None, None, None)
    assert [type(module) for module in model.modules()] == within
    assert report.replaced == ["mixer", "other"]
    assert equal([model(x)], [expected])
    if change == "sharded":
        model.mixer.__class__ = type(model.mixer).__base__
    else:
        nn.utils.parametrize.remove_parametrizations(model.mixer, "in_proj_weight")
    report.restore()
    assert [kind for _, kind, _ in snapshot(model)] == [kind for _, kind, _ in before]


@pytest.mark.parametrize("change", ["parametrized", "sharded"])
def test_a_class_that_others_gave_before_is_kept(change):
    model = build("custom")
    CHANGED[change](model)
    kind = type(model.mixer)
    with replace_attention(model) as report:
        assert report.replaced == ["other"]
        assert type(model.mixer) is kind
    assert type(model.mixer) is kind


def test_hooks_of_the_users_own_stay_the_same_function_too():
    """torch's C++ path is kept off by a hook that does nothing; one may have registered the very same oneself."""
    model = build("custom")
    stay = fused.attention.stay_in_python
    first = model.mixer.register_forward_pre_hook(stay)
    with replace_attention(model):
        second = model.mixer.register_forward_pre_hook(stay)
        assert len(model.mixer._forward_pre_hooks) == 3
    assert list(model.mixer._forward_pre_hooks) == [first.id, second.id]
    replaced = replace_attention(model)
    model.mixer._forward_pre_hooks.clear()
    kept = model.mixer.register_forward_pre_hook(stay)
    replaced.restore()
    assert list(model.mixer._forward_pre_hooks) == [kept.id]


def test_attributes_that_others_set_in_between_stay():
    model = build("classifier")
    assert model.encoder.use_nested_tensor
    with replace_attention(model):
        assert not model.encoder.use_nested_tensor
        model.encoder.use_nested_tensor = "theirs"
    assert model.encoder.use_nested_tensor == "theirs"


@pytest.mark.parametrize("case", ["transformer", "custom", "own layers"])
@pytest.mark.parametrize("at", [1, 2, -1])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_halfway_changes_nothing(case, at, error, monkeypatch):
    model, count = build(case), MODELS[case][1]
    before, seen, register = snapshot(model), [], nn.Module.register_forward_pre_hook
    attentions = sum(type(module) is nn.MultiheadAttention for module in model.modules())

    def fails(module, hook):
        seen.append(module)
        if len(seen) == (attentions if at < 0 else min(at, attentions)):
            raise error("no")
        return register(module, hook)

    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", fails)
    with pytest.raises(error, match="no"):
        replace_attention(model)
    assert seen
    assert snapshot(model) == before
    monkeypatch.undo()
    assert len(replace_attention(model).replaced) == count


# --- containers ---


class CrossAttnDownBlock(nn.Module):
    """As diffusers names its containers."""

    def __init__(self):
        super().__init__()
        self.attentions = nn.ModuleList([SelfAttention()])
        self.resnet = nn.Linear(2, 2)


class AttentionStack(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer = nn.MultiheadAttention(WIDTH, 2)


def test_what_only_contains_attention_is_not_listed():
    model = nn.Sequential(CrossAttnDownBlock(), AttentionStack(), SelfAttention())
    report = replace_attention(model)
    assert [name for name, _ in report.kept] == ["0.attentions.0", "2"]
    assert report.replaced == ["1.mixer"]
    assert replace_attention(AttentionStack(), strict=True).replaced == ["mixer"]
    assert replace_attention(nn.Sequential(AttentionStack()), strict=True).kept == []
    again = replace_attention(model)  # what is fused already is attention, too
    assert [name for name, _ in again.kept] == ["0.attentions.0", "2"]
