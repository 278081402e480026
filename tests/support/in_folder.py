"""in_folder.py FOLDER COMMAND [arguments]: runs `r1engine COMMAND ...` in a folder, with nothing on its stdin."""

import os
import sys

if __name__ == "__main__":
    os.chdir(sys.argv.pop(1))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from r1engine.cli import main

    main()
