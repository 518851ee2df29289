"""`python -m tutti`: the same as the command `tutti`, for torchrun."""

from tutti.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
