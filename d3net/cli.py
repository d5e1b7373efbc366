"""The command line: ``d3net demo``, ``d3net models``, ``d3net convert``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class CommandError(Exception):
    """The command cannot do its work here; the message says why and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns 0, 1 where it could not do its work, or 130 where it was interrupted; 2 is argparse's.
    """
    parser = argparse.ArgumentParser(prog="d3net", description="D3Net on fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_demo(commands)
    add_models(commands)
    add_convert(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except CommandError as error:
        print(f"d3net {options.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nd3net {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``d3net demo``."""
    parser = commands.add_parser(
        "demo",
        help="train a small separator on a real song, plain torch against fused",
        description="Trains a small D3Net-style separator on six seconds of a real song, through "
        "plain torch and through the fused kernels, and writes the separated stems, a picture "
        "and a table. Takes minutes on two cores; needs pip install 'd3net-kernels[demo]'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=folder, default=Path("demo_output"), help="folder to write to"
    )
    parser.add_argument("--steps", type=positive, default=150, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the crops")
    parser.set_defaults(run=demo)


def demo(options: argparse.Namespace) -> None:
    import d3net_kernels

    reason = d3net_kernels.why_not("cpu")
    if reason is not None:
        raise CommandError(f"the fused kernels are not available: {reason}")
    with command_errors(extra="demo"):
        from d3net.demo import run_demo

        make_folder("--out", options.out)
        with d3net_kernels.use_backend("cpu"):
            report = run_demo(options.out, options.steps, options.seed)
    print(report.table())
    print(f"The stems, the picture and this table are in {options.out.resolve()}")


def add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``d3net models``."""
    parser = commands.add_parser(
        "models",
        help="list the networks with their sizes",
        description="Lists every network with its trainable parameters, and its "
        "multiply-accumulates for one input of the shape in its row.",
    )
    parser.set_defaults(run=models)


def models(options: argparse.Namespace) -> None:
    from d3net.costs import table

    print(table())


def add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``d3net convert``."""
    parser = commands.add_parser(
        "convert",
        help="official .h5 weights to .safetensors, or back",
        description="Reads the official NNabla weights (.h5) and writes them as .safetensors, or "
        "the reverse. Every name and shape has to fit; what does not is listed, and nothing is "
        "written. Needs pip install 'd3net-kernels[h5]'.",
    )
    parser.add_argument("source", type=Path, help="file to read, .h5 or .safetensors")
    parser.add_argument("target", type=Path, help="file to write, .safetensors or .h5")
    parser.add_argument("--model", help="name of the network; recognised if not given")
    parser.set_defaults(run=convert)


def convert(options: argparse.Namespace) -> None:
    from d3net.convert import convert

    try:
        name = convert(options.source, options.target, options.model)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from error
    print(f"{options.target} has the weights of {name}")


@contextmanager
def command_errors(extra: str) -> Iterator[None]:
    """Turns a missing package of an extra, and trouble with files, into a CommandError."""
    try:
        yield
    except ModuleNotFoundError as error:
        advice = f"this command needs: pip install 'd3net-kernels[{extra}]'"
        raise CommandError(f"{error}; {advice}") from error
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}") from error


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a whole number from 1 on")
    return value


def make_folder(option: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(
            f"{option} is {path}: no folder can be made there ({error.strerror})"
        ) from error


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty name given, expected a folder")
    return Path(text)
