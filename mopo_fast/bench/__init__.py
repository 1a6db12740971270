"""How fast the kernels are, beside other ways and beside the machine's limits."""
