"""`python -m polygraft.cluster.launch` is the command `polygraft`."""

from polygraft.cluster.launch.main import main

main()
