"""The support matrix, from the list of features: docs/support-matrix.md, and the table between two markers in README.md.

    PYTHONPATH=.:tests python -m support.matrix
"""

from pathlib import Path

from support.features import FAMILIES, FEATURES, Feature
from support.seconds import LACK_SECOND, TORCH_LACKS

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "support-matrix.md", ROOT / "README.md"
START, END = "<!-- support matrix -->\n", "<!-- end -->\n"


def gradients(feature: Feature) -> str:
    return "q, k, v" + (f", {feature.gradients}" if feature.gradients else "")


def derivatives(feature: Feature) -> tuple[str, ...]:
    """Of the columns JVP, VJP∘VJP, JVP∘VJP, VJP∘JVP and vmap; torch has none of them for nested tensors."""
    if feature.name == TORCH_LACKS:
        return ("-",) * 5
    second = "error" if feature.name in LACK_SECOND else "✓"
    return "✓", second, second, second, "✓"


def page() -> str:
    lines = [
        "# Support matrix",
        "",
        "Printed from `tests/support/features.py` by `PYTHONPATH=.:tests python -m support.matrix`. Every row is tested",
        "alone, and every pair of rows that can meet in one call (with one bias, one score function and one mask function a",
        "call) meets in one: values and gradients against the reference in fp64, through the output and the LSE, under the",
        "memory guard, and fp16, bf16 and fp32 within the limits of [numerics.md](numerics.md).",
        "",
        "The columns of derivatives are the kernels': of the forward by forward mode (JVP), and the three ways to a second",
        "derivative, each by every tensor that has a gradient, tested against the reference in fp64; `vmap` goes over all of",
        "them. What they lack is an error by name, and `backend=\"blocked\"` has it ([derivatives.md](derivatives.md)).",
        "",
        "| | forward | gradient of | dtypes | packed | JVP | VJP∘VJP | JVP∘VJP | VJP∘JVP | vmap | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for feature in FEATURES:
        packed = "✓" if feature.packed else "-"
        told = " | ".join(derivatives(feature))
        lines.append(f"| {feature.title} | ✓ | {gradients(feature)} | {feature.dtypes} | {packed} | {told} | {feature.note} |")
    return "\n".join([*lines, ""])


def short() -> str:
    """The same by families, for the README."""
    lines = ["| | | gradient of |", "|---|---|---|"]
    for family in FAMILIES:
        members = [feature for feature in FEATURES if feature.family == family]
        named = dict.fromkeys(feature.gradients for feature in members if feature.gradients)
        lines.append(f"| {family} | {'; '.join(feature.title for feature in members)} | {', '.join(('q, k, v', *named))} |")
    return "\n".join([*lines, ""])


def with_table(readme: str) -> str:
    before, _, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md: expected {START.strip()} and {END.strip()}")
    return f"{before}{START}{short()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
