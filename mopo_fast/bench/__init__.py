"""Speed of the kernels, beside other implementations and the limits of the machine."""
