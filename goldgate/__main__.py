"""`python -m goldgate` is `goldgate`."""

from goldgate.cli import main

main()
