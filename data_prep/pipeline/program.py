"""Converters as programs: what the user can mend is one message, not a traceback.

    if __name__ == "__main__":
        run_program(main)

`main` itself raises, for tests and for whoever calls it as a library. Any other error is one of the
program, and its traceback is what we need to mend it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable


def run_program(main: Callable[[], None]) -> None:
    """Call `main`; a ValueError or OSError is its message on stderr and exit code 1, Ctrl-C code
    130."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is missing", file=sys.stderr)
        # 128 + SIGINT, as shells and schedulers expect of a program that was interrupted.
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
