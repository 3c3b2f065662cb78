"""``python -m sparsepass``: the command line."""

from sparsepass.cli import main

if __name__ == "__main__":
    main()
