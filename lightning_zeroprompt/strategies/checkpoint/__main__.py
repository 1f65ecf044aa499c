# SPDX-License-Identifier: Apache-2.0
"""``python -m lightning_zeroprompt.strategies.checkpoint FOLDER FILE``: make one file of a checkpoint folder."""

import argparse
import sys
from collections.abc import Sequence

from lightning_zeroprompt.strategies.checkpoint.consolidate import consolidate_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse arguments and convert; errors go to stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m lightning_zeroprompt.strategies.checkpoint",
        description="Make one Lightning checkpoint file of the folder that strategy=zeropp saved.",
    )
    parser.add_argument("folder", help="checkpoint folder")
    parser.add_argument("file", help="where to write the .ckpt file")
    parser.add_argument(
        "--no-weights-only",
        action="store_true",
        help="also load Python objects that you stored in the checkpoint; only for folders that you trust",
    )
    given = parser.parse_args(arguments)
    try:
        consolidate_checkpoint(given.folder, given.file, weights_only=not given.no_weights_only)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
