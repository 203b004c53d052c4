"""The command line of the workbench: `python build.py --help`.

Needs only Python 3.10 or newer. Finds or creates the environment described by `requirements.txt`
(`lib.suite.bootstrap`), restarts itself there and hands over to `lib.suite.cli.command`. Defines no command itself.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.stderr.write("build.py: Python 3.10 or newer is needed, this is %d.%d\n" % sys.version_info[:2])  # noqa: UP031
    sys.exit(2)

from lib.suite import bootstrap

if __name__ == "__main__":
    try:
        bootstrap.enter()
    except KeyboardInterrupt:  # while another process sets .venv up
        sys.stderr.write("\nbuild.py: stopped\n")
        sys.exit(130)
    from lib.suite.cli import command

    sys.exit(command.main(sys.argv[1:]))
