"""`python -m sparseft`: the doctor's report; with arguments, the command line."""

import sys

from sparseft.cli import app

app(sys.argv[1:] or ["doctor"], prog_name="sparseft")
