"""FlexAttention's names: ``flex_attention``, ``create_block_mask`` and their companions, without a compiler.

Source: He et al. 2024, "Flex Attention: A Programming Model for Generating Optimized Attention Kernels";
torch.nn.attention.flex_attention.
"""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, and_masks, noop_mask, or_masks

from fused_attn.api import attention
from fused_attn.call.functions import functions
from fused_attn.plan.backends import warn_once

__all__ = ["AuxOutput", "AuxRequest", "BlockMask", "and_masks", "create_block_mask", "create_mask", "flex_attention",
           "noop_mask", "or_masks"]

_BLOCK = 128
# Masks that are their mask_mod and nothing else, and of the others the states of their blocks.
_WHOLE: "weakref.WeakSet[BlockMask]" = weakref.WeakSet()
_STATES: "weakref.WeakKeyDictionary[BlockMask, torch.Tensor]" = weakref.WeakKeyDictionary()


def flex_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score_mod: Callable[..., Any] | None = None,
                   block_mask: BlockMask | None = None, scale: float | None = None, enable_gqa: bool = False,
                   return_lse: bool = False, kernel_options: dict[str, Any] | None = None, *,
                   return_aux: AuxRequest | None = None) -> Any:
    """torch's ``flex_attention``: attention with a function of the scores and a mask by blocks.

    Args:
        query, key, value: [B, Hq, L, E], [B, Hkv, S, E], [B, Hkv, S, Ev]; a batch of 1 for key and value is shared.
        score_mod: plain Python, (score, b, h, q_idx, kv_idx) -> score. Every tensor that it reaches has a gradient.
        block_mask: as ``create_block_mask`` of torch or of this module gives it; its lengths are those of query and key.
        scale: 1 / sqrt(E) by default.
        enable_gqa: whether Hkv may be a divisor of Hq.
        return_lse: also return the log-sum-exp [B, Hq, L].
        kernel_options: ignored, with one warning: tiles follow from the call.
        return_aux: ``AuxRequest(lse=True)``, in place of ``return_lse``; of maxima there are none.

    Raises:
        TypeError, ValueError: as torch's does; NotImplementedError for ``AuxRequest(max_scores=True)``.
    """
    if kernel_options:
        warn_once(f"fused_attn.compat.flex: kernel_options {sorted(kernel_options)} are ignored; tiles follow from the call")
    if return_lse and return_aux is not None:
        raise ValueError("return_lse: expected False beside return_aux, which asks for it as AuxRequest(lse=True)")
    if return_aux is not None and return_aux.max_scores:
        raise NotImplementedError("return_aux: AuxRequest(max_scores=True) is not built; lse=True is")
    if not enable_gqa and query.dim() == key.dim() == 4 and query.shape[1] != key.shape[1]:
        raise ValueError(f"key: expected query's {query.shape[1]} heads without enable_gqa=True; got {key.shape[1]}")
    if key.shape[0] == 1 and query.shape[0] > 1 and block_mask is not None:
        key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
    mask_mod = None if block_mask is None else _mask(block_mask, query, key)
    wants_lse = return_lse or (return_aux is not None and return_aux.lse)
    found = attention(query, key, value, score_mod=score_mod, mask_mod=mask_mod, scale=scale, return_lse=wants_lse)
    out, lse = found if wants_lse else (found, None)
    if return_aux is not None:
        return out, AuxOutput(lse=lse, max_scores=None)
    return (out, lse) if return_lse else out


def _mask(block_mask: BlockMask, query: torch.Tensor, key: torch.Tensor) -> Callable[..., Any] | None:
    """The mask function of a block mask for these queries and keys."""
    lengths = tuple(block_mask.seq_lengths)
    got = query.shape[2], key.shape[2]
    whole = block_mask.mask_mod is noop_mask and block_mask in _WHOLE
    if lengths != got and not whole:
        raise ValueError(f"block_mask: expected one made for Q_LEN={got[0]} and KV_LEN={got[1]}, the lengths of query and key; "
                         f"got one for {lengths[0]} and {lengths[1]}")
    of_query, of_mask = query.shape[:2], block_mask.kv_num_blocks.shape[:2]
    for name, asked, made in zip(("B", "H"), of_query, of_mask, strict=True):
        if made not in (1, asked):
            raise ValueError(f"block_mask: expected one made for {name}={asked} or {name}=None; got {name}={made}")
    if block_mask.kv_num_blocks.device != query.device:
        raise ValueError(f"block_mask: expected one on query's device {query.device}; got {block_mask.kv_num_blocks.device}")
    if whole:
        return None
    return block_mask.mask_mod if block_mask in _WHOLE else _by_blocks(block_mask, of_mask)


