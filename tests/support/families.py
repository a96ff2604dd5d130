"""Every family that transformers has a model of: made small, of random weights, and compared with its own eager attention.

    PYTHONPATH=. python tests/support/families.py [model types]     # writes docs/transformers.json, with all of them

A family is built from its config's defaults, with every size cut down by what it is called. It is compared where its eager
model runs on the inputs that its forward asks for: whole, padded on either side, with the gradients of all parameters, and in
greedy generation. What cannot be built that way is listed with the reason; nothing follows from it.
"""

import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fused_attn.integrations import transformers as fused

RECORD = Path(__file__).parents[2] / "docs" / "transformers.json"
WORDS, LENGTH, LARGEST = 61, 12, 60_000_000
WITHIN = 1e-4  # of the largest value, in fp32; wrong masks were 1e-2 and more
SIZES = [(re.compile(names), size) for names, size in (  # what a number of a config is called, and what it becomes
    (r"(.*_)?(vocab_size|n_vocab|codebook_size)(_per_layer_input)?", WORDS),
    (r"(.*_)?(num_hidden_layers|num_layers|n_layers?)|(en|de)coder_layers|num_(en|de)coder_layers|depth|num_blocks|layers", 2),
    (r"(.*_)?(key_value_heads|kv_heads)", 2), (r"(.*_)?heads?", 4),
    (r"(.*_)?hidden_(size|dim)(_per_layer_input)?|d_model|n_embd|(word_)?emb(ed|edding)?(_proj)?_(dim|size)|projection_(dim|size)"
     r"|dim|lru_width", 32),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|ff_dim|mlp_dim|d_ff)(_mlp)?|d_inner|dff|dim_ff|dim_feedforward", 32),
    (r"(.*_)?head_dim|d_kv|d_head|attention_head_size|kv_channels|rotary_dim", 8),
    (r"(kv|q|o)_lora_rank|query_pre_attn_scalar", 16),
    (r"(.*_)?max_position_embeddings|n_positions|max_(source|target)_positions|n_ctx|max_seq_len|seq_len|context_length", 64),
    (r"(num_|n_|moe_num_)(local_|routed_)?experts", 4), (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k|num_selects", 2),
    (r"n_group|topk_group|num_expert_group|n(um)?_shared_experts|first_k_dense_replace|num_nextn_predict_layers", 1),
    (r"index_topk|attention_chunk_size|mamba_dt_rank|time_step_rank", 4),
    (r"sliding_window(_size)?|local_attention|window_size", 5),
    (r"image_size|crop_size", 32), (r"patch_size|(.*_)?chunk_size|(.*_)?(ssm_state_size|state_size|d_state)", 8),
    (r"num_mel_bins|feature_size", 16), (r"type_vocab_size|n_codebooks|num_codebooks|num_quantizers", 2),
    (r"pad_token_id", 0), (r"bos_token_id|decoder_start_token_id|cls_token_id", 1), (r"eos_token_id|sep_token_id", 2))]
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")  # lists by layer, of which the first and the last kind stay
OF_ITS_OWN: dict[str, dict[str, Any]] = {  # what a family's small config needs besides
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "recurrent_gemma": {"num_hidden_layers": 3},
    "gemma3n_text": {"num_kv_shared_layers": 0}, "esm": {"vocab_size": WORDS, "pad_token_id": 1},
    "nemotron": {"num_key_value_heads": 2}, "xmod": {"default_language": "en_XX"},
    "mobilebert": {"intra_bottleneck_size": 32, "true_hidden_size": 32},
    "nllb-moe": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "deepseek_v2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{kind: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
       for kind in ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "glm_image_text")},
    "gemma4_text": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3, "num_kv_shared_layers": 1},
}


def shrink(kind: type, **more: Any) -> Any:
    """A config of few and small parts."""
    defaults = kind()
    sizes = defaults.to_dict()
    names = ("num_attention_heads", "n_heads", "n_head", "num_heads")
    heads = [sizes[name] for name in names if isinstance(sizes.get(name), int)]
    given = {name: _small(name, value, heads) for name, value in sizes.items()
             if name not in ("model_type", "transformers_version", "architectures", "dtype", *kind.sub_configs)}
    given = {name: value for name, value in given.items() if value != sizes[name]}
    for name in kind.sub_configs:
        if getattr(defaults, name, None) is not None:
            given[name] = shrink(type(getattr(defaults, name))).to_dict()
    return kind(**{**given, **OF_ITS_OWN.get(kind.model_type, {}), **more})


def _small(name: str, value: Any, heads: list[int]) -> Any:
    if isinstance(value, float) and re.search("drop|noise|jitter|mask_(time|feature)_prob", name):
        return 0.0
    if isinstance(value, dict):
        return {key: [2, 1, 1] if key == "mrope_section" else _small("", inner, heads) for key, inner in value.items()}
    if isinstance(value, list) and name in KINDS and value:
        return [value[0], value[-1]]
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    for pattern, size in SIZES:
        if pattern.fullmatch(name):
            if "kv_heads" in name or "key_value_heads" in name:
                return 4 if heads[:1] == [value] else min(size, value)
            return size if name.endswith("_id") else min(size, value)
    return 50 + sum(map(ord, name)) % 10 if re.search(r"_token_(id|index)$", name) else value


def families() -> Iterator[tuple[str, str]]:
    """Model type and class: the one that generates where there is one."""
    for kind in CONFIG_MAPPING:
        for task in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", ""):
            names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES")
            if kind in names:
                yield kind, names[kind] if isinstance(names[kind], str) else names[kind][0]
                break


