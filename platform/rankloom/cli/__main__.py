"""`python -m rankloom.cli`: the command line where no `rankloom` script is installed, as on a cluster's workers."""

from rankloom.cli import main

main()
