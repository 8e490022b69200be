"""Compile a checkpoint directory, and read what the file says about itself without running any of it.

python examples/compile_and_inspect.py CHECKPOINT model.q35c
"""

import sys

from q35c.artifact import read_artifact
from q35c.compile import compile_model
from q35c.demo import CHECKPOINT

source = sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT
output = sys.argv[2] if len(sys.argv) > 2 else "demo.q35c"
report = compile_model(source, output, precision="w4", context=512)
print(f"{report.path}: {report.bytes / 2**20:.1f} MiB in {report.seconds:.1f} s")
for stage, seconds in report.stages.items():
    print(f"  {seconds:6.2f} s  {stage}")
with read_artifact(output) as artifact:
    manifest = artifact.manifest
    print(f"{len(manifest.kernels)} kernels for {manifest.target.name}, {manifest.precision}")
    for entry in manifest.entries:
        print(
            f"  {entry.name:8} up to {entry.sequences} x {entry.tokens} tokens, {len(entry.steps)} kernel calls"
        )
    print(f"a sequence's state: {manifest.memory.state_per_sequence / 2**20:.1f} MiB")
