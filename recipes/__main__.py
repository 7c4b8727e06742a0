"""``python -m recipes`` is the command ``lightning-nna``."""

from recipes.command_line import main

if __name__ == "__main__":
    main()
