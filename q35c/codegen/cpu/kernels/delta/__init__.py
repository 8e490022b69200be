"""The gated delta net: convolution, scan and single step."""
