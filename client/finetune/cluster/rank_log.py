"""Runs inside a training pod (as text, through exec): prints a rank's log files, one per start, and follows them.

Arguments: folder of the logs, rank, bytes that the reader already has, ``follow`` or ``once``.
Standard library only: the pod need not have this package.
"""

import os
import sys
import time


def starts(folder: str, rank: str) -> list[str]:
    """The log files of this rank, oldest start first."""
    numbers = sorted(int(name[8:]) for name in os.listdir(folder) if name.startswith("attempt-") and name[8:].isdigit())
    paths = [os.path.join(folder, f"attempt-{number}", f"rank-{rank}.log") for number in numbers]
    return [path for path in paths if os.path.exists(path)]


def main(folder: str, rank: str, skip: int, follow: bool) -> None:
    read: dict[str, int] = {}
    while True:
        for path in starts(folder, rank) if os.path.isdir(folder) else ():
            with open(path, "rb") as file:
                file.seek(read.get(path, 0))
                content = file.read()
            read[path] = read.get(path, 0) + len(content)
            known = min(skip, len(content))
            skip -= known
            sys.stdout.buffer.write(content[known:])
        sys.stdout.buffer.flush()
        if not follow:
            return
        time.sleep(0.3)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "follow")
