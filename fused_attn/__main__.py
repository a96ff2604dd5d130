"""``python -m fused_attn``: the command ``fused-attn``."""

from fused_attn.tools.cli import main

raise SystemExit(main())
