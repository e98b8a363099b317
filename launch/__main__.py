"""`python -m polygraft.launch` is the command `polygraft`."""

from polygraft.launch.main import main

main()
