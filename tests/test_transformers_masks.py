"""What the transformers plug takes for a mask, pattern by pattern, and under which names models run it."""

import copy

import pytest
import torch
from torch import nn

from fused_attn import settings

T = pytest.importorskip("transformers")
fused = pytest.importorskip("fused_attn.integrations.transformers")
masking = pytest.importorskip("transformers.masking_utils")

pytestmark = pytest.mark.filterwarnings("default:::transformers")

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def close(actual, expected, tolerance=1e-12):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# --- masks ---


def block(batch, head, q, k):
    """Patches of an image, which see each other whatever their order."""
    return (q // 3 == k // 3) & (k > 2)


causal, both_ways, windowed = (
    masking.causal_mask_function, masking.bidirectional_mask_function, masking.sliding_window_causal_mask_function)
PACKS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]])
PLACES = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]])
LEFT, ALL = torch.arange(7) >= torch.tensor([[3], [0]]), torch.ones(2, 7, dtype=torch.bool)
PATTERNS = {  # dimensions of the mask, 0 for none; pattern, its window, and what differs from 7 queries over 7 keys
    "causal": (0, causal, None, {}), "nothing padded": (0, causal, None, {"attention_mask": ALL}),
    "a token": (0, causal, None, {"q_length": 1, "q_offset": 6}), "a chunk": (0, causal, None, {"q_length": 3, "q_offset": 4}),
    "left padding": (2, causal, None, {"attention_mask": LEFT}),
    "right padding": (2, causal, None, {"attention_mask": LEFT.flip(1)}),
    "mask of the past alone": (2, causal, None, {"q_length": 3, "q_offset": 4, "attention_mask": ALL[:, :5]}),
    "window": (3, windowed(3), 3, {}),
    "window, padding": (3, windowed(3), 3, {"attention_mask": LEFT}),
    "window, the past cut off": (2, windowed(4), 4, {
        "q_length": 1, "kv_length": 4, "q_offset": 6, "kv_offset": 3, "attention_mask": LEFT.roll(2, 1)}),
    "window, padding cut off": (0, windowed(4), 4, {
        "q_length": 1, "kv_length": 4, "q_offset": 6, "kv_offset": 3, "attention_mask": LEFT}),
    "both ways": (0, both_ways, None, {}), "both ways, padding": (4, both_ways, None, {"attention_mask": LEFT}),
    "other queries": (4, both_ways, None, {"q_length": 4, "attention_mask": LEFT}),
    "window both ways": (4, masking.sliding_window_bidirectional_mask_function(2), 2, {}),
    "chunks": (4, masking.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)), 3, {}),
    "packed": (4, masking.packed_sequence_compatibility_function(causal, PLACES, PACKS), None, {}),
    "packed, window": (4, masking.packed_sequence_compatibility_function(
        windowed(2), PLACES, PACKS), 2, {}),
    "blocks": (4, masking.or_masks(causal, masking.blockwise_overlay(PACKS)), None, {}),
    "blocks beside a window": (4, masking.or_masks(windowed(2), block), 2, {}),
    "part of causal": (4, masking.and_masks(causal, block), None, {}),
    "window or causal": (4, masking.or_masks(masking.sliding_window_overlay(3), causal), 3, {}),
    "causal and a window": (4, masking.and_masks(causal, masking.sliding_window_overlay(3)), 3, {}),
    "half a window": (4, masking.and_masks(masking.sliding_window_overlay(3), both_ways), 3, {}),
    "another window": (4, windowed(2), 3, {}), "static cache": (4, causal, None, {"q_length": 3}),
    "static cache, window": (4, windowed(3), 3, {"q_length": 2, "attention_mask": LEFT}),
    "offset on the device": (4, causal, None, {"q_length": 3, "q_offset": torch.tensor(4)}),
    "asked for": (4, causal, None, {"allow_is_causal_skip": False}),
    "asked for, padding": (4, causal, None, {"allow_is_causal_skip": False, "attention_mask": LEFT}),
    "asked for, both ways": (4, both_ways, None, {"allow_is_bidirectional_skip": False}),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_no_pattern_is_dropped(case):
    """A mask, and what attention makes of it with the window it is given, against all pairs that transformers would keep."""
    dims, pattern, window, more = PATTERNS[case]
    given = {"batch_size": 2, "q_length": 7, "kv_length": 7, "q_offset": 0, "kv_offset": 0, "mask_function": pattern,
             "attention_mask": None, "local_size": window, "allow_is_causal_skip": True, "allow_is_bidirectional_skip": True,
             **more}
    mask = fused.attention_mask(**given, dtype=torch.float64, device="cpu", use_vmap=False, config=None)
    assert (0 if mask is None else mask.dim()) == dims
    assert mask is None or mask.dtype == torch.bool
    module = nn.Module()
    module.is_causal = pattern is not both_ways
    q, k, v = (torch.randn(2, heads, given[name], 8).double() for heads, name in ((4, "q_length"), *[(2, "kv_length")] * 2))
    out, _ = fused.attention_forward(module, q, k, v, mask, scaling=0.4)  # of a layer that does not name its window
    pairs = masking.sdpa_mask(**{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    scores = 0.4 * (q @ k.repeat_interleave(2, 1).mT).masked_fill(~pairs, -torch.inf)
    close(out, (scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(2, 1)).transpose(1, 2))


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("kind", ["none", "padding", "bool", "float"])
def test_position_bias_beside_masks(kind, backend, monkeypatch):
    """With queries that are learned, one set for the whole batch, and a causal module, which a whole mask overrules."""
    q, k, v, bias = (torch.randn(*shape).double() for shape in ((1, 2, 5, 8), (3, 2, 5, 8), (3, 2, 5, 8), (1, 2, 5, 5)))
    keep = (torch.rand(3, 1, 5, 5) < 0.7) | torch.eye(5, dtype=torch.bool)
    added = torch.randn(3, 1, 5, 5).double()
    padding = torch.arange(5) < torch.tensor([[5], [2], [4]])
    mask = {"none": None, "padding": padding, "bool": keep, "float": added}[kind]
    causal_pairs = torch.ones(5, 5, dtype=torch.bool).tril()
    pairs = {"none": causal_pairs, "padding": causal_pairs & padding[:, None, None, :], "bool": keep}.get(kind)
    scores = 0.4 * q @ k.mT + bias
    scores = scores + added if kind == "float" else scores.masked_fill(~pairs, -torch.inf)
    monkeypatch.setattr(settings, "BACKEND", backend)
    module = nn.Module()
    module.is_causal = True
    out, weights = fused.attention_forward(module, q, k, v, mask, scaling=0.4, position_bias=bias)
    close(out, (scores.softmax(-1) @ v).transpose(1, 2))
    assert weights is None


# --- names ---


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


def right_or_told(model, make):
    """What a model of the same weights answers is the eager one's answer, unless it is refused in words."""
    ids = torch.randint(3, 61, (2, 7))
    expected = model(ids)[0]
    try:
        twin = make()
        twin.load_state_dict(model.state_dict())
        out = twin.eval()(ids)[0]
    except (KeyError, ValueError):
        return
    close(out, expected, 1e-5)


@pytest.mark.parametrize("family", ["Bloom", "Falcon", "GPTJ", "Mpt"])
def test_families_beside_the_interface(family):
    """Their attention is their own: they must not be given masks that leave out what it needs."""
    config = getattr(T, f"{family}Config")(**SMALL, **({"rotary_dim": 4} if family == "GPTJ" else {}))
    config._attn_implementation = "eager"
    model = getattr(T, f"{family}ForCausalLM")(copy.deepcopy(config)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    fused.register()
    assert not model._can_set_attn_implementation()
    model.set_attn_implementation("fused_attn")  # transformers warns
    assert model.config._attn_implementation == "eager"
    right_or_told(model, lambda: T.AutoModelForCausalLM.from_config(config, attn_implementation="fused_attn"))


INDEXED = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
           "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 2,
           "index_n_heads": 2, "index_head_dim": 16, "index_topk": 3}
SHAPED = {  # families that work on their masks themselves, or whose modules do not say truly whether they are causal
    "Doge": ("DogeForCausalLM", "DogeConfig", {"intermediate_size": 32, "num_key_value_heads": 2}),
    "DeepSeek-V3.2": ("DeepseekV32ForCausalLM", "DeepseekV32Config", {**INDEXED, "num_key_value_heads": 4}),
    "Splinter": ("SplinterModel", "SplinterConfig", {"intermediate_size": 32}),
    "BigBird-Pegasus": ("BigBirdPegasusForCausalLM", "BigBirdPegasusConfig", {
        "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}),
}


@pytest.mark.parametrize("family", SHAPED)
def test_families_that_need_more_of_a_mask(family):
    name, config, more = SHAPED[family]
    model = getattr(T, name)(getattr(T, config)(**SMALL, **more)).eval()
    for key, parameter in model.named_parameters():
        if "norm" not in key.lower():
            nn.init.normal_(parameter, std=0.15)
    fused.register()

    def fuse():
        twin = copy.deepcopy(model)
        twin.set_attn_implementation("fused_attn")
        return twin

    model.set_attn_implementation("eager")
    right_or_told(model, fuse)