def _make(config: Any, name: str, implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    for part in (config, *(getattr(config, part) for part in config.sub_configs)):
        if part is not None:
            part._experts_implementation = "eager"
    config._attn_implementation = implementation
    model = getattr(transformers, name)(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.is_floating_point() and not re.search(r"norm|A_log|dt_|\.D$", key):
            nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.3)
    return model.to(dtype)


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    config, accepted, main = model.config, inspect.signature(model.forward).parameters, model.main_input_name

    def ids(length: int = LENGTH) -> torch.Tensor:
        return torch.randint(3, 49, (2, length))  # which stay below the tokens that stand for images and the like

    given: dict[str, torch.Tensor] = {}
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 32)
        channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
        given[main] = torch.randn(2, channels, *(size if isinstance(size, (list, tuple)) else (size, size)))
    elif main == "input_features":
        given[main] = torch.randn(2, getattr(config, "num_mel_bins", 16), 2 * getattr(config, "max_source_positions", 32))
    elif main == "input_values":
        given[main] = torch.randn(2, 4000)
    elif "input_ids" in accepted:
        given["input_ids"] = ids()
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        given["decoder_input_ids"] = ids(7)
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in given.items()}


def _cases(model: Any) -> Iterator[tuple[str, dict[str, torch.Tensor], Any]]:
    given = _inputs(model)
    yield "whole", given, slice(None)
    if "input_ids" in given:
        keep = torch.arange(LENGTH) < torch.tensor([[LENGTH - 4], [LENGTH]])
        for side, mask in (("right", keep), ("left", keep.flip(1))):
            yield side, {**given, "attention_mask": mask.long()}, slice(None) if "decoder_input_ids" in given else mask


def _answer(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)  # of those that mask or drop in evaluation, too
    out = model(**given)
    found = [x for x in (getattr(out, name, None) for name in ("logits", "last_hidden_state")) if isinstance(x, torch.Tensor)]
    return (found or [x for x in out.to_tuple() if isinstance(x, torch.Tensor)])[0]


def _all(model: Any, wanted: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    for case, given, keep in _cases(model):
        if case in wanted:
            with torch.no_grad():
                out = _answer(model, given)
            yield case, out[keep] if isinstance(keep, slice) or out.shape[:2] == keep.shape else out
    given = _inputs(model)
    if "gradients" in wanted:
        grads = torch.autograd.grad(_answer(model, given).sin().sum(), [p for p in model.parameters() if p.requires_grad],
                                    allow_unused=True)
        grads = [grad for grad in grads if grad is not None]
        least = 1e-2 * max(grad.abs().max() for grad in grads)  # biases of keys have none but for rounding
        yield "gradients", torch.cat([(grad / torch.maximum(grad.abs().max(), least)).flatten() for grad in grads])
    if "generation" in wanted:
        ids = given["input_ids"]
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False,
                              pad_token_id=0, output_logits=True, return_dict_in_generate=True)
        yield "generation", torch.stack(said.logits)


def compare(kind: str, name: str) -> dict[str, Any]:
    """{case: largest difference}, or {"refused" or "not built": why}; in fp64 where fp32's rounding may be what differs."""
    found = _compare(kind, name, torch.float32)
    return _compare(kind, name, torch.float64) if differs(found) else found


def differs(found: dict[str, Any]) -> bool:
    return any(isinstance(x, float) and not x <= WITHIN for x in found.values())


def _compare(kind: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    try:
        config = shrink(CONFIG_MAPPING[kind])
        with torch.device("meta"):
            size = sum(p.numel() for p in getattr(transformers, name)(shrink(CONFIG_MAPPING[kind])).parameters())
        if size > LARGEST:
            raise ValueError(f"{size // 1_000_000}M parameters when small")
        model = _make(config, name, "eager", dtype)
        torch.manual_seed(1)
        expected = {}
        for case in ("whole", "right", "left", "gradients", "generation"):
            if case == "generation" and not (model.can_generate() and "input_ids" in _inputs(model)):
                continue
            torch.manual_seed(1)
            try:
                expected.update(_all(model, [case]))
            except Exception:
                if case == "whole":
                    raise
    except Exception as error:
        return {"not built": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
    if not expected["whole"].isfinite().all():
        return {"not built": "eager values are not finite"}
    try:
        twin = _make(shrink(CONFIG_MAPPING[kind]), name, fused.NAME, dtype)
    except ValueError as error:
        return {"refused": str(error).rpartition(", but it ")[2]}
    twin.load_state_dict(model.state_dict())
    found = {}
    for case, theirs in expected.items():
        torch.manual_seed(1)
        ours = dict(_all(twin, [case]))[case]
        found[case] = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-9)).item()
    return found


def main(wanted: list[str]) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    fused.register()
    results = {}
    for kind, name in families():
        if not wanted or kind in wanted:
            results[kind] = compare(kind, name)
            print(kind, results[kind], flush=True)
    wrong = {kind: found for kind, found in results.items() if differs(found)}
    print(f"{len(wrong)} differ: {wrong}")
    if not wanted:
        record = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0], "within": WITHIN,
                  "compared": {kind: list(found) for kind, found in results.items() if "whole" in found and kind not in wrong},
                  **{what: {kind: found[what] for kind, found in results.items() if what in found}
                     for what in ("refused", "not built")}, "wrong": wrong}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
