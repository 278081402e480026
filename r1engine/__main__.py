"""`python -m r1engine ...` is the console script; under torchrun: torchrun -m r1engine pipeline CONFIG."""

from r1engine.cli import main

if __name__ == "__main__":
    main()
