"""`python -m train_loop` is the same as `train-loop`."""

from train_loop.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
