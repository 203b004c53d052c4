"""The command line of the workbench: `python build.py --help`.

Needs nothing but Python 3.10 or newer. Finds or makes the environment that `requirements.txt` asks for
(`lib.suite.setup`), starts itself there and hands over to `lib.suite.command`. Knows no command itself.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("build.py: Python 3.10 or newer is needed, this is %d.%d" % sys.version_info[:2])  # noqa: UP031

from lib.suite import setup

if __name__ == "__main__":
    setup.enter()
    from lib.suite import command

    sys.exit(command.main(sys.argv[1:]))
