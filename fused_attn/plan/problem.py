"""One call as its schedules see it: tensors, description, target, and the tiles of every kernel."""

from typing import NamedTuple

import torch

from fused_attn.call.layout import keeps_residual, like, lse_like
from fused_attn.call.spec import AttentionSpec, OtherTensors, TileConfig
from fused_attn.kernels.launch import Call, UnfitTilesError
from fused_attn.plan import safer, tuned
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


class Problem(NamedTuple):
    """A call, and the ``device`` and ``arch`` that it is for: tensors without storage may stand for those of any card.

    ``call`` and ``roles`` are what ``lower`` makes of it; ``tiles``: configurations by kernel, in place of the tables' own, and
    None for a schedule that is not to be used. ``split``: how many keys a split of decoding has at least,
    None for as many as the tables say.
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
    tiles: safer.Tiles
    split: int | None

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec, others: OtherTensors,
           arch: str | None = None, tiles: safer.Tiles | None = None, device: torch.device | None = None) -> "Problem":
        """For the device of its tensors, for another one, or for ``arch``; ``tiles`` None for those that fit there."""
        device = q.device if device is None else device
        arch = arch_of(device) if arch is None else arch
        lowered = lower(q, k, spec, others, arch)
        tiles = safer.tiles(q, k, v, spec, others, arch) if tiles is None else tiles
        return cls(q, k, v, spec, others, device, arch, *lowered, tiles, tuned.split(device))

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
        if self.packed:  # no program writes the rows that belong to no sequence
            out.zero_()
        return out, lse_like(self.q, self.spec, self.packed)

    def config(self, kernel: Kernel) -> TileConfig:
        """The tiles of a kernel that takes pointers."""
        if (given := self.tiles.get(kernel)) is not None:
            return given
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
        if (given := self.tiles.get(schedule)) is not None:
            return given
        return self._fitted(choose_hopper(schedule, self.q.shape[3], self.v.shape[3], self.call.heavy))

    def gluon_backward_config(self) -> TileConfig:
        if (given := self.tiles.get("backward")) is not None:
            return given
        return choose_gluon_backward(self.q.shape[3], self.v.shape[3])

    def asked(self, which: tuned.Pass) -> str | None:
        """The schedule of a pass that the user asks for, or that was timed to be the quickest on this card, if any."""
        if self.spec.hopper != "auto":
            return self.spec.hopper
        return tuned.schedule(which, self.q, self.v, self.device)

    def gives_up(self, schedule: str) -> tuple[str, ...]:
        """The reason not to use a schedule whose kernel did not fit the card, if it is one."""
        return ("its kernel does not fit this card",) if self.tiles.get(schedule, True) is None else ()

    def step_down(self, unfit: UnfitTilesError) -> None:
        """Takes safer tiles for what did not fit, from the next problem of the kind on."""
        safer.step_down((self.q, self.k, self.v, self.spec, self.others, self.arch), unfit)

    def _fitted(self, config: TileConfig) -> TileConfig:
        loaded = self.call.loaded_bytes
        return fit_operands(config, loaded, self.q.dtype) if loaded else config
