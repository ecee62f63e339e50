"""`longspan`, and `python -m longspan`, which torchrun starts. Ctrl-C is heard before anything heavy is imported."""

from longspan.foundation.interrupts import end_before_anything, hear_interrupts


def main() -> None:
    """See `longspan.cli.main`."""
    try:
        hear_interrupts()
        from longspan.cli import main as run
    except KeyboardInterrupt:
        end_before_anything()
    run()


if __name__ == "__main__":
    main()
