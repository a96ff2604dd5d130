"""Hugging Face models with attn_implementation="fused_attn" against their own eager attention, on random tiny weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_attn import settings
from fused_attn.kernels import launch

T = pytest.importorskip("transformers")
fused = pytest.importorskip("fused_attn.integrations.transformers")

pytestmark = pytest.mark.filterwarnings("default:::transformers")

WORDS, LENGTH = 61, 12
SMALL = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
BOTH = {**GROUPED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
          "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
          "v_head_dim": 12, "num_key_value_heads": 4, "experts_implementation": "eager"}
DECODERS = {  # model, config, options
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED), "Mistral": ("MistralForCausalLM", "MistralConfig", {
        **GROUPED, "sliding_window": 5}), "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "Gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**BOTH, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}),
    "Gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**BOTH, "query_pre_attn_scalar": 16}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {
        **BOTH, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", {**SMALL, **LATENT}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {**SMALL, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                                               "scale_attn_by_inverse_layer_idx": True}),
    "OPT": ("OPTForCausalLM", "OPTConfig", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.0}),
}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
OTHERS = {
    "BERT": ("BertModel", "BertConfig", {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "ModernBERT": ("ModernBertModel", "ModernBertConfig", {**SMALL, "num_hidden_layers": 4, "local_attention": 6,
                                                           "cls_token_id": 1, "sep_token_id": 2}),
    "T5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", {
        "vocab_size": WORDS, "d_model": 32, **HEADS, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8,
        "max_source_positions": 10, "max_target_positions": 40, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 1}),
    "ViT": ("ViTModel", "ViTConfig", {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
                                      "num_attention_heads": 4, "image_size": 16, "patch_size": 4}),
}


@pytest.fixture(autouse=True, scope="module")
def registered():
    fused.register()


@pytest.fixture(autouse=True)
def softmax_in_fp64(monkeypatch):
    """Eager models take softmax in fp32, whatever they are in; an oracle does not."""
    softmax = F.softmax
    monkeypatch.setattr(F, "softmax", lambda x, dim=-1, dtype=None, **_: softmax(
        x, dim, dtype=x.dtype if x.dtype == torch.float64 else dtype))


@pytest.fixture
def kernels(monkeypatch):
    """Turns the kernels on, as the default backend; launches by name."""
    with launch.counted() as launches:
        yield lambda: monkeypatch.setattr(settings, "BACKEND", "triton") or launches


def build(family, **options):
    """fp64, in training, with weights that make attention choose."""
    model, config, defaults = {**DECODERS, **OTHERS}[family]
    model = getattr(T, model)(getattr(T, config)(**{**defaults, **options})).double().train()
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            nn.init.normal_(parameter, std=0.7 if "sinks" in name or "relative_attention_bias" in name else 0.15)
    return model


def words(batch=3, length=LENGTH):
    return torch.randint(3, WORDS, (batch, length))


COUNTS = torch.tensor([12, 5, 9])
RIGHT = (torch.arange(LENGTH) < COUNTS[:, None]).long()
MASKS = {"whole": None, "right-padded": RIGHT, "left-padded": RIGHT.flip(1)}
PADDED = pytest.mark.parametrize("padding", MASKS)
PARTS = [5, 1, 6]  # lengths of packed sequences
PACKED = {"position_ids": torch.cat([torch.arange(n) for n in PARTS])[None], "use_cache": False}
STARTS = torch.tensor([0, 5, 6, 12], dtype=torch.int32)
LENGTHS = {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS, "max_length_q": 6, "max_length_k": 6}


def results(model, implementation, keep=slice(None), **inputs):
    """What the model says at the positions that count, and the gradients of all its parameters."""
    model.set_attn_implementation(implementation)
    out = model(**inputs)
    out = (out.logits if hasattr(out, "logits") else out.last_hidden_state)[keep]
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(out.sin().sum(), list(wanted.values()), allow_unused=True)
    return out.detach(), dict(zip(wanted, grads, strict=True))


def close(actual, expected, tolerance=2e-6):
    """Norms, embeddings of positions and routers compute in fp32, here as there: it is their rounding that remains."""
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def same(ours, theirs):
    close(ours[0], theirs[0])
    assert theirs[0].abs().max() > 0.1
    largest = max(grad.abs().max() for grad in theirs[1].values() if grad is not None)
    for name, grad in theirs[1].items():
        assert (ours[1][name] is None) == (grad is None), name
        if grad is not None:  # some are zero but for rounding: those of biases of keys
            assert (ours[1][name] - grad).abs().max() <= 2e-6 * grad.abs().max() + 1e-8 * largest, name


def compare(model, keep=slice(None), **inputs):
    same(results(model, "fused_attn", keep, **inputs), results(model, "eager", keep, **inputs))


# --- outputs and gradients ---


@PADDED
@pytest.mark.parametrize("family", [*DECODERS, "BERT", "ModernBERT"])
def test_text(family, padding):
    mask = MASKS[padding]
    keep = slice(None) if mask is None else mask.bool()
    compare(build(family), keep, input_ids=words(), attention_mask=mask)


@PADDED
def test_t5(padding):
    compare(build("T5"), input_ids=words(), attention_mask=MASKS[padding], decoder_input_ids=words(3, 7))


@pytest.mark.parametrize("padding", [None, torch.arange(7) < torch.tensor([[7], [3], [5]])], ids=["whole", "right-padded"])
@pytest.mark.parametrize("family", ["T5", "Whisper"])
def test_padded_decoders(family, padding):
    encoder = {"input_ids": words()} if family == "T5" else {"input_features": torch.randn(3, 8, 20).double()}
    keep = slice(None) if padding is None else padding
    compare(build(family), keep, decoder_input_ids=words(3, 7), decoder_attention_mask=padding, **encoder)


def test_vit():
    compare(build("ViT"), pixel_values=torch.randn(2, 3, 16, 16).double())


@pytest.mark.parametrize("family", DECODERS)
def test_packed_by_their_positions(family):
    compare(build(family), input_ids=words(1), **PACKED)


def padded(ids):
    """Packed sequences as a padded batch, and where they are."""
    mask = torch.arange(max(PARTS)) < torch.tensor(PARTS)[:, None]
    return mask, {"input_ids": nn.utils.rnn.pad_sequence(ids[0].split(PARTS), batch_first=True), "attention_mask": mask.long()}


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "gpt-oss"])
def test_packed_by_lengths(family):
    model, ids = build(family), words(1)
    mask, batch = padded(ids)
    same(results(model, "fused_attn", 0, input_ids=ids, **PACKED, **LENGTHS), results(model, "eager", mask, **batch))


def test_packed_by_the_collator():
    model, ids = build("Llama"), words(1)
    collate = T.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    given = collate([{"input_ids": part.tolist()} for part in ids[0].split(PARTS)])
    del given["labels"]
    assert set(given) == {"input_ids", "position_ids", *LENGTHS}
    mask, batch = padded(ids)
    same(results(model, "fused_attn", 0, **given, use_cache=False), results(model, "eager", mask, **batch))


def chunked(**options):
    config = T.Llama4TextConfig(**GROUPED, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=32, **{
        "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0], **options})
    model = T.Llama4ForCausalLM(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model


@pytest.mark.parametrize("more", [{}, LENGTHS], ids=["positions", "lengths too"])
def test_chunked_attention_packed(more):
    """A pattern that lengths alone do not say."""
    model, ids = chunked(), words(1)
    same(results(model, "fused_attn", input_ids=ids, **PACKED, **more), results(model, "eager", input_ids=ids, **PACKED))


@PADDED
def test_chunked_attention(padding):
    mask = MASKS[padding]
    compare(chunked(), slice(None) if mask is None else mask.bool(), input_ids=words(), attention_mask=mask)


@pytest.mark.parametrize("window", [1, 11, 12, 13, 40])
@pytest.mark.parametrize("padding", ["whole", "left-padded"])
def test_windows_around_the_length(window, padding):
    mask = MASKS[padding]
    compare(build("Mistral", sliding_window=window), slice(None) if mask is None else mask.bool(), input_ids=words(),
            attention_mask=mask)


@PADDED
def test_a_decoder_that_looks_both_ways(padding):
    model, mask = build("Llama", is_causal=False), MASKS[padding]
    compare(model, slice(None) if mask is None else mask.bool(), input_ids=words(), attention_mask=mask)


@pytest.mark.parametrize("dtype", [bool, float])
def test_a_mask_of_ones_own(dtype):
    mask = torch.rand(3, 1, LENGTH, LENGTH) < 0.6
    mask[..., 0] = True
    if dtype is float:
        mask = torch.randn(mask.shape).double().masked_fill(~mask, torch.finfo(torch.float64).min)
    model, ids = build("Llama"), words()
    expected = results(model, "sdpa" if dtype is bool else "eager", input_ids=ids, attention_mask=mask)
    same(results(model, "fused_attn", input_ids=ids, attention_mask=mask), expected)


def test_dropout_is_passed_on():
    """Where every weight is dropped there is one answer."""
    compare(build("Llama", attention_dropout=1.0), input_ids=words())


def test_checkpointing_recomputes():
    model, ids, calls = build("Gemma2"), words(), []
    given = {"input_ids": ids, "attention_mask": RIGHT, "use_cache": False}
    expected = results(model, "fused_attn", **given)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    same(results(model, "fused_attn", **given), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("family", ["Llama", "gpt-oss", "BERT"])
def test_weights_on_request(family):
    model, ids = build(family), words()
    weights = []
    for implementation in ("fused_attn", "eager"):
        model.set_attn_implementation(implementation)
        weights.append(model(ids, attention_mask=RIGHT, output_attentions=True).attentions)
    for ours, theirs in zip(*weights, strict=True):
        close(ours.transpose(1, 2)[RIGHT.bool()], theirs.transpose(1, 2)[RIGHT.bool()])


@pytest.mark.few(2)
@pytest.mark.kernels
@pytest.mark.parametrize("padding", ["left-padded", pytest.param("whole", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "gpt-oss"])
def test_on_the_kernels(family, padding, kernels):
    model, ids, mask = build(family), words(2), MASKS[padding]
    given = {"input_ids": ids, "attention_mask": None if mask is None else mask[:2]}
    keep = slice(None) if mask is None else mask[:2].bool()
    expected = results(model, "eager", keep, **given)
    launches = kernels()
    same(results(model, "fused_attn", keep, **given), expected)
    assert launches["forward_kernel"] == launches["dkv_kernel"] == 2


@pytest.mark.kernels
@pytest.mark.parametrize("family", ["Mistral", pytest.param("T5", marks=pytest.mark.slow)])
def test_packed_and_biased_on_the_kernels(family, kernels):
    model, ids = build(family), words(1)
    packed = family == "Mistral"
    given = {"input_ids": ids, **(PACKED if packed else {"decoder_input_ids": words(1, 7)})}
    expected = results(model, "eager", **given)
    launches = kernels()
    same(results(model, "fused_attn", **given, **(LENGTHS if packed else {})), expected)
    assert launches["forward_kernel"] == (2 if packed else 6)


# --- generation ---


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [*(name if name in ("Llama", "Gemma2", "gpt-oss") else pytest.param(
    name, marks=pytest.mark.slow) for name in DECODERS), "T5"])
def test_greedy_generation(family, cache):
    model, ids, said = build(family).eval(), words(), []
    static = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    mask = RIGHT if family == "T5" else RIGHT.flip(1)
    for implementation in ("fused_attn", "eager"):
        model.set_attn_implementation(implementation)
        said.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False,
                                   output_logits=True, return_dict_in_generate=True, **static))
    assert torch.equal(*(one.sequences for one in said))
    close(*(torch.stack(one.logits) for one in said))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma3"])
def test_caches_called_directly(family, cache):
    """Without a mask: a prompt, a chunk, single tokens; equal to everything at once."""
    model, ids = build(family).eval(), words()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids).logits
        model.set_attn_implementation("fused_attn")
        past = T.DynamicCache(config=model.config) if cache == "dynamic" else T.StaticCache(model.config, max_cache_len=20)
        parts = [model(part, past_key_values=past).logits for part in ids.split([6, 3, 1, 1, 1], 1)]
    close(torch.cat(parts, 1), expected)


# --- torch.compile ---


@pytest.mark.few(1)
@pytest.mark.parametrize(("family", "given"), [
    ("Llama", {"attention_mask": RIGHT}), ("Mistral", {"use_cache": False}), *(
        pytest.param(family, given, marks=pytest.mark.slow) for family in ("Llama", "Mistral", "GPT-2", "Gemma2")
        for given in ({}, {"use_cache": False}, {"attention_mask": RIGHT, "use_cache": False})
        if (family, given) != ("Mistral", {"use_cache": False}))],
    ids=lambda x: x if isinstance(x, str) else " ".join(x) or "ids alone")
def test_one_graph(family, given):
    """As the eager model makes one."""
    model, ids, keep = build(family, **({} if family == "Gemma2" else {"num_hidden_layers": 1})), words(), RIGHT.bool()
    graphs = []
    for implementation in ("eager", "fused_attn"):
        torch._dynamo.reset()
        expected = results(model, implementation, keep, input_ids=ids, **given)
        counter = CompileCounterWithBackend("aot_eager")
        model.forward = torch.compile(type(model).forward.__get__(model), fullgraph=True, backend=counter)
        same(results(model, implementation, keep, input_ids=ids, **given), expected)
        del model.forward
        graphs.append(counter.frame_count)
    assert graphs[1] <= graphs[0]
