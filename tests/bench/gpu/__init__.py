"""What a GPU makes of every shipped recipe: the CPU's losses, lower precisions, resuming, rate and memory.

`python -m tests.bench.gpu` needs one GPU, Python >= 3.11, torch >= 2.11, timm and pydantic; no data, but for what
`--crops` adds.
"""
