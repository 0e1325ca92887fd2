"""`python -m sitdist`, for launchers that start modules."""

from sitdist.cli.main import main

if __name__ == "__main__":
    main()
