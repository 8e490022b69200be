"""The command line. Commands are thin: each calls one function that is as easy to call from Python.

Nothing here imports torch, transformers or tvm before a command that compiles has begun.
"""

from __future__ import annotations

import os

import click

from q35c import __version__
from q35c.cli.bench import bench_command
from q35c.cli.chat import chat_command
from q35c.cli.compile import compile_command, export_command
from q35c.cli.demo import demo_command
from q35c.cli.generate import generate_command
from q35c.cli.group import DEBUG_VARIABLE, ReportingGroup
from q35c.cli.inspect import inspect_command, verify_file_command
from q35c.cli.measure import perplexity_command, tokenize_command
from q35c.cli.serve import serve_command
from q35c.cli.verify import verify_command


@click.group(cls=ReportingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="q35c")
@click.option("--debug", is_flag=True, help=f"Show tracebacks (also: {DEBUG_VARIABLE}=1).")
def main(debug: bool) -> None:
    """Compile Qwen3.5 models ahead of time into one file, and generate text from it.

    \b
    A first look, without downloading a model:
      q35c demo
    A model of your own:
      q35c compile ./Qwen3.5-0.8B -o model.q35c
      q35c generate model.q35c "The house was" --max-new-tokens 64
      q35c chat model.q35c
      q35c serve model.q35c

    Exit codes: 0 done, 1 the input cannot be used, 2 a bug of q35c, 130 interrupted.
    """
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


for _command in (
    compile_command,
    generate_command,
    chat_command,
    serve_command,
    demo_command,
    bench_command,
    tokenize_command,
    perplexity_command,
    inspect_command,
    verify_file_command,
    verify_command,
    export_command,
):
    main.add_command(_command)
