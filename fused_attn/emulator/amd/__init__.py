"""AMD's compiled kernels on a CPU: the assembly text is executed, instruction by instruction, on arrays of lanes."""
