"""`q35c chat`: a conversation at the terminal, or line by line over pipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from q35c.cli.options import model_options, sampling_options
from q35c.cli.talk import Talk
from q35c.cli.talk_commands import describe_answer, run_command
from q35c.cli.terminal import Terminal, line_history
from q35c.errors import InputError


@click.command("chat")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--system", default="", help="What the system says first.")
@click.option(
    "--think", type=click.Choice(["on", "off"]), help="Let the model think first [its template]."
)
@click.option("--tools", type=click.Path(path_type=Path), help="JSON schemas of tools to offer.")
@click.option("--load", type=click.Path(path_type=Path), help="Go on from a saved conversation.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    help="Directory of this conversation: go on from what it holds, and keep there what is said and computed.",
)
@click.option(
    "-n",
    "--max-new-tokens",
    type=int,
    default=-1,
    show_default=True,
    help="Tokens of an answer at most; -1: until the context is full.",
)
@sampling_options
@model_options
@click.option("--quiet", is_flag=True, help="No figures after answers.")
def chat_command(
    artifact: Path,
    think: str | None,
    tools: Path | None,
    load: Path | None,
    resume: Path | None,
    threads: int | None,
    device: str | None,
    context: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Talk with a model. Over a pipe every line is a message, and only answers go to standard output.

    Ctrl-C stops an answer, Ctrl-D or /exit ends; /help lists the commands. What an earlier turn computed is used
    again, and an answer does not depend on whether it was.

    \b
    Examples:
      q35c chat model.q35c
      q35c chat model.q35c --system "Answer briefly." --think off --temperature 0
      q35c chat model.q35c --resume trip        # and again tomorrow
      echo "Why is the sky blue?" | q35c chat model.q35c --quiet
    """
    import q35c

    terminal = Terminal()
    with q35c.load(artifact, threads, context=context, device=device) as model:
        model.apply_chat_template(
            [{"role": "user", "content": "?"}]
        )  # refuses what has no template
        talk = Talk(model, thinking=None if think is None else think == "on", **options)
        if tools is not None:
            talk.load_tools(tools)
        try:
            if resume is not None:
                talk.resume(resume)
            if load is not None:
                talk.load(load)
            if terminal.is_interactive:
                terminal.tell(greeting(artifact.name, talk))
            with line_history(terminal.is_interactive):
                run_talk(talk, terminal, quiet)
        finally:
            talk.close()


def greeting(name: str, talk: Talk) -> str:
    """Return the first line that a terminal shows."""
    earlier = len(talk.history())
    resumed = f"{earlier} messages so far; " if earlier else ""
    return f"{name}: context {talk.model.context} tokens; {resumed}/help lists commands"


def run_talk(talk: Talk, terminal: Terminal, is_quiet: bool = False) -> None:
    """Read, answer, until the user ends it. What goes wrong ends it only where nobody sits at a terminal."""
    is_over = False
    while not is_over:
        try:
            answer_due(talk, terminal, is_quiet)  # a conversation that was loaded may wait for it
            is_over = not take_turn(talk, terminal)
        except EOFError:  # a command that ends
            is_over = True
        except InputError as error:
            if not terminal.is_interactive:
                raise
            terminal.tell(f"error: {error}")


def take_turn(talk: Talk, terminal: Terminal) -> bool:
    """Read what the user says, or a command; return whether there may be more. Raises InputError."""
    calls = talk.open_calls
    line = terminal.read(f"{calls[0]['function']['name']} = " if calls else "> ")
    if line is None:
        return False
    if line.startswith("/") and not line.startswith("//"):
        terminal.tell(run_command(talk, line))
    elif line.strip() or calls:
        talk.say(line.removeprefix("/") if line.startswith("//") else line)
    return True


def answer_due(talk: Talk, terminal: Terminal, is_quiet: bool) -> None:
    """Answer, if the user has said something. Raises InputError."""
    if not talk.is_due:
        return
    try:
        answer = talk.answer(terminal.write)
    finally:
        terminal.end()
    if answer is not None and not is_quiet:
        terminal.tell(describe_answer(answer))
