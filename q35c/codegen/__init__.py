"""From scheduled graphs to machine code: targets, kernels, lowering, weight packing, building."""