def _by_blocks(block_mask: BlockMask, of_mask: tuple[int, ...]) -> Callable[..., Any]:
    """The mask of a ``BlockMask`` that anybody may have put together: its full blocks, and its mask_mod in its partial ones."""
    states = _STATES.get(block_mask)
    if states is None:
        states = _STATES[block_mask] = _states(block_mask)
    of_query, of_key = block_mask.BLOCK_SIZE
    by_batch, by_head = (size > 1 for size in of_mask)
    mask_mod = block_mask.mask_mod

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        state = states[b if by_batch else 0, h if by_head else 0, q_idx // of_query, kv_idx // of_key]
        return (state == 2) | ((state == 1) & mask_mod(b, h, q_idx, kv_idx))

    return mask


def _states(block_mask: BlockMask) -> torch.Tensor:
    """[B', H', rows of blocks, columns]: 2 for a full block, 1 for one that mask_mod decides, 0 for an empty one."""
    of_key = block_mask.BLOCK_SIZE[1]
    columns = -(-block_mask.seq_lengths[1] // of_key)
    states = torch.zeros(*block_mask.kv_num_blocks.shape, columns, dtype=torch.int8, device=block_mask.kv_num_blocks.device)
    listed = ((1, block_mask.kv_num_blocks, block_mask.kv_indices),
              (2, block_mask.full_kv_num_blocks, block_mask.full_kv_indices))
    for state, counts, indices in listed:
        if counts is None or indices is None:
            continue
        inside = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
        # Entries past the count may be anything; they go to one more column, which is cut off.
        at = torch.where(inside, indices.long(), columns).clamp(max=columns)
        wide = torch.cat((states, states.new_zeros(*states.shape[:-1], 1)), -1)
        states = wide.scatter(-1, at, torch.where(inside, state, 0).to(torch.int8))[..., :columns]
    return states


def create_block_mask(mask_mod: Callable[..., Any], B: int | None, H: int | None, Q_LEN: int, KV_LEN: int,
                      device: Any = None, BLOCK_SIZE: int | tuple[int, int] = _BLOCK, _compile: bool = False,
                      separate_full_blocks: bool = True, compute_dq_write_order: bool = False,
                      dq_kv_order: bool = True) -> BlockMask:
    """torch's ``create_block_mask``, without a tensor of the size of the scores: the blocks are told row by row.

    ``mask_mod`` is plain Python, (b, h, q_idx, kv_idx) -> bool. What it gives is torch's own ``BlockMask``. Tiles of the
    kernels follow from the call, whatever BLOCK_SIZE and the arguments after it say.
    """
    of_query, of_key = BLOCK_SIZE if isinstance(BLOCK_SIZE, (tuple, list)) else (BLOCK_SIZE, BLOCK_SIZE)
    device = _device(device)
    sizes, rows, columns = (B or 1, H or 1), -(-Q_LEN // of_query), -(-KV_LEN // of_key)
    some = torch.zeros(*sizes, rows, columns, dtype=torch.bool, device=device)
    every = torch.zeros_like(some)
    keep = functions.evaluated_mask(mask_mod, (*sizes, Q_LEN, KV_LEN), device)
    for row in range(rows):
        part = keep(slice(row * of_query, min((row + 1) * of_query, Q_LEN)))
        whole = torch.nn.functional.pad(part, (0, columns * of_key - KV_LEN, 0, of_query - part.shape[2]), value=False)
        count = whole.unflatten(-1, (columns, of_key)).sum((2, 4))
        some[:, :, row], every[:, :, row] = count > 0, count == of_query * of_key
    found = BlockMask.from_kv_blocks(*_listed(some & ~every), *_listed(every), BLOCK_SIZE=(of_query, of_key), mask_mod=mask_mod,
                                     seq_lengths=(Q_LEN, KV_LEN))
    _WHOLE.add(found)
    return found


def _listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many blocks of each row are True, their columns in rising order, then the others)."""
    columns = blocks.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    return blocks.sum(-1, dtype=torch.int32), columns.to(torch.int32)


def create_mask(mod_fn: Callable[..., Any], B: int | None, H: int | None, Q_LEN: int, KV_LEN: int,
                device: Any = None) -> torch.Tensor:
    """torch's ``create_mask``: the whole mask [B, H, Q_LEN, KV_LEN], True where a pair attends.

    Of a score function, that is where it does not make minus infinity of a score of 0.
    """
    extents, mask_mod = (B or 1, H or 1, Q_LEN, KV_LEN), mod_fn
    if len(inspect.signature(mod_fn).parameters) == 5:
        def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return mod_fn(q_idx * 0.0, b, h, q_idx, kv_idx) != -torch.inf

    return functions.evaluated_mask(mask_mod, extents, _device(device))(slice(0, Q_LEN))


def _device(device: Any) -> torch.device:
    """The device asked for, or as torch's functions have it the accelerator, if there is one."""
    if device is not None:
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator
