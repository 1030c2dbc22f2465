"""`python -m edgedisp`, which is what torchrun and accelerate launch start several times."""

from edgedisp.cli import main

if __name__ == "__main__":
    main()
