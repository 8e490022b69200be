"""`q35c serve`: the model over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from q35c.cli.options import machine_options
from q35c.cli.streams import note, say

_LEVELS = ("debug", "info", "warning", "error")


@click.command("serve")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. One that other machines reach needs a key.")  # fmt: skip
@click.option("--port", type=int, default=8080, show_default=True, help="0: any that is free.")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="File with the API keys, one a line [the key in Q35C_API_KEY, else none is asked for].")  # fmt: skip
@click.option("--insecure", is_flag=True, help="Let other machines in without a key.")
@click.option("--served-model-name", "names", multiple=True, help="Name that requests give the model; may be given several times, '*' accepts any [the file's name].")  # fmt: skip
@machine_options
@click.option(
    "--context",
    type=int,
    help="Most tokens of a conversation, up to the model's own limit [as compiled].",
)
@click.option("--batch", type=int, help="Answers that are generated together [as compiled].")
@click.option("--max-queue", type=int, default=64, show_default=True, help="Requests that may wait; more are told to come back.")  # fmt: skip
@click.option("--queue-timeout", "queue_seconds", type=float, default=300.0, show_default=True, help="Seconds that a request may wait.")  # fmt: skip
@click.option("--max-stall", type=float, default=200.0, show_default=True, help="Milliseconds that running answers may pause while a prompt is read.")  # fmt: skip
@click.option("--prefix-cache", default="25%", show_default=True, help="Memory for the beginnings of prompts: 2GiB, a share of what is free, or 0.")  # fmt: skip
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Directory that keeps them over restarts; what users wrote can be read there.")  # fmt: skip
@click.option("--reasoning-field", type=click.Choice(("reasoning_content", "reasoning")), default="reasoning_content", show_default=True, help="What thinking is called in chat answers.")  # fmt: skip
@click.option("--allowed-hosts", multiple=True, help="Name of this server in a Host header, beside the local ones; may be given several times, '*' accepts any.")  # fmt: skip
@click.option("--cors-origin", "cors_origins", multiple=True, help="Web page that may use the server, as https://page.example; may be given several times.")  # fmt: skip
@click.option("--allow-videos", is_flag=True, help="Also decode clips that requests hold, which libav does in this process.")  # fmt: skip
@click.option("--drain", "drain_seconds", type=float, default=30.0, show_default=True, help="Seconds that running answers have left after the signal to end.")  # fmt: skip
@click.option("--log-level", type=click.Choice(_LEVELS), default="info", show_default=True, help="What goes to standard error: info is a line for each request.")  # fmt: skip
@click.option("--warm-up", is_flag=True, help="In idle times, compute what the next turn of a conversation will begin with.")  # fmt: skip
@click.option("--log-prompts", is_flag=True, help="Also log what users write.")
def serve_command(artifact: Path, **options: Any) -> None:
    """Serve ARTIFACT to clients of OpenAI's and Anthropic's interfaces.

    \b
    POST /v1/chat/completions  /v1/completions  /v1/responses  /v1/messages
         /v1/messages/count_tokens  /tokenize  /detokenize
    GET  /v1/models  /health  /metrics

    The URL goes to standard output once requests are answered. A first SIGTERM or Ctrl-C lets running answers
    end, a second one does not.

    \b
    Examples:
      q35c serve model.q35c
      q35c serve model.q35c --host 0.0.0.0 --api-key-file keys.txt --allowed-hosts llm.example
      curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "model", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    import logging

    from q35c.serve.run import Limits, default_names, read_keys, serve
    from q35c.serve.settings import Settings

    level = options["log_level"].upper()
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # the rest is not about requests
    settings = Settings(
        keys=read_keys(options["api_key_file"]),
        names=default_names(artifact, options["names"]),
        reasoning_field=options["reasoning_field"],
        allowed_hosts=options["allowed_hosts"],
        cors_origins=options["cors_origins"],
        queue_seconds=options["queue_seconds"],
        log_prompts=options["log_prompts"],
        warm_up=options["warm_up"],
        allow_videos=options["allow_videos"],
    )
    limits = Limits(
        context=options["context"],
        batch=options["batch"],
        threads=options["threads"],
        device=options["device"],
        max_queue=options["max_queue"],
        max_stall=options["max_stall"] / 1000,
        prefix_cache=options["prefix_cache"],
        cache_dir=options["cache_dir"],
    )
    serve(
        artifact,
        settings,
        limits,
        host=options["host"],
        port=options["port"],
        drain_seconds=options["drain_seconds"],
        is_insecure=options["insecure"],
        on_ready=lambda url: say(f"serving {settings.names[0]} at {url}"),
        on_warning=lambda text: note(f"warning: {text}"),
    )
