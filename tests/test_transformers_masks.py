"""What the transformers plug takes for a mask, pattern by pattern, and what families make of their own."""

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

together, remapped = masking.packed_sequence_mask_function(PACKS), getattr(
    masking, "remap_positions_for_packed_sequence", lambda pattern, places: pattern)
PATTERNS = {  # dimensions of the mask, 0 for none; pattern, its window, and what differs from 7 queries over 7 keys
    "causal": (2, causal, None, {}), "nothing padded": (2, causal, None, {"attention_mask": ALL}),
    "a token": (2, causal, None, {"q_length": 1, "q_offset": 6}), "a chunk": (2, causal, None, {"q_length": 3, "q_offset": 4}),
    "left padding": (2, causal, None, {"attention_mask": LEFT}),
    "right padding": (2, causal, None, {"attention_mask": LEFT.flip(1)}),
    "mask of the past alone": (2, causal, None, {"q_length": 3, "q_offset": 4, "attention_mask": ALL[:, :5]}),
    "window": (5, windowed(3), 3, {}),
    "window, padding": (5, windowed(3), 3, {"attention_mask": LEFT}),
    "window, the past cut off": (2, windowed(4), 4, {
        "q_length": 1, "kv_length": 4, "q_offset": 6, "kv_offset": 3, "attention_mask": LEFT.roll(2, 1)}),
    "window, padding cut off": (2, windowed(4), 4, {
        "q_length": 1, "kv_length": 4, "q_offset": 6, "kv_offset": 3, "attention_mask": LEFT}),
    "both ways": (0, both_ways, None, {}), "both ways, padding": (4, both_ways, None, {"attention_mask": LEFT}),
    "other queries": (4, both_ways, None, {"q_length": 4, "attention_mask": LEFT}),
    "window both ways": (4, masking.sliding_window_bidirectional_mask_function(2), 2, {}),
    "chunks": (4, masking.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)), 3, {}),
    "packed": (4, masking.and_masks(together, remapped(causal, PLACES)), None, {}),
    "packed, window": (4, masking.and_masks(together, remapped(windowed(2), PLACES)), 2, {}),
    "packed, the other way round": (4, masking.and_masks(remapped(windowed(2), PLACES), together), 2, {}),
    "blocks": (4, masking.or_masks(causal, together), None, {}),
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
    module.is_causal = pattern is both_ways  # which is not asked
    q, k, v = (torch.randn(2, heads, given[name], 8).double() for heads, name in ((4, "q_length"), *[(2, "kv_length")] * 2))
    out, _ = fused.attention_forward(module, q, k, v, mask, scaling=0.4, is_causal=pattern is both_ways, sliding_window=2)
    pairs = masking.sdpa_mask(**{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    scores = 0.4 * (q @ k.repeat_interleave(2, 1).mT).masked_fill(~pairs, -torch.inf)
    close(out, (scores.softmax(-1).nan_to_num(0.0) @ v.repeat_interleave(2, 1)).transpose(1, 2))


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("kind", ["none", "padding", "bool", "float"])
def test_position_bias_beside_masks(kind, backend, monkeypatch):
    """With queries that are learned, one set for the whole batch, and a causal module, which only the mask can make so."""
    q, k, v, bias = (torch.randn(*shape).double() for shape in ((1, 2, 5, 8), (3, 2, 5, 8), (3, 2, 5, 8), (1, 2, 5, 5)))
    keep = (torch.rand(3, 1, 5, 5) < 0.7) | torch.eye(5, dtype=torch.bool)
    added = torch.randn(3, 1, 5, 5).double()
    padding = torch.arange(5) < torch.tensor([[5], [2], [4]])
    mask = {"none": None, "padding": padding, "bool": keep, "float": added}[kind]
    everything = torch.ones(5, 5, dtype=torch.bool)
    pairs = {"none": everything, "padding": everything.tril() & padding[:, None, None, :], "bool": keep}.get(kind)
    scores = 0.4 * q @ k.mT + bias
    scores = scores + added if kind == "float" else scores.masked_fill(~pairs, -torch.inf)
    monkeypatch.setattr(settings, "BACKEND", backend)
    module = nn.Module()
    module.is_causal = True
    out, weights = fused.attention_forward(module, q, k, v, mask, scaling=0.4, position_bias=bias)
    close(out, (scores.softmax(-1) @ v).transpose(1, 2))
    assert weights is None


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=pytest.mark.kernels)])
@pytest.mark.parametrize("kind", ["none", "causal", "window", "packed", "padding"])
def test_sequences_given_by_their_ends(kind, backend, monkeypatch):
    """In a batch of one: what the mask says, inside each sequence; a mask that says more than that is used as it is."""
    q, k, v = (torch.randn(1, 2, 7, 8).double() for _ in range(3))
    config, places = None, PLACES[:1]
    given = {"batch_size": 1, "q_length": 7, "kv_length": 7, "allow_is_bidirectional_skip": True, "config": config}
    pattern, width, keys = {"none": (both_ways, None, None), "causal": (causal, None, None), "window": (windowed(2), 2, None),
                            "packed": (masking.and_masks(remapped(windowed(2), places), masking.packed_sequence_mask_function(
                                PACKS[:1])), 2, None), "padding": (causal, None, LEFT[:1])}[kind]
    mask = fused.attention_mask(**given, mask_function=pattern, local_size=width, attention_mask=keys)
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    monkeypatch.setattr(settings, "BACKEND", backend)
    out, _ = fused.attention_forward(nn.Module(), q, k, v, mask, scaling=0.4, cu_seq_lens_q=ends, cu_seq_lens_k=ends,
                                     max_length_q=4, max_length_k=4)
    row, column = torch.arange(7)[:, None], torch.arange(7)
    pairs = {"none": row >= 0, "padding": (column <= row) & LEFT[0]}.get(kind, column <= row)
    pairs = pairs & (row - column < (width or 7)) & ((PACKS[0][:, None] == PACKS[0]) | (kind == "padding"))
    scores = 0.4 * (q @ k.mT).masked_fill(~pairs, -torch.inf)
    close(out, (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("counts", [True, False])
def test_a_mask_that_was_expanded_is_read_by_its_values(batch, length, counts):
    """Stride 0 is the word for keys that all count in masks of ours alone."""
    given = torch.full((1, 1), counts).expand(batch, length)
    mask = fused.attention_mask(batch, length, length, attention_mask=given)
    q = torch.randn(batch, 2, length, 8)
    out, _ = fused.attention_forward(nn.Module(), q, q, q, mask)
    assert (out.abs().sum() > 0) == counts


def test_a_mask_of_one_key_that_was_cut_from_an_expanded_one():
    """Torch calls it contiguous whatever its stride."""
    mask = fused.attention_mask(2, 1, 1, attention_mask=torch.zeros(2, 1, dtype=torch.bool).expand(2, 5)[:, 3:4])
    q = torch.randn(2, 2, 1, 8)
    assert not fused.attention_forward(nn.Module(), q, q, q, mask)[0].any()


WIDE = torch.ones(2, 7, 7, dtype=torch.bool).tril()
FORMS = {  # masks in no form that transformers has, whatever their strides
    "bool": WIDE, "float": torch.zeros(2, 7, 7), "int": WIDE.long(), "expanded": LEFT[:, :, None].expand(-1, -1, 7),
    "expanded over queries": LEFT[:, None].expand(-1, 7, -1), "five dimensions": WIDE[:, None, None],
    "an additive window": torch.zeros(2, 7, 1, 1, 3), "one dimension": LEFT[0],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["model", "encoder", "attention"])
def test_other_forms_are_refused(form, where):
    fused.register()
    mask = FORMS[form]
    if where == "attention":
        q = torch.randn(2, 2, 7, 8)
        call = lambda: fused.attention_forward(nn.Module(), q, q, q, mask)  # noqa: E731
    else:
        config, model = (T.LlamaConfig, T.LlamaModel) if where == "model" else (T.BertConfig, T.BertModel)
        model = model._from_config(config(**SMALL, intermediate_size=32), attn_implementation="fused_attn")
        call = lambda: model(torch.randint(3, 61, (2, 7)), attention_mask=mask)  # noqa: E731
    with pytest.raises(ValueError, match=r"attention_mask: expected \[batch, keys\].*; got "):
        call()


def test_a_window_is_known_wherever_it_went():
    """Moved to a device, it loses its strides; compiled, its identity; from generation, it comes back."""
    mask = fused.attention_mask(2, 7, 7, mask_function=windowed(3), local_size=3, attention_mask=LEFT)
    moved = mask.to("meta", copy=True)
    assert (moved.shape, moved.dtype) == (mask.shape, mask.dtype)
    assert fused.attention_mask(2, 7, 7, attention_mask=mask) is mask
    q = torch.randn(2, 2, 7, 8)
    expected = fused.attention_forward(nn.Module(), q, q, q, mask)[0]
    close(fused.attention_forward(nn.Module(), q, q, q, mask.contiguous())[0], expected)
    compiled = torch.compile(fused.attention_forward, backend="eager", fullgraph=True)
    close(compiled(nn.Module(), q, q, q, mask)[0], expected, 1e-6)


# --- families ---


INDEXED = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
           "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 2,
           "index_n_heads": 2, "index_head_dim": 16, "index_topk": 3}
ENDS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 32, "vocab_size": 61}
SHAPED = {  # families that work on their masks themselves, or whose modules do not say truly whether they are causal
    "Doge": ("DogeForCausalLM", "DogeConfig", {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2}),
    "DeepSeek-V3.2": ("DeepseekV32ForCausalLM", "DeepseekV32Config", {**SMALL, **INDEXED, "num_key_value_heads": 4}),
    "Splinter": ("SplinterModel", "SplinterConfig", {**SMALL, "intermediate_size": 32}),
    "BigBird-Pegasus": ("BigBirdPegasusForCausalLM", "BigBirdPegasusConfig", {
        **SMALL, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 32}),
    "PegasusX": ("PegasusXForConditionalGeneration", "PegasusXConfig", {**ENDS, "block_size": 4, "num_global_tokens": 2}),
    "NLLB-MoE": ("NllbMoeForConditionalGeneration", "NllbMoeConfig", {
        **ENDS, "num_experts": 4, "expert_capacity": 16, "encoder_sparse_step": 1, "decoder_sparse_step": 1}),
    "Gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", {
        **SMALL, "num_hidden_layers": 3, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8,
        "num_kv_shared_layers": 1, "layer_types": ["full_attention"] * 3, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 61}),
}


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("family", SHAPED)
def test_families_that_need_more_of_a_mask(family, padding):
    name, config, more = SHAPED[family]
    if not hasattr(T, name):
        pytest.skip(f"transformers {T.__version__} has no {name}")
    model = getattr(T, name)(getattr(T, config)(**more, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    for key, parameter in model.named_parameters():
        if "norm" not in key.lower():
            nn.init.normal_(parameter, std=0.15)
    fused.register()
    ids, keep = torch.randint(3, 61, (2, 7)), {None: ALL, "right": LEFT.flip(1), "left": LEFT}[padding]
    given = {"attention_mask": None if padding is None else keep.long()}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 61, (2, 7))
        keep = ALL
    answers = {}
    for implementation in ("eager", "fused_attn"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            answers[implementation] = [model(ids, **given)[0][keep]]
        if model.can_generate():
            said = model.generate(ids, attention_mask=given["attention_mask"], max_new_tokens=4, min_new_tokens=4,
                                  do_sample=False, decoder_start_token_id=2, output_logits=True, return_dict_in_generate=True)
            answers[implementation].append(torch.stack(said.logits))
    for ours, theirs in zip(answers["fused_attn"], answers["eager"], strict=True):
        close(ours, theirs, 1e-5)
