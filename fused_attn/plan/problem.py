"""One call as its schedules see it: tensors, description, target, and the tiles of every kernel."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch

from fused_attn.call.layout import keeps_residual, like, lse_like
from fused_attn.call.spec import AttentionSpec, OtherTensors, TileConfig
from fused_attn.kernels.launch import Call
from fused_attn.plan import tuned
from fused_attn.plan.lower import lower
from fused_attn.plan.tiles import (
    Kernel,
    choose,
    choose_additive,
    choose_combine,
    choose_fused,
    choose_gluon_backward,
    choose_hopper,
    choose_splits,
    fit_operands,
)
from fused_attn.targets import arch_of

SHIPPED: Mapping[str, TileConfig] = MappingProxyType({})  # no tiles but those of the tables


class Problem(NamedTuple):
    """A call, and the ``device`` and ``arch`` that it is for: tensors without storage may stand for those of any card.

    ``call`` and ``roles`` are what ``lower`` makes of it; ``tiles``: configurations by kernel, in place of the tables' own.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    spec: AttentionSpec
    others: OtherTensors
    device: torch.device
    arch: str
    call: Call
    roles: tuple[tuple[int, int] | None, ...]
    tiles: Mapping[str, TileConfig]

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors,
           arch: str | None = None, tiles: Mapping[str, TileConfig] = SHIPPED,
           device: torch.device | None = None) -> "Problem":
        """For the device of its tensors, for another one, or for ``arch``."""
        device = q.device if device is None else device
        arch = arch_of(device) if arch is None else arch
        lowered = lower(q, k, spec, others, arch)
        return cls(q, k, v, spec, others, device, arch, *lowered, tiles)

    @property
    def packed(self) -> bool:
        return self.others.cu_q is not None

    @property
    def residual(self) -> bool:
        """Whether the output is kept in twice its digits."""
        return keeps_residual(self.spec, self.others)

    def outputs(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [B, H, Nq, Dv], lse as ``layout.lse_like`` makes it), to be filled."""
        out = like(self.q, self.v.shape[3], dtype)
        if self.packed:  # rows of no sequence are no program's
            out.zero_()
        return out, lse_like(self.q, self.spec, self.packed)

    def config(self, kernel: Kernel) -> TileConfig:
        """The tiles of a kernel that takes pointers."""
        if kernel in self.tiles:
            return self.tiles[kernel]
        dim, dim_v = self.q.shape[3], self.v.shape[3]
        if kernel == "combine":
            return choose_combine(dim_v)
        if kernel == "splits":
            return self._fitted(choose_splits(self.call.n_queries, dim, dim_v, self.q.dtype, self.arch))
        if self.call.extras.additive:
            return choose_additive(kernel, dim, self.arch)
        config = choose(kernel, dim, dim_v, self.q.dtype, self.arch, self.call.heavy)
        return self._fitted(config if self.call.heavy else tuned.instead(config, kernel, self.q, self.v, self.device))

    def fused_config(self) -> TileConfig | None:
        """The tiles of the backward that is one kernel, or None where registers have no room for it."""
        if "fused" in self.tiles:
            return self.tiles["fused"]
        config = choose_fused(self.q.shape[3], self.v.shape[3], self.q.dtype, self.arch)
        return None if config is None else tuned.instead(config, "fused", self.q, self.v, self.device)

    def hopper_config(self, schedule: str) -> TileConfig:
        """The tiles of the forward by one of Hopper's schedules above pointers."""
        if "forward" in self.tiles:
            return self.tiles["forward"]
        return self._fitted(choose_hopper(schedule, self.q.shape[3], self.v.shape[3], self.call.heavy))

    def gluon_backward_config(self) -> TileConfig:
        if "backward" in self.tiles:
            return self.tiles["backward"]
        return choose_gluon_backward(self.q.shape[3], self.v.shape[3])

    def _fitted(self, config: TileConfig) -> TileConfig:
        loaded = self.call.loaded_bytes
        return fit_operands(config, loaded, self.q.dtype) if loaded else config
