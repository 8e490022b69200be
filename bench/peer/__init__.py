"""The parts of `bench/peers.py`: what is installed, which models, one measurement each, the report."""
