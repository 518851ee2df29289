"""Check the wording of the project: no machine's paths, no issue numbers, no package hosts, and no docstring that
begins with a relative clause.

Reads every tracked text file except data and licenses. Prints each hit as path:line and exits 1 if there is any.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FORBIDDEN = {
    "a path of a particular machine": r"(?<![\w.$}])/(?:work|root|home)/[\w.]|\.\./shared\b",
    "a package host": r"\b(?:pypi|npmjs|debian)\.org\b|\bpythonhosted\b",
    "a docstring that begins neither with a verb nor with a noun": r'^\s*"{3}(?:What|Whether|Have|How|The same)\b',
    "an issue number": r"\b(?:issue|ticket|pull request)s? #?\d",
}
SKIPPED = ("data/", "LICENSE")


def main() -> int:
    root = Path(__file__).parents[1]
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    hits = 0
    for name in filter(None, tracked.split("\0")):
        if name.startswith(SKIPPED) or not (root / name).is_file():
            continue
        for number, line in enumerate((root / name).read_text(errors="ignore").splitlines(), start=1):
            for kind, pattern in FORBIDDEN.items():
                if re.search(pattern, line, re.IGNORECASE):
                    hits += 1
                    print(f"{name}:{number}: {kind}: {line.strip()}")
    print(f"wording: {hits} to change")
    return bool(hits)


if __name__ == "__main__":
    sys.exit(main())
