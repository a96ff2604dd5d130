"""torch's layers in classes of one's own, with code around torch's: what may not be changed into anything else."""

from torch import nn


class OwnLayer(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return super().forward(2 * src, *args, **kwargs)


class OwnEncoder(nn.TransformerEncoder):
    def forward(self, src, *args, **kwargs):
        return super().forward(src.cos(), *args, **kwargs)
