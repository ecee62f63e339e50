"""`python -m longspan` is `longspan`; torchrun starts it so."""

from longspan.cli import main

if __name__ == "__main__":
    main()
