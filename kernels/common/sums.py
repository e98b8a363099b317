"""How long a sum is that a library may split. Torch-free."""

LONG = 512  # terms; with AMX oneDNN splits sums of 576 over threads when there are few of them
