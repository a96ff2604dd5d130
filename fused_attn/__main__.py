"""``python -m fused_attn``."""

from fused_attn.cli import main

raise SystemExit(main())
