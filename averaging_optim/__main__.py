"""`python -m averaging_optim merge OUT FILE…`: average checkpoints from a shell."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from averaging_optim.post_hoc import decay_shares, merge

_EPILOG = """\
examples:
  python -m averaging_optim merge averaged.pt step8000.pt step9000.pt step10000.pt
  python -m averaging_optim merge averaged.safetensors run/checkpoint-* --shares sqrt
  python -m averaging_optim merge averaged.pt a.pt b.pt --shares 0.75,0.25 --key ema.module
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status."""
    options = _parser().parse_args(arguments)
    out = Path(options.out)
    try:
        if out.exists():
            raise ValueError(f"OUT must not exist yet, got {str(out)!r}. Remove it first.")
        merged = merge(options.files, _shares(options.shares, len(options.files)), key=options.key)
        _write(merged, out)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{out}: the average of {len(options.files)} checkpoints")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m averaging_optim", description=__doc__)
    command = parser.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "merge",
        help="average the weights of one model in several checkpoints",
        description="Average the weights of one model in several checkpoints.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("out", metavar="OUT", help="file to write: .safetensors, or of torch.save")
    command.add_argument(
        "files",
        metavar="FILE",
        nargs="+",
        help="checkpoint, the earlier first: a file of torch.save or safetensors, or a folder of "
        "torch.distributed.checkpoint or save_pretrained",
    )
    command.add_argument(
        "--shares",
        help="of each checkpoint, as 0.5,0.3,0.2; or linear, cosine or sqrt, as though the "
        "learning rate had decayed so; by default all equal",
    )
    command.add_argument("--key", help="where the weights are in each checkpoint, such as model")
    return parser


def _shares(shares: str | None, n: int) -> list[float] | None:
    if shares is None:
        return None
    if shares[:1].isalpha():
        return decay_shares(shares, n)
    return [float(share) for share in shares.split(",")]


def _write(merged: dict[str, Any], out: Path) -> None:
    """Write a file that is whole or not there, whenever the process is stopped."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.suffix == ".safetensors":
            from safetensors.torch import save_file

            if others := [name for name, each in merged.items() if not isinstance(each, Tensor)]:
                raise ValueError(f"OUT must not be of safetensors, which can't hold {others[0]!r}.")
            save_file({name: each.contiguous() for name, each in merged.items()}, temporary)
        else:
            torch.save(merged, temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.link(temporary, out)  # unlike os.replace, it refuses if there is one by now
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
