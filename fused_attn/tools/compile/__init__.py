"""Compiling kernels for cards that are not here, and reading the machine code: ``offline`` compiles, ``sass`` reads,
``profile`` says what the code keeps busy, ``matrix`` does it for every feature on every card."""
