"""Packaging: a pure-Python wheel, built without a compiler and without importing torch."""

import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search(r'^__version__ = "(.+)"$', Path("fused_attn/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)

# The kernels live in kernels/ and install as fused_attn.kernels: a top-level package named `kernels` would shadow Hugging
# Face's. The directory has no __init__.py for the same reason, so find_packages does not see it.
KERNELS = sorted({f"fused_attn.{'.'.join(file.parent.parts)}" for file in Path("kernels").rglob("*.py")})

TRITON = [
    "triton>=3.6; platform_system == 'Linux'",  # the kernels' compiler; elsewhere it ships under other names
    "numpy",  # Triton's CPU interpreter computes with it and does not ask for it
]
CLI = [
    "rich",  # tables and progress bars of the `fused-attn` command
]
EXAMPLES = [
    "rich",  # progress bars
    "matplotlib",  # plots of what the examples find
]
BENCH = [
    "rich",  # progress bars
    "matplotlib",  # plots of the results
    "pytest-benchmark",  # overhead of a call, measured beside the tests
]
TRANSFORMERS = [
    "transformers>=5.4,<5.25",  # fused_attn.integrations.transformers plugs into its attention interface; both ends are tested
]
TEST = [
    "pytest",  # runs the suite
    "pytest-xdist",  # ... on several cores
    "pytest-timeout",  # ... and stops a test that hangs
    "pytest-benchmark",  # overhead of a call
    "expecttest",  # torch's own test database imports it
    "hypothesis",  # shapes and windows nobody thought of
    "setuptools>=77",  # tests build the wheel offline
    "ruff",  # lint
    "mypy",  # types
    "import-linter",  # one-way imports
    "rich",  # tests run the command line
    "matplotlib",  # tests run the plots
    *TRANSFORMERS,  # tests compare its models, of random weights
]

setup(
    name="fused-attn",
    version=VERSION[1],
    description="Fused attention in Triton: every feature forward and backward, proven against a plain PyTorch reference",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["fused_attn", "fused_attn.*"]), *KERNELS],
    package_dir={"fused_attn.kernels": "kernels"},
    package_data={"fused_attn": ["py.typed", "versions.json"], "fused_attn.emulator": ["machine/*"]},
    include_package_data=False,
    install_requires=[
        "torch>=2.10",  # tensors, autograd, torch.library; which build of it is the user's choice
    ],
    extras_require={"triton": TRITON, "cli": CLI, "examples": EXAMPLES, "bench": BENCH, "transformers": TRANSFORMERS,
                    "test": TEST},
    entry_points={"console_scripts": ["fused-attn = fused_attn.tools.cli:main"]},
)
