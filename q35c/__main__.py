"""Run the command line: `python -m q35c`."""

from q35c.cli import main

if __name__ == "__main__":
    main(prog_name="q35c")
