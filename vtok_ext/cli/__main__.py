"""`python -m vtok_ext.cli` is `vtok`."""

from . import main

if __name__ == "__main__":
    main()
